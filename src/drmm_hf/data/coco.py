"""Detection data of any layout -> one `datasets.Dataset` schema; COCO files, and back to a COCO folder.

Every loader returns a dataset with `FEATURES`: category ids, annotation ids, crowd flags and areas as they stand in
the source, boxes as (x, y, width, height) in pixels of the original picture, pictures decoded on access. Read the
categories with `categories(dataset)`, and what was left out with `left_out(dataset)`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
from datasets import Dataset, IterableDataset
from tqdm import tqdm

from .canonical import (
    FEATURES,
    Records,
    annotation_dataset,
    canonical_dataset,
    canonical_stream,
    categories,
    dataset_info,
    leaves_folder,
    left_out,
    with_files,
)
from .hub_datasets import BoxFormat, hub_splits, hub_stream, prove_box_format
from .pascal_voc import voc_splits
from .pictures import displayed_size, inspect_pictures, open_image
from .problems import Problems, check_policy
from .yolo import yolo_splits


__all__ = [
    "FEATURES",
    "annotation_problems",
    "canonical_dataset",
    "categories",
    "coco_paths",
    "displayed_size",
    "find_splits",
    "left_out",
    "load_coco",
    "load_detection_dataset",
    "open_image",
    "plain_split",
    "prove_box_format",
    "resolve_split",
    "save_coco",
]

logger = logging.getLogger(__name__)

Reader = Callable[[Problems], Dataset]


def load_coco(
    annotation_file: str | Path, image_dir: str | Path, *, invalid: Literal["error", "skip"] = "error"
) -> Dataset:
    """Load a COCO instances file and its image folder.

    Args:
        annotation_file (`str` or `Path`): Json with `images`, `annotations` and `categories`. A missing `area` becomes
            width times height, a missing `iscrowd` 0; other fields (segmentations, licences) are not read.
        image_dir (`str` or `Path`): The folder that the file names are relative to.
        invalid (`"error"` or `"skip"`): What to do about bad data, see `load_detection_dataset`.

    Returns:
        `Dataset`: One row an image, in the order of the file, with `FEATURES`. Pictures stay on disk.

    Raises:
        ValueError: If the json, an id, a file name, a category or a box is wrong; the message names the file and the
            annotation.
        FileNotFoundError: If the annotation file or a picture does not exist.
    """
    return _load(partial(_read_coco, Path(annotation_file), [Path(image_dir)]), str(annotation_file), invalid)


def load_detection_dataset(
    source: str | Path,
    split: str,
    *,
    images: str | Path | None = None,
    annotations: str | Path | None = None,
    categories: Iterable[Mapping[str, Any]] | None = None,
    bbox_format: BoxFormat | None = None,
    invalid: Literal["error", "skip"] = "error",
    streaming: bool = False,
    problems: Problems | None = None,
    alone: bool = False,
) -> Dataset | IterableDataset:
    """Load one split of a detection dataset, whatever it is stored as.

    Args:
        source (`str` or `Path`): A folder of COCO (see `coco_paths`), Roboflow (`<split>/_annotations.coco.json`),
            YOLO (`data.yaml`) or Pascal VOC, the id of a dataset on the Hub, or a folder that `datasets.load_dataset`
            reads (imagefolder with `metadata.jsonl` or `metadata.csv`, parquet, ...).
        split (`str`): Name of the split, or a usual other name of it, such as `validation` or `val2017` for `val`.
        images (`str` or `Path`, *optional*): Image folder of COCO annotations, where it is not a usual place.
        annotations (`str` or `Path`, *optional*): COCO file, where it is not
            `<source>/annotations/instances_<split>.json`.
        categories (`Iterable[Mapping]`, *optional*): Records with `id` and `name`, for sources that do not list their
            categories: Pascal VOC, and `datasets` sources whose category column is no `ClassLabel`. By default the
            names or ids that occur in any split.
        bbox_format (`str`, *optional*): `xywh`, `xyxy` or `cxcywh`, in pixels. For `datasets` sources; by default the
            boxes must prove it themselves: all other formats contradict the picture sizes or the areas.
        invalid (`"error"` or `"skip"`): What to do about bad data: missing pictures, file names that leave the folder,
            ids that occur twice, unknown categories, boxes without area inside their picture, and whatever else
            `drmm_hf.data.problems.KINDS` names. `error` raises with the counts and the first of each kind. `skip`
            leaves such pictures and boxes out, logs the same as a warning and keeps it in `left_out(dataset)`; it also
            reads the header of each picture, and leaves out those that are cut off or of another size. Only
            `drmm doctor` decodes all pictures.
        streaming (`bool`): Whether to return an `IterableDataset`, which reads from the Hub as it goes and whose
            `state_dict` holds its position.
        problems (`Problems`, *optional*): Where a stream records what it leaves out as it goes; otherwise each is
            logged.
        alone (`bool`): Whether to fetch nothing but this split of a `datasets` source. The categories must then be a
            `ClassLabel` or given.

    Returns:
        `Dataset` or `IterableDataset`: One row an image with `FEATURES`.

    Raises:
        ValueError: If the split is unknown, the source is not understood or the data are bad.
        FileNotFoundError: If a file is missing.
    """
    check_policy(invalid)
    if annotations is not None:
        _refuse("COCO", annotations, categories, bbox_format)
        folders = _image_folders(Path(source), split) if images is None else [Path(images)]
        readers: dict[str, Reader] | None = {split: partial(_read_coco, Path(annotations), folders)}
    else:
        _, readers = _folder_splits(Path(source), images, categories, bbox_format)
    if readers is None and streaming:
        split = resolve_split(split, datasets.get_dataset_split_names(str(source)), source)
        return hub_stream(str(source), split, categories, bbox_format, invalid, problems)
    if readers is None and alone:
        split = resolve_split(split, datasets.get_dataset_split_names(str(source)), source)
        readers = hub_splits(str(source), categories, bbox_format, split)
    if readers is None:
        readers = hub_splits(str(source), categories, bbox_format)
    split = resolve_split(split, readers, source)
    dataset = _load(readers[split], f"{source}, split {split}", invalid)
    return canonical_stream(dataset) if streaming else dataset


def find_splits(
    source: str | Path,
    *,
    categories: Iterable[Mapping[str, Any]] | None = None,
    bbox_format: BoxFormat | None = None,
) -> tuple[str, dict[str, Reader]]:
    """Recognise the layout of a source and list its splits.

    Args:
        source (`str` or `Path`): As in `load_detection_dataset`.
        categories (`Iterable[Mapping]`, *optional*): As in `load_detection_dataset`.
        bbox_format (`str`, *optional*): As in `load_detection_dataset`.

    Returns:
        `tuple[str, dict]`: `COCO`, `Roboflow`, `YOLO`, `Pascal VOC` or `datasets`; and split -> function that reads
        it, records what is wrong in the `Problems` it is given and leaves it out.

    Raises:
        ValueError: If an argument does not apply to the layout, or the source is not understood.
    """
    layout, readers = _folder_splits(Path(source), None, categories, bbox_format)
    return layout, hub_splits(str(source), categories, bbox_format) if readers is None else readers


def coco_paths(
    source: str | Path, split: str, *, images: str | Path | None = None, annotations: str | Path | None = None
) -> tuple[Path, Path] | None:
    """Find the annotation file and the image folder of one split of a COCO folder.

    Args:
        source (`str` or `Path`): The folder. Annotations are `annotations/instances_<split>.json`; pictures are in
            `<split>/`, `images/<split>/`, `images/` or the folder itself, whichever holds the pictures listed.
        split (`str`): Name of the split, or a usual other name of it.
        images (`str` or `Path`, *optional*): Image folder to use instead.
        annotations (`str` or `Path`, *optional*): Annotation file to use instead.

    Returns:
        `tuple[Path, Path]` or None: Annotation file and image folder; None if `source` holds no COCO annotations, or
        those of Roboflow, whose placeholder category is no class.

    Raises:
        ValueError: If the folder has COCO annotations, but not of this split.
        FileNotFoundError: If no folder holds the pictures.
    """
    if annotations is None:
        files = _coco_files(Path(source))
        if not files:
            return None
        split = resolve_split(split, files, source)
        annotations = files[split]
    names = _annotations(Path(annotations), Problems())["file_name"]
    candidates = _image_folders(Path(source), split) if images is None else [Path(images)]
    return Path(annotations), _folder_of(names, candidates, annotations)


def annotation_problems(annotation_file: str | Path) -> dict[str, dict[str, Any]]:
    """Say what is wrong with a COCO file, without its pictures.

    Args:
        annotation_file (`str` or `Path`): The file.

    Returns:
        `dict`: As `left_out` returns it.

    Raises:
        ValueError: If it is no COCO file.
        FileNotFoundError: If it does not exist.
    """
    problems = Problems()
    _annotations(Path(annotation_file), problems)
    return problems.found


def save_coco(dataset: Dataset, folder: str | Path, split: str) -> Path:
    """Write a canonical dataset as one split of a COCO folder; pictures are copied byte for byte.

    Args:
        dataset (`Dataset`): A dataset with `FEATURES`.
        folder (`str` or `Path`): The COCO folder, created if needed.
        split (`str`): Name of the split: pictures in `<folder>/<split>/`.

    Returns:
        `Path`: The annotation file, `<folder>/annotations/instances_<split>.json`.

    Raises:
        ValueError: If two images share a file name, or one leaves the folder.
    """
    folder = Path(folder)
    annotation_file = folder / "annotations" / f"instances_{split}.json"
    annotation_file.parent.mkdir(parents=True, exist_ok=True)
    images, annotations, names = [], [], set()
    for row in dataset.cast_column("image", datasets.Image(decode=False)):
        name = f"file_name {row['file_name']!r} (image {row['image_id']})"
        if row["file_name"] in names:
            raise ValueError(f"{name} occurs twice: names must differ")
        if leaves_folder(row["file_name"]):
            raise ValueError(f"{name} leaves the image folder; it must be relative, without '..'")
        names.add(row["file_name"])
        target = folder / split / row["file_name"]
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


# Splits and policy ---------------------------------------------------------------------------------------------------


def _load(read: Reader, source: str, invalid: Literal["error", "skip"]) -> Dataset:
    """Read a split and apply the policy to what is wrong with it."""
    check_policy(invalid)
    problems = Problems()
    dataset = read(problems)
    if invalid == "skip":
        dataset = _readable(dataset, problems)
    problems.settle(source, invalid)
    dataset.info.description = dataset_info(categories(dataset), problems.found).description
    return dataset


def _readable(dataset: Dataset, problems: Problems) -> Dataset:
    """Leave out pictures whose header or end is broken, or whose size is not the annotated one."""
    rows = dataset.select_columns(["image_id", "file_name", "image", "width", "height"])
    rows = rows.cast_column("image", datasets.Image(decode=False))
    bar = tqdm(inspect_pictures(rows, decode=False), "reading headers", len(rows), leave=False, delay=2, disable=None)
    kept = []
    for position, picture in enumerate(bar):
        if picture.problem is None:
            kept.append(position)
        else:
            row = rows[position]
            problems.add(picture.problem[0], f"{row['file_name']} (image {row['image_id']})", picture.problem[1])
    return dataset if len(kept) == len(dataset) else dataset.select(kept)


def resolve_split(split: str, known: Collection[str], source: str | Path) -> str:
    """Find a split by its name, or the only one that usually goes by it.

    Args:
        split (`str`): Name, such as `validation`.
        known (`Collection[str]`): The splits that there are, such as `val2017`.
        source (`str` or `Path`): Name of the data, for messages.

    Returns:
        `str`: The name among the known ones.

    Raises:
        ValueError: If none or several go by it.
    """
    if split in known:
        return split
    others = [name for name in known if plain_split(name) == plain_split(split)]
    if len(others) != 1:
        raise ValueError(f"split {split!r} is not in {source}: it has {sorted(known)}")
    logger.info("split %r of %s is called %r there", split, source, others[0])
    return others[0]


def plain_split(split: str) -> str:
    """Return one name for what is called val, valid, validation, dev or val2017, and likewise train and test.

    Args:
        split (`str`): The name.

    Returns:
        `str`: In small letters, without a year.
    """
    name = re.sub(r"[-_]?\d{4}$", "", split.lower())
    names = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}
    return names.get(name, name)


def _folder_splits(
    folder: Path, images: str | Path | None, categories: Iterable[Mapping[str, Any]] | None, bbox_format: str | None
) -> tuple[str, dict[str, Reader] | None]:
    """Recognise a folder; None stands for the splits where only `datasets` may know it."""
    readers: dict[str, Reader] | None
    layout, readers = "COCO", _coco_splits(folder, images)
    if images is not None and not readers:
        raise ValueError(f"images is given, but {folder}/annotations has no COCO file: give annotations as well")
    if not readers:
        layout, readers = "Roboflow", _roboflow_splits(folder)
    if not readers:
        layout, readers = "YOLO", yolo_splits(folder)
    if not readers:
        layout, readers = "Pascal VOC", voc_splits(folder, categories)
    if not readers:
        return "datasets", None
    _refuse(layout, folder, None if layout == "Pascal VOC" else categories, bbox_format)
    return layout, readers


def _refuse(layout: str, source: str | Path, categories: Any, bbox_format: str | None) -> None:
    for argument, value in (("categories", categories), ("bbox_format", bbox_format)):
        if value is not None:
            raise ValueError(f"{argument} does not apply to {layout} annotations ({source}): they say it themselves")


# COCO and Roboflow ---------------------------------------------------------------------------------------------------


def _coco_files(folder: Path) -> dict[str, Path]:
    files = sorted((folder / "annotations").glob("instances_*.json"))
    return {path.stem.removeprefix("instances_"): path for path in files}


def _coco_splits(folder: Path, images: str | Path | None) -> dict[str, Reader]:
    return {
        split: partial(_read_coco, path, _image_folders(folder, split) if images is None else [Path(images)])
        for split, path in _coco_files(folder).items()
    }


def _roboflow_splits(folder: Path) -> dict[str, Reader]:
    files = sorted(folder.glob("*/_annotations.coco.json"))
    return {path.parent.name: partial(_read_coco, path, [path.parent], placeholder=True) for path in files}


def _image_folders(folder: Path, split: str) -> list[Path]:
    """Return the places where the pictures of a split may be, the likeliest first."""
    roots = [path for path in (folder, folder / "images") if path.is_dir()]
    others = [
        path for root in roots for path in sorted(root.iterdir()) if plain_split(path.name) == plain_split(split)
    ]
    usual = [folder / split, folder / "images" / split, *filter(Path.is_dir, others), folder / "images", folder]
    return list(dict.fromkeys(usual))


def _folder_of(names: Sequence[str], folders: list[Path], annotation_file: str | Path) -> Path:
    """Return the first folder that holds a picture; the only one without looking."""
    if len(folders) == 1 or not len(names):
        return folders[0]
    names = names[:]
    some = [name for name in names[:: max(1, len(names) // 50)] if not leaves_folder(name)]
    for folder in folders:
        if any((folder / name).exists() for name in some):
            return folder
    tried = ", ".join(map(str, folders))
    raise FileNotFoundError(f"{annotation_file}: picture {names[0]!r} is in none of {tried}; name its folder: images")


def _read_coco(path: Path, folders: list[Path], problems: Problems, *, placeholder: bool = False) -> Dataset:
    """Read a COCO file; its folder is the first one with a picture of it."""
    annotations = _annotations(path, problems, placeholder)
    return with_files(annotations, _folder_of(annotations["file_name"], folders, path), str(path), problems)


def _annotations(path: Path, problems: Problems, placeholder: bool = False) -> Dataset:
    """Read a COCO file without looking for its pictures."""
    if not path.is_file():
        raise FileNotFoundError(f"annotation file {path} does not exist")
    digest = hashlib.blake2b(f"1 {path} {placeholder}".encode("utf-8", "surrogateescape"), digest_size=16)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)

    def read() -> Records:
        content = _read_annotations(path)
        if placeholder:
            content["categories"] = _without_placeholder(content, path)
        return Records(str(path), content["images"], content["annotations"], content["categories"])

    return annotation_dataset(read, problems, digest.hexdigest())


def _without_placeholder(content: dict[str, Any], path: Path) -> list[Any]:
    """Leave out the category that stands for the whole project, under which Roboflow puts the classes."""
    records = content["categories"]
    first, rest = records[0] if records else {}, records[1:]
    named = all(isinstance(record, dict) and record.get("supercategory") == first.get("name") for record in rest)
    if not rest or not named or any(a.get("category_id") == first.get("id") for a in _dicts(content["annotations"])):
        return records
    logger.warning(
        "%s: category %r (%r) is the name of the project, without annotations: it is no class",
        path,
        first.get("id"),
        first.get("name"),
    )
    return rest


def _dicts(records: Iterable[Any]) -> Iterable[dict[str, Any]]:
    return (record for record in records if isinstance(record, dict))


def _read_annotations(path: Path) -> dict[str, Any]:
    """Read a COCO file but its segmentations, which are most of it."""

    def without_segmentation(record: dict[str, Any]) -> dict[str, Any]:
        record.pop("segmentation", None)
        return record

    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_hook=without_segmentation)
    except ValueError as error:  # bad json, or bytes that are not utf-8
        raise ValueError(f"{path} is not valid json: {error}") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(
                f"{path} has no list {key!r}: COCO instances files hold images, annotations and categories"
            )
    return content
