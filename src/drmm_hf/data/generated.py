"""The embedded default dataset: ellipses, rectangles and triangles that overlap, drawn from a seed.

Made to be learnt from scratch in minutes while asking what D-RMM is about: objects of one class so close that
non-maximum suppression would have to choose between them. The class is the shape alone; colour, size, aspect, angle
and background vary. Boxes are the exact bounds of the whole shape, hidden parts included.
"""

from __future__ import annotations

from io import BytesIO

import numpy as np
from datasets import Dataset
from PIL import Image

from .coco import canonical_dataset


CATEGORIES = ({"id": 2, "name": "ellipse"}, {"id": 3, "name": "rectangle"}, {"id": 7, "name": "triangle"})
"""Ids with gaps on purpose: a category id that is taken for a class label shows at once."""

_CORNERS = {
    "rectangle": np.array([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]),
    "triangle": np.array([(np.cos(angle), np.sin(angle)) for angle in 2 * np.pi * np.arange(3) / 3]),
}
_MIN_VISIBLE = 0.4  # share of every object that stays in sight
_COMPANION_IOU = (0.33, 0.6)  # of the boxes of a planned pair; no two boxes of a class overlap more than that
_TRIES = 100  # attempts to place one object


def generate_shapes(
    num_images: int,
    seed: int,
    image_size: tuple[int, int] = (128, 128),
    *,
    num_objects: tuple[int, int] = (3, 12),
    object_sizes: tuple[float, float] = (0.12, 0.5),
    overlap: float = 0.25,
    noise: float = 6.0,
) -> Dataset:
    """Draw pictures of overlapping shapes.

    Args:
        num_images (`int`): Number of pictures.
        seed (`int`): Pictures depend on the seed, their index and the other arguments only: a longer dataset begins
            with the shorter one, and another seed shares no picture with it.
        image_size (`tuple[int, int]`): Height and width in pixels.
        num_objects (`tuple[int, int]`): Fewest and most objects in a picture, both inclusive.
        object_sizes (`tuple[float, float]`): Smallest and largest longer side of a box, relative to the shorter side
            of the picture; drawn log-uniformly, but where a picture is full the small ones find room.
        overlap (`float`): Share of the objects planned as pairs of one class whose boxes overlap at an IoU of 0.33 to
            0.6; the share of objects in such overlaps comes out close to it.
        noise (`float`): Standard deviation of the pixel noise, in grey levels of 255.

    Returns:
        `Dataset`: Canonical rows with embedded png pictures; image ids count from 1. `area` is that of the shape.

    Raises:
        ValueError: If an argument is out of range.
    """
    fewest, most = num_objects
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}, must be at least 1")
    if min(image_size) < 32:
        raise ValueError(f"image_size is {image_size}, both sides must be at least 32 pixels")
    if not 1 <= fewest <= most:
        raise ValueError(f"num_objects is {num_objects}, must be (fewest, most) with 1 <= fewest <= most")
    if not 0 < object_sizes[0] <= object_sizes[1] <= 1:
        raise ValueError(f"object_sizes is {object_sizes}, must be (smallest, largest) in (0, 1]")
    if not 0 <= overlap <= 1:
        raise ValueError(f"overlap is {overlap}, must be in [0, 1]")

    rows, next_id = [], 1
    for index in range(num_images):
        rng = np.random.default_rng([seed, index])
        for _ in range(_TRIES):  # an unlucky large first object may leave no room
            shapes = _arrange(rng, image_size, num_objects, object_sizes, overlap)
            if len(shapes) >= fewest:
                break
        else:
            raise ValueError(f"num_objects is {num_objects}: {fewest} of object_sizes {object_sizes} do not fit")
        buffer = BytesIO()
        Image.fromarray(_paint(rng, shapes, image_size, noise)).save(buffer, "png", compress_level=0)
        name = f"{index + 1:06d}.png"
        objects = [shape.annotation(next_id + position) for position, shape in enumerate(shapes)]
        next_id += len(objects)
        rows.append(
            {
                "image_id": index + 1,
                "file_name": name,
                "image": {"bytes": buffer.getvalue(), "path": name},
                "width": image_size[1],
                "height": image_size[0],
                "objects": objects,
            }
        )
    return canonical_dataset(rows, CATEGORIES)


class _Shape:
    """One object: a unit shape, stretched, turned, and scaled so that the longer side of its box is `size`."""

    def __init__(self, category: int, centre: np.ndarray, size: float, stretch: float, angle: float) -> None:
        self.category, self.centre, self.size, self.stretch, self.angle = category, centre, size, stretch, angle
        kind = str(CATEGORIES[category]["name"])
        axes = np.array([np.sqrt(stretch), 1 / np.sqrt(stretch)])
        turn = np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
        if kind == "ellipse":
            half = np.hypot(*(axes[:, None] * turn))
        else:
            corners = (_CORNERS[kind] * axes) @ turn
            low, high = corners.min(0), corners.max(0)
            half = (high - low) / 2
        scale = size / (2 * half.max())
        self.axes, self.turn = axes * scale, turn
        self.corners = None if kind == "ellipse" else (corners - (low + high) / 2) * scale  # relative to the centre
        self.half = half * scale
        self.box = np.concatenate([centre - self.half, centre + self.half])  # x1, y1, x2, y2

    def patch(self, image_size: tuple[int, int]) -> tuple[tuple[slice, slice], np.ndarray]:
        """Return the part of the picture around the shape and the distances of its pixel centres to the outline.

        Distances are in pixels, negative inside; for an ellipse they are exact to first order.
        """
        left, top = np.maximum(np.floor(self.box[:2]).astype(int) - 1, 0)
        right, bottom = np.minimum(np.ceil(self.box[2:]).astype(int) + 1, image_size[::-1])
        x = np.arange(left, right)[None, :] + 0.5 - self.centre[0]
        y = np.arange(top, bottom)[:, None] + 0.5 - self.centre[1]
        if self.corners is None:
            u, v = (along[0] * x + along[1] * y for along in self.turn)
            a, b = self.axes
            radius = np.hypot(u / a, v / b)
            distance = radius * (radius - 1) / np.maximum(np.hypot(u / a**2, v / b**2), 1e-6)
        else:
            edges = np.roll(self.corners, -1, axis=0) - self.corners
            normals = np.stack([edges[:, 1], -edges[:, 0]], axis=1) / np.hypot(*edges.T)[:, None]
            offsets = (normals * self.corners).sum(1)
            distance = np.max(
                [n[0] * x + n[1] * y - offset for n, offset in zip(normals, offsets, strict=True)], axis=0
            )
        distance = np.maximum(
            distance, np.maximum(np.abs(x) - self.half[0], np.abs(y) - self.half[1])
        )  # sharp corners
        return (slice(top, bottom), slice(left, right)), distance

    def annotation(self, annotation_id: int) -> dict:
        """Return the canonical annotation of the whole shape."""
        x1, y1, x2, y2 = self.box.tolist()
        if self.corners is None:
            area = np.pi * self.axes.prod()
        else:
            (x, y), (next_x, next_y) = self.corners.T, np.roll(self.corners, -1, axis=0).T
            area = (x * next_y - next_x * y).sum() / 2
        return {
            "id": annotation_id,
            "category_id": CATEGORIES[self.category]["id"],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": float(area),
            "iscrowd": 0,
        }


def _arrange(
    rng: np.random.Generator,
    image_size: tuple[int, int],
    num_objects: tuple[int, int],
    object_sizes: tuple[float, float],
    overlap: float,
) -> list[_Shape]:
    """Place the objects of one picture, later ones on top; some may find no room."""
    height, width = image_size
    smallest, largest = np.array(object_sizes) * min(image_size)
    count = int(rng.integers(num_objects[0], num_objects[1] + 1))
    pairs = min(int(count * overlap / 2 + rng.random()), count // 2)
    shapes: list[_Shape] = []
    owner = np.full(image_size, -1)  # the object on top of each pixel
    pixels, visible = np.zeros((2, count), dtype=int)  # of each object: all, and those in sight

    def place(leader: _Shape | None) -> _Shape | None:
        for _ in range(_TRIES):
            if leader is None:
                size = float(np.exp(rng.uniform(np.log(smallest), np.log(largest))))
                centre = rng.uniform(size / 2, np.array([width, height]) - size / 2)
                shape = _Shape(int(rng.integers(len(CATEGORIES))), centre, size, rng.uniform(0.7, 1.4), _angle(rng))
            else:
                size = float(np.clip(leader.size * rng.uniform(0.85, 1.18), smallest, largest))
                direction, shift = rng.uniform(0, 2 * np.pi), rng.uniform(0.15, 0.6) * leader.size
                centre = leader.centre + shift * np.array([np.cos(direction), np.sin(direction)])
                stretch = leader.stretch * rng.uniform(0.9, 1.1)
                shape = _Shape(leader.category, centre, size, stretch, _angle(rng))
                if _iou(shape.box, leader.box) < _COMPANION_IOU[0]:
                    continue
            if (shape.box[:2] < 0).any() or (shape.box[2:] > (width, height)).any():
                continue
            if any(s.category == shape.category and _iou(s.box, shape.box) > _COMPANION_IOU[1] for s in shapes):
                continue
            where, distance = shape.patch(image_size)
            covered = distance < 0
            hidden = np.bincount(owner[where][covered] + 1, minlength=count + 1)[1:]
            if (hidden[hidden > 0] > (visible - _MIN_VISIBLE * pixels)[hidden > 0]).any():
                continue
            owner[where][covered] = len(shapes)
            visible[:] -= hidden
            visible[len(shapes)] = pixels[len(shapes)] = covered.sum()
            shapes.append(shape)
            return shape
        return None

    while len(shapes) < count:
        leader = place(None)
        if leader is None:
            break
        if pairs:
            pairs -= 1
            place(leader)
    return shapes


def _angle(rng: np.random.Generator) -> float:
    return float(rng.uniform(0, 2 * np.pi))


def _iou(first: np.ndarray, second: np.ndarray) -> float:
    overlap = np.maximum(np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2]), 0).prod()
    return float(overlap / ((first[2:] - first[:2]).prod() + (second[2:] - second[:2]).prod() - overlap))


def _paint(rng: np.random.Generator, shapes: list[_Shape], image_size: tuple[int, int], noise: float) -> np.ndarray:
    """Paint a cloudy background, the shapes with a rim each, and noise; return uint8 (height, width, 3)."""
    height, width = image_size
    ground = rng.uniform(50, 205, 3)
    clouds = rng.uniform(-40, 40, (6, 6, 3)) + ground
    canvas = np.asarray(
        Image.fromarray(np.clip(clouds, 0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC),
        dtype=np.float32,
    ).copy()
    for shape in shapes:
        fill = rng.uniform(0, 255, 3)
        while np.linalg.norm(fill - ground) < 110:
            fill = rng.uniform(0, 255, 3)
        rim = fill * 0.35 if fill.mean() > 100 else fill * 0.35 + 160
        where, distance = shape.patch(image_size)
        coverage = np.clip(0.5 - distance, 0, 1)[..., None]  # anti-aliased
        inner = np.clip(0.5 - distance - max(1.0, 0.05 * shape.size), 0, 1)[..., None]
        canvas[where] += coverage * (rim + inner * (fill - rim) - canvas[where])
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * noise
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
