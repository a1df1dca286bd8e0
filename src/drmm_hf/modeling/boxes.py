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


# AdaMixer measures a box by the logarithms of its sides; one below this many pixels counts as this many.
SMALLEST_SIDE = 2**-10


def xyxy_to_xyzr(boxes: Tensor) -> Tensor:
    """Convert corners to AdaMixer's form: centre, log size and log aspect ratio.

    Args:
        boxes (`torch.Tensor` of shape `(..., 4)`): left, top, right, bottom in pixels.

    Returns:
        `torch.Tensor` of shape `(..., 4)`: centre x, centre y in pixels, z = log2 sqrt(w h), r = log2(h / w).

    Source: AdaMixer. The public code carries this form from stage to stage and so needs no floor on the sides.
    """
    top_left, bottom_right = boxes.split(2, dim=-1)
    log_width, log_height = (bottom_right - top_left).clamp(min=SMALLEST_SIDE).log2().split(1, dim=-1)
    centre = (top_left + bottom_right) / 2
    return torch.cat([centre, (log_width + log_height) / 2, log_height - log_width], dim=-1)


def xyzr_to_xyxy(xyzr: Tensor) -> Tensor:
    """Convert AdaMixer's form to corners.

    Args:
        xyzr (`torch.Tensor` of shape `(..., 4)`): centre x, centre y in pixels, z = log2 sqrt(w h), r = log2(h / w).

    Returns:
        `torch.Tensor` of shape `(..., 4)`: left, top, right, bottom in pixels.
    """
    centre, z, r = xyzr.split([2, 1, 1], dim=-1)
    size = torch.exp2(torch.cat([z - r / 2, z + r / 2], dim=-1))
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def move_xyzr(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Refine boxes as AdaMixer does.

    Args:
        boxes (`torch.Tensor` of shape `(..., 4)`): xyxy, pixels.
        deltas (`torch.Tensor` of shape `(..., 4)`): of the centre in units of 2^z, of z and of r.

    Returns:
        `torch.Tensor` of shape `(..., 4)`: xyxy, pixels.

    Source: AdaMixer's refinement; one unit for x and y.
    """
    xyzr = xyxy_to_xyzr(boxes)
    unit = torch.cat([xyzr[..., 2:3].exp2().expand_as(xyzr[..., :2]), torch.ones_like(xyzr[..., 2:])], dim=-1)
    return xyzr_to_xyxy(xyzr + deltas * unit)


def move_cxcywh(boxes: Tensor, deltas: Tensor, max_log_size_delta: float) -> Tensor:
    """Refine boxes as Sparse R-CNN does.

    Args:
        boxes (`torch.Tensor` of shape `(..., 4)`): xyxy, pixels.
        deltas (`torch.Tensor` of shape `(..., 4)`): of the centre in halves of a side, of log width and log height.
        max_log_size_delta (`float`): bound of the absolute value of the last two.

    Returns:
        `torch.Tensor` of shape `(..., 4)`: xyxy, pixels, not clipped to the picture.

    Source: R-CNN's box coding with standard deviations (0.5, 0.5, 1, 1).
    """
    centre, size = xyxy_to_cxcywh(boxes).split(2, dim=-1)
    shift, growth = deltas.split(2, dim=-1)
    growth = growth.clamp(-max_log_size_delta, max_log_size_delta)
    return cxcywh_to_xyxy(torch.cat([centre + shift / 2 * size, size * growth.exp()], dim=-1))
