"""The criterion, forward and backward, beside transformers' Deformable DETR loss with Hungarian matching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DeformableDetrConfig
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss

from ..modeling.boxes import cxcywh_to_xyxy
from ..modeling.configuration_drmm import DrmmConfig
from ..modeling.criteria import CRITERIA, check_labels, pad_targets, reduce_terms
from ..modeling.mixture import MixtureParameters, log_mixing_coefficients
from .measuring import Stopwatch, check_least, environment, peak_memory, summary, take_turns


PICTURE = (800, 1344)  # height and width in pixels; nothing depends on it but the unit of boxes


def benchmark_loss(
    *,
    num_queries: Sequence[int] = (300,),
    num_objects: Sequence[int] = (15, 100),
    num_stages: int = 6,
    batch_size: int = 8,
    num_labels: int = 80,
    repetitions: int = 10,
) -> dict[str, Any]:
    """Measure what the loss costs: labels to targets, terms, reduction and gradients of all predictions.

    Both losses see the same predictions: class logits and boxes of every query and stage (ours also scales and
    objectness), drawn at random, half of them near a ground truth, as matching and mixture meet them in training.

    Args:
        num_queries (`Sequence[int]`): Numbers K of queries.
        num_objects (`Sequence[int]`): Numbers N of ground truths a picture.
        num_stages (`int`): Stages S.
        batch_size (`int`): Pictures B.
        num_labels (`int`): Classes C.
        repetitions (`int`): Turns of each loss that count, after one that does not.

    Returns:
        `dict`: The settings and the environment; `cases`, for each K and N `num_queries`, `num_objects`; for `drmm`
        and `deformable_detr` `seconds` and `processor_seconds`, dicts of `median`, `min` and `max`, and `peak_bytes`,
        what one pass needs beyond the predictions (None where the system does not tell); `ratio`, theirs over ours.

    Raises:
        ValueError: If a number is out of range.
    """
    numbers = {"num_stages": num_stages, "batch_size": batch_size, "num_labels": num_labels}
    numbers |= {"num_queries": min(num_queries, default=0), "num_objects": min(num_objects, default=0)}
    check_least({name: (value, 1) for name, value in {**numbers, "repetitions": repetitions}.items()})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = []
    for queries, objects in product(num_queries, num_objects):
        losses = _losses(num_stages, batch_size, queries, num_labels, objects, device)

        def timed_parts(loss: Callable[[], Tensor]) -> dict:
            stopwatch = Stopwatch(device)
            value = loss()
            stopwatch.mark("forward")
            value.backward()
            stopwatch.mark("backward")
            return stopwatch.total()

        turns = {name: partial(timed_parts, loss) for name, loss in losses.items()}
        taken = take_turns(turns, repetitions, title=f"{queries} queries, {objects} objects")
        case = {"num_queries": queries, "num_objects": objects}
        for name, loss in losses.items():
            memory = peak_memory(lambda loss=loss: loss().backward(), device)
            case[name] = {
                "seconds": summary([seconds.wall for seconds in taken[name]]),
                "processor_seconds": summary([seconds.processor for seconds in taken[name]]),
                "peak_bytes": None if memory is None else memory.added,
            }
        pairs = zip(taken["deformable_detr"], taken["drmm"], strict=True)
        case["ratio"] = summary([theirs.cost(device) / ours.cost(device) for theirs, ours in pairs])
        cases.append(case)
    return {
        **environment(device, "transformers", "scipy"),
        "num_stages": num_stages,
        "batch_size": batch_size,
        "num_labels": num_labels,
        "repetitions": repetitions,
        "cases": cases,
    }


def _losses(
    num_stages: int, batch_size: int, num_queries: int, num_labels: int, num_objects: int, device: torch.device
) -> dict[str, Callable[[], Tensor]]:
    """Draw predictions and labels; return both losses as functions of nothing."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_stages, batch_size, num_queries)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator).to(device)

    def leaf(values: Tensor) -> Tensor:
        return values.detach().clone().requires_grad_()

    sides = 0.05 + 0.3 * uniform(batch_size, num_objects, 2)
    boxes = torch.cat([sides / 2 + (1 - sides) * uniform(batch_size, num_objects, 2), sides], -1)
    classes = torch.randint(num_labels, (batch_size, num_objects), generator=generator).to(device)
    labels = [{"boxes": b, "class_labels": c} for b, c in zip(boxes, classes, strict=True)]

    near = torch.arange(num_queries, device=device) % num_objects  # the ground truth that a query may be near
    strayed = boxes[:, near] + 0.1 * sides.repeat(1, 1, 2)[:, near] * (uniform(*shape, 4) - 0.5)
    anywhere = torch.cat([uniform(*shape, 2), 0.05 + 0.3 * uniform(*shape, 2)], -1)
    is_near = (uniform(*shape) < 0.5)[..., None]
    pred_boxes = leaf(torch.where(is_near, strayed, anywhere).clamp(0.001, 0.999))
    logits = uniform(*shape, num_labels) - 4
    class_logits = leaf(logits + 6 * is_near * F.one_hot(classes, num_labels)[:, near])
    image_sizes = torch.tensor([PICTURE], device=device).expand(batch_size, -1)
    frame = torch.tensor([*PICTURE[::-1], *PICTURE[::-1]], device=device)
    values = (cxcywh_to_xyxy(pred_boxes.detach()) * frame, 1 + 30 * uniform(*shape, 4), class_logits)
    values = (*values, 4 * uniform(*shape) - 2)
    predictions = [[leaf(value[stage]) for value in values] for stage in range(num_stages)]  # as heads give them

    config = DrmmConfig(num_labels=num_labels)
    criterion = CRITERIA[config.criterion]
    peer_config = DeformableDetrConfig(num_labels=num_labels, auxiliary_loss=True, decoder_layers=num_stages)

    def drmm() -> Tensor:
        stages = []
        for stage in predictions:
            for value in stage:
                value.grad = None
            stages.append(MixtureParameters(*stage, log_mixing_coefficients(stage[-1])))
        check_labels(labels, num_labels)
        targets = pad_targets(labels, image_sizes, torch.float32)
        return reduce_terms(criterion(stages, targets, config), targets, config)[0]

    def deformable_detr() -> Tensor:
        class_logits.grad = pred_boxes.grad = None
        loss, _, _ = DeformableDetrForObjectDetectionLoss(
            class_logits[-1], labels, device, pred_boxes[-1], peer_config, class_logits, pred_boxes
        )
        return loss

    return {"drmm": drmm, "deformable_detr": deformable_detr}
