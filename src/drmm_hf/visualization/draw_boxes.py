"""Detections and ground truth drawn on a picture."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont


# Hues far apart from one another, light enough for black text; more classes get hues between them.
_COLOURS = ["ff5a4f", "3fa7ff", "ffc928", "37c871", "c37dff", "ff8f1f", "1fd1d1", "ff7ac8", "a6d608", "b98b5f"]

# The drawing is made at this length of the longer edge at least, so that text stays sharp on small pictures.
_LONG_EDGE = 1280


def draw_boxes(
    image: Image.Image,
    result: Mapping[str, Any],
    id2label: Mapping[int, str],
    threshold: float = 0.3,
    ground_truth: Mapping[str, Any] | None = None,
) -> Image.Image:
    """Draw detections as solid boxes with name and score, and ground truth as white dashed boxes.

    Args:
        image (`Image.Image`): The picture; it is left as it is.
        result (`Mapping`): `boxes` `(n, 4)` xyxy in pixels of the picture, `labels` `(n,)` and `scores` `(n,)`, as
            post-processing gives them: tensors, arrays or lists. Without `scores`, as annotations are, every box is
            drawn under its name alone. With `box_intervals` `(n, 4, 2)` each side fades out to both ends of its own.
        id2label (`Mapping[int, str]`): Name of each label.
        threshold (`float`): Smallest score that is drawn.
        ground_truth (`Mapping`, *optional*): `boxes` of the same form.

    Returns:
        `Image.Image`: An RGB picture of the same shape, enlarged to 1280 pixels if both its edges are shorter.
    """
    scale = max(1.0, _LONG_EDGE / max(image.size))
    size = (round(image.width * scale), round(image.height * scale))
    canvas = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(canvas, "RGBA")
    unit = max(canvas.size) / _LONG_EDGE
    width = max(2, round(3 * unit))
    font = ImageFont.load_default(size=max(13, round(17 * unit)))

    if ground_truth is not None:
        for box in _array(ground_truth["boxes"]).reshape(-1, 4):
            _dashed_rectangle(draw, _ordered(box * scale), max(2, width - 1), dash=9 * unit)

    boxes, labels = _array(result["boxes"]).reshape(-1, 4), _array(result["labels"]).astype(int)
    scores = _array(result["scores"]) if "scores" in result else None
    shown = list(range(len(boxes)))
    if scores is not None:
        shown = [index for index in np.argsort(-scores, kind="stable").tolist() if scores[index] >= threshold]
    if "box_intervals" in result:
        intervals = _array(result["box_intervals"]).reshape(-1, 4, 2)
        for index in reversed(shown):
            _soft_sides(canvas, boxes[index] * scale, intervals[index] * scale, colour(labels[index]))
    for index in reversed(shown):
        draw.rectangle(_ordered(boxes[index] * scale), outline=colour(labels[index]), width=width)
    taken: list[tuple[float, ...]] = []
    for index in shown:  # the most confident chooses the place of its tag first
        box, label = boxes[index], labels[index]
        text = id2label[int(label)] if scores is None else f"{id2label[int(label)]} {scores[index]:.2f}"
        tag = _free_place(_ordered(box * scale), _tag_size(font, text, unit), canvas.size, taken)
        taken.append(tag)
        draw.rounded_rectangle(tag, radius=3 * unit, fill=(*colour(label), 235))
        draw.text(((tag[0] + tag[2]) / 2, (tag[1] + tag[3]) / 2), text, font=font, fill=(0, 0, 0), anchor="mm")
    return canvas


def grid(images: Sequence[Image.Image], columns: int = 3, captions: Sequence[str] | None = None) -> Image.Image:
    """Lay pictures out in rows.

    Args:
        images (`Sequence[Image.Image]`): Pictures of any size; each is resized to fit its cell, whose size is that of
            the first, at most 1280 pixels.
        columns (`int`): Number of pictures in a row.
        captions (`Sequence[str]`, *optional*): A line of text above each picture.

    Returns:
        `Image.Image`: One white-framed picture.

    Raises:
        ValueError: If there is no picture.
    """
    if not images:
        raise ValueError("images is empty; a grid needs at least one.")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    shrink = min(1.0, _LONG_EDGE / max(images[0].size))
    width, height = round(images[0].width * shrink), round(images[0].height * shrink)
    gap = max(4, round(max(width, height) / 80))
    size = max(13, round(max(width, height) / 50))
    font = ImageFont.load_default(size=size)
    head = round(size * 1.7) if captions else 0
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + head + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        left = gap + index % columns * (width + gap)
        top = gap + index // columns * (height + head + gap)
        if captions:
            draw.text((left, top + head / 2), captions[index], font=font, fill=(40, 40, 40), anchor="lm")
        factor = min(width / image.width, height / image.height)
        fitted = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)
        sheet.paste(fitted, (left + (width - fitted.width) // 2, top + head + (height - fitted.height) // 2))
    return sheet


def colour(label: int) -> tuple[int, int, int]:
    """Return the colour of a class.

    Args:
        label (`int`): The class.

    Returns:
        `tuple[int, int, int]`: Red, green and blue, 0 to 255. The same class always has the same colour.
    """
    label = int(label)
    if label < len(_COLOURS):
        first, second, third = bytes.fromhex(_COLOURS[label])
        return first, second, third
    hue = (label * 0.618034) % 1  # the golden ratio spreads any number of hues
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.55, 0.85, 0.7)[label % 3], (1.0, 0.95)[label % 2])
    return round(red * 255), round(green * 255), round(blue * 255)


def _array(values: Any) -> np.ndarray:
    """Return tensors, arrays and lists as arrays of floats."""
    return np.asarray(values.detach().float().cpu() if hasattr(values, "detach") else values, dtype=float)


def _ordered(box: np.ndarray) -> list[float]:
    """Return whole corners with the smaller coordinate first, since Pillow refuses inverted boxes."""
    x0, y0, x1, y1 = np.round(box).tolist()
    return [min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)]


def _soft_sides(canvas: Image.Image, box: np.ndarray, intervals: np.ndarray, shade: tuple[int, int, int]) -> None:
    """Paint each side of a box as a band that is strongest at the side and gone at the ends of its interval."""
    bands = []
    for length, (start, end) in ((canvas.width, (0, 2)), (canvas.height, (1, 3))):
        places = np.arange(length) + 0.5
        fades = []
        for side in (start, end):
            distance, (low, high) = places - box[side], np.abs(intervals[side] - box[side])
            reach = np.where(distance < 0, low, high)
            fades.append(np.clip(1 - np.abs(distance) / np.maximum(reach, 0.5), 0, 1) ** 2.5)
        near, far = sorted((box[start], box[end]))
        bands.append((np.maximum(*fades), (places >= near) & (places <= far)))
    (across, within_x), (along, within_y) = bands
    opacity = np.maximum(across * within_y[:, None], along[:, None] * within_x)
    canvas.paste(shade, mask=Image.fromarray(np.uint8(140 * opacity)))


def _tag_size(font: Any, text: str, unit: float) -> tuple[float, float]:
    """Return width and height of a tag with this text."""
    return math.ceil(font.getlength(text) + 8 * unit), math.ceil(font.size * 1.3)


def _free_place(
    box: Sequence[float], size: tuple[float, float], canvas: tuple[int, int], taken: Sequence[Sequence[float]]
) -> tuple[float, ...]:
    """Return the first place about a box where a tag covers no other tag, else the one that covers least."""
    (x0, y0, x1, y1), (width, height) = box, size
    places = [
        (x0, y0 - height),  # above, left
        (x1 - width, y0 - height),
        (x0, y1),  # below, left
        (x1 - width, y1),
        (x0, y0),  # inside
        (x0, y1 - height),
    ]

    def clamp(place: tuple[float, float]) -> tuple[float, ...]:
        left = min(max(place[0], 0), canvas[0] - width)
        top = min(max(place[1], 0), canvas[1] - height)
        return left, top, left + width, top + height

    tags = [clamp(place) for place in places]
    return min(tags, key=lambda tag: sum(_covered(tag, other) for other in taken))


def _covered(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the area that two rectangles share."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(width, 0) * max(height, 0)


def _dashed_rectangle(draw: ImageDraw.ImageDraw, box: Sequence[float], width: int, dash: float) -> None:
    """Draw a rectangle of white dashes with dark gaps, which shows on any picture."""
    x0, y0, x1, y1 = box
    for start, end in (((x0, y0), (x1, y0)), ((x1, y0), (x1, y1)), ((x1, y1), (x0, y1)), ((x0, y1), (x0, y0))):
        length = math.dist(start, end)
        draw.line([start, end], fill=(0, 0, 0, 130), width=width)
        steps = max(1, round(length / (2 * dash)))
        for step in range(steps):
            ends = [(step + part) / steps for part in (0, 0.5)]
            dashes = [(start[0] + (end[0] - start[0]) * t, start[1] + (end[1] - start[1]) * t) for t in ends]
            draw.line(dashes, fill="white", width=width)
