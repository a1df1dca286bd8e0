"""D-RMM: end-to-end multi-object detection with a regularized mixture model, for transformers.

Importing the package registers its classes with transformers' Auto classes and object-detection pipeline.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForObjectDetection

from .modeling.configuration_drmm import DrmmConfig
from .modeling.image_processing_drmm import DrmmImageProcessor
from .modeling.modeling_drmm import DrmmForObjectDetection, DrmmModel
from .modeling.pipeline_drmm import DrmmObjectDetectionPipeline


__version__ = "0.1.0"

__all__ = [
    "DrmmConfig",
    "DrmmForObjectDetection",
    "DrmmImageProcessor",
    "DrmmModel",
    "DrmmObjectDetectionPipeline",
]

AutoConfig.register("drmm", DrmmConfig, exist_ok=True)
AutoModel.register(DrmmConfig, DrmmModel, exist_ok=True)
AutoModelForObjectDetection.register(DrmmConfig, DrmmForObjectDetection, exist_ok=True)
AutoImageProcessor.register(DrmmConfig, image_processor_classes={"torchvision": DrmmImageProcessor}, exist_ok=True)
