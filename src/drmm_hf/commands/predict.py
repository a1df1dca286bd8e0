"""`drmm predict`: find the objects in pictures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments.

    Args:
        parser (`argparse.ArgumentParser`): The command's parser.
    """
    parser.add_argument("model", help="folder or Hub id of any transformers object detector")
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="pictures, and folders of pictures")
    parser.add_argument(
        "--output", default="runs/predict", metavar="DIR", help="where to write (default: runs/predict)"
    )
    parser.add_argument("--threshold", type=float, default=0.5, help="smallest score (default: 0.5)")
    parser.add_argument("--json", action="store_true", help="print the boxes as json, and nothing else")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")


def run(args: argparse.Namespace) -> int:
    """Predict, write the boxes and the drawn pictures, and print the boxes.

    Args:
        args (`argparse.Namespace`): The parsed arguments.

    Returns:
        `int`: 0.
    """
    from ..conversion.model_source import find_source

    if not 0 <= args.threshold <= 1:
        raise ValueError(f"threshold is {args.threshold}; scores lie in [0, 1].")
    name = find_source(args.model)
    paths = find_pictures(args.images)

    import datasets
    from transformers.utils import logging

    from ..evaluation.predict import load_detector, predict
    from ..visualization.draw_boxes import draw_boxes

    logging.disable_progress_bar()  # of each weight that is loaded
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)  # before the work, so that a place that cannot be written costs none
    files = [str(path) for path in paths]
    dataset = datasets.Dataset.from_dict({"image_id": range(len(paths)), "file_name": files, "image": files})
    dataset = dataset.cast_column("image", datasets.Image())
    model, processor = load_detector(name, args.device)
    detections = predict(model, processor, dataset)

    names = model.config.id2label
    records = []
    for path, row, drawn_path in zip(paths, dataset, _drawn_paths(paths, output), strict=True):
        result = {name: array.tolist() for name, array in detections[row["image_id"]].items()}
        count = sum(score >= args.threshold for score in result["scores"])
        boxes = [_box({name: values[index] for name, values in result.items()}, names) for index in range(count)]
        size = {"width": row["image"].width, "height": row["image"].height}
        records.append({"file": str(path), "drawn": str(drawn_path), **size, "boxes": boxes})
        draw_boxes(row["image"], result, names, args.threshold).save(drawn_path, quality=92)
    text = json.dumps(records, indent=1)
    (output / "predictions.json").write_text(text + "\n")
    print(text if args.json else _lines(records))
    return 0


def find_pictures(places: Iterable[str | Path]) -> list[Path]:
    """List pictures, those of folders in the order of their names.

    Args:
        places (`Iterable[str | Path]`): Picture files, and folders that hold some.

    Returns:
        `list[Path]`: Each file once.

    Raises:
        FileNotFoundError: If a place does not exist, or a folder holds no picture.
        ValueError: If a file is no picture.
    """
    from PIL import Image, UnidentifiedImageError

    found: list[Path] = []
    for place in map(Path, places):
        if not place.exists():
            raise FileNotFoundError(f"{place} does not exist; images are files and folders.")
        if place.is_dir():
            known = Image.registered_extensions()
            files = sorted(path for path in place.iterdir() if path.suffix.lower() in known and path.is_file())
            if not files:
                raise FileNotFoundError(f"{place} holds no picture; a folder of images has at least one.")
            found += files
            continue
        try:
            Image.open(place).close()
        except UnidentifiedImageError as error:
            raise ValueError(f"{place} is no picture that Pillow can read.") from error
        found.append(place)
    return list(dict.fromkeys(found))


def _box(values: Mapping[str, Any], names: Mapping[int, str]) -> dict[str, Any]:
    """Return one detection with the name of its class."""
    entry = {
        "label": names[values["labels"]],
        "score": round(values["scores"], 6),
        "box": [round(value, 3) for value in values["boxes"]],
    }
    if "query_indices" in values:
        entry["query"] = values["query_indices"]
    for name, key in (("objectness", "objectness"), ("class_probabilities", "class_probability")):
        if name in values:
            entry[key] = round(values[name], 6)
    if "box_scales" in values:
        entry["box_scales"] = [round(value, 3) for value in values["box_scales"]]
    return entry


def _drawn_paths(paths: Collection[Path], output: Path) -> list[Path]:
    """Return where each drawn picture goes: its own name, numbered where that is taken, by a picture itself too."""
    drawn: list[Path] = []
    originals = {path.resolve() for path in paths}
    for path in paths:
        target, number = output / f"{path.stem}.jpg", 1
        while target in drawn or target.resolve() in originals:
            number += 1
            target = output / f"{path.stem}_{number}.jpg"
        drawn.append(target)
    return drawn


def _lines(records: Iterable[Mapping[str, Any]]) -> str:
    """Return the boxes as lines of text."""
    lines = []
    for record in records:
        lines.append(f"{record['file']} ({record['width']}x{record['height']}): {len(record['boxes'])} objects")
        for entry in record["boxes"]:
            box = ", ".join(f"{value:.1f}" for value in entry["box"])
            lines.append(f"  {entry['score']:.3f}  {entry['label']}  ({box})")
        lines.append(f"  drawn in {record['drawn']}")
    return "\n".join(lines)
