"""How far an exported graph is from the model in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers.utils import ModelOutput

from ..conversion.class_names import class_names
from ..data.generated import generate_shapes
from ..data.loading import load_image
from ..evaluation.detections import Detections
from ..evaluation.evaluate import category_of_label, measure
from ..evaluation.predict import picture_batches
from ..modeling.image_processing_drmm import DrmmImageProcessor
from ..modeling.modeling_drmm import DrmmForObjectDetection
from .graph import TOP_K, DetectionGraph


# Detections whose score is so close to that of the last one may be exchanged for others as close.
SCORE_TOLERANCE = 1e-5

Detector = Callable[..., dict[str, Tensor]]


def compare_with_eager(
    model: DrmmForObjectDetection, processor: DrmmImageProcessor, exported: Detector
) -> list[dict[str, Any]]:
    """Compare the detections of a graph with those of the model, on generated pictures of three shapes.

    Args:
        model (`DrmmForObjectDetection`): The model in float32.
        processor (`DrmmImageProcessor`): Its image processor.
        exported (`Callable`): The graph, such as an `ExportedDetector`.

    Returns:
        `list[dict]`: One entry a batch: `height` and `width` of the padded pictures, `batch_size`, and what
        `largest_differences` returns. Batches of two hold pictures of unequal size.
    """
    eager = DetectionGraph(model.eval())
    rows = []
    for inputs, sizes in parity_batches(processor):
        with torch.no_grad():
            expected = top_detections(eager, processor, inputs, sizes)
        found = top_detections(exported, processor, inputs, sizes)
        batch, _, height, width = inputs["pixel_values"].shape
        differences = largest_differences(expected, found, sizes, len(class_names(model.config)))
        rows.append({"height": height, "width": width, "batch_size": batch} | differences)
    return rows


def parity_batches(processor: DrmmImageProcessor) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield processed pictures: wide, tall and square, one and two at a time.

    Args:
        processor (`DrmmImageProcessor`): Its `size` says how large.

    Yields:
        `tuple[dict, torch.Tensor]`: `pixel_values` and `pixel_mask`, and the (height, width) of each picture, float32.
    """
    sides = [int(side) for side in dict(processor.size).values() if side] or [480]
    short, long = min(sides), max(sides)
    for index, (height, width) in enumerate(((short, long), (long, short), (short, short))):
        for sizes in ([(height, width)], [(height, width), (max(32, height * 3 // 4), max(32, width * 2 // 3))]):
            pictures = [load_image(generate_shapes(1, index, size)[0]) for size in sizes]
            inputs = processor(images=pictures, do_resize=False, return_tensors="pt")
            yield dict(inputs), torch.tensor(sizes, dtype=torch.float32)


def top_detections(
    detector: Detector, processor: DrmmImageProcessor, inputs: Mapping[str, Tensor], target_sizes: Tensor
) -> dict[str, Tensor]:
    """Run a detector and return its best detections, whether it chooses them itself or leaves that to the processor.

    Args:
        detector (`Callable`): A `DetectionGraph` or an `ExportedDetector`.
        processor (`DrmmImageProcessor`): The image processor of the model.
        inputs (`Mapping[str, torch.Tensor]`): `pixel_values` and `pixel_mask`.
        target_sizes (`torch.Tensor` of shape `(B, 2)`): (height, width) of the original pictures, float32.

    Returns:
        `dict[str, torch.Tensor]`: As `DrmmImageProcessor.top_detections` returns them.
    """
    outputs = detector(inputs["pixel_values"], inputs["pixel_mask"], target_sizes)
    return outputs if "scores" in outputs else processor.top_detections(ModelOutput(outputs), target_sizes, TOP_K)


def largest_differences(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], sizes: Tensor, num_classes: int
) -> dict[str, float | int]:
    """Compare two choices of detections, pair of query and class by pair.

    Args:
        expected (`Mapping[str, torch.Tensor]`): Of the model, `(B, n, ...)`, see `top_detections`.
        found (`Mapping[str, torch.Tensor]`): Of the graph.
        sizes (`torch.Tensor` of shape `(B, 2)`): (height, width) of the pictures.
        num_classes (`int`): Number of classes.

    Returns:
        `dict`: Over the pairs in both, the largest difference of a box side in pixels (`box_px`) and as a share of the
        picture's longer side (`box_share`), and of a score (`score`); and how many pairs of the model are missing
        though their scores are above its last one by more than `SCORE_TOLERANCE` (`missing`).
    """
    pairs, others = (each["query_indices"] * num_classes + each["labels"] for each in (expected, found))
    same = pairs[:, :, None] == others[:, None, :]
    in_both, place = same.any(dim=2), same.byte().argmax(dim=2)
    boxes = found["boxes"].gather(1, place[..., None].expand(-1, -1, 4))
    box_px = ((boxes - expected["boxes"]).abs().amax(dim=-1)).masked_fill(~in_both, 0)
    score = (found["scores"].gather(1, place) - expected["scores"]).abs().masked_fill(~in_both, 0)
    above = expected["scores"] > expected["scores"][:, -1:] + SCORE_TOLERANCE
    return {
        "box_px": box_px.max().item(),
        "box_share": (box_px / sizes.amax(dim=1, keepdim=True)).max().item(),
        "score": score.max().item(),
        "missing": int((above & ~in_both).sum()),
    }


def precision_of(
    detectors: Mapping[str, Detector],
    processor: DrmmImageProcessor,
    config: Any,
    dataset: datasets.Dataset,
    annotations: Mapping[str, Any],
) -> dict[str, float]:
    """Measure average precision of several forms of one detector.

    Args:
        detectors (`Mapping[str, Callable]`): By name, `DetectionGraph` or `ExportedDetector`.
        processor (`DrmmImageProcessor`): Their image processor.
        config (`DrmmConfig`): Tells their classes.
        dataset (`Dataset`): Pictures in the canonical schema.
        annotations (`Mapping`): What the COCO file of the dataset holds.

    Returns:
        `dict[str, float]`: AP, a fraction, by name.
    """
    found = {name: Detections() for name in detectors}
    for batch in picture_batches(processor, dataset):
        sizes = torch.tensor(batch.sizes, dtype=torch.float32)
        for name, detector in detectors.items():
            with torch.no_grad():
                fields = top_detections(detector, processor, batch.inputs, sizes)
            for index, image_id in enumerate(batch.image_ids):
                found[name].add(image_id, {field: values[index] for field, values in fields.items()}, TOP_K)
    mapping = category_of_label(config, annotations["categories"])
    return {name: measure(detections, annotations, mapping)["AP"] for name, detections in found.items()}
