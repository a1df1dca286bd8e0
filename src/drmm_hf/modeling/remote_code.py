"""What makes a saved folder load where this package is not installed: the code, and where it is in the code."""

import json
import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files


# File of a folder -> what its `auto_map` says.
AUTO_MAPS = {
    "config.json": {
        "AutoConfig": "configuration_drmm.DrmmConfig",
        "AutoModel": "modeling_drmm.DrmmModel",
        "AutoModelForObjectDetection": "modeling_drmm.DrmmForObjectDetection",
    },
    "preprocessor_config.json": {"AutoImageProcessor": "image_processing_drmm.DrmmImageProcessor"},
}
# Versions that the code is for: from the oldest that is tested to the next one that may break it. timm is needed by
# its backbones only.
REQUIREMENTS = {"torch": ">=2.9,<3", "torchvision": ">=0.24,<1", "transformers": ">=5.23,<6", "timm": ">=1.0.15,<2"}


def add_code(folder: str | Path) -> list[Path]:
    """Add the code of what a folder holds, and name its classes in the settings.

    Args:
        folder (`str` or `Path`): Written by `save_pretrained` of a model, a processor, or both.

    Returns:
        `list[Path]`: The code files in the folder.
    """
    folder, here, sources = Path(folder), Path(__file__).parent, set()
    for name, auto_map in AUTO_MAPS.items():
        if not (folder / name).is_file():
            continue
        settings = json.loads((folder / name).read_text(encoding="utf-8"))
        text = json.dumps(settings | {"auto_map": auto_map}, indent=2, sort_keys=True) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
        for module in {entry.split(".")[0] for entry in auto_map.values()}:
            source = str(here / f"{module}.py")
            sources |= {source, *get_relative_import_files(source)}
        if name == "config.json":
            text = "".join(f"{package}{versions}\n" for package, versions in requirements(settings).items())
            (folder / "requirements.txt").write_text(text, encoding="utf-8")
    return [Path(shutil.copyfile(source, folder / Path(source).name)) for source in sorted(sources)]


def requirements(settings: dict) -> dict[str, str]:
    """Return the packages that a model needs, with their versions.

    Args:
        settings (`dict`): Content of its `config.json`.

    Returns:
        `dict[str, str]`: Range of versions by name.
    """
    uses_timm = (settings.get("backbone_config") or {}).get("model_type") == "timm_backbone"
    return {name: versions for name, versions in REQUIREMENTS.items() if name != "timm" or uses_timm}


class PublishedWithCode:
    """Let `push_to_hub`, and `save_pretrained(push_to_hub=True)`, upload the code along.

    Classes that are registered for it (`register_for_auto_class`) would do so, but they write the code into every
    folder that they save.
    """

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        add_code(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)


__all__ = ["AUTO_MAPS", "REQUIREMENTS", "PublishedWithCode", "add_code", "requirements"]
