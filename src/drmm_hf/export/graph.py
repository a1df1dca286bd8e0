"""A detector as one traced graph with dynamic batch, height and width."""

from __future__ import annotations

from collections.abc import Sequence
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from ..modeling.backbone import STRIDES
from ..modeling.image_processing_drmm import DrmmImageProcessor
from ..modeling.modeling_drmm import DrmmForObjectDetection


# What the graph returns without post-processing, where the model has it.
RAW_OUTPUTS = ("logits", "pred_boxes", "box_scales", "objectness_logits", "class_logits")
TOP_K = 100


class DetectionGraph(nn.Module):
    """What is traced: the model, and on request the processor's choice of the best detections.

    Args:
        model (`DrmmForObjectDetection`): the detector.
        processor (`DrmmImageProcessor`, *optional*): with it the graph ends in the 100 best detections, calibrated as
            the processor is; without it in the model's own predictions.
    """

    def __init__(self, model: DrmmForObjectDetection, processor: DrmmImageProcessor | None = None):
        super().__init__()
        self.model = model
        self.processor = processor

    def forward(
        self, pixel_values: Tensor, pixel_mask: Tensor, target_sizes: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Detect.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): normalised pictures, float32 whatever the model's
                type.
            pixel_mask (`torch.Tensor` of shape `(B, H, W)`): 1 on the picture, 0 on padding, int64.
            target_sizes (`torch.Tensor` of shape `(B, 2)`, *optional*): (height, width) of the original pictures,
                float32; with a processor only.

        Returns:
            `dict[str, torch.Tensor]`: `RAW_OUTPUTS` as `DrmmObjectDetectionOutput` has them, or the fields of
            `DrmmImageProcessor.top_detections`.
        """
        outputs = self.model(pixel_values.to(self.model.dtype), pixel_mask, return_dict=True)
        if self.processor is not None:
            return self.processor.top_detections(outputs, target_sizes, TOP_K)
        return {name: outputs[name] for name in RAW_OUTPUTS if outputs.get(name) is not None}


def trace(graph: DetectionGraph, attention: str = "sdpa") -> ExportedProgram:
    """Trace a detector for any number of pictures of any size, padded to multiples of 32.

    Args:
        graph (`DetectionGraph`): what to trace; its model is on the CPU.
        attention (`str`): implementation of attention in the trace; "eager" is made of plain products.

    Returns:
        `torch.export.ExportedProgram`: of `pixel_values`, `pixel_mask` and, with a processor, `target_sizes`.

    Raises:
        ValueError: if the backbone cannot be traced with sizes left open.
    """
    graph.eval()
    inputs = {"pixel_values": torch.zeros(2, 3, 96, 128), "pixel_mask": torch.ones(2, 96, 128, dtype=torch.int64)}
    # Sizes of which nothing is known make sizes of maps that take minutes to reason about.
    batch, height, width = Dim("batch"), STRIDES[-1] * Dim("rows"), STRIDES[-1] * Dim("columns")
    shapes = {"pixel_values": {0: batch, 2: height, 3: width}, "pixel_mask": {0: batch, 1: height, 2: width}}
    if graph.processor is not None:
        inputs["target_sizes"] = torch.tensor([[96.0, 128.0], [90.0, 120.0]])
        shapes["target_sizes"] = {0: batch}
    strided = (module for module in graph.model.model.backbone.modules() if _stride(module) > 1)
    hooks = [module.register_forward_hook(_with_plain_size) for module in strided]
    config = graph.model.config  # that of the detector's own layers, not of its backbone
    before, config._attn_implementation = config._attn_implementation, attention
    try:
        # timm's layers that pad as TensorFlow does compute the padding from the size, in operations no format keeps.
        with torch.no_grad(), patch("timm.layers.conv2d_same.pad_same", _pad_divisible):
            return torch.export.export(graph, (), kwargs=inputs, dynamic_shapes=shapes)
    except torch._dynamo.exc.UserError as error:
        backbone = graph.model.model.backbone.model_type
        raise ValueError(
            f"the detector on the backbone {backbone!r} cannot be traced with open sizes: {error}"
        ) from error
    finally:
        config._attn_implementation = before
        for hook in hooks:
            hook.remove()


def _pad_divisible(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int] = (1, 1), value: float = 0
) -> Tensor:
    """Pad as TensorFlow's "SAME" does where the stride divides the size, as it does in pictures of multiples of 32."""
    missing = [max((k - 1) * d + 1 - s, 0) for k, s, d in zip(kernel_size, stride, dilation, strict=True)]
    (top, bottom), (left, right) = ((total // 2, total - total // 2) for total in missing)
    return F.pad(x, (left, right, top, bottom), value=value)


def _stride(module: nn.Module) -> int:
    """Return by how much a layer divides height and width."""
    stride = module.stride if isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) else 1
    return stride if isinstance(stride, int) else stride[0]


def _with_plain_size(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """Give the output of a strided layer its size as a quotient of the input's: a resize to the size that it has.

    Otherwise sizes grow layer by layer into nested formulas, in which every question about a shape takes seconds.
    """
    height, width = (side // _stride(layer) for side in inputs[0].shape[-2:])
    return F.interpolate(output, size=(height, width), mode="nearest")
