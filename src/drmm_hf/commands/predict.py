"""`drmm predict`: find the objects in pictures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import numpy as np


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
    parser.add_argument(
        "--threshold", type=float, help="show scores above it (default: what the model folder has, else 0.5)"
    )
    parser.add_argument(
        "--interval",
        type=float,
        metavar="SHARE",
        help="give an interval about each side that holds it with this probability, such as 0.9 (D-RMM's mixtures)",
    )
    parser.add_argument(
        "--density", action="store_true", help="also draw the density over box centres and sides (D-RMM's mixtures)"
    )
    parser.add_argument("--json", action="store_true", help="print the boxes as json, and nothing else")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="type of the weights (default: as they were saved)"
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")


def run(args: argparse.Namespace) -> int:
    """Predict, write the boxes and the drawn pictures, and print the boxes.

    Args:
        args (`argparse.Namespace`): The parsed arguments.

    Returns:
        `int`: 0.
    """
    from ..conversion.model_source import find_source

    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise ValueError(f"threshold is {args.threshold}; scores lie in [0, 1].")
    if args.interval is not None and not 0 < args.interval < 1:
        raise ValueError(f"interval is {args.interval}; the rule is between 0 and 1.")
    name = find_source(args.model)
    paths = find_pictures(args.images)

    import datasets
    import numpy as np
    from transformers.utils import logging

    from ..evaluation.files import write_text
    from ..evaluation.likelihood import check_density
    from ..evaluation.predict import load_detector, predict
    from ..modeling.mixture import central_quantile, tail_freedom
    from ..visualization.density_picture import density_picture, mixture_of_result
    from ..visualization.draw_boxes import draw_boxes

    logging.disable_progress_bar()  # of each weight that is loaded
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)  # before the work, so that a place that cannot be written costs none
    files = [str(path) for path in paths]
    dataset = datasets.Dataset.from_dict({"image_id": range(len(paths)), "file_name": files, "image": files})
    dataset = dataset.cast_column("image", datasets.Image())
    model, processor = load_detector(name, args.device, args.dtype)
    config, top_k, freedom = model.config, 100, 1.0
    limits = thresholds(args.threshold, getattr(processor, "score_threshold", None), config.num_labels)
    if args.interval is not None or args.density:
        check_density(config)
        freedom = tail_freedom(config.coordinate_distribution, config.student_t_freedom)
    if args.density:
        top_k = config.num_queries * config.num_labels  # all pairs: they are the whole mixture
    everything = predict(model, processor, dataset, top_k=top_k)
    detections = everything.top_k(100)

    names, records = config.id2label, []
    places = (_drawn_paths(paths, output), _drawn_paths(paths, output, "_density.png"))
    for path, row, drawn_path, density_path in zip(paths, dataset, *places, strict=True):
        result = detections[row["image_id"]]
        result = {name: values[result["scores"] > limits[result["labels"]]] for name, values in result.items()}
        if args.interval is not None:
            reach = central_quantile(args.interval, freedom) * result["box_scales"]
            result["box_intervals"] = np.stack([result["boxes"] - reach, result["boxes"] + reach], axis=-1)
        columns = {name: values.tolist() for name, values in result.items()}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        size = {"width": row["image"].width, "height": row["image"].height}
        record = {"file": str(path), "drawn": str(drawn_path), **size, "boxes": [_box(one, names) for one in rows]}
        draw_boxes(row["image"], result, names, threshold=0).save(drawn_path, quality=92)
        if args.density:
            density_picture(row["image"], mixture_of_result(everything[row["image_id"]]), density_path, freedom)
            record["density"] = str(density_path)
        records.append(record)
    text = json.dumps(records, indent=1)
    write_text(output / "predictions.json", text + "\n")
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


def thresholds(asked: float | None, saved: float | list[float] | None, num_classes: int) -> np.ndarray:
    """Return the score above which detections of each class are kept, as post-processing keeps them.

    Args:
        asked (`float`, *optional*): For all classes, whatever is saved.
        saved (`float` or `list[float]`, *optional*): `score_threshold` of the processor.
        num_classes (`int`): Number of classes of the model.

    Returns:
        `np.ndarray` of shape `(num_classes,)`: In float32, as scores are; 0.5 where nothing is asked for or saved.
    """
    import numpy as np

    chosen = next(one for one in (asked, saved, 0.5) if one is not None)
    return np.broadcast_to(np.asarray(chosen, dtype=np.float32), (num_classes,))


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
    if "box_intervals" in values:
        entry["box_intervals"] = [[round(end, 3) for end in side] for side in values["box_intervals"]]
    return entry


def _drawn_paths(paths: Collection[Path], output: Path, ending: str = ".jpg") -> list[Path]:
    """Return where each drawn picture goes: its own name, numbered where that is taken, by a picture itself too."""
    drawn: list[Path] = []
    originals = {path.resolve() for path in paths}
    for path in paths:
        target, number = output / f"{path.stem}{ending}", 1
        while target in drawn or target.resolve() in originals:
            number += 1
            target = output / f"{path.stem}_{number}{ending}"
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
        lines.append(f"  drawn in {record['drawn']}{' and ' + record['density'] if 'density' in record else ''}")
    return "\n".join(lines)
