"""How fast an exported graph is beside the model in torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..export.graph import DetectionGraph
from ..export.parity import parity_batches, top_detections
from .measuring import environment, summary, take_turns, timed


def measure_latency(
    graph: DetectionGraph, processor: Any, exported: Callable[..., dict[str, Tensor]], repetitions: int = 15
) -> dict[str, Any]:
    """Let a model and its export take turns on one picture, up to the best detections.

    Args:
        graph (`DetectionGraph`): The model.
        processor (`DrmmImageProcessor`): Its image processor.
        exported (`ExportedDetector`): The export.
        repetitions (`int`): Turns of each.

    Returns:
        `dict`: `height` and `width`; under `eager` and `exported` the median, least and most seconds of wall clock;
        `speedup`, the median over the turns of the ratio eager / exported; and `environment`.
    """
    inputs, sizes = next(parity_batches(processor))
    device = torch.device("cpu")
    works = {
        name: partial(timed, partial(top_detections, detector, processor, inputs, sizes), device)
        for name, detector in (("eager", graph.eval()), ("exported", exported))
    }
    with torch.inference_mode():
        taken = take_turns(works, repetitions, title="latency")
    walls = {name: [seconds.wall for seconds in values] for name, values in taken.items()}
    ratios = [eager / other for eager, other in zip(walls["eager"], walls["exported"], strict=True)]
    height, width = inputs["pixel_values"].shape[-2:]
    summaries = {name: summary(values) for name, values in walls.items()}
    return {"height": height, "width": width, **summaries, "speedup": summary(ratios)} | {
        "environment": environment(device)
    }
