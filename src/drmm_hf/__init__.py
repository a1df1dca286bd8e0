"""D-RMM: end-to-end multi-object detection with a regularized mixture model, for transformers.

Importing the package registers its classes with the Auto classes and the object-detection pipeline.
"""

from importlib import import_module


__version__ = "0.1.0"

# Public names, resolved on first use.
_SUBMODULES = {
    "DrmmConfig": "modeling.configuration_drmm",
    "DrmmForObjectDetection": "modeling.modeling_drmm",
    "DrmmImageProcessor": "modeling.image_processing_drmm",
    "DrmmModel": "modeling.modeling_drmm",
    "DrmmObjectDetectionPipeline": "modeling.pipeline_drmm",
}

__all__ = sorted(_SUBMODULES)


def __getattr__(name: str):
    if name not in _SUBMODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_SUBMODULES[name]}", __name__), name)
