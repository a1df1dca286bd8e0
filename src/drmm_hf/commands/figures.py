"""`drmm figures`: the figures of the paper, drawn from what has been measured here."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from ..evaluation.paper_tables import Result

    Drawn = tuple[Path, Sequence[Result | Path]]  # the figure, and the results that it shows

# How to train and evaluate what a figure needs.
_TRAIN = {"box": " --head-type box --box-delta-unit pixels", "nll": " --criterion nll", "nll_mcm": ""}
_COPIES = " --num-ground-truth-copies 3"
_EVALUATE = {"duplicates": " --sweep", "calibration": " --calibration", "assignments": " --assignments 100"}
_ROLES = {"box": "{} (box head)", "nll": "NLL", "nll_mcm": "NLL + MCM"}
_DECODERS = {"sparse_rcnn": "Sparse R-CNN", "adamixer": "AdaMixer"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments.

    Args:
        parser (`argparse.ArgumentParser`): The command's parser.
    """
    parser.add_argument("number", type=int, metavar="N", help="number of the figure: 2 or 6 to 15")
    parser.add_argument("--results", nargs="+", default=[], metavar="DIR", help="folders to look for results in")
    parser.add_argument("--output", required=True, metavar="FILE", help="where to draw: a .png, .pdf or .svg file")
    parser.add_argument("--data", metavar="DIR", help="where the pictures are, if not where the recipe says")
    parser.add_argument(
        "--image-ids", nargs="+", type=int, metavar="ID", help="pictures to show (default: those that show most)"
    )


def run(args: argparse.Namespace) -> int:
    """Draw a figure.

    Args:
        args (`argparse.Namespace`): The parsed arguments.

    Returns:
        `int`: 0.
    """
    from ..evaluation.paper_tables import NO_RUN, find_results
    from .tables import resolved_recipe

    if args.number not in FIGURES:
        diagrams = (
            " Figures 1, 3, 4 and 5 are diagrams: docs/concepts.md has them." if args.number in range(1, 6) else ""
        )
        raise ValueError(f"figure is {args.number}; drawn from results are {', '.join(map(str, FIGURES))}.{diagrams}")
    if Path(args.output).suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"output is {args.output!r}; it must end in .png, .pdf or .svg.")
    results, strangers = find_results(args.results, resolved_recipe)
    try:
        usual = [one for one in results if not _overfits(one) and not one.options]
        unknown = [place for place, reason in strangers.items() if reason == NO_RUN]
        path, used = FIGURES[args.number](usual, unknown, args)
    except ValueError:
        print(*left_out(results, strangers, []), sep="\n", file=sys.stderr)
        raise
    print("drawn from", *(f"  {_place(one)}: {_about(one)}" for one in used), sep="\n")
    print(*left_out(results, strangers, used), f"written to {path}", sep="\n")
    return 0


def left_out(results: Sequence[Result], strangers: Mapping[Path, str], used: Sequence[Result | Path]) -> list[str]:
    """Say which folders of results a figure does not show, and why.

    Args:
        results (`Sequence[Result]`): From `drmm_hf.evaluation.paper_tables.find_results`.
        strangers (`Mapping[Path, str]`): Likewise.
        used (`Sequence[Result | Path]`): Those that it shows.

    Returns:
        `list[str]`: A line a folder.
    """
    from ..evaluation.paper_tables import NO_RUN

    lines = []
    for result in results:
        if _overfits(result):
            lines.append(f"left out, trained to overfit {result.recipe['overfit']} pictures: {_place(result)}")
        elif result.options:
            lines.append(f"left out, evaluated otherwise ({result.options_in_words()}): {_place(result)}")
        elif result not in used:
            lines.append(f"left out, not needed ({_about(result)}): {_place(result)}")
        for old, new in result.superseded.items():
            lines.append(f"left out, older than {new}, of the same model and split: {old}")
    for place, reason in strangers.items():
        if place not in used:
            hint = " (only Figure 2 takes such, of its data and split)" if reason == NO_RUN else ""
            lines.append(f"left out, {reason}{hint}: {place}")
    return lines


def _overfits(result: Result) -> bool:
    return result.recipe["overfit"] is not None


def _place(source: Result | Path) -> str:
    """Return the folders that figures are from: a result joins files of several evaluations."""
    if isinstance(source, Path):
        return str(source)
    return ", ".join(map(str, dict.fromkeys(source.places.values()))) or str(source.run)


def _about(source: Result | Path) -> str:
    """Say what figures are of."""
    return "no recipe.yaml" if isinstance(source, Path) else f"{_title(source)}; {source.data} {source.split}"


def find(number: int, results: Sequence[Result], role: str, file: str, copies: bool = False) -> Result:
    """Find what a figure needs among results.

    Args:
        number (`int`): Of the figure.
        results (`Sequence[Result]`): From `drmm_hf.evaluation.paper_tables.find_results`.
        role (`str`): "box", "nll" or "nll_mcm".
        file (`str`): Which of its files is needed.
        copies (`bool`): Whether it was trained with copied ground truths.

    Returns:
        `Result`: The first that fits.

    Raises:
        ValueError: If there is none; the message has the commands that give it.
    """
    for result in results:
        if _role(result) == role and file in result.files and (result.recipe["num_ground_truth_copies"] > 1) == copies:
            return result
    train = f"drmm train RECIPE --output RUN{_TRAIN[role]}{_COPIES if copies else ''}"
    evaluate = f"drmm evaluate RUN/best DATA --output RUN/SPLIT --split SPLIT{_EVALUATE.get(file, '')}"
    raise ValueError(f"figure {number} needs {file}.json of a model that is not there: {train}, then {evaluate}")


def _role(result: Result) -> str:
    return "box" if result.recipe["head_type"] == "box" else result.recipe["criterion"]


def _title(result: Result) -> str:
    """Name a result by its method."""
    role = _role(result)
    decoder = _DECODERS[result.recipe["decoder_type"]]
    names = {"box": decoder, "nll": f"NLL, {decoder}", "nll_mcm": f"D-RMM, {decoder}"}
    name = names.get(role, f"{role}, {decoder}")
    for field, word in (("num_ground_truth_copies", "copies"), ("num_query_groups", "groups")):
        if result.recipe[field] > 1:
            name += f", {result.recipe[field]} {word}"
    return name


def _same_data(results: Sequence[Result]) -> Sequence[Result]:
    """Return the results on the data and split that most of them are on: one figure, one data set."""
    places = [(result.data, result.split, result.ground_truth) for result in results]
    return [result for result, place in zip(results, places, strict=True) if place == max(places, key=places.count)]


def _without_selection(results: Sequence[Result]) -> Sequence[Result]:
    return _same_data([result for result in results if result.recipe["top_k_ratio"] is None])


def _per_cent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}"


def figure_2(results: Sequence[Result], strangers: Sequence[Path], args: argparse.Namespace) -> Drawn:
    """Draw the reliability of several detectors, of others too, in the order of the folders."""
    from ..evaluation.calibration import CalibrationResult
    from ..evaluation.paper_tables import data_name
    from ..evaluation.report_files import read_report
    from ..visualization.plots import reliability_diagrams

    found: dict[tuple[Any, ...], tuple[str, Result | Path, dict[str, Any]]] = {}
    for result in results:
        if "metrics" in result.files and result.recipe["top_k_ratio"] is None:
            key = result.run, result.data, result.split, result.ground_truth
            found[key] = _title(result), result, result.files["metrics"]
    for place in sorted((one for one in strangers if (one / "metrics.json").is_file()), key=_written):
        about = read_report(place / "evaluation.json")
        model, data = about["model"] or place, about["data"]
        key = model, data and data_name(data), about["split"], about.get("ground_truth")
        found.pop(key, None)  # an older evaluation of the same
        found[key] = Path(model).name, place, read_report(place / "metrics.json")
    measured = [key[1:] for key in found]
    shown = [one for key, one in found.items() if key[1:] == max(measured, key=measured.count)]
    if not shown:
        raise ValueError(
            "figure 2 needs metrics.json of some detectors: drmm evaluate MODEL DATA --output DIR writes it"
        )
    names = [name for name, _, _ in shown]
    diagrams = {
        name if names.count(name) == 1 else f"{name} {names[:index].count(name) + 1}": metrics["reliability"]
        for index, (name, _, metrics) in enumerate(shown)
    }
    diagrams = {name: CalibrationResult.from_dict(one) for name, one in diagrams.items()}
    notes = [f"above 0.1: {_per_cent(metrics['ECE_0.1'], 2)} %" for _, _, metrics in shown]
    return reliability_diagrams(diagrams, args.output, notes=notes), [source for _, source, _ in shown]


def _written(place: Path) -> float:
    return (place / "metrics.json").stat().st_mtime


def figure_8(results: Sequence[Result], _: Sequence[Path], args: argparse.Namespace) -> Drawn:
    """Draw the reliability of NLL, with NMS and winner-take-all, and of NLL + MCM."""
    from ..evaluation.calibration import CalibrationResult
    from ..visualization.plots import reliability_diagrams

    results = _without_selection(results)
    nll, nll_mcm = find(8, results, "nll", "duplicates"), find(8, results, "nll_mcm", "metrics")
    swept = nll.files["duplicates"]
    entries = {"NLL": swept["none"]}
    for method in ("nms", "wta"):
        best = swept["best_iou_threshold"]
        entries[f"NLL + {method.upper()}"] = next(one for one in swept[method] if one["iou_threshold"] == best)
    entries["NLL + MCM"] = nll_mcm.files["metrics"]
    diagrams = {name: CalibrationResult.from_dict(entry["reliability"]) for name, entry in entries.items()}
    notes = [f"AP {_per_cent(entry['AP'])} %" for entry in entries.values()]
    return reliability_diagrams(diagrams, args.output, notes=notes), [nll, nll_mcm]


def figure_9(results: Sequence[Result], _: Sequence[Path], args: argparse.Namespace) -> Drawn:
    """Draw the reliability of class probability, objectness and their product."""
    from ..evaluation.calibration import CalibrationResult
    from ..visualization.plots import reliability_diagrams

    result = find(9, _without_selection(results), "nll_mcm", "calibration")
    kinds = result.files["calibration"]["kinds"]
    names = {
        "class_probability": "class probability p",
        "objectness": "objectness o",
        "confidence": "confidence p · o",
    }
    diagrams = {name: CalibrationResult.from_dict(kinds[key]["reliability"]) for key, name in names.items()}
    return reliability_diagrams(diagrams, args.output, ["p", "o", "p · o"]), [result]


def figure_7(results: Sequence[Result], _: Sequence[Path], args: argparse.Namespace) -> Drawn:
    """Draw AP against the IoU threshold of NMS."""
    from ..visualization.paper_figures import nms_curves

    results, curves = _without_selection(results), {}
    used = [find(7, results, role, "duplicates") for role in _ROLES]
    for role, result in zip(_ROLES, used, strict=True):
        swept = result.files["duplicates"]
        name = _ROLES[role].format(_DECODERS[result.recipe["decoder_type"]])
        points = {entry["iou_threshold"]: entry["AP"] for entry in swept["nms"]} | {1.0: swept["none"]["AP"]}
        curves[name] = list(points.items())
    return nms_curves(curves, args.output), used


def figure_10(results: Sequence[Result], _: Sequence[Path], args: argparse.Namespace) -> Drawn:
    """Draw AP against speed: the published points, and beside them what was measured here."""
    from ..evaluation.paper_tables import paper_table
    from ..visualization.paper_figures import speed_diagram

    published: dict[str, list[tuple[float, float, str]]] = {}
    for row in paper_table(6).rows:
        if row.figures["FPS"] is not None:
            published.setdefault(row.labels[0], []).append(
                (row.figures["FPS"], row.figures["AP"] / 100, row.labels[1])
            )
    panels = {"Published: COCO test-dev, TITAN RTX": published}
    measured, used = _measured_speeds(_without_selection(results), _title, lambda _: "")
    return speed_diagram(panels | measured, args.output), used


def _measured_speeds(results: Sequence[Result], series: Any, word: Any) -> tuple[dict[str, dict], list[Result]]:
    """Return the panel of what was measured here, results with AP and pictures a second, and these results."""
    measured: dict[str, list[tuple[float, float, str]]] = {}
    places, used = set(), []
    for result in results:
        speed = result.files.get("cost", {}).get("pictures_per_second")
        if speed is not None and "metrics" in result.files:
            measured.setdefault(series(result), []).append((speed, result.files["metrics"]["AP"], word(result)))
            used.append(result)
            places.add(f"{result.data} {result.split}, {result.files['cost']['device']}")
    if not measured:
        print("no speed was measured here: drmm benchmark cost RUN/best --speed --output RUN/cost.json")
        return {}, []
    return {f"Here: {' and '.join(sorted(places))}": measured}, used


def figure_11(results: Sequence[Result], _: Sequence[Path], args: argparse.Namespace) -> Drawn:
    """Draw AP against the share of queries that is kept."""
    from ..visualization.paper_figures import selection_curves

    values: dict[str, dict[float, list[float]]] = {}
    used = sorted(_selected(11, results), key=lambda result: result.recipe["num_queries"])
    for result in used:
        name, ratio = f"{_title(result)}, {result.recipe['num_queries']} queries", result.recipe["top_k_ratio"] or 1.0
        values.setdefault(name, {}).setdefault(ratio, []).append(result.files["metrics"]["AP"])
    curves = {
        name: [(ratio, mean(points)) for ratio, points in ratios.items()]  # over seeds
        for name, ratios in values.items()
        if len(ratios) > 1
    }
    return selection_curves(curves, args.output), used


def figure_12(results: Sequence[Result], _: Sequence[Path], args: argparse.Namespace) -> Drawn:
    """Draw AP against speed, with and without a selection of queries."""
    from ..visualization.paper_figures import speed_diagram

    def word(result: Result) -> str:
        ratio = result.recipe["top_k_ratio"]
        return f"#{result.recipe['num_queries']}" + ("" if ratio is None else f" Top-{ratio:g}")

    panels, used = _measured_speeds(_selected(12, results), _title, word)
    if not panels:
        raise ValueError(
            "figure 12 needs speeds: drmm benchmark cost RUN/best --speed --top-k-ratio 0.7 "
            "--output RUN/top0.7/cost.json"
        )
    return speed_diagram(panels, args.output), used


def _selected(number: int, results: Sequence[Result]) -> Sequence[Result]:
    """Return the results with AP if there are some with a selection of queries."""
    results = _same_data([result for result in results if "metrics" in result.files])
    if not any(result.recipe["top_k_ratio"] for result in results):
        raise ValueError(
            f"figure {number} needs evaluations with several ratios: drmm evaluate RUN/best DATA --split SPLIT "
            "--top-k-ratio 0.7 --output RUN/top0.7"
        )
    return results


def _pictures(result: Result, data: str | None) -> tuple[Any, Mapping[str, Any]]:
    """Load the pictures that a result was measured on, and their annotations."""
    from ..training.arguments import load_recipe
    from ..training.build import load_split

    arguments = load_recipe(result.run / "recipe.yaml").data
    source = data or arguments.source
    return load_split(dataclasses.replace(arguments, source=source, val_split=result.split), "val")


def _detections(number: int, results: Sequence[Result], data: str | None) -> tuple[dict[str, Any], Any, list[Result]]:
    """Return the detections of the five models of Figure 15 by name, the pictures, and the results they are from."""
    from ..data.labels import LabelMap
    from ..evaluation.deduplication import deduplicate
    from ..evaluation.detections import Detections

    results, found = _without_selection(results), {}
    used = [find(number, results, role, "metrics") for role in _ROLES]
    for role, result in zip(_ROLES, used, strict=True):
        dataset, annotations = _pictures(result, data)
        label_map = LabelMap.from_categories(annotations["categories"])
        read = Detections.load(result.places["metrics"] / "detections.json", label_map, dataset["image_id"])
        name = _ROLES[role].format(_DECODERS[result.recipe["decoder_type"]])
        found[name + _figures(result.files["metrics"])] = read
        if role == "nll":
            swept = result.files.get("duplicates")
            iou = 0.7 if swept is None else swept["best_iou_threshold"]
            for method in ("nms", "wta"):
                entries = [] if swept is None else [one for one in swept[method] if one["iou_threshold"] == iou]
                figures = _figures(entries[0]) if entries else ""
                found[f"NLL + {method.upper()}{figures}"] = deduplicate(read, method, iou)[0]
    return found, dataset, used


def _figures(entry: Mapping[str, Any]) -> str:
    return f", {_per_cent(entry['AP'])} / {_per_cent(entry['AR100'])}"


def _chosen(found: Mapping[str, Any], image_ids: Sequence[int] | None, count: int) -> list[int]:
    """Return the pictures to show: those where NMS removes most confident boxes of the NLL model."""
    if image_ids:
        return list(image_ids)
    _, nll, nms, *_ = found.values()
    confident = [{one: int((part[one]["scores"] > 0.1).sum()) for one in part} for part in (nll, nms)]
    return sorted(confident[0], key=lambda one: confident[1][one] - confident[0][one])[:count]


def _image(dataset: Any, image_id: int) -> Image:
    import datasets

    from ..data.loading import load_image

    row = list(dataset["image_id"]).index(image_id)
    return load_image(dataset.cast_column("image", datasets.Image(decode=False))[row])


def figure_6(results: Sequence[Result], _: Sequence[Path], args: argparse.Namespace) -> Drawn:
    """Draw the boxes of four models on one picture, with their AP / AR."""
    from ..visualization.plots import confidence_boxes

    found, dataset, used = _detections(6, results, args.data)
    (image_id, *_) = _chosen(found, args.image_ids, 1)
    image = _image(dataset, image_id)
    names = list(found)
    panels = []
    for letter, index in zip("abcd", (0, 1, 4, 3), strict=True):
        part = found[names[index]][image_id]
        panels.append((f"({letter}) {names[index]}", image, part["boxes"], part["scores"]))
    return confidence_boxes(panels, args.output), used


def figure_15(results: Sequence[Result], _: Sequence[Path], args: argparse.Namespace) -> Drawn:
    """Draw the boxes of five models on the same pictures, with their AP / AR."""
    from ..visualization.paper_figures import confidence_grid

    found, dataset, used = _detections(15, results, args.data)
    chosen = _chosen(found, args.image_ids, 4)
    images = {image_id: _image(dataset, image_id) for image_id in chosen}
    rows = {
        name: [(images[one], part[one]["boxes"], part[one]["scores"]) for one in chosen]
        for name, part in found.items()
    }
    return confidence_grid({name.replace(", ", "\n"): row for name, row in rows.items()}, args.output), used


def _corners(bbox: Sequence[float]) -> list[float]:
    left, top, width, height = bbox
    return [left, top, left + width, top + height]


def _overlaps(boxes: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> np.ndarray:
    """Return the IoU of xywh boxes, `(n, m)`."""
    import torch
    from torchvision.ops import box_iou

    sides = [
        torch.tensor([_corners(box) for box in some], dtype=torch.float64).reshape(-1, 4) for some in (boxes, others)
    ]
    return box_iou(*sides).numpy()


def figure_13(results: Sequence[Result], _: Sequence[Path], args: argparse.Namespace) -> Drawn:
    """Draw predictions that fit an object well and yet are trained as background."""
    from ..visualization.paper_figures import assignment_diagram

    result = find(13, results, "box", "assignments")
    dataset, _annotations = _pictures(result, args.data)
    shown = []
    for image in result.files["assignments"]["images"]:
        stage, truths = image["stages"][-1], image["ground_truths"]
        matched = {query for entry in stage["matched"] for query in entry["predictions"]}
        predictions = stage["predictions"]
        overlaps = _overlaps([one["bbox"] for one in predictions], [one["bbox"] for one in truths])
        negatives = [
            index
            for index, one in enumerate(predictions)
            if index not in matched
            and any(
                overlap >= 0.5 and truth["category_id"] == one["category_id"]
                for overlap, truth in zip(overlaps[index], truths, strict=True)
            )
        ]
        boxes = [(_corners(truth["bbox"]), "ground truth", "") for truth in truths]
        for kind, indices in (("negative", negatives), ("positive", sorted(matched))):
            boxes += [
                (
                    _corners(predictions[one]["bbox"]),
                    kind,
                    f"{predictions[one]['score']:.2f}" if kind == "negative" else "",
                )
                for one in indices
            ]
        shown.append((len(negatives), image["image_id"], boxes))
    shown = _wanted(shown, args.image_ids, 4)
    panels = [(f"{count} negatives at IoU 0.5", _image(dataset, one), boxes) for count, one, boxes in shown]
    names = {
        "ground truth": "ground truth",
        "positive": "prediction that is matched: positive",
        "negative": "prediction that fits and is not: negative",
    }
    return assignment_diagram(panels, names, args.output), [result]


def figure_14(results: Sequence[Result], _: Sequence[Path], args: argparse.Namespace) -> Drawn:
    """Draw the predictions that copies of one ground truth are matched to."""
    from ..visualization.paper_figures import assignment_diagram

    result = find(14, results, "box", "assignments", copies=True)
    dataset, _annotations = _pictures(result, args.data)
    shown = []
    for image in result.files["assignments"]["images"]:
        stage = image["stages"][-1]
        for truth, entry in zip(image["ground_truths"], stage["matched"], strict=True):
            boxes = [stage["predictions"][query]["bbox"] for query in entry["predictions"]]
            if len(boxes) < 2:
                continue
            overlaps = _overlaps(boxes, [truth["bbox"]])[:, 0]
            best = int(overlaps.argmax())
            drawn = [(_corners(truth["bbox"]), "ground truth", "")]
            for index, (box, score) in enumerate(zip(boxes, entry["scores"], strict=True)):
                drawn.append((_corners(box), "positive" if index == best else "negative", f"{score:.2f}"))
            shown.append((float(overlaps[best] - overlaps.min()), image["image_id"], drawn))
    shown = _wanted(shown, args.image_ids, 4)
    panels = [("", _image(dataset, image_id), boxes) for _, image_id, boxes in shown]
    copies = result.files["assignments"]["num_copies"]
    names = {
        "ground truth": "ground truth",
        "positive": f"best assignment of {copies}",
        "negative": "the others, which learn the same class",
    }
    return assignment_diagram(panels, names, args.output), [result]


def _wanted(shown: list[tuple], image_ids: Sequence[int] | None, count: int) -> list[tuple]:
    """Return what has the largest first entry, once a picture, or what is asked for."""
    best: dict[int, tuple] = {}
    for entry in sorted(shown, key=lambda entry: -entry[0]):
        best.setdefault(entry[1], entry)
    chosen = [one for one in image_ids or list(best)[:count] if one in best]
    if not chosen:
        raise ValueError(
            "assignments.json has no such pictures: drmm evaluate RUN/best DATA --assignments N with more"
        )
    return [best[one] for one in chosen]


FIGURES = {
    2: figure_2,
    6: figure_6,
    7: figure_7,
    8: figure_8,
    9: figure_9,
    10: figure_10,
    11: figure_11,
    12: figure_12,
    13: figure_13,
    14: figure_14,
    15: figure_15,
}
