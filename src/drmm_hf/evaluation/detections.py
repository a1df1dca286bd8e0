"""The one result type: what a detector found in each picture."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from drmm_hf.data.labels import LabelMap

from .files import read_json, write_text


# Field of a result -> (width of a row, its key in a COCO result). The first three are always there.
_OPTIONAL = {
    "query_indices": ((), "query"),
    "objectness": ((), "objectness"),
    "class_probabilities": ((), "class_probability"),
    "box_scales": ((4,), "box_scales"),
}
_SHAPES = {"boxes": (4,), "scores": (), "labels": (), **{name: shape for name, (shape, _) in _OPTIONAL.items()}}
_INTEGERS = ("labels", "query_indices")
_LARGEST = float(np.finfo(np.float32).max)
_NUMBERS = (float, int, np.floating, np.integer)


class Detections:
    """Hold the detections of many pictures, each picture under its own id, sorted by score.

    A picture's entry is a dict of arrays with one row a detection: `boxes` `(n, 4)` xyxy in pixels of the original
    picture, `scores` `(n,)`, `labels` `(n,)` contiguous classes, and, where the detector has them, `query_indices`
    `(n,)`, `objectness` `(n,)`, `class_probabilities` `(n,)` and `box_scales` `(n, 4)` in pixels. A picture in which
    nothing was found has an entry too: it was looked at.

    Example:
        >>> detections = Detections()
        >>> detections.add(7, {"boxes": [[0, 0, 10, 20]], "scores": [0.5], "labels": [1]})
        >>> detections[7]["scores"].tolist()
        [0.5]
    """

    def __init__(self) -> None:
        """Start without any picture."""
        self._images: dict[int, dict[str, np.ndarray]] = {}

    def add(self, image_id: int, result: Mapping[str, Any], top_k: int | None = None) -> None:
        """Add the detections of one picture.

        Args:
            image_id (`int`): Id of the picture in the dataset.
            result (`Mapping`): The fields above as tensors, arrays or lists; other keys are left out.
            top_k (`int`, *optional*): How many of the most confident are kept; by default all.

        Raises:
            ValueError: If the picture is already there, if a field has the wrong shape, or if a number is not finite.
        """
        image_id = int(image_id)
        if image_id in self._images:
            raise ValueError(f"image_id {image_id} was added twice; a picture has one result.")
        arrays = {name: _array(name, result[name], image_id) for name in _SHAPES if result.get(name) is not None}
        missing = [name for name in ("boxes", "scores", "labels") if name not in arrays]
        if missing:
            raise ValueError(f"result of image_id {image_id} has no {', '.join(missing)}.")
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"result of image_id {image_id} has fields of different lengths: {lengths}.")
        order = np.argsort(-arrays["scores"], kind="stable")[:top_k]
        self._images[image_id] = {name: array[order] for name, array in arrays.items()}

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self._images)

    def __contains__(self, image_id: int) -> bool:
        """Tell whether a picture has a result."""
        return image_id in self._images

    def __iter__(self) -> Iterator[int]:
        """Iterate over the image ids in the order in which they were added."""
        return iter(self._images)

    def __getitem__(self, image_id: int) -> dict[str, np.ndarray]:
        """Return the arrays of one picture."""
        return self._images[image_id]

    def __repr__(self) -> str:
        """Name the counts."""
        return f"Detections({len(self)} images, {self.num_boxes} boxes)"

    @property
    def num_boxes(self) -> int:
        """Number of detections in all pictures."""
        return sum(len(result["scores"]) for result in self._images.values())

    @property
    def num_boxes_without_size(self) -> int:
        """Number of detections without width or height, which `to_coco` leaves out."""
        return sum(int((~_has_size(_xywh(result["boxes"]))).sum()) for result in self._images.values())

    def top_k(self, k: int) -> Detections:
        """Keep the `k` most confident detections of each picture.

        Args:
            k (`int`): Number of detections a picture, over all classes together.

        Returns:
            `Detections`: A new object; this one is unchanged.

        Raises:
            ValueError: If `k` is below 1.
        """
        if k < 1:
            raise ValueError(f"top_k is {k}; the rule is at least 1.")
        kept = Detections()
        for image_id, result in self._images.items():
            kept.add(image_id, {name: array[:k] for name, array in result.items()})
        return kept

    def bare(self) -> Detections:
        """Leave out all fields but boxes, scores and labels.

        Returns:
            `Detections`: A new object that shares their arrays.
        """
        bare = Detections()
        for image_id, result in self._images.items():
            bare._images[image_id] = {name: result[name] for name in ("boxes", "scores", "labels")}
        return bare

    def relabel(self, mapping: Mapping[int, int]) -> Detections:
        """Give every detection a new label and leave out those whose label has none.

        Args:
            mapping (`Mapping[int, int]`): New label of each old one.

        Returns:
            `Detections`: A new object; this one is unchanged.
        """
        relabelled = Detections()
        for image_id, result in self._images.items():
            kept = np.array([label in mapping for label in result["labels"].tolist()], dtype=bool)
            result = {name: array[kept] for name, array in result.items()}
            result["labels"] = np.array([mapping[label] for label in result["labels"].tolist()], dtype=np.int64)
            relabelled.add(image_id, result)
        return relabelled

    @classmethod
    def merge(cls, parts: Iterable[Detections]) -> Detections:
        """Join the results of several processes.

        Distributed samplers repeat pictures to make all shares equal, so a picture that several parts hold counts
        once: its first result is kept.

        Args:
            parts (`Iterable[Detections]`): Results of the processes.

        Returns:
            `Detections`: Every picture once.
        """
        merged = cls()
        for part in parts:
            for image_id in part:
                if image_id not in merged:
                    merged.add(image_id, part[image_id])
        return merged

    def select(self, image_ids: Iterable[int]) -> Detections:
        """Pick pictures, in a new order.

        Args:
            image_ids (`Iterable[int]`): Their ids.

        Returns:
            `Detections`: A new object.
        """
        picked = Detections()
        picked._images = {int(image_id): self._images[image_id] for image_id in image_ids}
        return picked

    def save_arrays(self, path: str | Path) -> None:
        """Write the detections as arrays, to the last bit and with the pictures in which nothing was found.

        Args:
            path (`str` or `Path`): File to write, in numpy's npz format.
        """
        arrays: dict[str, Any] = {"image_ids": np.array(list(self._images), dtype=np.int64)}
        for name in _SHAPES:
            mine = [result.get(name) for result in self._images.values()]
            # A field that a picture does not have is told from one without rows.
            arrays[f"{name}_count"] = np.array([-1 if array is None else len(array) for array in mine], dtype=np.int64)
            rows = [array for array in mine if array is not None]
            if rows:
                arrays[name] = np.concatenate(rows)
        with Path(path).open("wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load_arrays(cls, path: str | Path) -> Detections:
        """Read what `save_arrays` wrote.

        Args:
            path (`str` or `Path`): The file.

        Returns:
            `Detections`: The same as was written.

        Raises:
            ValueError: If the file is damaged or holds what `add` refuses.
        """
        detections = cls()
        try:
            with np.load(path, allow_pickle=False) as arrays:
                image_ids = arrays["image_ids"].tolist()
                results: list[dict[str, Any]] = [{} for _ in image_ids]
                for name in _SHAPES:
                    counts = arrays[f"{name}_count"]
                    stops = np.cumsum(np.maximum(counts, 0))
                    rows = arrays[name] if (counts >= 0).any() else np.empty(0)
                    for result, count, stop in zip(results, counts, stops, strict=True):
                        if count >= 0:
                            result[name] = rows[stop - count : stop]
            for image_id, result in zip(image_ids, results, strict=True):
                detections.add(image_id, result)
        except (BadZipFile, EOFError, KeyError, TypeError, ValueError, zlib.error) as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        return detections

    def to_coco(self, label_map: LabelMap) -> list[dict[str, Any]]:
        """Return the detections as a list of COCO results.

        Besides `image_id`, `category_id`, `bbox` (xywh pixels, rounded to 1e-4) and `score`, an entry carries `query`,
        `objectness`, `class_probability` and `box_scales` where the detector has them. Boxes without width or height
        are left out; `num_boxes_without_size` counts them.

        Args:
            label_map (`LabelMap`): From labels to the category ids of the dataset.

        Returns:
            `list[dict]`: Picture after picture, each by falling score.
        """
        entries, category_ids = [], np.array(label_map.category_ids)
        for image_id, result in self._images.items():
            boxes = _xywh(result["boxes"])
            kept = _has_size(boxes)
            labels = result["labels"][kept]
            for label in labels[(labels < 0) | (labels >= len(category_ids))].tolist():
                label_map.category_id(label)  # which refuses it
            columns = {
                "category_id": category_ids[labels].tolist(),
                "bbox": boxes[kept].tolist(),
                "score": _decimals(result["scores"][kept]),
            }
            columns |= {key: _decimals(result[name][kept]) for name, (_, key) in _OPTIONAL.items() if name in result}
            entries += [
                {"image_id": image_id, **dict(zip(columns, row, strict=True))}
                for row in zip(*columns.values(), strict=True)
            ]
        return entries

    @classmethod
    def from_coco(
        cls, entries: Iterable[Mapping[str, Any]], label_map: LabelMap, image_ids: Iterable[int] = ()
    ) -> Detections:
        """Read a list of COCO results.

        Args:
            entries (`Iterable[Mapping]`): As `to_coco` writes them; only the COCO keys are needed.
            label_map (`LabelMap`): From the category ids of the dataset to labels.
            image_ids (`Iterable[int]`): All pictures that were looked at. A list of results cannot name the pictures
                in which nothing was found.

        Returns:
            `Detections`: The pictures of `image_ids` first, in that order.

        Raises:
            ValueError: If an entry lacks one of COCO's keys or holds something else there, or its category is not in
                the label map; the message has its position.
        """
        groups: dict[int, list[Mapping[str, Any]]] = {int(image_id): [] for image_id in image_ids}
        for position, entry in enumerate(entries):
            _check_entry(position, entry, label_map)
            groups.setdefault(int(entry["image_id"]), []).append(entry)
        detections = cls()
        for image_id, group in groups.items():
            boxes = np.array([entry["bbox"] for entry in group], dtype=np.float64).reshape(-1, 4)
            result = {
                "boxes": np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1),
                "scores": [entry["score"] for entry in group],
                "labels": [label_map.label(entry["category_id"]) for entry in group],
            }
            for name, (_, key) in _OPTIONAL.items():
                if group and all(key in entry for entry in group):
                    result[name] = [entry[key] for entry in group]
            detections.add(image_id, result)
        return detections

    def save(self, path: str | Path, label_map: LabelMap) -> None:
        """Write the detections as a json file of COCO results.

        Args:
            path (`str` or `Path`): File to write; its folder is made.
            label_map (`LabelMap`): From labels to the category ids of the dataset.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(self.to_coco(label_map)))

    @classmethod
    def load(cls, path: str | Path, label_map: LabelMap, image_ids: Iterable[int] = ()) -> Detections:
        """Read a json file of COCO results.

        Args:
            path (`str` or `Path`): File to read.
            label_map (`LabelMap`): From the category ids of the dataset to labels.
            image_ids (`Iterable[int]`): All pictures that were looked at, as in `from_coco`.

        Returns:
            `Detections`: What the file holds.

        Raises:
            ValueError: If it holds no COCO results, or of unknown categories; the message names the file.
        """
        entries = read_json(path)
        if not isinstance(entries, list):
            raise ValueError(f"{path} holds a {type(entries).__name__}; COCO results are a list of dicts.")
        try:
            return cls.from_coco(entries, label_map, image_ids)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _is_number(value: Any) -> bool:
    """Tell whether json has a number here that float32 can hold."""
    if not isinstance(value, _NUMBERS) or isinstance(value, bool):
        return False
    return bool(-_LARGEST <= value <= _LARGEST)


def _is_whole(value: Any) -> bool:
    return _is_number(value) and -(2**63) <= value < 2**63 and value == int(value)


def _is_score(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _are_four(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 4 and all(map(_is_number, value))


# Key of a COCO result -> (whether a value may stand there, the rule in words); the first four must be there.
_RULES = {
    "image_id": (_is_whole, "a whole number"),
    "category_id": (_is_whole, "a whole number"),
    "bbox": (_are_four, "4 numbers that float32 can hold, x, y, width and height"),
    "score": (_is_score, "a number in [0, 1]"),
    "query": (lambda value: _is_whole(value) and value >= 0, "a whole number of at least 0"),
    "objectness": (_is_score, "a number in [0, 1]"),
    "class_probability": (_is_score, "a number in [0, 1]"),
    "box_scales": (lambda value: _are_four(value) and min(value) >= 0, "4 numbers of at least 0"),
}


def _check_entry(position: int, entry: Mapping[str, Any], label_map: LabelMap) -> None:
    """Refuse what is no COCO result."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"entry {position} is {str(entry)[:80]!r}; the rule is a dict, as COCO results are.")
    missing = [key for key in ("image_id", "category_id", "bbox", "score") if key not in entry]
    if missing:
        raise ValueError(f"entry {position} has no {', '.join(missing)}; a COCO result has all four keys.")
    for key, (is_right, rule) in _RULES.items():
        if key in entry and not is_right(entry[key]):
            raise ValueError(f"{key} of entry {position} is {str(entry[key])[:80]!r}; the rule is {rule}.")
    try:
        label_map.label(entry["category_id"])
    except ValueError as error:
        raise ValueError(f"entry {position}: {error}") from None


def _array(name: str, values: Any, image_id: int) -> np.ndarray:
    """Return one field as a checked array on the CPU."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.numpy() if not values.is_floating_point() else values.float().numpy()
    dtype = np.int64 if name in _INTEGERS else np.float64 if name == "boxes" else np.float32
    array = np.asarray(values, dtype=dtype)
    if array.size == 0:
        array = array.reshape(0, *_SHAPES[name])
    if array.shape[1:] != _SHAPES[name] or array.ndim == 0:
        raise ValueError(f"{name} of image_id {image_id} has shape {array.shape}; the rule is (n, *{_SHAPES[name]}).")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} of image_id {image_id} holds numbers that are not finite.")
    return array


def _xywh(boxes: np.ndarray) -> np.ndarray:
    """Return xyxy boxes as xywh, rounded to 1e-4 pixels."""
    return np.round(np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1), 4)


def _has_size(boxes_xywh: np.ndarray) -> np.ndarray:
    """Tell which boxes have width and height."""
    return np.all(boxes_xywh[:, 2:] > 0, axis=1)


def _decimals(array: np.ndarray) -> Sequence[Any]:
    """Return numbers for json: the shortest decimals that read back as the same float32, and integers as they are."""
    if array.dtype == np.int64:
        return array.tolist()
    exact = array.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        exponent = np.where(exact == 0, 0, np.floor(np.log10(np.abs(exact))))
        decimals = exact.copy()
        for digits in (9, 8, 7, 6):  # float32 has at least 6 of them, and 9 always do
            scale = 10.0 ** (digits - 1 - exponent)
            rounded = np.rint(exact * scale) / scale
            decimals = np.where(rounded.astype(np.float32) == array, rounded, decimals)
    return decimals.tolist()
