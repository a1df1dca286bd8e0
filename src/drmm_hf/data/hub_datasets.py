"""Whatever `datasets.load_dataset` reads: Hub ids, parquet, image folders with metadata; whole or as a stream."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, IterableDataset, Value

from .canonical import FEATURES, Records, annotation_dataset, check_records, dataset_info, with_pictures
from .pictures import displayed_size, open_image
from .problems import Policy, Problems


logger = logging.getLogger(__name__)

BoxFormat = Literal["xywh", "xyxy", "cxcywh"]
_EVIDENCE_ROWS = 256  # rows of a stream that must prove the box format


def hub_splits(
    source: str,
    given: Iterable[Mapping[str, Any]] | None = None,
    bbox_format: BoxFormat | None = None,
    alone: str | None = None,
) -> dict[str, Callable[[Problems], Dataset]]:
    """Find the splits of a dataset that `datasets` loads.

    Args:
        source (`str`): What `datasets.load_dataset` takes: a Hub id or a folder.
        given (`Iterable[Mapping]`, *optional*): Categories, where the category column is no `ClassLabel`.
        bbox_format (`str`, *optional*): Format of the boxes; proven by themselves where it is None.
        alone (`str`, *optional*): Name of the only split to fetch.

    Returns:
        `dict`: Split -> function that reads it.

    Raises:
        ValueError: If the box format is unknown.
    """
    _check_format(bbox_format)
    _check_place(source)
    splits = datasets.load_dataset(source) if alone is None else {alone: _fetch(source, alone)}
    categories = None if given is None else [dict(record) for record in given]
    return {split: partial(_read, splits, split, source, categories, bbox_format) for split in splits}


def hub_stream(
    source: str,
    split: str,
    given: Iterable[Mapping[str, Any]] | None,
    bbox_format: BoxFormat | None,
    invalid: Policy,
    problems: Problems | None = None,
) -> IterableDataset:
    """Open a split as a stream of canonical rows, checked as they pass.

    Args:
        source (`str`): What `datasets.load_dataset` takes.
        split (`str`): Name of the split, as it stands there.
        given (`Iterable[Mapping]`, *optional*): Categories, where the category column is no `ClassLabel`.
        bbox_format (`str`, *optional*): Format of the boxes; proven by the first rows where it is None.
        invalid (`"error"` or `"skip"`): Policy. Ids that occur twice are not noticed in a stream.
        problems (`Problems`, *optional*): Where to record what is left out; otherwise each is logged.

    Returns:
        `IterableDataset`: With `FEATURES`. Ids that the source lacks are hashes, equal wherever the row is read.

    Raises:
        ValueError: If the categories are not known beforehand, or the box format is not proven.
    """
    _check_format(bbox_format)
    _check_place(source)
    stream = datasets.load_dataset(source, split=split, streaming=True)
    if stream.features is None:
        stream = stream._resolve_features()
    where = f"{source}, split {split}"
    key, records, id_of = _category_column({split: stream}, split, source, given)
    raw = stream.cast_column("image", datasets.Image(decode=False))
    if bbox_format is None:
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for position, record in enumerate(raw.take(_EVIDENCE_ROWS)):
            image_id = _stream_id(record)
            place = f"{where}, row {position}"
            _add_row(images, annotations, record, record["image"], image_id, place, key, id_of, Problems())
        bbox_format = _proven(images, annotations, where)
    check = partial(_stream_row, key=key, categories=records, id_of=id_of, box=bbox_format, where=where)
    rows = raw.map(
        partial(check, policy=invalid, left_out=problems),
        remove_columns=[name for name in stream.features if name not in FEATURES],
    )
    if invalid == "skip":
        rows = rows.filter(lambda width: width > 0, input_columns="width")
    rows = rows.cast(FEATURES)  # not in map, after which the pictures could not be left undecoded any more
    rows.info.description = dataset_info(records).description
    return rows


def prove_box_format(boxes: np.ndarray, image_sizes: np.ndarray, areas: np.ndarray | None = None) -> BoxFormat:
    """Tell in which format boxes are written, by what would be impossible in the others.

    A box contradicts a format if it would have no extent, leave its picture by more than 2 pixels, or be smaller than
    the area of its object. Where the areas are those of the boxes (99 % agree with one format), any other area
    contradicts as well. A format is proven when at most 1 % of the boxes contradict it, and at least 5 % and 3 boxes
    contradict each other one.

    Args:
        boxes (`np.ndarray` of shape `(N, 4)`): Four numbers a box.
        image_sizes (`np.ndarray` of shape `(N, 2)`): Height and width of each box's picture in pixels.
        areas (`np.ndarray` of shape `(N,)`, *optional*): Area of each object in square pixels, nan where unknown.

    Returns:
        `str`: `xywh`, `xyxy` or `cxcywh`; the evidence is logged, as a warning, since it is a conclusion to look at.

    Raises:
        ValueError: If nothing is proven; the message holds the evidence.
    """
    boxes, image_sizes = np.asarray(boxes, float).reshape(-1, 4), np.asarray(image_sizes, float).reshape(-1, 2)
    areas = np.full(len(boxes), np.nan) if areas is None else np.asarray(areas, float)
    height, width = image_sizes.T
    against: dict[BoxFormat, np.ndarray] = {}
    exact: dict[BoxFormat, np.ndarray] = {}
    for box_format in _TO_XYWH:
        x, y, w, h = _TO_XYWH[box_format](boxes).T
        outside = (x < -2) | (y < -2) | (x + w > width + 2) | (y + h > height + 2)
        too_small = areas > w * h + w + h + 1  # a rasterised outline may reach half a pixel beyond its box
        against[box_format] = (w <= 0) | (h <= 0) | outside | too_small
        exact[box_format] = np.abs(areas - w * h) <= 0.01 * np.abs(areas) + 1
    with_area = ~np.isnan(areas)
    if with_area.any() and max(matches[with_area].mean() for matches in exact.values()) >= 0.99:
        against = {box_format: against[box_format] | with_area & ~exact[box_format] for box_format in against}
    counts = {box_format: int(contradicts.sum()) for box_format, contradicts in against.items()}
    evidence = ", ".join(f"{count} contradict {box_format}" for box_format, count in counts.items())
    best = min(counts, key=counts.__getitem__)
    others = min(count for box_format, count in counts.items() if box_format != best)
    if counts[best] > 0.01 * len(boxes) or others < max(3, 0.05 * len(boxes)):
        raise ValueError(f"bbox_format is not proven by the {len(boxes)} boxes ({evidence}): give it explicitly")
    logger.warning("bbox_format was taken to be %s: of %d boxes, %s", best, len(boxes), evidence)
    return best


_TO_XYWH: dict[BoxFormat, Callable[[np.ndarray], np.ndarray]] = {
    "xywh": lambda boxes: boxes,
    "xyxy": lambda boxes: np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1),
    "cxcywh": lambda boxes: np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]], axis=1),
}


def _check_format(bbox_format: str | None) -> None:
    if bbox_format is not None and bbox_format not in _TO_XYWH:
        raise ValueError(f"bbox_format is {bbox_format!r}, must be one of {list(_TO_XYWH)}")


def _check_place(source: str) -> None:
    """Refuse the path of a folder that does not exist before the Hub is asked for it, which may take half a minute."""
    path = Path(source)
    if not path.exists() and (source.startswith(("/", ".", "~")) or (path.parent != Path() and path.parent.is_dir())):
        raise FileNotFoundError(f"data {source!r} does not exist; the rule is a folder, or an id on the Hub.")


def _fetch(source: str, split: str) -> Dataset:
    """Fetch the files of one split; asked for a split, `datasets` fetches all of them."""
    builder = datasets.load_dataset_builder(source)
    return datasets.load_dataset(
        source,
        data_files={split: list(builder.config.data_files[split])},
        split=split,
        features=builder.info.features,  # which the card may have, and not the files
        verification_mode="no_checks",  # the card counts all splits
    )


def _read(
    splits: Mapping[str, Dataset],
    split: str,
    source: str,
    given: list[dict[str, Any]] | None,
    bbox_format: BoxFormat | None,
    problems: Problems,
) -> Dataset:
    fingerprints = [(name, dataset._fingerprint) for name, dataset in splits.items()]
    key = repr((1, source, split, fingerprints, given, bbox_format)).encode()
    fingerprint = hashlib.blake2b(key, digest_size=16).hexdigest()

    def read() -> Records:
        return _records(splits, split, source, given, bbox_format, problems)

    annotations = annotation_dataset(read, problems, fingerprint)
    first = {image_id: row for row, image_id in reversed(list(enumerate(_image_ids(splits[split]))))}
    rows = [first[image_id] for image_id in annotations["image_id"]]
    pictures = splits[split].select_columns("image")
    if len(rows) < len(pictures):
        pictures = pictures.select(rows).flatten_indices()
    return with_pictures(annotations, pictures)


def _image_ids(dataset: Dataset) -> list[Any]:
    """Return the image ids, the number of the row where there is none."""
    if "image_id" not in dataset.features:
        return list(range(len(dataset)))
    return [row if image_id is None else image_id for row, image_id in enumerate(dataset["image_id"])]


def _records(
    splits: Mapping[str, Dataset],
    split: str,
    source: str,
    given: list[dict[str, Any]] | None,
    bbox_format: BoxFormat | None,
    problems: Problems,
) -> Records:
    key, categories, id_of = _category_column(splits, split, source, given)
    dataset, where = splits[split], f"{source}, split {split}"
    raw = dataset.select_columns("image").cast_column("image", datasets.Image(decode=False))
    there = [name for name in ("width", "height", "objects") if name in dataset.features]
    paths = pc.struct_field(raw.data.column("image"), "path").to_pylist() if raw._indices is None else None
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    rows = zip(_image_ids(dataset), dataset.select_columns(there), strict=True)
    for position, (image_id, record) in enumerate(rows):
        path = paths[position] if paths is not None and {"width", "height"} <= record.keys() else None
        image = {"bytes": None, "path": path} if path else raw[position]["image"]
        place = f"{where}, row {position}"
        _add_row(images, annotations, record, image, image_id, place, key, id_of, problems)
    names = [record["file_name"] for record in images]
    if len(set(names)) < len(names):  # pictures of several folders
        for record in images:
            record["file_name"] = f"{record['id']}{PurePosixPath(record['file_name']).suffix}"
    if annotations:
        box_format = bbox_format or _proven(images, annotations, where)
        for record in annotations:
            record["bbox"] = _xywh(record["bbox"], box_format)
    for number, record in enumerate(annotations, start=1):
        record["id"] = number if record["id"] is None else record["id"]
    return Records(where, images, annotations, categories)


def _add_row(
    images: list[dict[str, Any]],
    annotations: list[dict[str, Any]],
    record: Mapping[str, Any],
    image: Mapping[str, Any] | None,
    image_id: Any,
    where: str,
    key: str,
    id_of: Callable[[Any], Any],
    problems: Problems,
) -> None:
    """Add the records of a row, boxes in the format of the source."""
    if image is None or (image["bytes"] is None and image["path"] is None):
        problems.add("missing_picture", where, "image is empty")
        return
    try:
        objects = _object_list(record.get("objects"))
    except ValueError as error:
        problems.add("bad_record", where, error)
        return
    width, height, name = record.get("width"), record.get("height"), image["path"]
    try:
        if width is None or height is None:
            width, height = displayed_size(open_image(image))
        if not name:
            image_format = open_image(image).format
            assert image_format is not None  # whatever was opened has one
            name = f"{image_id}.{image_format.lower()}"
        name = Path(name).name
    except Exception as error:  # decoders of broken files raise whatever they stumble over
        problems.add("unreadable_picture", where, f"cannot be read: {error}")
        return
    images.append({"id": image_id, "file_name": name, "width": width, "height": height, "where": where})
    for index, item in enumerate(objects):
        fields = {name: item.get(name) for name in ("id", "bbox", "area", "iscrowd")}
        place = f"{where} (image {image_id}), objects[{index}]"
        annotations.append({**fields, "image_id": image_id, "category_id": id_of(item[key]), "where": place})


def _proven(images: list[dict[str, Any]], annotations: list[dict[str, Any]], where: str) -> BoxFormat:
    """Prove the box format from all boxes that are four numbers."""
    sizes = {record["id"]: (record["height"], record["width"]) for record in images}
    fair = [record for record in annotations if _is_box(record["bbox"])]
    areas = np.array([record["area"] for record in fair], dtype=float)  # None becomes nan
    boxes = np.array([record["bbox"] for record in fair], dtype=float)
    try:
        return prove_box_format(boxes, np.array([sizes[record["image_id"]] for record in fair], dtype=float), areas)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _xywh(bbox: Any, box_format: BoxFormat) -> Any:
    return _TO_XYWH[box_format](np.array([bbox], dtype=float))[0].tolist() if _is_box(bbox) else bbox


def _is_box(bbox: Any) -> bool:
    return isinstance(bbox, list) and len(bbox) == 4 and None not in bbox and bool(np.isfinite(bbox).all())


def _category_column(
    splits: Mapping[str, Dataset | IterableDataset],
    split: str,
    source: str,
    given: Iterable[Mapping[str, Any]] | None,
) -> tuple[str, list[dict[str, Any]], Callable[[Any], Any]]:
    """Find the category column: its key in `objects`, the categories, and the map from an entry to a category id."""
    features = splits[split].features
    for column in ("image", "objects"):
        if column not in features:
            raise ValueError(f"{source}, split {split} has no column {column!r}: it has {list(features)}")
    objects = features["objects"]
    fields = objects if isinstance(objects, dict) else objects.feature  # a dict of lists, or a list of dicts
    key = next((key for key in ("category", "category_id") if key in fields), None)
    if key is None or "bbox" not in fields:
        raise ValueError(f"{source}: objects has {list(fields)}, needs bbox and category or category_id")
    feature = fields[key].feature if isinstance(objects, dict) else fields[key]
    if isinstance(feature, ClassLabel):
        names = list(enumerate(feature.names))
    elif given is None:
        if isinstance(splits[split], IterableDataset):
            raise ValueError(f"{source} names no categories, and a stream is not searched for them: give categories")
        entries: set[Any] = set()
        for dataset in splits.values():
            for record in dataset.select_columns("objects"):
                objects = record["objects"]
                columns = objects[key] if isinstance(objects, dict) else [item[key] for item in objects or []]
                entries.update(columns or [])
        textual = all(isinstance(entry, str) for entry in entries)
        names = [(index if textual else entry, str(entry)) for index, entry in enumerate(sorted(entries))]
        logger.warning("%s names no categories; the entries that occur in its splits were taken: %s", source, names)
    records = [{"id": number, "name": name} for number, name in names] if given is None else [dict(r) for r in given]
    if feature == Value("string"):
        ids = {record["name"]: record["id"] for record in records}
        return key, records, lambda entry: ids.get(entry, entry)
    return key, records, lambda entry: entry


def _object_list(objects: Any) -> list[dict[str, Any]]:
    """Return the annotations of a row as a list of dicts, from a dict of lists or a list of dicts."""
    if not isinstance(objects, dict):
        return [dict(item) for item in objects or []]
    lengths = {key: len(values) for key, values in objects.items() if values is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the lists of objects differ in length: {lengths}")
    return [{key: objects[key][i] for key in lengths} for i in range(next(iter(lengths.values()), 0))]


# Streams -------------------------------------------------------------------------------------------------------------


def _stream_row(
    record: Mapping[str, Any],
    key: str,
    categories: list[dict[str, Any]],
    id_of: Callable[[Any], Any],
    box: BoxFormat,
    where: str,
    policy: Policy,
    left_out: Problems | None,
) -> dict[str, Any]:
    """Check one row; what is left out has width 0."""
    image_id, problems = _stream_id(record), Problems()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    _add_row(images, annotations, record, record["image"], image_id, where, key, id_of, problems)
    for position, item in enumerate(annotations):
        item["bbox"] = _xywh(item["bbox"], box)
        item["id"] = _number(f"{image_id}/{position}".encode()) if item["id"] is None else item["id"]
    rows = check_records(Records(where, images, annotations, categories), problems).to_pylist()
    if policy == "skip" and left_out is not None:
        left_out.merge(problems.found)
    else:
        problems.settle(f"{where}, picture {image_id}", policy)
    if rows:
        return {**rows[0], "image": record["image"]}
    return {"image_id": 0, "file_name": "", "image": None, "width": 0, "height": 0, "objects": []}


def _stream_id(record: Mapping[str, Any]) -> int:
    """Return the id of a row, a hash of the picture where there is none."""
    if record.get("image_id") is not None:
        return record["image_id"]
    image = record["image"] or {"bytes": b"", "path": None}
    return _number(image["bytes"] if image["bytes"] is not None else str(image["path"]).encode())


def _number(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1
