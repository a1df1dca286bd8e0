"""`drmm audit`: look for errors in annotations with a model's density."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .counts import at_least
from .document import add_json


if TYPE_CHECKING:
    import datasets
_ON_PNG = 24  # crops on a picture; the page of html has --worst of them
_LISTED = 5  # entries that are printed
_DOUBTFUL = 0.05  # plausibility below which annotations are counted
_LEGEND = {
    "plausibility": "How well an annotation agrees with what the model sees, from 0 to 1, whatever the size and "
    "sharpness of the object. A rank, and no probability that the annotation is wrong: the model errs as well.",
    "box": "The model sees the object, but with other borders: compare the two boxes.",
    "class": "The model sees an object in this place, but of another class.",
    "nothing there": "The model sees no object in this place: there is none, its box is far off, or the model misses "
    "it. Where no box of the model overlaps the annotation by an IoU of 0.1, none is drawn.",
    "model": "What the model would have put there: class, confidence, and IoU of its box with the annotated one (1: "
    "the same box). The lower the confidence, the less it is worth.",
    "predictions without annotation": "What the model sees where nothing of this class is annotated, most confident "
    "first: a missing annotation, or a wrong alarm.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments.

    Args:
        parser (`argparse.ArgumentParser`): The command's parser.
    """
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a D-RMM model")
    parser.add_argument(
        "data", metavar="DATA", help="COCO folder, Hub id or image folder; DATA MODEL is understood too"
    )
    parser.add_argument("--split", default="train", help="split of the data (default: train)")
    parser.add_argument("--output", default="runs/audit", metavar="DIR", help="where to write (default: runs/audit)")
    parser.add_argument("--worst", type=at_least(0), default=100, metavar="N", help="crops on the page, of each kind")
    parser.add_argument(
        "--batch-size", type=at_least(1), default=1, metavar="N", help="pictures a batch; changes no figure"
    )
    parser.add_argument(
        "--top-k", type=at_least(1), default=100, metavar="K", help="predictions a picture (default: 100)"
    )
    parser.add_argument(
        "--planted", metavar="FILE", help="measure the audit: planted_errors.json of scripts/plant_errors.py"
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Rank annotations and missing ones, write them and their crops, and print the worst.

    Args:
        args (`argparse.Namespace`): The parsed arguments.

    Returns:
        `int`: 0.
    """
    from transformers.utils import logging

    from ..conversion.model_source import find_source
    from ..data.labels import LabelMap
    from ..evaluation.audit import audit
    from ..evaluation.evaluate import category_of_label
    from ..evaluation.likelihood import check_density, gather_evidence
    from ..evaluation.planted_errors import read_planted
    from ..evaluation.predict import load_detector, predict
    from ..evaluation.report import load_split

    name, data = args.model, args.data
    if (Path(data) / "config.json").is_file() and not (Path(name) / "config.json").is_file():
        name, data = data, name  # DATA MODEL: only one of the two is a model
    source = find_source(name)
    dataset, annotations = load_split(data, args.split)
    planted = None if args.planted is None else read_planted(args.planted, annotations)
    logging.disable_progress_bar()  # of each weight that is loaded
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)  # before the work, so that a bad place costs none

    model, processor = load_detector(source, args.device)
    check_density(model.config)
    if getattr(processor, "calibration", None):
        # A map in steps makes many scores equal, and suggestions come from the density, which it does not change.
        processor.calibration = None
        print("the calibration that is saved with the model is not used: its confidences are ranked as they are")
    mapping = category_of_label(model.config, annotations["categories"])
    label_map = LabelMap.from_categories(annotations["categories"])
    evidence = gather_evidence(model, processor, dataset, annotations, batch_size=args.batch_size)
    detections = predict(model, processor, dataset, args.batch_size, top_k=args.top_k)
    detections = detections.relabel({label: label_map.label(one) for label, one in mapping.items()})
    entries = detections.to_coco(label_map)
    (output / "detections.json").write_text(json.dumps(entries))
    result = audit(annotations, evidence, entries, args.top_k)
    (output / "audit.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    written = ["audit.json", "detections.json", *draw_sheets(result, dataset, annotations, output, args.worst)]
    args.document = result
    print(summary(result, annotations))
    if planted is not None:
        scored, files = measure_audit(result, annotations, entries, planted, output, args.top_k)
        written += files
        args.document = result | {"planted": scored}
        print(f"\n{score_table(scored)}")
    print(f"written to {output}: {', '.join(written)}")
    return 0


def summary(result: Mapping[str, Any], annotations: Mapping[str, Any]) -> str:
    """Return the worst entries of an audit as lines of text.

    Args:
        result (`Mapping`): From `drmm_hf.evaluation.audit.audit`.
        annotations (`Mapping`): The COCO annotations.

    Returns:
        `str`: A line each for the least plausible annotations and the most confident missing ones, then counts.
    """
    from ..evaluation.audit import CONFIDENT

    names = _names(annotations)
    lines = ["least plausible annotations"]
    for entry in result["annotations"][:_LISTED]:
        lines.append(f"  {entry['file_name']}  {'  '.join(_annotation_lines(entry, names))}")
    lines.append("predictions without annotation")
    for entry in result["missing"][:_LISTED]:
        lines.append(f"  {entry['file_name']}  {'  '.join(_missing_lines(entry, names))}")
    doubtful = [entry for entry in result["annotations"] if entry["plausibility"] < _DOUBTFUL]
    reasons = Counter(entry["reason"] for entry in doubtful)
    confident = sum(entry["score"] >= CONFIDENT for entry in result["missing"])
    lines += [
        "",
        f"{result['num_images']} images; {len(result['annotations'])} annotations, {len(doubtful)} of them below a "
        f"plausibility of {_DOUBTFUL}" + (f" ({_counts(reasons)})" if reasons else ""),
        f"{confident} predictions of {CONFIDENT} and more without annotation; {result['num_crowds']} crowds left out",
        *warnings(result),
    ]
    return "\n".join(lines)


def warnings(result: Mapping[str, Any]) -> list[str]:
    """Name the classes that a model hardly knows.

    Args:
        result (`Mapping`): From `drmm_hf.evaluation.audit.audit`.

    Returns:
        `list[str]`: One line, or none if it knows all.
    """
    from ..evaluation.audit import CONFIDENT

    weak = [entry for entry in result["classes"] if not entry["known"]]
    if not weak:
        return []
    listed = [
        f"{entry['name']} (AP {100 * entry['AP']:.0f}, {entry['confident']} predictions of {CONFIDENT} and more for "
        f"{entry['annotations']} annotations)"
        for entry in weak[:_LISTED]
    ]
    more = f" and {len(weak) - _LISTED} more, all in audit.json" if len(weak) > _LISTED else ""
    return [
        f"warning: the model hardly knows {', '.join(listed)}{more}: what it suspects of these classes says more of "
        "the model than of the annotations"
    ]


def draw_sheets(
    result: Mapping[str, Any], dataset: datasets.Dataset, annotations: Mapping[str, Any], output: Path, worst: int
) -> list[str]:
    """Draw crops of the worst entries: a page of html, and a picture of each kind.

    Args:
        result (`Mapping`): From `drmm_hf.evaluation.audit.audit`.
        dataset (`datasets.Dataset`): The pictures, in the canonical schema.
        annotations (`Mapping`): Their COCO annotations.
        output (`Path`): Folder to write to.
        worst (`int`): Entries of each kind on the page; the first 24 of them are on the picture.

    Returns:
        `list[str]`: Names of the files.
    """
    import datasets

    from ..data.loading import load_image
    from ..visualization.contact_sheet import Card, contact_sheet, crop, html_sheet

    names = _names(annotations)
    rows = {image_id: row for row, image_id in enumerate(dataset["image_id"])}
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    image = lru_cache(8)(lambda image_id: load_image(dataset[rows[image_id]]))
    sections, written = {}, ["audit.html"]
    for heading, key, describe in (
        ("Least plausible annotations", "annotations", _annotation_lines),
        ("Predictions without annotation", "missing", _missing_lines),
    ):
        sections[heading] = cards = []
        for entry in result[key][:worst]:
            boxes = (None, entry["bbox"])
            if key == "annotations":
                boxes = (entry["bbox"], entry["suggestion"] and entry["suggestion"]["bbox"])
            cards.append(Card(crop(image(entry["image_id"]), *boxes), [*describe(entry, names), entry["file_name"]]))
        if cards:
            contact_sheet(cards[:_ON_PNG], annotated=key == "annotations").save(output / f"{key}.png")
            written.append(f"{key}.png")
    counts = f"{result['num_images']} images, {len(result['annotations'])} annotations"
    counts += f", {result['num_crowds']} crowds left out"
    page = html_sheet("Audit of annotations", sections, [counts, *warnings(result)], _LEGEND)
    (output / "audit.html").write_text(page, encoding="utf-8")
    return written


def measure_audit(
    result: Mapping[str, Any],
    annotations: Mapping[str, Any],
    entries: Sequence[Mapping[str, Any]],
    planted: Sequence[Mapping[str, Any]],
    output: Path,
    top_k: int,
) -> tuple[dict[str, Any], list[str]]:
    """Measure how well an audit finds planted errors, beside one by confidences alone.

    Args:
        result (`Mapping`): From `drmm_hf.evaluation.audit.audit`.
        annotations (`Mapping`): The spoilt annotations.
        entries (`Sequence[Mapping]`): The detections, as COCO results.
        planted (`Sequence[Mapping]`): The record of what was planted.
        output (`Path`): Folder to write `planted.json` and `planted.png` to.
        top_k (`int`): Number of predictions a picture.

    Returns:
        `tuple[dict, list[str]]`: `density` and `confidence`, from `score_audit`; the names of the files.
    """
    from transformers.utils import is_matplotlib_available

    from ..evaluation.audit import confidence_audit, score_audit
    from ..visualization.plots import audit_curves

    scored = {"density": score_audit(result, planted)}
    scored["confidence"] = score_audit(confidence_audit(annotations, entries, top_k), planted)
    (output / "planted.json").write_text(json.dumps(scored, allow_nan=False) + "\n")
    if not is_matplotlib_available():
        return scored, ["planted.json"]
    audit_curves(scored, output / "planted.png")
    return scored, ["planted.json", "planted.png"]


def score_table(scored: Mapping[str, Any]) -> str:
    """Return how well planted errors were found as lines of text, in per cent.

    Args:
        scored (`Mapping`): Name of the ranking to what `drmm_hf.evaluation.audit.score_audit` returns.

    Returns:
        `str`: A line a kind of error.
    """
    width = max(map(len, scored))
    titles = "".join(f"{f'AP, {name}':>{width + 6}}{'first n':>9}" for name in scored)
    lines = [f"{'planted':<14}{'n':>6}{titles}"]
    for kind in ("annotations", "moved", "relabelled", "removed"):
        parts = [one[kind] for one in scored.values()]
        if parts[0] is not None:
            cells = "".join(
                f"{100 * part['average_precision']:>{width + 6}.1f}{100 * part['found_at_num']:>9.1f}"
                for part in parts
            )
            lines.append(f"{kind:<14}{parts[0]['num']:>6}{cells}")
    return "\n".join([*lines, "", "average precision in per cent; first n: share found among the first n of the list"])


def _annotation_lines(entry: Mapping[str, Any], names: Mapping[int, str]) -> list[str]:
    """Say what is annotated, and what the model would have put there."""
    seen, suggestion = "nothing that overlaps it", entry["suggestion"]
    if suggestion is not None:
        seen = f"{names[suggestion['category_id']]} {suggestion['score']:.2f}, IoU {suggestion['iou']:.2f}"
    return [
        f"{names[entry['category_id']]} #{entry['annotation_id']}: {entry['reason']}",
        f"model: {seen}",
        f"plausibility {entry['plausibility']:.2g}",
    ]


def _missing_lines(entry: Mapping[str, Any], names: Mapping[int, str]) -> list[str]:
    """Say what the model sees."""
    box = ", ".join(f"{value:.0f}" for value in entry["bbox"])
    return [f"{names[entry['category_id']]} {entry['score']:.2f}", f"box {box}"]


def _names(annotations: Mapping[str, Any]) -> dict[int, str]:
    """Return the names of categories by their ids."""
    return {record["id"]: record["name"] for record in annotations["categories"]}


def _counts(counter: Counter) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.most_common())
