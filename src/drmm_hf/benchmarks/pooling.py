"""Pooling of regions from a pyramid, forward and backward, beside torchvision's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import roi_align

from ..modeling.roi_pooling import pool_regions, roi_levels
from .measuring import Seconds, Stopwatch, check_least, environment, peak_memory, summary, take_turns


STRIDES, SIZE, SAMPLING_RATIO, LEVEL_BASE = (4, 8, 16, 32), 7, 2, 56.0


def benchmark_pooling(
    *,
    height: int = 800,
    width: int = 1344,
    batch_size: int = 1,
    num_boxes: int = 300,
    channels: int = 256,
    repetitions: int = 5,
) -> dict[str, Any]:
    """Measure what it costs to pool regions and to send their gradient back to the maps.

    Args:
        height (`int`): Of the pictures, pixels.
        width (`int`): The same.
        batch_size (`int`): Pictures.
        num_boxes (`int`): Boxes a picture.
        channels (`int`): Of the maps.
        repetitions (`int`): Turns that count, after one that does not.

    Returns:
        `dict`: The settings and the environment; for `drmm` and `torchvision` `forward` and `backward`, of the clock
        that counts, and `bytes`; `ratio`, torchvision's time over ours; `difference`, the largest of the results.

    Raises:
        ValueError: If a number is out of range.
    """
    numbers = {"height": height, "width": width, "batch_size": batch_size, "num_boxes": num_boxes}
    numbers |= {"channels": channels, "repetitions": repetitions}
    check_least({name: (value, 1) for name, value in numbers.items()})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.randn(batch_size, channels, -(-height // stride), -(-width // stride), generator=generator)
        .to(device, memory_format=torch.channels_last)
        .requires_grad_()
        for stride in STRIDES
    ]
    frame = torch.tensor([width, height])
    sides = (0.03 + 0.7 * torch.rand(batch_size, num_boxes, 2, generator=generator) ** 2) * frame
    starts = torch.rand(batch_size, num_boxes, 2, generator=generator) * (frame - sides)
    boxes = torch.cat([starts, starts + sides], -1).to(device)
    ways = {"drmm": partial(_ours, maps, boxes), "torchvision": partial(pool_by_level, maps, boxes)}

    def timed(pool: Callable[[], Tensor]) -> dict[str, Seconds]:
        for one in maps:
            one.grad = None
        stopwatch = Stopwatch(device)
        pooled = pool()
        stopwatch.mark("forward")
        pooled.sum().backward()
        stopwatch.mark("backward")
        return stopwatch.parts()

    with torch.no_grad():
        difference = (ways["drmm"]() - ways["torchvision"]()).abs().max().item()
    memory = {name: peak_memory(partial(timed, pool), device) for name, pool in ways.items()}
    taken = take_turns({name: partial(timed, pool) for name, pool in ways.items()}, repetitions, title="pooling")
    costs = {
        name: {part: [turn[part].cost(device) for turn in turns] for part in ("forward", "backward")}
        for name, turns in taken.items()
    }
    figures = {
        name: {part: summary(values) for part, values in parts.items()}
        | {"bytes": None if memory[name] is None else memory[name].added}
        for name, parts in costs.items()
    }
    ratios = {
        part: summary([b / a for a, b in zip(costs["drmm"][part], costs["torchvision"][part], strict=True)])
        for part in ("forward", "backward")
    }
    settings = {name: value for name, value in numbers.items() if name not in ("height", "width")}
    return {**environment(device, "torchvision"), "size": [height, width], **settings} | {
        **figures,
        "ratio": ratios,
        "difference": difference,
    }


def _ours(maps: list[Tensor], boxes: Tensor) -> Tensor:
    return pool_regions(maps, boxes, STRIDES, SIZE, SAMPLING_RATIO, LEVEL_BASE).flatten(0, 1)


def pool_by_level(maps: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """Pool each level's boxes from its map by `roi_align`, as detectors on torchvision's operator do.

    Args:
        maps (`Sequence[torch.Tensor]`): Pyramid maps of shape `(B, C, H_l, W_l)` at `STRIDES`.
        boxes (`torch.Tensor` of shape `(B, K, 4)`): xyxy, pixels of the model input.

    Returns:
        `torch.Tensor` of shape `(B * K, SIZE * SIZE, C)`: what `pool_regions` gives with the constants of this file.
    """
    levels = roi_levels(boxes, len(maps), LEVEL_BASE).flatten()
    images = torch.arange(len(boxes), device=boxes.device).repeat_interleave(boxes.shape[1])
    regions = torch.cat([images[:, None].to(boxes.dtype), boxes.flatten(0, 1)], -1)
    pooled = maps[0].new_zeros(len(regions), maps[0].shape[1], SIZE, SIZE)
    for level, (features, stride) in enumerate(zip(maps, STRIDES, strict=True)):
        chosen = levels == level
        pooled[chosen] = roi_align(features, regions[chosen], SIZE, 1 / stride, SAMPLING_RATIO, aligned=True)
    return pooled.flatten(2).transpose(1, 2)
