"""Detection in pictures that are large beside their objects: tile by tile, and in the whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torchvision.ops import nms
from tqdm import tqdm

from drmm_hf.data.loading import load_image

from .detections import Detections
from .predict import predict


# A box that ends this close to a side of its tile, as a share of the tile, has been cut by it.
_MARGIN = 0.01


def predict_tiles(
    model: torch.nn.Module,
    processor: Any,
    dataset: Iterable[Mapping[str, Any]],
    tile: int,
    overlap: float = 0.25,
    batch_size: int = 1,
    top_k: int = 100,
    iou_threshold: float = 0.5,
    progress: bool = True,
) -> Detections:
    """Find small objects in large pictures: each picture is seen in the whole and in tiles that overlap.

    A box that an inner side of its tile cuts is left out: the neighbouring tile holds the object whole if it is
    smaller than the overlap. Larger boxes are taken from the whole picture too, and no others from there, where small
    objects are blurred. What is found several times counts once, by non-maximum suppression within its class.

    Args:
        model (`torch.nn.Module`): As in `predict`.
        processor (`Any`): Likewise; it resizes each tile as it resizes pictures.
        dataset (`Iterable[Mapping]`): Likewise.
        tile (`int`): Side of a tile, in pixels of the picture.
        overlap (`float`): Share of a tile that it has in common with the next, in [0, 1).
        batch_size (`int`): Largest number of tiles in a batch.
        top_k (`int`): Number of detections kept of each tile; a picture has all that remain.
        iou_threshold (`float`): IoU above which two boxes of a class are one object.
        progress (`bool`): Whether to show a progress bar. It shows after two seconds only.

    Returns:
        `Detections`: One result a picture, in pixels of the picture, without `query_indices`: several passes share
        them.

    Raises:
        ValueError: If `tile` or `overlap` is out of range, and as `predict` does.
    """
    if tile < 1 or not 0 <= overlap < 1:
        raise ValueError(f"tile is {tile} and overlap {overlap}; the rule is at least 1 pixel, and a share in [0, 1).")
    detections = Detections()
    hidden = None if progress else True  # None: shown on a terminal
    for row in tqdm(dataset, desc="predicting", unit="image", delay=2, disable=hidden, leave=False):
        image_id = int(row["image_id"])
        if image_id in detections:
            continue
        image = load_image(row)
        windows = tile_windows(image.height, image.width, tile, overlap)
        rows = [{"image_id": index, "image": image.crop(window)} for index, window in enumerate(windows.tolist())]
        found = predict(model, processor, rows, batch_size, top_k=top_k, progress=False)
        detections.add(image_id, merge_tiles(windows, [found[index] for index in found], tile, overlap, iou_threshold))
    return detections


def tile_windows(height: int, width: int, tile: int, overlap: float) -> np.ndarray:
    """Return the whole picture and the tiles that cover it.

    Args:
        height (`int`): Height of the picture, pixels.
        width (`int`): Its width.
        tile (`int`): Side of a tile, pixels.
        overlap (`float`): Least share of a tile that it has in common with the next, in [0, 1).

    Returns:
        `np.ndarray` of shape `(1 + T, 4)`: xyxy in whole pixels, the picture first; T is 0 where it fits into a tile.
    """
    starts = []
    for length in (height, width):
        span = max(length - tile, 0)
        count = 1 + int(np.ceil(span / max(1, int(tile * (1 - overlap)))))
        starts.append(np.linspace(0, span, count).astype(int))
    whole = np.array([[0, 0, width, height]])
    if len(starts[0]) == len(starts[1]) == 1:
        return whole
    top, left = (side.ravel() for side in np.meshgrid(*starts, indexing="ij"))
    tiles = np.stack([left, top, np.minimum(left + tile, width), np.minimum(top + tile, height)], axis=1)
    return np.concatenate([whole, tiles])


def merge_tiles(
    windows: np.ndarray,
    results: Sequence[Mapping[str, np.ndarray]],
    tile: int,
    overlap: float,
    iou_threshold: float = 0.5,
) -> dict[str, np.ndarray]:
    """Join the detections of the windows of one picture.

    Args:
        windows (`np.ndarray` of shape `(1 + T, 4)`): From `tile_windows`.
        results (`Sequence[Mapping]`): The detections in each window, in pixels of it.
        tile (`int`): Side of a tile, pixels.
        overlap (`float`): Share of a tile that it has in common with the next, in [0, 1).
        iou_threshold (`float`): IoU above which two boxes of a class are one object.

    Returns:
        `dict[str, np.ndarray]`: Detections in pixels of the picture, sorted by score.
    """
    picture = windows[0]
    parts: list[dict[str, np.ndarray]] = []
    for window, result in zip(windows, results, strict=True):
        boxes = result["boxes"] + np.tile(window[:2], 2)
        margin = np.array([1, 1, -1, -1]) * max(1.0, _MARGIN * tile)
        beyond = (boxes - window - margin) * np.array([1, 1, -1, -1]) < 0
        whole = ~(beyond & (window != picture)).any(axis=1)
        if len(windows) > 1 and len(parts) == 0:  # the picture, beside its tiles
            whole &= (boxes[:, 2:] - boxes[:, :2]).max(axis=1, initial=0) > overlap * tile
        part = dict(result) | {"boxes": boxes.astype(np.float32)}
        parts.append({name: values[whole] for name, values in part.items() if name != "query_indices"})
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    boxes, scores = (torch.from_numpy(joined[name]).float() for name in ("boxes", "scores"))
    kept = []
    for label in np.unique(joined["labels"]):  # many boxes: a matrix of all pairs would be large
        (mine,) = np.nonzero(joined["labels"] == label)
        kept.append(mine[nms(boxes[mine], scores[mine], iou_threshold).numpy()])
    order = np.concatenate([*kept, np.zeros(0, dtype=int)])
    order = order[np.argsort(-joined["scores"][order], kind="stable")]
    return {name: values[order] for name, values in joined.items()}
