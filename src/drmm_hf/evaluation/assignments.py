"""Which predictions a model's training matches to each ground truth: what Figures 13 and 14 show.

Only box heads match; D-RMM's mixtures have nothing to show here. The model does the matching, with its own criterion.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .coco_metrics import load_annotations
from .evaluate import category_of_label, check_images
from .predict import picture_batches, to_model


if TYPE_CHECKING:
    import datasets


def check_matching(config: Any) -> None:
    """Refuse models whose training matches nothing.

    Args:
        config (`PreTrainedConfig`): Config of the model.

    Raises:
        ValueError: If it is no D-RMM model with a box head.
    """
    if getattr(config, "head_type", None) != "box":
        kind = getattr(config, "model_type", type(config).__name__)
        raise ValueError(
            f"model is a {kind!r} without head_type 'box'; --assignments shows the matching of box heads."
        )


@torch.no_grad()
def assignments(
    model: Any,
    processor: Any,
    dataset: datasets.Dataset,
    annotations: str | Path | Mapping[str, Any],
    *,
    num_images: int = 16,
    progress: bool = True,
) -> dict[str, Any]:
    """Match the predictions of every stage to the annotations of a few pictures, as training does.

    Args:
        model (`torch.nn.Module`): A D-RMM model with box heads.
        processor (`Any`): Its image processor.
        dataset (`datasets.Dataset`): Pictures in the canonical schema of `drmm_hf.data.coco`.
        annotations (`str`, `Path` or `Mapping`): Their COCO json file, or what it holds. Crowds are left out.
        num_images (`int`): How many pictures, spread over the data set, at most.
        progress (`bool`): Whether to show a progress bar. It shows after two seconds only.

    Returns:
        `dict`: `num_copies`, how many predictions learn a ground truth, and `images`, a list. An image has `image_id`,
        `ground_truths` (`bbox`, xywh pixels of the original picture, and `category_id`) and `stages`, a list with the
        `predictions` of each stage (`bbox`, `category_id` and `score` of the likeliest class) and `matched`: for each
        ground truth the indices of its predictions and the `scores` that they give its class.

    Raises:
        ValueError: If the model has no box head, or its classes or the pictures are not those of the annotations.

    Source: Figures 13 and 14.
    """
    check_matching(model.config)
    annotations = load_annotations(annotations)
    check_images(annotations, dataset)
    mapping = category_of_label(model.config, annotations["categories"])
    labels = {category_id: label for label, category_id in mapping.items()}
    objects = defaultdict(list)
    for record in annotations["annotations"]:
        if not record.get("iscrowd"):
            objects[record["image_id"]].append(record)
    few = min(num_images, len(dataset))
    dataset = dataset.select([index * len(dataset) // few for index in range(few)])
    device, was_training, images = next(model.parameters()).device, model.training, []
    model.eval()
    try:
        for batch in picture_batches(processor, dataset, 1, progress, "matching"):
            (height, width), mine = batch.sizes[0], objects[batch.image_ids[0]]
            frame = torch.tensor([width, height, width, height], dtype=torch.float32)
            boxes = torch.tensor([record["bbox"] for record in mine], dtype=torch.float32).reshape(-1, 4)
            classes = torch.tensor([labels[record["category_id"]] for record in mine], dtype=torch.int64)
            centred = torch.cat([boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]], dim=1) / frame
            label = {"class_labels": classes.to(device), "boxes": centred.to(device)}
            assigned, outputs = model.assignments(labels=[label], **to_model(batch.inputs, model))
            stages = [*(outputs.auxiliary_outputs or []), {"logits": outputs.logits, "pred_boxes": outputs.pred_boxes}]
            images.append(
                {
                    "image_id": batch.image_ids[0],
                    "ground_truths": [{name: record[name] for name in ("bbox", "category_id")} for record in mine],
                    "stages": [
                        _stage(queries[0].cpu(), stage, classes, frame, mapping)
                        for queries, stage in zip(assigned, stages, strict=True)
                    ],
                }
            )
    finally:
        model.train(was_training)
    return {"num_copies": model.config.num_ground_truth_copies, "images": images}


def _stage(
    assigned: torch.Tensor,
    stage: Mapping[str, torch.Tensor],
    classes: torch.Tensor,
    frame: torch.Tensor,
    mapping: Mapping[int, int],
) -> dict[str, Any]:
    """Return one stage of one picture; `assigned` is `(N, copies)`."""
    scores = stage["logits"][0].float().cpu().sigmoid()
    centred = stage["pred_boxes"][0].float().cpu()
    boxes = torch.cat([centred[:, :2] - centred[:, 2:] / 2, centred[:, 2:]], dim=1) * frame
    best, likeliest = scores.max(dim=-1)
    matched = []
    for label, queries in zip(classes.tolist(), assigned.tolist(), strict=True):
        queries = [query for query in queries if query >= 0]
        matched.append(
            {"predictions": queries, "scores": [round(scores[query, label].item(), 4) for query in queries]}
        )
    columns = (boxes.tolist(), likeliest.tolist(), best.tolist())
    return {
        "predictions": [
            {"bbox": [round(side, 2) for side in box], "category_id": mapping.get(label), "score": round(score, 4)}
            for box, label, score in zip(*columns, strict=True)
        ],
        "matched": matched,
    }
