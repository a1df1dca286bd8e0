"""`drmm calibrate`: fit what corrects a model's confidences and scales, and save it with its processor."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .counts import at_least
from .document import add_json


_FEW_OBJECTS = 100  # fewer say little about others
_FEW_OF_A_CLASS = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments.

    Args:
        parser (`argparse.ArgumentParser`): The command's parser.
    """
    parser.add_argument("model", metavar="MODEL", help="folder of a D-RMM model; its preprocessor_config.json changes")
    parser.add_argument("data", metavar="DATA", help="COCO folder, Hub id or image folder that it was not trained on")
    parser.add_argument("--split", default="val", help="split of the data (default: val)")
    parser.add_argument(
        "--scores",
        choices=["auto", "temperature", "isotonic", "none"],
        default="auto",
        help="how to correct confidences (default: auto, what is best on held-out pictures of this split)",
    )
    parser.add_argument("--no-scales", action="store_true", help="leave box scales as they are")
    parser.add_argument(
        "--threshold", choices=["all", "class"], help="also save the score threshold of the largest F1 as the default"
    )
    parser.add_argument(
        "--annotations", metavar="FILE", help="COCO json file, if not annotations/instances_SPLIT.json"
    )
    parser.add_argument("--images", metavar="DIR", help="image folder, if not one of the usual places")
    parser.add_argument(
        "--batch-size", type=at_least(1), default=1, metavar="N", help="pictures a batch; changes no figure"
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Predict as if nothing were calibrated, fit, and save.

    Args:
        args (`argparse.Namespace`): The parsed arguments.

    Returns:
        `int`: 0.
    """
    path = Path(args.model) / "preprocessor_config.json"
    if not path.is_file():
        raise ValueError(
            f"model is {args.model!r}, which has no preprocessor_config.json; the rule is a model folder."
        )

    from ..evaluation.files import run_user

    if (user := run_user(path.resolve().parents[1])) is not None:
        raise ValueError(
            f"model is {args.model!r}, of a run that goes on ({user}) and would replace what is saved; wait for its "
            "end, or calibrate a copy."
        )

    from transformers.utils import logging

    from ..data.labels import LabelMap
    from ..evaluation.evaluate import category_of_label, check_images
    from ..evaluation.predict import load_detector, predict
    from ..evaluation.recalibration import calibration_fields, held_out_errors
    from ..evaluation.report import load_split
    from ..modeling.mixture import tail_freedom

    dataset, annotations = load_split(args.data, args.split, images=args.images, annotations=args.annotations)
    objects = [record for record in annotations["annotations"] if not record.get("iscrowd")]
    if not objects:
        raise ValueError(
            f"data is {args.data!r}, whose split {args.split} has no annotated object, crowds aside; the rule is some "
            "that predictions can be compared with."
        )
    logging.disable_progress_bar()  # of each weight that is loaded
    model, processor = load_detector(args.model, args.device)
    if not hasattr(processor, "score_threshold"):
        raise ValueError(
            f"model is a {model.config.model_type!r}, whose processor takes no calibration; D-RMM's does."
        )
    mapping = category_of_label(model.config, annotations["categories"])
    check_images(annotations, dataset)
    processor.calibration = None  # a second calibration replaces the first one
    label_map = LabelMap.from_categories(annotations["categories"])
    detections = predict(model, processor, dataset, args.batch_size)
    known = detections.relabel({label: label_map.label(category_id) for label, category_id in mapping.items()})
    entries, config, method, errors = known.to_coco(label_map), model.config, args.scores, {}
    if method == "auto":
        errors = held_out_errors(annotations, entries)
        method = min(errors, key=lambda one: errors[one]["squared_error"]) if errors else "temperature"
    fields = calibration_fields(
        annotations,
        entries,
        method=None if method == "none" else method,
        scales=not args.no_scales and config.head_type == "mixture",
        threshold=args.threshold,
        freedom=tail_freedom(config.coordinate_distribution, config.student_t_freedom),
    )
    if args.threshold == "class":
        names = {record["id"]: record["name"] for record in annotations["categories"]}
        each = fields["score_threshold"]
        fields["score_threshold"] = [each.get(names.get(mapping.get(label)), 0.5) for label in sorted(config.id2label)]
    save_fields(path, fields)
    if len(objects) < _FEW_OBJECTS:
        print(
            f"drmm calibrate: warning: fitted on {len(objects)} objects; fewer than {_FEW_OBJECTS} say little about "
            "those of other pictures",
            file=sys.stderr,
        )
    if args.threshold == "class":
        counts = Counter(record["category_id"] for record in objects)
        rare = [f"{name} ({counts[id_]})" for id_, name in names.items() if counts[id_] < _FEW_OF_A_CLASS]
        if rare:
            print(
                f"drmm calibrate: warning: thresholds of classes with fewer than {_FEW_OF_A_CLASS} objects say "
                f"little: {', '.join(rare)}",
                file=sys.stderr,
            )
    certain = certainty(fields, [entry["score"] for entry in entries])
    if certain is not None:
        print(f"drmm calibrate: warning: {certain}", file=sys.stderr)
    args.document = fields | {"scores": method, "held_out": errors, "num_pictures": len(dataset)}
    if args.scores == "auto":
        print(f"{choice(errors, method)}\n")
    print(summary(fields, config.id2label, len(dataset)))
    print(f"saved in {path}; measure on other pictures: drmm evaluate {args.model} DATA --split test --calibration")
    return 0


def save_fields(path: str | Path, fields: Mapping[str, Any]) -> None:
    """Put a calibration into the settings of a processor, and leave all others as they are.

    Args:
        path (`str` or `Path`): Its `preprocessor_config.json`, which is whole at any time.
        fields (`Mapping`): `calibration` and `score_threshold`; what is None is taken out.
    """
    from ..evaluation.files import write_text
    from ..modeling.image_processing_drmm import DrmmImageProcessor

    settings = json.loads(Path(path).read_text(encoding="utf-8")) | fields
    settings = {name: value for name, value in settings.items() if name not in fields or value is not None}
    DrmmImageProcessor(**fields)  # what it refuses is not written
    write_text(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def certainty(fields: Mapping[str, Any], scores: Sequence[float]) -> str | None:
    """Say where confidences become exactly 1, and from how many predictions that was concluded.

    Args:
        fields (`Mapping`): `calibration` of a processor.
        scores (`Sequence[float]`): Confidences that it was fitted to.

    Returns:
        `str` or None: A line; None if none become 1.
    """
    fitted = (fields["calibration"] or {}).get("scores") or {}
    if fitted.get("method") != "isotonic" or fitted["calibrated"][-1] < 1:
        return None
    first = fitted["scores"][fitted["calibrated"].index(1)]
    count = sum(score >= first for score in scores)
    return (
        f"confidences of {first:.3f} and more become 1.000, since the {count} such predictions here were all right; "
        "that is no certainty about others"
    )


def choice(errors: Mapping[str, Mapping[str, float]], method: str) -> str:
    """Say how a map of the confidences was chosen.

    Args:
        errors (`Mapping`): From `drmm_hf.evaluation.recalibration.held_out_errors`.
        method (`str`): What was chosen.

    Returns:
        `str`: A line a method.
    """
    if not errors:
        return f"too few pictures or right predictions to hold some out: {method}"
    lines = [f"{'on held-out pictures':<22}{'ECE (%)':>9}{'squared error':>15}"]
    for name, error in errors.items():
        cells = f"{100 * error['ECE']:>9.2f}{error['squared_error']:>15.4f}"
        title = "as predicted" if name == "none" else name
        lines.append(f"{title:<22}{cells}{'  chosen' if name == method else ''}")
    return "\n".join(lines)


def summary(fields: Mapping[str, Any], id2label: Mapping[int, str], num_pictures: int) -> str:
    """Say in a few lines what was fitted.

    Args:
        fields (`Mapping`): `calibration` and `score_threshold` of a processor.
        id2label (`Mapping[int, str]`): Name of each class.
        num_pictures (`int`): On how many pictures it was fitted.

    Returns:
        `str`: A line for confidences, scales and threshold each.
    """
    calibration, threshold = fields["calibration"] or {}, fields["score_threshold"]
    scores, factor = calibration.get("scores"), calibration.get("scale_factor")
    if scores is None:
        corrected = "as predicted"
    elif scores["method"] == "temperature":
        corrected = f"log-odds over the temperature {scores['temperature']:.3f}"
    else:
        corrected = f"isotonic map of {len(scores['scores'])} knots"
    if isinstance(threshold, list):
        threshold = ", ".join(f"{id2label[label]} {one:.3f}" for label, one in enumerate(threshold))
    elif threshold is not None:
        threshold = f"{threshold:.3f}"
    return "\n".join(
        [
            f"fitted on {num_pictures} pictures",
            f"confidences: {corrected}",
            f"box scales: {'as predicted' if factor is None else f'times {factor:.3f}'}",
            f"threshold: {threshold or '0.5, the usual default'}",
        ]
    )
