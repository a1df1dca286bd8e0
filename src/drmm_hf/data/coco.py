"""COCO annotation files and `datasets` sources -> one `datasets.Dataset` schema, and back to a COCO folder.

Every loader returns a dataset with `FEATURES`: category ids, annotation ids, crowd flags and areas as they stand in
the source, boxes as (x, y, width, height) in pixels of the original picture, pictures decoded on access. Categories
travel as json in `dataset.info.description`, which the operations of `datasets` (select, filter, map, save_to_disk)
keep; read them with `categories(dataset)`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetInfo, Features, List, Value
from PIL import ExifTags, Image


logger = logging.getLogger(__name__)

FEATURES = Features(
    {
        "image_id": Value("int64"),
        "file_name": Value("string"),
        "image": datasets.Image(),
        "width": Value("int64"),
        "height": Value("int64"),
        "objects": List(
            {
                "id": Value("int64"),
                "category_id": Value("int64"),
                "bbox": List(Value("float64"), length=4),
                "area": Value("float64"),
                "iscrowd": Value("int64"),
            }
        ),
    }
)

BoxFormat = Literal["xywh", "xyxy", "cxcywh"]
_LISTED = 5  # how many culprits an error message names


def load_coco(
    annotation_file: str | Path, image_dir: str | Path, *, invalid: Literal["error", "skip"] = "error"
) -> Dataset:
    """Load a COCO instances file and its image folder.

    Args:
        annotation_file (`str` or `Path`): Json with `images`, `annotations` and `categories`. A missing `area` becomes
            width times height, a missing `iscrowd` 0; other fields (segmentations, licences) are not read.
        image_dir (`str` or `Path`): The folder that the file names are relative to.
        invalid (`"error"` or `"skip"`): What to do about boxes without area inside their picture.

    Returns:
        `Dataset`: One row an image, in the order of the file, with `FEATURES`. Pictures stay on disk.

    Raises:
        ValueError: If the json, an id, a file name, a category or a box is wrong; the message names the file and the
            annotation.
        FileNotFoundError: If the annotation file or a picture does not exist.
    """
    content = _read_annotations(Path(annotation_file))
    return _coco_dataset(content, Path(annotation_file), Path(image_dir), invalid)


def load_detection_dataset(
    source: str | Path,
    split: str,
    *,
    images: str | Path | None = None,
    annotations: str | Path | None = None,
    categories: Iterable[Mapping[str, Any]] | None = None,
    bbox_format: BoxFormat | None = None,
    invalid: Literal["error", "skip"] = "error",
) -> Dataset:
    """Load one split of a detection dataset, whatever it is stored as.

    Args:
        source (`str` or `Path`): A COCO folder (see `coco_paths`), the id of a dataset on the Hub, or a folder that
            `datasets.load_dataset` reads (imagefolder with `metadata.jsonl` or `metadata.csv`, parquet, ...).
        split (`str`): Name of the split.
        images (`str` or `Path`, *optional*): Image folder, where it is not one of the usual places.
        annotations (`str` or `Path`, *optional*): Annotation file, where it is not
            `<source>/annotations/instances_<split>.json`.
        categories (`Iterable[Mapping]`, *optional*): Records with `id` and `name`. For `datasets` sources whose
            category column is not a `ClassLabel`; by default the ids that occur in any split, named by their number.
        bbox_format (`str`, *optional*): `xywh`, `xyxy` or `cxcywh`, in pixels. For `datasets` sources; by default the
            boxes must prove it themselves: all other formats contradict the picture sizes or the areas.
        invalid (`"error"` or `"skip"`): What to do about boxes without area inside their picture.

    Returns:
        `Dataset`: One row an image with `FEATURES`.

    Raises:
        ValueError: If the split is unknown, the source is not understood or an annotation is wrong.
        FileNotFoundError: If a file is missing.
    """
    found = _find_coco(Path(source), split, images, annotations)
    if found is not None:
        content, annotation_file, image_dir = found
        for argument, value in (("categories", categories), ("bbox_format", bbox_format)):
            if value is not None:
                raise ValueError(
                    f"{argument} does not apply to COCO annotations ({annotation_file}): the file says it itself"
                )
        return _coco_dataset(content, annotation_file, image_dir, invalid)
    splits = datasets.load_dataset(str(source))
    if split not in splits:
        raise ValueError(f"split {split!r} is not in {source}: it has {sorted(splits)}")
    return _from_datasets(splits, split, str(source), categories, bbox_format, invalid)


def coco_paths(
    source: str | Path, split: str, *, images: str | Path | None = None, annotations: str | Path | None = None
) -> tuple[Path, Path] | None:
    """Find the annotation file and the image folder of one split of a COCO folder.

    Args:
        source (`str` or `Path`): The folder. Annotations are `annotations/instances_<split>.json`; pictures are in
            `<split>/`, `images/<split>/`, `images/` or the folder itself, whichever holds the first picture listed.
        split (`str`): Name of the split.
        images (`str` or `Path`, *optional*): Image folder to use instead.
        annotations (`str` or `Path`, *optional*): Annotation file to use instead.

    Returns:
        `tuple[Path, Path]` or None: Annotation file and image folder; None if `source` holds no COCO annotations.

    Raises:
        ValueError: If the folder has COCO annotations, but not of this split.
        FileNotFoundError: If no folder holds the pictures.
    """
    found = _find_coco(Path(source), split, images, annotations)
    return None if found is None else found[1:]


def categories(dataset: Dataset) -> list[dict[str, Any]]:
    """Return the categories of a canonical dataset.

    Args:
        dataset (`Dataset`): A dataset of this module, or anything `datasets` derived from one.

    Returns:
        `list[dict]`: Records with `id` and `name`, in the order of the source.

    Raises:
        ValueError: If the dataset carries no categories.
    """
    try:
        return json.loads(dataset.info.description)["categories"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(
            "dataset carries no categories: load it with load_detection_dataset or build it with canonical_dataset"
        ) from None


def canonical_dataset(rows: Iterable[Mapping[str, Any]], categories: Iterable[Mapping[str, Any]]) -> Dataset:
    """Build a dataset with `FEATURES` from rows in memory, without checking them.

    Args:
        rows (`Iterable[Mapping]`): One record an image with the keys of `FEATURES`; `image` is a path, a PIL image or
            `{"bytes": ..., "path": ...}`.
        categories (`Iterable[Mapping]`): Records with `id` and `name`.

    Returns:
        `Dataset`: The rows in the same order.
    """
    rows = list(rows)
    columns = {name: [row[name] for row in rows] for name in FEATURES}
    return Dataset.from_dict(columns, features=FEATURES, info=_info(categories))


def save_coco(dataset: Dataset, folder: str | Path, split: str) -> Path:
    """Write a canonical dataset as one split of a COCO folder; pictures are copied byte for byte.

    Args:
        dataset (`Dataset`): A dataset with `FEATURES`.
        folder (`str` or `Path`): The COCO folder, created if needed.
        split (`str`): Name of the split: pictures in `<folder>/<split>/`.

    Returns:
        `Path`: The annotation file, `<folder>/annotations/instances_<split>.json`.

    Raises:
        ValueError: If two images share a file name.
    """
    folder = Path(folder)
    annotation_file = folder / "annotations" / f"instances_{split}.json"
    annotation_file.parent.mkdir(parents=True, exist_ok=True)
    images, annotations, names = [], [], set()
    for row in dataset.cast_column("image", datasets.Image(decode=False)):
        if row["file_name"] in names:
            raise ValueError(
                f"file_name {row['file_name']!r} occurs twice (image {row['image_id']}): names must differ"
            )
        names.add(row["file_name"])
        target = _inside(folder / split, row["file_name"], f"image {row['image_id']}")
        target.parent.mkdir(parents=True, exist_ok=True)
        if row["image"]["bytes"] is None:
            shutil.copyfile(row["image"]["path"], target)
        else:
            target.write_bytes(row["image"]["bytes"])
        images.append({"id": row["image_id"], **{key: row[key] for key in ("file_name", "width", "height")}})
        annotations += [{"image_id": row["image_id"], **item} for item in row["objects"]]
    content = {"images": images, "annotations": annotations, "categories": categories(dataset)}
    annotation_file.write_text(json.dumps(content), encoding="utf-8")
    return annotation_file


# COCO ----------------------------------------------------------------------------------------------------------------


def _find_coco(
    folder: Path, split: str, images: str | Path | None, annotations: str | Path | None
) -> tuple[dict[str, Any], Path, Path] | None:
    """Find and read a COCO split: the content of its annotation file, the file, the image folder."""
    annotation_file = folder / "annotations" / f"instances_{split}.json" if annotations is None else Path(annotations)
    if annotations is None and not annotation_file.is_file():
        files = annotation_file.parent.glob("instances_*.json")
        known = sorted(path.stem.removeprefix("instances_") for path in files)
        if known:
            raise ValueError(f"split {split!r} is not in {annotation_file.parent}: it has {known}")
        if images is not None:
            raise ValueError(f"images is given, but {annotation_file} does not exist: give annotations as well")
        return None
    content = _read_annotations(annotation_file)
    if images is not None:
        return content, annotation_file, Path(images)
    candidates = [folder / split, folder / "images" / split, folder / "images", folder]
    first = str(next(iter(content["images"]), {}).get("file_name", ""))
    for candidate in candidates:
        if (candidate / first).exists():
            return content, annotation_file, candidate
    tried = ", ".join(str(candidate) for candidate in candidates)
    raise FileNotFoundError(f"{annotation_file}: picture {first!r} is in none of {tried}; name its folder with images")


def _read_annotations(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"annotation file {path} does not exist")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bad json, or bytes that are not utf-8
        raise ValueError(f"{path} is not valid json: {error}") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(
                f"{path} has no list {key!r}: COCO instances files hold images, annotations and categories"
            )
        for position, record in enumerate(content[key]):
            if not isinstance(record, dict):
                raise ValueError(f"{path}: {key}[{position}] is {record!r}, must be an object")
    return content


def _coco_dataset(content: dict[str, Any], source: Path, image_dir: Path, invalid: str) -> Dataset:
    labels = _checked_categories(content["categories"], str(source))
    rows: dict[int, dict[str, Any]] = {}
    for position, record in enumerate(content["images"]):
        where = f"{source}: images[{position}] (id {record.get('id')!r})"
        image_id = _integer(record, "id", where)
        if image_id in rows:
            raise ValueError(f"{where}: the id is taken by {rows[image_id]['file_name']!r}; image ids must differ")
        size = {key: _integer(record, key, where, least=1) for key in ("width", "height")}
        name = record.get("file_name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{where}: file_name is {name!r}, must be a path relative to the image folder")
        path = _inside(image_dir, name, where)
        rows[image_id] = {"image_id": image_id, "file_name": name, "image": str(path), **size, "objects": []}

    missing = [row for row in rows.values() if not os.path.isfile(row["image"])]
    if missing:
        listed = ", ".join(f"{row['file_name']!r} (image {row['image_id']})" for row in missing[:_LISTED])
        raise FileNotFoundError(f"{source}: {len(missing)} of {len(rows)} pictures are not in {image_dir}: {listed}")

    for position, record in enumerate(content["annotations"]):
        where = f"{source}: annotations[{position}] (id {record.get('id')!r})"
        image_id = _integer(record, "image_id", where)
        if image_id not in rows:
            raise ValueError(f"{where}: image_id {image_id} is not among the {len(rows)} images of the file")
        rows[image_id]["objects"].append({**_canonical_object(record, labels, where), "where": where})
    _check_annotation_ids(rows.values())
    return canonical_dataset(_without_invalid(list(rows.values()), str(source), invalid), content["categories"])


def _checked_categories(records: Sequence[Mapping[str, Any]], source: str) -> dict[int, str]:
    names: dict[int, str] = {}
    for position, record in enumerate(records):
        where = f"{source}: categories[{position}]"
        category_id = _integer(record, "id", where)
        if category_id in names:
            raise ValueError(f"{where}: id {category_id} is taken by {names[category_id]!r}; category ids must differ")
        if not isinstance(record.get("name"), str):
            raise ValueError(f"{where}: name is {record.get('name')!r}, must be a string")
        names[category_id] = record["name"]
    if not names:
        raise ValueError(f"{source}: categories is empty; every annotation needs one")
    return names


def _canonical_object(record: Mapping[str, Any], known: Mapping[int, str], where: str) -> dict[str, Any]:
    """Check one annotation, except for its box having an area, and bring it into the schema."""
    category_id = _integer(record, "category_id", where)
    if category_id not in known:
        raise ValueError(f"{where}: category_id {category_id} is not among the categories {sorted(known)}")
    bbox = _checked_bbox(record, where)
    area = record.get("area")
    if area is None:
        area = bbox[2] * bbox[3]
    elif not _is_finite(area) or area < 0:
        raise ValueError(f"{where}: area is {area!r}, must be a finite number of at least 0")
    crowd = record.get("iscrowd")
    if crowd not in (None, 0, 1):
        raise ValueError(f"{where}: iscrowd is {crowd!r}, must be 0 or 1")
    annotation_id = _integer(record, "id", where)
    return {
        "id": annotation_id,
        "category_id": category_id,
        "bbox": bbox,
        "area": float(area),
        "iscrowd": int(crowd or 0),
    }


def _checked_bbox(record: Mapping[str, Any], where: str) -> list[float]:
    bbox = record.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_finite, bbox)):
        raise ValueError(f"{where}: bbox is {bbox!r}, must be 4 finite numbers")
    return [float(value) for value in bbox]


def _check_annotation_ids(rows: Iterable[Mapping[str, Any]]) -> None:
    seen: dict[int, str] = {}
    for row in rows:
        for item in row["objects"]:
            if item["id"] in seen:
                raise ValueError(f"{item['where']}: the id is taken by {seen[item['id']]}; annotation ids must differ")
            seen[item["id"]] = item["where"]


def _without_invalid(rows: list[dict[str, Any]], source: str, invalid: str) -> list[dict[str, Any]]:
    """Apply the policy for boxes without area inside their picture, and drop the bookkeeping key `where`."""
    if invalid not in ("error", "skip"):
        raise ValueError(f"invalid is {invalid!r}, must be 'error' or 'skip'")
    culprits, total = [], 0
    for row in rows:
        kept = []
        for item in row["objects"]:
            x, y, width, height = item["bbox"]
            total += 1
            inside = min(x + width, row["width"]) > max(x, 0) and min(y + height, row["height"]) > max(y, 0)
            where = item.pop("where")
            if width > 0 and height > 0 and inside:
                kept.append(item)
            else:
                culprits.append(f"{where}: {item['bbox']} in a picture of {row['width']} x {row['height']}")
        row["objects"] = kept
    if culprits:
        text = f"{source}: {len(culprits)} of {total} boxes have no area inside their picture"
        if invalid == "error":
            listed = "\n  ".join(culprits[:_LISTED])
            raise ValueError(f"{text}; correct them, or leave them out with invalid='skip'. The first:\n  {listed}")
        logger.warning("%s and were left out; the first: %s", text, culprits[0])
    return rows


def _inside(folder: Path, name: str, where: str) -> Path:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or Path(name).is_absolute():
        raise ValueError(
            f"{where}: file_name {name!r} leaves the image folder {folder}; it must be relative, without '..'"
        )
    return folder.absolute() / path


def _integer(record: Mapping[str, Any], key: str, where: str, least: int | None = None) -> int:
    value = record.get(key)
    if isinstance(value, bool) or not (isinstance(value, int) or isinstance(value, float) and value.is_integer()):
        raise ValueError(f"{where}: {key} is {value!r}, must be an integer")
    if least is not None and value < least:
        raise ValueError(f"{where}: {key} is {value!r}, must be at least {least}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{where}: {key} is {value!r}, must fit into 64 bits")
    return int(value)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _info(categories: Iterable[Mapping[str, Any]]) -> DatasetInfo:
    records = [{"id": int(record["id"]), "name": str(record["name"])} for record in categories]
    return DatasetInfo(description=json.dumps({"categories": records}), features=FEATURES)


# `datasets` sources --------------------------------------------------------------------------------------------------


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
        `str`: `xywh`, `xyxy` or `cxcywh`; the evidence is logged.

    Raises:
        ValueError: If nothing is proven; the message holds the evidence.
    """
    boxes, image_sizes = np.asarray(boxes, float).reshape(-1, 4), np.asarray(image_sizes, float).reshape(-1, 2)
    areas = np.full(len(boxes), np.nan) if areas is None else np.asarray(areas, float)
    height, width = image_sizes.T
    against, exact = {}, {}
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
    logger.info("bbox_format %s: of %d boxes, %s", best, len(boxes), evidence)
    return best


_TO_XYWH = {
    "xywh": lambda boxes: boxes,
    "xyxy": lambda boxes: np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1),
    "cxcywh": lambda boxes: np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]], axis=1),
}


def _from_datasets(
    splits: Mapping[str, Dataset],
    split: str,
    source: str,
    given: Iterable[Mapping[str, Any]] | None,
    bbox_format: BoxFormat | None,
    invalid: str,
) -> Dataset:
    key, records, id_of = _category_column(splits, split, source, given)
    known = _checked_categories(records, source)
    images = splits[split].select_columns("image").cast_column("image", datasets.Image(decode=False))["image"]

    rows: list[dict[str, Any]] = []
    found: list[tuple[dict[str, Any], dict[str, Any], str]] = []  # annotation, its row, where it stands
    for position, (image, record) in enumerate(zip(images, splits[split].remove_columns("image"), strict=True)):
        where = f"{source}, split {split}, row {position}"
        if image is None:
            raise ValueError(f"{where}: image is empty")
        image_id = position if record.get("image_id") is None else _integer(record, "image_id", where)
        row = {"image_id": image_id, "file_name": _file_name(image, image_id), "image": image, "objects": []}
        if record.get("width") is None or record.get("height") is None:
            row["width"], row["height"] = displayed_size(open_image(image))
        else:
            row |= {side: _integer(record, side, where, least=1) for side in ("width", "height")}
        rows.append(row)
        for index, item in enumerate(_object_list(record["objects"], where)):
            place = f"{where} (image {image_id}), objects[{index}]"
            annotation_id = len(found) + 1 if item.get("id") is None else item["id"]
            item |= {"id": annotation_id, "category_id": id_of(item[key]), "bbox": _checked_bbox(item, place)}
            found.append((item, row, place))

    if len({row["image_id"] for row in rows}) < len(rows):
        raise ValueError(f"{source}, split {split}: an image_id occurs twice; image ids must differ")
    if len({row["file_name"] for row in rows}) < len(rows):  # pictures of several folders
        for row in rows:
            row["file_name"] = f"{row['image_id']}{PurePosixPath(row['file_name']).suffix}"
    if found:
        boxes = np.array([item["bbox"] for item, _, _ in found])
        sizes = np.array([(row["height"], row["width"]) for _, row, _ in found])
        areas = np.array([item.get("area") for item, _, _ in found], dtype=float)  # None becomes nan
        bbox_format = bbox_format or prove_box_format(boxes, sizes, areas)
        if bbox_format not in _TO_XYWH:
            raise ValueError(f"bbox_format is {bbox_format!r}, must be one of {list(_TO_XYWH)}")
        for (item, row, place), bbox in zip(found, _TO_XYWH[bbox_format](boxes).tolist(), strict=True):
            row["objects"].append({**_canonical_object({**item, "bbox": bbox}, known, place), "where": place})
    _check_annotation_ids(rows)
    return canonical_dataset(_without_invalid(rows, f"{source}, split {split}", invalid), records)


def _category_column(
    splits: Mapping[str, Dataset], split: str, source: str, given: Iterable[Mapping[str, Any]] | None
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
        entries = {
            item[key]
            for name, dataset in splits.items()
            for position, record in enumerate(dataset.select_columns("objects"))
            for item in _object_list(record["objects"], f"{source}, split {name}, row {position}")
        }
        textual = all(isinstance(entry, str) for entry in entries)
        names = [(index if textual else entry, str(entry)) for index, entry in enumerate(sorted(entries))]
        logger.warning("%s names no categories; the entries that occur in its splits were taken: %s", source, names)
    records = [{"id": number, "name": name} for number, name in names] if given is None else [dict(r) for r in given]
    if feature == Value("string"):
        ids = {record["name"]: record["id"] for record in records}
        return key, records, lambda entry: ids.get(entry, entry)
    return key, records, lambda entry: entry


def _object_list(objects: Any, where: str) -> list[dict[str, Any]]:
    """Return the annotations of a row as a list of dicts, from a dict of lists or a list of dicts."""
    if not isinstance(objects, dict):
        return [dict(item) for item in objects or []]
    lengths = {key: len(values) for key, values in objects.items() if values is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{where}: the lists of objects differ in length: {lengths}")
    return [{key: objects[key][i] for key in lengths} for i in range(next(iter(lengths.values()), 0))]


def _file_name(image: Mapping[str, Any], image_id: int) -> str:
    return Path(image["path"]).name if image["path"] else f"{image_id}.{open_image(image).format.lower()}"


# Pictures ------------------------------------------------------------------------------------------------------------


def open_image(image: Mapping[str, Any]) -> Image.Image:
    """Open an undecoded picture of a dataset; pixels are read on access.

    Args:
        image (`Mapping`): `{"bytes": ..., "path": ...}`, one of them set.

    Returns:
        `PIL.Image.Image`: The picture as stored, before its EXIF orientation is applied.
    """
    return Image.open(image["path"] if image["bytes"] is None else BytesIO(image["bytes"]))


def displayed_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height of a picture once its EXIF orientation is applied.

    Args:
        image (`PIL.Image.Image`): The picture as stored.

    Returns:
        `tuple[int, int]`: Width and height in pixels.
    """
    turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return image.size[::-1] if turned else image.size
