"""`drmm compare`: set detectors side by side on the same data."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .counts import at_least
from .document import add_json


if TYPE_CHECKING:
    import datasets

_FIGURES = ("AP", "AP50", "ECE", "ECE_0.1")
_LISTED = 5  # pictures that are named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments.

    Args:
        parser (`argparse.ArgumentParser`): The command's parser.
    """
    parser.usage = "drmm compare [NAME=]MODEL [NAME=]MODEL ... DATA [options]"
    parser.add_argument(
        "models",
        metavar="[NAME=]MODEL",
        nargs="+",
        help="folder or Hub id of any transformers object detector, or a json file of COCO results",
    )
    parser.add_argument("data", metavar="DATA", help="COCO folder, Hub id or image folder")
    parser.add_argument("--split", default="val", help="split of the data (default: val)")
    parser.add_argument(
        "--output", default="runs/compare", metavar="DIR", help="where to write (default: runs/compare)"
    )
    parser.add_argument(
        "--batch-size", type=at_least(1), default=1, metavar="N", help="pictures a batch; changes no figure"
    )
    parser.add_argument(
        "--top-k", type=at_least(1), default=100, metavar="K", help="predictions a picture (default: 100)"
    )
    parser.add_argument(
        "--timed",
        type=at_least(0),
        default=24,
        metavar="N",
        help="pictures to time the models on, in turns (default: 24)",
    )
    parser.add_argument(
        "--drawn",
        type=at_least(0),
        default=4,
        metavar="N",
        help="pictures to draw, where they differ most (default: 4)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="type of the weights of every model (default: as they were saved)",
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measure each model, time them in turns, draw where they differ most, and print a table.

    Args:
        args (`argparse.Namespace`): The parsed arguments.

    Returns:
        `int`: 0.
    """
    named = named_sources(args.models)

    from transformers.utils import logging

    from ..conversion.model_source import find_source
    from ..evaluation.compare import compare
    from ..evaluation.predict import load_detector
    from ..evaluation.report import load_results, load_split

    if args.dtype is not None and all(source.endswith(".json") for source in named.values()):
        raise ValueError(f"dtype is {args.dtype!r}, and no model is given; json files of results have no weights.")
    sources = {name: source if source.endswith(".json") else find_source(source) for name, source in named.items()}
    dataset, annotations = load_split(args.data, args.split)
    logging.disable_progress_bar()  # of each weight that is loaded
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)  # before the work, so that a bad place costs none
    detectors = {
        name: load_results(source, annotations)[0]
        if source.endswith(".json")
        else load_detector(source, args.device, args.dtype)
        for name, source in sources.items()
    }
    options = {"batch_size": args.batch_size, "top_k": args.top_k, "num_timed": args.timed}
    result = compare(detectors, dataset, annotations, output, **options)
    written = ["compare.json", *draw_differences(result, dataset, annotations, output, args.drawn)]
    args.document = result
    written += [f"{model['folder']}/" for model in result["models"].values()]
    print(comparison(result))
    print(f"written to {output}: {', '.join(written)}")
    return 0


def named_sources(arguments: Sequence[str]) -> dict[str, str]:
    """Tell the names of models from their places.

    Args:
        arguments (`Sequence[str]`): `NAME=PLACE`, or a place, which is then its own name.

    Returns:
        `dict[str, str]`: Place of each name.

    Raises:
        ValueError: If a name is given twice, or there is one model only.
    """
    if len(arguments) < 2:
        raise ValueError(f"{len(arguments)} model is given; the rule is at least two to compare.")
    named = {}
    for argument in arguments:
        name, equals, place = argument.partition("=")
        if name in named:
            raise ValueError(f"two models are called {name!r}; tell them apart with NAME=MODEL.")
        named[name] = place if equals else name
    return named


def comparison(result: Mapping[str, Any]) -> str:
    """Return the figures of models as lines of text.

    Args:
        result (`Mapping`): From `drmm_hf.evaluation.compare.compare`.

    Returns:
        `str`: A line a model, AP and calibration in per cent; then the pictures where they differ most.
    """
    width = max(len("model"), *map(len, result["models"]))
    titles = "".join(f"{name:>9}" for name in (*_FIGURES, "NLL", "M param", "input", "ms", "speed"))
    lines = [f"{'model':<{width}}{titles}  quartiles"]
    for name, model in result["models"].items():
        values = [100 * model[figure] if model[figure] is not None else None for figure in _FIGURES]
        cells = "".join(_cell(value, 2) for value in [*values, model["NLL"]])
        cells += _cell(model["parameters"] and model["parameters"] / 1e6, 2)
        cells += f"{_size(model['input_size']):>9}"
        cells += _cell(model["seconds"] and 1000 * model["seconds"], 0) + _cell(model["speed"], 2)
        quartiles = model["speed_quartiles"]
        lines.append(f"{name:<{width}}{cells}" + (f"  {quartiles[0]:.2f} - {quartiles[1]:.2f}" if quartiles else ""))
    lines += [
        "",
        "AP and ECE in per cent; NLL in pixels of the picture; input: shorter side / bound of the longer one, or "
        "height x width; ms a picture, one at a time; speed beside the first",
        "",
        "error (LRP) of the pictures where they differ most, each model at the score of its best F1"
        if result["pictures"]
        else "each model at the score of its best F1, there is no picture in which their errors (LRP) differ",
    ]
    for picture in result["pictures"][:_LISTED]:
        errors = "  ".join(f"{name} {100 * error['lrp']:.0f} %" for name, error in picture["errors"].items())
        lines.append(f"  {picture['file_name']}: {errors}")
    return "\n".join(lines)


def draw_differences(
    result: Mapping[str, Any], dataset: datasets.Dataset, annotations: Mapping[str, Any], output: Path, num: int
) -> list[str]:
    """Draw the pictures where models differ most, a row a picture: the annotations, then each model.

    Args:
        result (`Mapping`): From `drmm_hf.evaluation.compare.compare`.
        dataset (`datasets.Dataset`): The pictures, in the canonical schema.
        annotations (`Mapping`): Their COCO annotations.
        output (`Path`): Folder that holds the detections of each model; the picture goes there too.
        num (`int`): Most pictures to draw.

    Returns:
        `list[str]`: Name of the file, if the models differ at all.
    """
    import datasets

    from ..data.labels import LabelMap
    from ..data.loading import load_image
    from ..evaluation.detections import Detections
    from ..visualization.draw_boxes import draw_boxes, grid

    few = result["pictures"][:num]
    if not few:
        return []
    label_map = LabelMap.from_categories(annotations["categories"])
    objects = [{**record, "score": 1.0} for record in annotations["annotations"] if not record.get("iscrowd")]
    image_ids = list(dataset["image_id"])
    shown = {"annotations": Detections.from_coco(objects, label_map, image_ids)}
    for name, model in result["models"].items():
        shown[name] = Detections.load(output / model["folder"] / "detections.json", label_map, image_ids)
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    images, captions = [], []
    for entry in few:
        image = load_image(dataset[image_ids.index(entry["image_id"])])
        for name, detections in shown.items():
            boxes, threshold = dict(detections[entry["image_id"]]), 0.0
            if name == "annotations":
                boxes.pop("scores")
                captions.append(f"{entry['file_name']}: annotations")
            else:
                threshold, error = result["models"][name]["threshold"], entry["errors"][name]
                counts = f"{error['correct']} right, {error['wrong']} wrong, {error['missed']} missed"
                captions.append(f"{name}, from {threshold:.2f}: error {100 * error['lrp']:.0f} %, {counts}")
            images.append(draw_boxes(image, boxes, label_map.id2label, threshold))
    grid(images, columns=len(shown), captions=captions).save(output / "differences.jpg", quality=88)
    return ["differences.jpg"]


def _size(size: Mapping[str, int] | None) -> str:
    """Return the input size of a model in few letters."""
    size = size or {}
    if "height" in size:
        return f"{size['height']}x{size['width']}"
    return "/".join(str(size[edge]) for edge in ("shortest_edge", "longest_edge") if edge in size) or "-"


def _cell(value: float | None, digits: int) -> str:
    return f"{'-' if value is None else f'{value:.{digits}f}':>9}"
