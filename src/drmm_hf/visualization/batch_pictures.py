"""Batches as the model gets them, drawn: a look at them finds what no log tells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .draw_boxes import draw_boxes, grid


def save_augmented_pictures(
    batches: Iterable[Mapping[str, Any]],
    processor: Any,
    id2label: Mapping[int, str],
    path: str | Path,
    num_pictures: int = 12,
) -> None:
    """Draw the first pictures of some batches with their boxes, with the normalisation undone and the padding cut off.

    Args:
        batches (`Iterable[Mapping]`): `pixel_values` (B, 3, H, W) and `labels`, a list of dicts with `boxes` (N, 4)
            cx, cy, w, h as fractions of the unpadded picture, `class_labels` (N,), `size` and `image_id`.
        processor (`Any`): The image processor that made them: its `do_rescale`, `rescale_factor`, `do_normalize`,
            `image_mean` and `image_std`.
        id2label (`Mapping[int, str]`): Name of each label.
        path (`str` or `Path`): The picture to write; its folder is made.
        num_pictures (`int`): How many to draw; no more batches are read than it takes.

    Raises:
        ValueError: If there is no picture.
    """
    images, captions = [], []
    for batch in batches:
        for values, label in zip(batch["pixel_values"], batch["labels"], strict=True):
            height, width = label["size"].tolist()
            boxes = label["boxes"].detach().cpu().double().numpy() * np.array([width, height, width, height])
            corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)
            image = _picture(values[:, :height, :width].detach().cpu().float().numpy(), processor)
            images.append(draw_boxes(image, {"boxes": corners, "labels": label["class_labels"]}, id2label))
            captions.append(f"image {int(label['image_id'])}, {width} x {height}")
            if len(images) == num_pictures:
                break
        if len(images) == num_pictures:
            break
    if not images:
        raise ValueError("batches is empty; a picture needs at least one.")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    grid(images, columns=min(4, len(images)), captions=captions).save(path)


def _picture(values: np.ndarray, processor: Any) -> Image.Image:
    """Return the bytes that became these values (3, height, width)."""
    if processor.do_normalize:
        mean, std = (np.array(numbers)[:, None, None] for numbers in (processor.image_mean, processor.image_std))
        values = values * std + mean
    if processor.do_rescale:
        values = values / processor.rescale_factor
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
