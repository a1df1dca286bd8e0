"""`drmm predict`: find the objects in pictures and films."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from .counts import at_least
from .document import add_json


if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from ..data.films import Film
    from ..data.picture_files import PictureFile

TOP_K = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments.

    Args:
        parser (`argparse.ArgumentParser`): The command's parser.
    """
    parser.add_argument("model", help="folder or Hub id of any transformers object detector")
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGES",
        help="pictures and films: files, folders, patterns as 'shots/**/*.jpg', http addresses, - for standard input",
    )
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
    parser.add_argument(
        "--tile",
        type=at_least(32),
        metavar="PX",
        help="see each picture in the whole and in square tiles of this side, for small objects in large pictures",
    )
    parser.add_argument(
        "--tile-overlap",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="share of a tile that the next one sees too; objects to be found should be smaller (default: 0.25)",
    )
    parser.add_argument(
        "--every", type=at_least(1), default=1, metavar="N", help="look at each N-th frame of a film (default: 1)"
    )
    parser.add_argument(
        "--batch-size", type=at_least(1), default=1, metavar="N", help="pictures of equal size a pass (default: 1)"
    )
    parser.add_argument(
        "--coco", metavar="FILE", help="also write the boxes as a COCO file, which tools for annotation read"
    )
    parser.add_argument(
        "--invalid-data",
        choices=["error", "skip"],
        default="error",
        help="stop at pictures that cannot be read, or name them and leave them out (default: error)",
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="type of the weights (default: as they were saved)"
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Predict, write the boxes and the drawn pictures, and print the boxes.

    Args:
        args (`argparse.Namespace`): The parsed arguments.

    Returns:
        `int`: 0.
    """
    from ..conversion.model_source import find_source
    from ..data.picture_files import find_pictures

    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise ValueError(f"threshold is {args.threshold}; scores lie in [0, 1].")
    if args.interval is not None and not 0 < args.interval < 1:
        raise ValueError(f"interval is {args.interval}; the rule is between 0 and 1.")
    if not 0 <= args.tile_overlap < 1:
        raise ValueError(f"tile_overlap is {args.tile_overlap}; the rule is at least 0 and below 1.")
    if args.density and args.tile:
        raise ValueError("--density is of one pass over the whole picture; leave out --tile.")
    name = find_source(args.model)
    with TemporaryDirectory() as aside:
        files = readable(find_pictures(args.images, aside), skip=args.invalid_data == "skip")
        if args.density and any(file.is_film for file in files):
            raise ValueError("--density draws pictures; leave out films.")
        if args.coco and any(file.is_film for file in files):
            raise ValueError("--coco has pictures; leave out films.")
        return _predict(args, name, files)


def readable(files: Sequence[PictureFile], skip: bool) -> list[PictureFile]:
    """Look at pictures before the work: what cannot be read, or is not of 8 bits, is named.

    Args:
        files (`Sequence[PictureFile]`): Pictures and films; films are looked at when they are opened.
        skip (`bool`): Whether such pictures are left out; otherwise they are an error.

    Returns:
        `list[PictureFile]`: Those that can be read.

    Raises:
        ValueError: If a picture cannot be read and is not to be left out, or none can.
    """
    from ..data.pictures import inspect_pictures

    pictures = [file for file in files if not file.is_film]
    rows = ({"image": {"bytes": None, "path": str(file.path)}, "width": 0, "height": 0} for file in pictures)
    bad = {
        file: f"{file.name}: {look.problem[1]}"
        for file, look in zip(pictures, inspect_pictures(rows, decode=False), strict=True)
        if look.problem is not None and look.problem[0] != "wrong_size"
    }
    kept = [file for file in files if file not in bad]
    if not bad:
        return kept
    lines = [*list(bad.values())[:5], *([f"and {len(bad) - 5} more"] if len(bad) > 5 else [])]
    if not skip or not kept:
        hint = "" if skip or not kept else "; --invalid-data skip leaves them out"
        raise ValueError(f"{len(bad)} of {len(files)} pictures cannot be used: {'; '.join(lines)}{hint}")
    print(f"left out, {len(bad)} of {len(files)} pictures:", *lines, sep="\n  ", file=sys.stderr)
    return kept


def _predict(args: argparse.Namespace, name: str, files: Sequence[PictureFile]) -> int:
    """Predict what has been found."""
    from transformers.utils import logging

    from ..data.films import Film
    from ..evaluation.files import write_json, write_text
    from ..evaluation.likelihood import check_density
    from ..evaluation.predict import load_detector

    logging.disable_progress_bar()  # of each weight that is loaded
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)  # before the work, so that a place that cannot be written costs none
    films = {file: Film(file.path, file.name, args.every) for file in files if file.is_film}
    places = _drawn_paths(files, output, ".jpg")
    density_places = _drawn_paths(files, output, "_density.png") if args.density else {}
    earlier = replaced_files(output, [*places.values(), *density_places.values(), output / "predictions.json"])
    earlier -= {path for path in earlier if path.resolve() in {file.path.resolve() for file in files}}
    if earlier:
        print(f"files of an earlier run in {output} that are replaced: {len(earlier)}", file=sys.stderr)
    model, processor = load_detector(name, args.device, args.dtype)
    if args.interval is not None or args.density:
        check_density(model.config)
    predicted = {}
    try:
        pictures = [file for file in files if file not in films]
        predicted |= _pictures(args, model, processor, pictures, places, density_places)
        for file, film in films.items():
            predicted[file] = _film(args, model, processor, film, places[file])
    finally:  # a film may be damaged at its end
        records = [predicted[file] for file in files if file in predicted]
        if records:
            write_text(output / "predictions.json", json.dumps(records, indent=1) + "\n")
            for path in earlier - written_files(output, records):
                path.unlink(missing_ok=True)
    if args.coco:
        write_json(coco_content(records, model.config), args.coco)
    args.document = records
    print(_lines(records))
    return 0


def replaced_files(output: Path, targets: Iterable[Path]) -> set[Path]:
    """Find what an earlier run left in a folder.

    Args:
        output (`Path`): The folder.
        targets (`Iterable[Path]`): Files that are to be written.

    Returns:
        `set[Path]`: The files that the `predictions.json` in it names, and itself.

    Raises:
        ValueError: If one of the targets is there and is none of them.
    """
    from ..evaluation.files import read_json

    earlier = set()
    with suppress(OSError, ValueError, TypeError, LookupError):  # there is none, or it is of something else
        earlier = written_files(output, [*read_json(output / "predictions.json")])
    foreign = [path for path in targets if path.exists() and path not in earlier]
    if foreign:
        raise ValueError(f"{foreign[0]} was not written by an earlier drmm predict; name another --output.")
    return {path for path in earlier if path.is_file()}


def written_files(output: Path, records: Sequence[Mapping[str, Any]]) -> set[Path]:
    """Return the files of a run.

    Args:
        output (`Path`): Its folder, which may have been moved since.
        records (`Sequence[Mapping]`): As `predictions.json` has them.

    Returns:
        `set[Path]`: Drawn pictures and films, densities and `predictions.json`.
    """
    names = [record["drawn"] for record in records] + [one["density"] for one in records if "density" in one]
    return {output / "predictions.json", *(output / Path(name).name for name in names)}


def _pictures(
    args: argparse.Namespace,
    model: Any,
    processor: Any,
    files: Sequence[PictureFile],
    places: Mapping[PictureFile, Path],
    density_places: Mapping[PictureFile, Path],
) -> Iterator[tuple[PictureFile, dict[str, Any]]]:
    """Predict pictures, draw them, and yield what is said of each."""
    from tqdm import tqdm

    from ..data.loading import load_image
    from ..modeling.mixture import tail_freedom
    from ..visualization.density_picture import density_picture, mixture_of_result

    if not files:
        return
    rows = [
        {"image_id": index, "file_name": file.name, "image": {"bytes": None, "path": str(file.path)}}
        for index, file in enumerate(files)
    ]
    config, top_k = model.config, TOP_K
    if args.density:
        top_k = config.num_queries * config.num_labels  # all pairs: they are the whole mixture
    everything = _detect(args, model, processor, rows, top_k)
    detections = everything.top_k(TOP_K) if args.density else everything
    for row in tqdm(rows, "drawing", unit="image", delay=2, disable=None, leave=False):
        file, image = files[row["image_id"]], load_image(row)
        result = _shown(args, detections[row["image_id"]], model, processor)
        _draw(image, result, config).save(places[file], quality=92)
        size = {"width": image.width, "height": image.height}
        record = {"file": file.name, "drawn": str(places[file]), **size, "boxes": _boxes(result, config)}
        if args.density:
            freedom = tail_freedom(config.coordinate_distribution, config.student_t_freedom)
            mixture = mixture_of_result(everything[row["image_id"]])
            density_picture(image, mixture, density_places[file], freedom)
            record["density"] = str(density_places[file])
        yield file, record


def _film(args: argparse.Namespace, model: Any, processor: Any, film: Film, place: Path) -> dict[str, Any]:
    """Predict the frames of a film, a few at a time, write them drawn, and return what is said of it."""
    from tqdm import tqdm

    from ..data.films import film_writer

    record = {"file": film.name, "drawn": str(place), "frames_per_second": float(film.rate)}
    record |= {"width": None, "height": None, "frames": []}
    frames = iter(tqdm(film, film.name, film.num_frames, unit="frame", delay=2, disable=None, leave=False))
    with film_writer(place, film.rate) as write:
        while chunk := list(islice(frames, args.batch_size)):
            rows = [{"image_id": frame.index, "image": frame.image} for frame in chunk]
            detections = _detect(args, model, processor, rows, TOP_K, progress=False)
            for frame in chunk:
                result = _shown(args, detections[frame.index], model, processor)
                write(_draw(frame.image, result, model.config))
                boxes = _boxes(result, model.config)
                record["frames"].append({"frame": frame.index, "seconds": round(frame.seconds, 3), "boxes": boxes})
                record |= {"width": frame.image.width, "height": frame.image.height}
        if not record["frames"]:
            raise ValueError(f"{film.name} has no frame.")
    return record


def _detect(args: argparse.Namespace, model: Any, processor: Any, rows: Any, top_k: int, progress: bool = True):
    """Predict rows in the whole, or in tiles too."""
    from ..evaluation.predict import predict
    from ..evaluation.tiles import predict_tiles

    options = {"batch_size": args.batch_size, "top_k": top_k, "progress": progress}
    if args.tile:
        return predict_tiles(model, processor, rows, args.tile, args.tile_overlap, **options)
    return predict(model, processor, rows, **options)


def _shown(args: argparse.Namespace, result: Mapping[str, np.ndarray], model: Any, processor: Any) -> dict[str, Any]:
    """Return the detections above the threshold, with their intervals where those are asked for."""
    import numpy as np

    from ..modeling.mixture import central_quantile, tail_freedom

    limits = thresholds(args.threshold, getattr(processor, "score_threshold", None), model.config.num_labels)
    result = {name: values[result["scores"] > limits[result["labels"]]] for name, values in result.items()}
    if args.interval is not None:
        freedom = tail_freedom(model.config.coordinate_distribution, model.config.student_t_freedom)
        reach = central_quantile(args.interval, freedom) * result["box_scales"]
        result["box_intervals"] = np.stack([result["boxes"] - reach, result["boxes"] + reach], axis=-1)
    return result


def _draw(image: Image, result: Mapping[str, Any], config: Any) -> Image:
    from ..visualization.draw_boxes import draw_boxes

    return draw_boxes(image, result, config.id2label, threshold=0)


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


def coco_content(records: Sequence[Mapping[str, Any]], config: Any) -> dict[str, Any]:
    """Return the boxes of pictures in the form of a COCO file.

    Args:
        records (`Sequence[Mapping]`): Of pictures, as `predictions.json` has them.
        config (`PreTrainedConfig`): Of the model; its `category_ids`, where it has them, are the ids of the classes.

    Returns:
        `dict`: `images` with ids from 1, `categories`, and `annotations`, which have a `score` besides; boxes xywh.
    """
    ids = getattr(config, "category_ids", None) or sorted(config.id2label)
    category_of = {
        config.id2label[label]: category for label, category in zip(sorted(config.id2label), ids, strict=True)
    }
    content = {"images": [], "categories": [{"id": id_, "name": name} for name, id_ in category_of.items()]}
    annotations = content["annotations"] = []
    for image_id, record in enumerate(records, start=1):
        size = {"width": record["width"], "height": record["height"]}
        content["images"].append({"id": image_id, "file_name": record["file"], **size})
        for box in record["boxes"]:
            left, top, right, bottom = box["box"]
            bbox = [round(value, 3) for value in (left, top, right - left, bottom - top)]
            entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category_of[box["label"]]}
            entry |= {"bbox": bbox, "area": round(bbox[2] * bbox[3], 3), "iscrowd": 0, "score": box["score"]}
            annotations.append(entry)
    return content


def _boxes(result: Mapping[str, np.ndarray], config: Any) -> list[dict[str, Any]]:
    """Return detections with the names of their classes."""
    columns = {name: values.tolist() for name, values in result.items()}
    rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    return [_box(row, config.id2label) for row in rows]


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


def _drawn_paths(files: Sequence[PictureFile], output: Path, ending: str) -> dict[PictureFile, Path]:
    """Return where each file goes drawn: its own name, numbered where that is taken, by a file that is read too."""
    drawn: dict[PictureFile, Path] = {}
    taken = {file.path.resolve() for file in files}
    for file in files:
        suffix, number = ".mp4" if file.is_film else ending, 1
        target = output / f"{file.stem}{suffix}"
        while target.resolve() in taken:
            number += 1
            target = output / f"{file.stem}_{number}{suffix}"
        taken.add(target.resolve())
        drawn[file] = target
    return drawn


def _lines(records: Iterable[Mapping[str, Any]]) -> str:
    """Return the boxes as lines of text."""
    lines = []
    for record in records:
        size = f"{record['width']}x{record['height']}"
        if "frames" in record:
            count = sum(len(frame["boxes"]) for frame in record["frames"])
            lines.append(f"{record['file']} ({size}): {count} boxes in {len(record['frames'])} frames")
            lines.append(f"  drawn in {record['drawn']}")
            continue
        lines.append(f"{record['file']} ({size}): {len(record['boxes'])} objects")
        for entry in record["boxes"]:
            box = ", ".join(f"{value:.1f}" for value in entry["box"])
            lines.append(f"  {entry['score']:.3f}  {entry['label']}  ({box})")
        lines.append(f"  drawn in {record['drawn']}{' and ' + record['density'] if 'density' in record else ''}")
    return "\n".join(lines)
