"""Box formats and frames. Boxes are xyxy corners in pixels of the model input unless a name says otherwise."""

from typing import NamedTuple

import torch
from torch import Tensor


class BoxPredictions(NamedTuple):
    """The predictions of one stage with `head_type="box"`: K boxes with independent class scores.

    Attributes:
        boxes (`torch.Tensor` of shape `(..., K, 4)`): xyxy, pixels of the model input.
        class_logits (`torch.Tensor` of shape `(..., K, C)`): the sigmoid gives the score of each class.
    """

    boxes: Tensor
    class_logits: Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert centre-size boxes to corners.

    Args:
        boxes (`torch.Tensor` of shape `(..., 4)`): centre x, centre y, width, height in any unit.

    Returns:
        `torch.Tensor` of shape `(..., 4)`: left, top, right, bottom in the same unit.
    """
    centre, size = boxes.split(2, dim=-1)
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert corners to centre-size boxes; an inverted box keeps its negative size.

    Args:
        boxes (`torch.Tensor` of shape `(..., 4)`): left, top, right, bottom in any unit.

    Returns:
        `torch.Tensor` of shape `(..., 4)`: centre x, centre y, width, height in the same unit.
    """
    top_left, bottom_right = boxes.split(2, dim=-1)
    return torch.cat([(top_left + bottom_right) / 2, bottom_right - top_left], dim=-1)


def side_lengths(boxes: Tensor) -> Tensor:
    """Return the length that each side's coordinate is measured against: (w, h, w, h).

    Args:
        boxes (`torch.Tensor` of shape `(..., 4)`): xyxy.

    Returns:
        `torch.Tensor` of shape `(..., 4)`: width, height, width, height (negative where the box is inverted).
    """
    top_left, bottom_right = boxes.split(2, dim=-1)
    return (bottom_right - top_left).repeat(*[1] * (boxes.dim() - 1), 2)


def image_sizes_from_mask(pixel_mask: Tensor) -> Tensor:
    """Measure the unpadded picture inside each padded one.

    Args:
        pixel_mask (`torch.Tensor` of shape `(B, H, W)`): non-zero on the picture, which sits in the top-left corner.

    Returns:
        `torch.Tensor` of shape `(B, 2)`: (height, width) in pixels, int64, on the mask's device.
    """
    mask = pixel_mask != 0
    return torch.stack([mask.any(dim=2).sum(dim=1), mask.any(dim=1).sum(dim=1)], dim=1)


def frame_scale(image_sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the factor between boxes in [0, 1] of the unpadded picture and pixels of the model input.

    Args:
        image_sizes (`torch.Tensor` of shape `(B, 2)`): (height, width) of the unpadded pictures, in pixels.
        dtype (`torch.dtype`): floating-point type of the result.

    Returns:
        `torch.Tensor` of shape `(B, 1, 4)`: width, height, width, height.
    """
    return image_sizes.flip(-1).repeat(1, 2)[:, None].to(dtype)
