"""Training augmentation: presets of `torchvision.transforms.v2` that keep a box and what belongs to it together.

A target is a dict of `boxes` (`tv_tensors.BoundingBoxes`, xyxy in pixels), `labels`, `area`, `iscrowd` and `ids`, one
entry a box in each. Pictures are uint8 tensors (3, height, width) before and after.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F  # noqa: N812


Preset = Literal["none", "flip", "flip_multiscale", "paper", "small_data"]
PAPER_SHORT_EDGES = tuple(range(480, 801, 32))
"""Shorter sides of multi-scale training, in pixels. Source: section 4.1, the usual 480 to 800."""
PAPER_CROP_SHORT_EDGES = (400, 500, 600)
"""Shorter sides of a picture before it is cropped, in pixels. Source: section 4.1, as in DETR."""
PAPER_CROP_SIZES = (384, 600)
"""Shortest and longest side of a crop, in pixels. Source: section 4.1, as in DETR."""

_MEAN_COLOUR = {tv_tensors.Image: (124, 116, 104)}  # around a picture that was zoomed out: ImageNet's mean


def build_augmentation(
    preset: Preset | Callable[[Tensor, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]],
    *,
    horizontal_flip: float = 0.5,
    vertical_flip: float = 0.0,
    short_edges: Sequence[int] = PAPER_SHORT_EDGES,
    max_long_edge: int = 1333,
    crop_short_edges: Sequence[int] = PAPER_CROP_SHORT_EDGES,
    crop_sizes: Sequence[int] = PAPER_CROP_SIZES,
    colour_distortion: float = 0.0,
) -> Augmentation:
    """Build the augmentation of a training set.

    - `none`: nothing (but boxes are clipped to the picture, as in all others).
    - `flip`: flips.
    - `flip_multiscale`: flips; resize to a random shorter side.
    - `paper`: flips; half of the time resize and crop a random part; resize to a random shorter side.
    - `small_data`: colour distortion; half of the time zoom out; a crop that keeps a box; flips; resize as above.

    A picture is resized and cropped in proportion to the size of the model input: the paper's figures are for 800
    pixels, and `paper` with `short_edges` around 240 wants `crop_short_edges` and `crop_sizes` of that order too.

    A function of your own takes a picture and a target, as this module describes them, and returns the two. A recipe
    names it `package.module:function`; the module may lie in the current folder. Its pictures are resized by the
    processor, unless the function has an attribute `resizes` that is true.

    Args:
        preset (`str` or `Callable`): One of the above, `package.module:function`, or a function.
        horizontal_flip (`float`): Probability of a left-right flip in the presets with flips.
        vertical_flip (`float`): Probability of an upside-down flip; 0.5 suits pictures without an up, as microscopy.
        short_edges (`Sequence[int]`): Shorter sides to choose from, in pixels, in the presets that resize.
        max_long_edge (`int`): Upper bound of the longer side, in pixels, in the presets that resize.
        crop_short_edges (`Sequence[int]`): Shorter sides of a picture before its crop, in pixels, in `paper`.
        crop_sizes (`Sequence[int]`): Shortest and longest side of the crop, in pixels, in `paper`.
        colour_distortion (`float`): Probability of random brightness, contrast, saturation and hue, in all presets
            but `none`, and `small_data`, which always has it.

    Returns:
        `Augmentation`: A function of (picture, target); its `resizes` tells whether pictures come out at network size,
        so that the processor must not resize them again.

    Raises:
        ValueError: If the preset is unknown, its function cannot be found, or a parameter it uses is out of range.
    """
    if isinstance(preset, str) and ":" in preset:
        preset = _function(preset)
    if callable(preset):
        return Augmentation(preset, resizes=getattr(preset, "resizes", False))
    if preset not in get_args(Preset):
        raise ValueError(
            f"augmentation is {preset!r}, must be one of {list(get_args(Preset))} or a function, module:function"
        )
    probabilities = {
        "horizontal_flip": horizontal_flip,
        "vertical_flip": vertical_flip,
        "colour_distortion": colour_distortion,
    }
    for argument, value in probabilities.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{argument} is {value!r}, must be a probability in [0, 1]")
    resizes = preset in ("flip_multiscale", "paper", "small_data")
    if resizes and not (short_edges and min(short_edges) >= 1 and max(short_edges) <= max_long_edge):
        raise ValueError(
            f"short_edges is {list(short_edges)}, must hold sizes from 1 to the longest edge, {max_long_edge}"
        )
    if preset == "paper" and (not crop_short_edges or min(crop_short_edges) < 1):
        raise ValueError(f"crop_short_edges is {list(crop_short_edges)}, must hold sizes of at least 1")
    if preset == "paper" and (len(crop_sizes) != 2 or not 1 <= crop_sizes[0] <= crop_sizes[1]):
        raise ValueError(f"crop_sizes is {list(crop_sizes)}, must be a shortest and a longest side, at least 1")

    steps: list[Callable[..., Any]] = []
    if preset == "small_data":
        steps += [v2.RandomPhotometricDistort(), v2.RandomZoomOut(_MEAN_COLOUR, (1.0, 2.0)), v2.RandomIoUCrop()]
    elif preset != "none" and colour_distortion:
        steps += [v2.RandomApply([v2.RandomPhotometricDistort()], p=colour_distortion)]
    if preset != "none":
        steps += [v2.RandomHorizontalFlip(horizontal_flip), v2.RandomVerticalFlip(vertical_flip)]
    if preset == "paper":
        # Before its crop the public code bounds a picture's longer side at 4200, 7 times 600.
        enlarge = RandomShortestSize(list(crop_short_edges), 7 * max(crop_short_edges))
        steps += [v2.RandomApply([v2.Compose([enlarge, RandomSizeCrop(*crop_sizes)])], p=0.5)]
    if resizes:
        steps += [RandomShortestSize(list(short_edges), max_long_edge)]
    return Augmentation(v2.Compose(steps or [v2.Identity()]), resizes)


class Augmentation:
    """Apply a transform and keep labels, areas, crowd flags and ids with their boxes.

    Boxes are clipped to the new picture and left out, with all that belongs to them, when less than a pixel of a side
    remains. An object is taken to cover the same share of its box as before, so areas follow resizing exactly and
    cropping in proportion.

    Args:
        transform (`Callable`): A function of (picture, target) that returns the two. It may move, drop or repeat
            boxes, and must index everything else in the target alike.
        resizes (`bool`): Whether pictures come out at network size.
    """

    def __init__(self, transform: Callable[..., Any], resizes: bool) -> None:
        self.transform, self.resizes = transform, resizes
        self.tidy = v2.Compose([v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(1.0, labels_getter=_companions)])

    def __call__(self, image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Augment one picture.

        Args:
            image (`Tensor` of shape `(3, height, width)`): The picture, uint8.
            target (`dict[str, Tensor]`): What it shows; see the module.

        Returns:
            `tuple[Tensor, dict[str, Tensor]]`: The new picture and target.

        Raises:
            ValueError: If a function of the user returns something else than it was given.
        """
        covered = dict(zip(target["ids"].tolist(), target["area"] / _area(target["boxes"]), strict=True))
        image, target = self.transform(tv_tensors.Image(image), target)
        if not isinstance(target["boxes"], tv_tensors.BoundingBoxes):
            raise ValueError(f"augmentation returned boxes of type {type(target['boxes'])}, must be BoundingBoxes")
        if image.dtype != torch.uint8 or image.shape[-2:] != target["boxes"].canvas_size:
            raise ValueError(
                f"augmentation returned a picture of {image.dtype} and size {tuple(image.shape[-2:])}, "
                f"must be torch.uint8 and of the canvas_size of its boxes, {target['boxes'].canvas_size}"
            )
        image, target = self.tidy(image, target)
        return image.as_subclass(Tensor), target | {
            "area": _area(target["boxes"]) * torch.tensor([covered[id_] for id_ in target["ids"].tolist()])
        }


class RandomShortestSize(v2.RandomShortestSize):
    """Resize to a random shorter side, with the rounding of the processor: to the nearest pixel, at least one."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the size: height and width in pixels."""
        canvas = v2.query_size(flat_inputs)
        shortest = self.min_size[_randint(0, len(self.min_size) - 1)]
        scale = min(shortest / min(canvas), self.max_size / max(canvas))
        return {"size": tuple(max(1, int(side * scale + 0.5)) for side in canvas)}


class RandomSizeCrop(v2.Transform):
    """Crop a random part whose sides are drawn independently; pictures that are smaller keep their side.

    Args:
        min_size (`int`): Shortest side of the part in pixels.
        max_size (`int`): Longest side of the part in pixels.
    """

    def __init__(self, min_size: int, max_size: int) -> None:
        super().__init__()
        self.min_size, self.max_size = min_size, max_size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        """Draw the part: its upper left corner and size in pixels."""
        canvas = v2.query_size(flat_inputs)
        size = [_randint(min(side, self.min_size), min(side, self.max_size)) for side in canvas]
        top, left = (_randint(0, side - part) for side, part in zip(canvas, size, strict=True))
        return {"top": top, "left": left, "height": size[0], "width": size[1]}

    def transform(self, inpt: Any, params: dict[str, int]) -> Any:
        """Crop a picture, or move and clip boxes."""
        return self._call_kernel(F.crop, inpt, **params)


def _randint(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def _function(name: str) -> Callable[..., Any]:
    """Import the function that a text such as `package.module:function` names."""
    module, _, attribute = name.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        function = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"augmentation is {name!r}, must name a function as package.module:function: {error}"
        ) from error
    if not callable(function):
        raise ValueError(f"augmentation is {name!r}, must name a function, is a {type(function).__name__}")
    return function


def _area(boxes: Tensor) -> Tensor:
    x1, y1, x2, y2 = boxes.as_subclass(Tensor).unbind(-1)
    return (x2 - x1) * (y2 - y1)


def _companions(inputs: tuple[Tensor, dict[str, Tensor]]) -> list[Tensor]:
    return [inputs[1][key] for key in ("labels", "area", "iscrowd", "ids")]
