"""The one schema of all data: raw records of any source are checked here, in one place, and become Arrow columns.

Large tables are written once to the cache of `datasets` and mapped into memory, so that processes and workers share
them. Categories and what was left out travel as json in `dataset.info.description`, which the operations of
`datasets` (select, filter, map, save_to_disk) keep.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import tempfile
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features, List, Value
from datasets.table import InMemoryTable, MemoryMappedTable

from .problems import Problems


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
_TABLE_FEATURES = Features({name: feature for name, feature in FEATURES.items() if name != "image"})
_STREAM_SHARDS = 64  # parts that the processes and workers of a stream share among them
_MAPPED_ABOVE = 2**24  # bytes; smaller tables stay in memory and leave no file behind


@dataclass
class Records:
    """What a source says about one split: COCO's three lists, not checked yet.

    A record may hold `where`, its place for messages.

    Args:
        source (`str`): Name of the split, for messages.
        images (`list[dict]`): With `id`, `file_name`, `width` and `height`.
        annotations (`list[dict]`): With `id`, `image_id`, `category_id`, `bbox` (xywh, pixels), `area`, `iscrowd`.
        categories (`list[dict]`): With `id` and `name`.
    """

    source: str
    images: Sequence[Any]
    annotations: Sequence[Any]
    categories: Sequence[Any]

    def where(self, section: str, position: int) -> str:
        """Return the place of a record.

        Args:
            section (`str`): `images`, `annotations` or `categories`.
            position (`int`): Its index.

        Returns:
            `str`: The place.
        """
        record = getattr(self, section)[position]
        if not isinstance(record, dict):
            return f"{self.source}: {section}[{position}]"
        return record.get("where") or f"{self.source}: {section}[{position}] (id {record.get('id')!r})"


def categories(dataset: Dataset | datasets.IterableDataset) -> list[dict[str, Any]]:
    """Return the categories of a canonical dataset.

    Args:
        dataset (`Dataset` or `IterableDataset`): A dataset of this package, or anything `datasets` derived from one.

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


def left_out(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """Return what the loader left out with `invalid="skip"`.

    Args:
        dataset (`Dataset`): A dataset of this package.

    Returns:
        `dict[str, dict]`: Kind of problem -> `count` and the `first` few messages; empty if nothing was left out, or
        if the dataset is of another package.
    """
    try:
        return json.loads(dataset.info.description)["left_out"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return {}


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
    return Dataset.from_dict(columns, features=FEATURES, info=dataset_info(categories))


def dataset_info(
    categories: Iterable[Mapping[str, Any]], left_out: Mapping[str, Any] | None = None
) -> datasets.DatasetInfo:
    """Return the info that a canonical dataset carries.

    Args:
        categories (`Iterable[Mapping]`): Records with `id` and `name`.
        left_out (`Mapping`, *optional*): `Problems.found`.

    Returns:
        `DatasetInfo`: With the schema, and the description as json.
    """
    records = [{"id": int(record["id"]), "name": str(record["name"])} for record in categories]
    description = {"categories": records} | ({"left_out": left_out} if left_out else {})
    return DatasetInfo(description=json.dumps(description), features=FEATURES)


def canonical_stream(dataset: Dataset) -> datasets.IterableDataset:
    """Read a canonical dataset as a stream.

    Args:
        dataset (`Dataset`): A dataset of this package.

    Returns:
        `IterableDataset`: Its rows in up to 64 shards, with its categories.
    """
    stream = dataset.to_iterable_dataset(num_shards=max(1, min(_STREAM_SHARDS, len(dataset))))
    stream.info.description = dataset.info.description  # which `datasets` leaves behind
    return stream


# From records to a table ---------------------------------------------------------------------------------------------


def annotation_dataset(read: Callable[[], Records], problems: Problems, fingerprint: str | None = None) -> Dataset:
    """Check the records of a split and return their columns, without the pictures.

    Args:
        read (`Callable`): Returns the records; not called where the cache has the table.
        problems (`Problems`): What is wrong is recorded here, and left out.
        fingerprint (`str`, *optional*): Changes with whatever the records depend on: the key of the cache. None, and
            a `problems` that lists all, read afresh.

    Returns:
        `Dataset`: The columns of `FEATURES` but `image`.
    """
    path = Path(datasets.config.HF_DATASETS_CACHE) / "drmm" / f"{fingerprint}.arrow"
    cached = fingerprint is not None and problems.listed is not None
    if cached and path.is_file():
        table = MemoryMappedTable.from_file(str(path))
    else:
        table = InMemoryTable(check_records(read(), problems))
        if cached and table.nbytes > _MAPPED_ABOVE:
            table = _mapped(table, path)
    content = json.loads(table.schema.metadata[b"drmm"])
    problems.found = content["problems"]
    info = DatasetInfo(description=json.dumps({"categories": content["categories"]}), features=_TABLE_FEATURES)
    return Dataset(table, info=info)


def with_pictures(annotations: Dataset, pictures: Dataset) -> Dataset:
    """Put annotations and pictures side by side, copying neither.

    Args:
        annotations (`Dataset`): From `annotation_dataset`.
        pictures (`Dataset`): A column `image`, row by row.

    Returns:
        `Dataset`: With `FEATURES`.
    """
    info = dataset_info(categories(annotations))
    if not len(annotations):
        return canonical_dataset([], categories(annotations))
    pictures = pictures.cast_column("image", datasets.Image())
    joined = datasets.concatenate_datasets([annotations, pictures], axis=1, info=info)
    return joined.select_columns(list(FEATURES))


def with_files(annotations: Dataset, folder: Path, source: str, problems: Problems) -> Dataset:
    """Put annotations beside the picture files of a folder; none is opened.

    Args:
        annotations (`Dataset`): From `annotation_dataset`.
        folder (`Path`): Folder that the file names are relative to.
        source (`str`): Name of the split, for messages.
        problems (`Problems`): Missing and empty files are recorded here, and left out.

    Returns:
        `Dataset`: With `FEATURES`.
    """
    names, folder = annotations["file_name"][:], folder.absolute()
    paths = [str(folder / PurePosixPath(name)) for name in names]
    column = pa.StructArray.from_arrays(
        [pa.nulls(len(paths), pa.binary()), pa.array(paths, pa.string())], ["bytes", "path"]
    )
    pictures = Dataset(pa.table({"image": column}), info=DatasetInfo(features=Features({"image": datasets.Image()})))
    dataset = with_pictures(annotations, pictures)
    absent = {position: problem for position, path in enumerate(paths) if (problem := _absent(path)) is not None}
    for position, (kind, message) in absent.items():
        where = f"{source}: {names[position]!r} (image {annotations[position]['image_id']})"
        problems.add(kind, where, f"{message} {folder}")
    return dataset.select(np.setdiff1d(np.arange(len(paths)), list(absent))) if absent else dataset


def checked_categories(records: Sequence[Any], source: str) -> dict[int, str]:
    """Check categories.

    Args:
        records (`Sequence`): Records with `id` and `name`.
        source (`str`): Where they stand.

    Returns:
        `dict[int, str]`: Name of each id.

    Raises:
        ValueError: If there are none, an id is no integer or taken, or a name is no text.
    """
    names: dict[int, str] = {}
    for position, record in enumerate(records):
        where = f"{source}: categories[{position}]"
        try:
            category_id = integer(record, "id")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if category_id in names:
            raise ValueError(f"{where}: id {category_id} is taken by {names[category_id]!r}; category ids must differ")
        if not isinstance(record.get("name"), str):
            raise ValueError(f"{where}: name is {record.get('name')!r}, must be a string")
        names[category_id] = record["name"]
    if not names:
        raise ValueError(f"{source}: categories is empty; every annotation needs one")
    return names


def integer(record: Mapping[str, Any], key: str, least: int | None = None) -> int:
    """Read an integer field.

    Args:
        record (`Mapping`): The record.
        key (`str`): The field.
        least (`int`, *optional*): The smallest value allowed.

    Returns:
        `int`: The value.

    Raises:
        ValueError: If it is no integer of 64 bits, or too small.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{record!r} must be an object")
    value = record.get(key)
    if type(value) is not int and not (isinstance(value, float) and value.is_integer()):
        raise ValueError(f"{key} is {value!r}, must be an integer")
    if least is not None and value < least:
        raise ValueError(f"{key} is {value!r}, must be at least {least}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{key} is {value!r}, must fit into 64 bits")
    return int(value)


def area_and_crowd(record: Mapping[str, Any]) -> tuple[float | None, int]:
    """Read `area` and `iscrowd` of an annotation.

    Args:
        record (`Mapping`): The annotation.

    Returns:
        `tuple[float, int]`: The area, None if it names none, and 1 for a crowd, else 0.

    Raises:
        ValueError: If one is something else.
    """
    area, crowd = record.get("area"), record.get("iscrowd")
    if area is not None and not (_is_finite(area) and area >= 0):
        raise ValueError(f"area is {area!r}, must be a finite number of at least 0")
    if crowd not in (None, 0, 1):
        raise ValueError(f"iscrowd is {crowd!r}, must be 0 or 1")
    return area, int(crowd or 0)


def finite_box(record: Mapping[str, Any]) -> list[float]:
    """Read `bbox` of an annotation.

    Args:
        record (`Mapping`): The annotation.

    Returns:
        `list[float]`: The 4 numbers.

    Raises:
        ValueError: If it is something else, or one is not finite.
    """
    bbox = record.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_finite, bbox)):
        raise ValueError(f"bbox is {bbox!r}, must be 4 finite numbers below 2**63")
    return bbox


def leaves_folder(name: str) -> bool:
    """Return whether a file name leads out of the folder it is relative to.

    Args:
        name (`str`): The name; `/` separates folders, and the other slash too on Windows.

    Returns:
        `bool`: True if it is absolute or has a `..`.
    """
    return Path(name).is_absolute() or PurePosixPath(name).is_absolute() or ".." in Path(name).parts


def check_records(records: Records, problems: Problems) -> pa.Table:
    """Check every record of a split.

    Args:
        records (`Records`): What the source says.
        problems (`Problems`): What is wrong is recorded here, and left out.

    Returns:
        `pa.Table`: The columns of `FEATURES` but `image`; categories and problems as json in the metadata.

    Raises:
        ValueError: If the categories are wrong.
    """
    known = checked_categories(records.categories, records.source)
    rows, kept = _checked_images(records, problems)
    columns, where = _checked_annotations(records, rows, kept, known, problems)
    columns = _plausible_boxes(columns, where, kept, problems)
    columns = _own_ids(columns, where, problems)

    order = np.argsort(columns["row"], kind="stable")
    columns = {name: values[order] for name, values in columns.items()}
    offsets = np.searchsorted(columns["row"], np.arange(len(kept) + 1)).astype(np.int32)
    boxes = pa.FixedSizeListArray.from_arrays(pa.array(columns["bbox"].reshape(-1)), 4)
    fields = [
        *(pa.array(columns[name]) for name in ("id", "category_id")),
        boxes,
        *(pa.array(columns[name]) for name in ("area", "iscrowd")),
    ]
    objects = pa.StructArray.from_arrays(fields, ["id", "category_id", "bbox", "area", "iscrowd"])
    pictures = {name: [row[name] for row in kept] for name in ("image_id", "file_name", "width", "height")}
    table = pa.table(
        pictures | {"objects": pa.ListArray.from_arrays(pa.array(offsets), objects)},
        schema=_TABLE_FEATURES.arrow_schema,
    )
    content = {"categories": [{"id": i, "name": name} for i, name in known.items()], "problems": problems.found}
    return table.replace_schema_metadata((table.schema.metadata or {}) | {b"drmm": json.dumps(content).encode()})


def _checked_images(records: Records, problems: Problems) -> tuple[dict[Any, int | None], list[dict[str, Any]]]:
    """Return the good image records, and the row of each id: None where the picture was left out."""
    rows: dict[Any, int | None] = {}
    kept: list[dict[str, Any]] = []
    for position, record in enumerate(records.images):
        image_id = None
        try:
            image_id = integer(record, "id")
            size = {key: integer(record, key, least=1) for key in ("width", "height")}
            name = record.get("file_name")
            if not isinstance(name, str) or not name:
                raise ValueError(f"file_name is {name!r}, must be a path relative to the image folder")
        except ValueError as error:
            problems.add("bad_record", records.where("images", position), error)
            if image_id is not None:
                rows.setdefault(image_id, None)
            continue
        where = records.where
        if leaves_folder(name):
            message = f"file_name {name!r} leaves the image folder; it must be relative, without '..'"
            problems.add("outside_folder", where("images", position), message)
            rows.setdefault(image_id, None)
        elif image_id in rows:
            row = rows[image_id]
            taken = "a picture that was left out" if row is None else repr(kept[row]["file_name"])
            problems.add("duplicate_image_id", where("images", position), f"the id is taken by {taken}")
            if row is not None and kept[row]["file_name"] != name:  # whose annotations they are, nobody knows
                rows[image_id] = None
        else:
            rows[image_id] = len(kept)
            kept.append({"image_id": image_id, "file_name": name, **size})
    contested = {position for position, row in enumerate(kept) if rows[row["image_id"]] is None}
    if contested:
        kept = [row for position, row in enumerate(kept) if position not in contested]
        rows |= {row["image_id"]: position for position, row in enumerate(kept)}
    return rows, kept


def _checked_annotations(
    records: Records,
    rows: Mapping[int, int | None],
    kept: Sequence[Mapping[str, Any]],
    known: Mapping[int, str],
    problems: Problems,
) -> tuple[dict[str, np.ndarray], Callable[[int], str]]:
    """Return the columns of annotations that are well formed, and the place of a record by its `position`."""
    integers = {name: array("q") for name in ("position", "row", "id", "category_id", "iscrowd")}
    areas, boxes = array("d"), array("d")

    def where(position: int) -> str:
        return records.where("annotations", position)

    for position, record in enumerate(records.annotations):
        try:
            image_id = integer(record, "image_id")
            category_id, annotation_id = integer(record, "category_id"), integer(record, "id")
            area, crowd = area_and_crowd(record)
        except ValueError as error:
            problems.add("bad_record", where(position), error)
            continue
        if image_id not in rows:
            message = f"image_id {image_id} is not among the {len(kept)} images"
            problems.add("unknown_image", where(position), message)
        elif (row := rows[image_id]) is None:
            continue  # left out with its picture
        elif category_id not in known:
            message = f"category_id {category_id} is not among the categories {sorted(known)}"
            problems.add("unknown_category", where(position), message)
        else:
            try:
                bbox = finite_box(record)
            except ValueError as error:
                problems.add("box_not_finite", where(position), error)
                continue
            values = (position, row, annotation_id, category_id, crowd)
            for column, value in zip(integers.values(), values, strict=True):
                column.append(value)
            boxes.extend(bbox)
            areas.append(bbox[2] * bbox[3] if area is None else area)
    columns: dict[str, np.ndarray] = {name: np.frombuffer(column, np.int64) for name, column in integers.items()}
    columns |= {"area": np.frombuffer(areas), "bbox": np.frombuffer(boxes).reshape(-1, 4)}
    return columns, where


def _plausible_boxes(
    columns: dict[str, np.ndarray], where: Callable[[int], str], kept: Sequence[Mapping[str, Any]], problems: Problems
) -> dict[str, np.ndarray]:
    """Leave out boxes without area inside their picture."""
    sizes = np.array([(row["width"], row["height"]) for row in kept], float).reshape(-1, 2)[columns["row"]]
    low, extent = columns["bbox"][:, :2], columns["bbox"][:, 2:]
    inside = np.minimum(low + extent, sizes) > np.maximum(low, 0)
    good = (inside & (extent > 0)).all(1)
    if _look_like_corners(low, extent, sizes):
        over = int((low + extent > sizes + 1).any(1).sum())
        message = (
            f"{over} of {len(low)} boxes end beyond their picture as [left, top, width, height]; all fit as corners"
        )
        problems.add("corners", where(columns["position"][0]), message)
    for index in np.flatnonzero(~good):
        row = kept[columns["row"][index]]
        message = f"{columns['bbox'][index].tolist()} in a picture of {row['width']} x {row['height']}"
        problems.add("box_without_area", where(columns["position"][index]), message)
    return {name: values[good] for name, values in columns.items()}


def _look_like_corners(low: np.ndarray, extent: np.ndarray, sizes: np.ndarray) -> bool:
    """Tell whether most of ten boxes or more leave their pictures as xywh, and all lie inside as xyxy."""
    leave = (low + extent > sizes + 1).any(1)
    return len(low) >= 10 and bool(leave.mean() > 0.5 and ((extent > low) & (extent <= sizes + 1)).all())


def _own_ids(columns: dict[str, np.ndarray], where: Callable[[int], str], problems: Problems) -> dict[str, np.ndarray]:
    """Leave out annotations whose id an earlier one has."""
    _, first, inverse = np.unique(columns["id"], return_index=True, return_inverse=True)
    first = first[inverse.reshape(-1)]
    good = first == np.arange(len(first))
    for index in np.flatnonzero(~good):
        place, taken = (where(columns["position"][i]) for i in (index, first[index]))
        problems.add("duplicate_annotation_id", place, f"the id is taken by {taken}; annotation ids must differ")
    return {name: values[good] for name, values in columns.items()}


def _absent(path: str) -> tuple[str, str] | None:
    """Return what is wrong with a picture file, as far as its directory entry tells."""
    try:
        status = os.stat(path)
    except OSError:
        return "missing_picture", "is not in"
    if not stat.S_ISREG(status.st_mode):
        return "missing_picture", "is no file in"
    return None if status.st_size else ("unreadable_picture", "is empty in")


def _is_finite(value: Any) -> bool:
    """Return whether a value is a number that stays finite in float32, as the product of two does."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**63


def _mapped(table: InMemoryTable, path: Path) -> InMemoryTable | MemoryMappedTable:
    """Write a table aside, rename it into place and map it; keep it in memory where the cache cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as aside:
            with pa.OSFile(f"{aside}/table", "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table.table, max_chunksize=1000)
            os.replace(f"{aside}/table", path)
    except OSError as error:
        logger.warning("%s cannot be written, so every process keeps its own annotations: %s", path, error)
        return table
    return MemoryMappedTable.from_file(str(path))
