"""Write a model folder that loads anywhere with `trust_remote_code=True`, without this package."""

import json
import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from .modeling import configuration_drmm, image_processing_drmm, modeling_drmm


# File of the folder -> what its `auto_map` says.
_AUTO_MAPS = {
    "config.json": {
        "AutoConfig": "configuration_drmm.DrmmConfig",
        "AutoModel": "modeling_drmm.DrmmModel",
        "AutoModelForObjectDetection": "modeling_drmm.DrmmForObjectDetection",
    },
    "preprocessor_config.json": {"AutoImageProcessor": "image_processing_drmm.DrmmImageProcessor"},
}


def save_bundle(
    model: modeling_drmm.DrmmForObjectDetection,
    processor: image_processing_drmm.DrmmImageProcessor,
    folder: str | Path,
) -> list[Path]:
    """Save a model, its processor and the code of both.

    The folder holds what `save_pretrained` writes after `register_for_auto_class`, but no class and no config object
    is changed: later `save_pretrained` calls still write plain folders.

    Args:
        model: Saved as safetensors with its config.
        processor: Saved as `preprocessor_config.json`.
        folder: Made if need be; files of the same names are overwritten.

    Returns:
        The code files in the folder.
    """
    folder = Path(folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for name, auto_map in _AUTO_MAPS.items():
        settings = json.loads((folder / name).read_text(encoding="utf-8"))
        text = json.dumps(settings | {"auto_map": auto_map}, indent=2, sort_keys=True) + "\n"
        (folder / name).write_text(text, encoding="utf-8")

    sources = set()
    for module in (configuration_drmm, modeling_drmm, image_processing_drmm):
        sources |= {module.__file__, *get_relative_import_files(module.__file__)}
    return [Path(shutil.copy(source, folder)) for source in sorted(sources)]
