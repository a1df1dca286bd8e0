"""Write a model folder that loads anywhere with `trust_remote_code=True`, without this package."""

from pathlib import Path

from ..modeling.image_processing_drmm import DrmmImageProcessor
from ..modeling.modeling_drmm import DrmmForObjectDetection
from ..modeling.remote_code import add_code


def save_bundle(model: DrmmForObjectDetection, processor: DrmmImageProcessor, folder: str | Path) -> list[Path]:
    """Save a model, its processor and the code of both.

    The folder holds what `save_pretrained` writes after `register_for_auto_class`, and `requirements.txt`, but no
    class and no config object is changed: later `save_pretrained` calls still write plain folders.

    Args:
        model: Saved as safetensors with its config.
        processor: Saved as `preprocessor_config.json`.
        folder: Made if need be; files of the same names are overwritten.

    Returns:
        The code files in the folder.
    """
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return add_code(folder)
