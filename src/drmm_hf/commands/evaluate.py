"""`drmm evaluate`: measure AP and calibration of a detector against untouched annotations."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from .counts import at_least
from .document import add_json


if TYPE_CHECKING:
    from accelerate import PartialState


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments.

    Args:
        parser (`argparse.ArgumentParser`): The command's parser.
    """
    parser.usage = "drmm evaluate MODEL DATA [options]\n       drmm evaluate DATA --detections FILE [options]"
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of any transformers object detector")
    parser.add_argument(
        "data",
        metavar="DATA",
        nargs="?",
        help="COCO folder, Hub id, image folder, or a COCO json file (with --images)",
    )
    parser.add_argument(
        "--detections", metavar="FILE", help="measure a json file of COCO results, of any detector, instead of a model"
    )
    parser.add_argument("--split", default="val", help="split of the data (default: val)")
    parser.add_argument(
        "--output", default="runs/evaluate", metavar="DIR", help="where to write (default: runs/evaluate)"
    )
    parser.add_argument(
        "--annotations", metavar="FILE", help="COCO json file, if not annotations/instances_SPLIT.json"
    )
    parser.add_argument("--images", metavar="DIR", help="image folder, if not one of the usual places")
    parser.add_argument(
        "--streaming", action="store_true", help="read the pictures as they are needed, without downloading a data set"
    )
    parser.add_argument(
        "--batch-size", type=at_least(1), default=1, metavar="N", help="pictures a batch; changes no figure"
    )
    parser.add_argument(
        "--top-k", type=at_least(1), default=100, metavar="K", help="predictions a picture (default: 100)"
    )
    duplicates = parser.add_mutually_exclusive_group()
    duplicates.add_argument(
        "--nms", type=float, metavar="IOU", help="suppress boxes above this IoU (default: no NMS; D-RMM needs none)"
    )
    duplicates.add_argument(
        "--wta", type=float, metavar="IOU", help="likewise, and add their confidences to the boxes that remain"
    )
    duplicates.add_argument(
        "--sweep", action="store_true", help="measure NMS and winner-take-all at IoU 0.5 to 1, and draw the figures"
    )
    parser.add_argument(
        "--thresholds",
        action="store_true",
        help="precision, recall and F1 by score, best thresholds, confusion matrix",
    )
    parser.add_argument(
        "--breakdown",
        action="store_true",
        help="figures by size, aspect ratio and crowding of objects, and the kinds of errors",
    )
    reliability = parser.add_mutually_exclusive_group()
    reliability.add_argument(
        "--calibration",
        action="store_true",
        help="measure reliability in every way, and fit calibrators on this split",
    )
    reliability.add_argument(
        "--calibrators", metavar="FILE", help="test calibrators.json, which --calibration wrote for another split"
    )
    parser.add_argument(
        "--coverage", action="store_true", help="measure how often intervals from box scales hold the annotated sides"
    )
    parser.add_argument(
        "--freedom",
        type=float,
        metavar="V",
        help="degrees of freedom of the density whose scales FILE has (default: 1, Cauchy; inf: Gaussian)",
    )
    parser.add_argument(
        "--losses", action="store_true", help="measure the likelihood of the annotations too (D-RMM's mixtures only)"
    )
    parser.add_argument(
        "--against", metavar="FILE", help="likelihood.json of another model, to set beside it as Table 9 does"
    )
    parser.add_argument(
        "--assignments",
        type=at_least(1),
        metavar="N",
        help="tell which predictions training matches, on N pictures (box heads)",
    )
    parser.add_argument(
        "--top-k-ratio", type=float, metavar="R", help="keep this share of the queries after every stage but the last"
    )
    parser.add_argument(
        "--submission",
        metavar="NAME",
        help="DATA is an image_info json without annotations (with --images): write the zip for COCO's server instead",
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="type of the weights (default: as they were saved)"
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate, write figures and pictures, and print a table in per cent.

    Args:
        args (`argparse.Namespace`): The parsed arguments.

    Returns:
        `int`: 0.
    """
    check_options(args)

    from transformers.utils import logging

    from ..conversion.model_source import find_source
    from ..evaluation.files import run_lock, run_user
    from ..evaluation.parts import launched_processes

    if args.detections is not None:
        args.model, args.data = None, args.model
    source = None if args.model is None else find_source(args.model)
    processes = None if args.model is None else launched_processes(args.device)
    user = None if source is None else run_user(Path(source).resolve().parent)
    if user is not None and (processes is None or processes.is_main_process):
        print(
            f"drmm evaluate: warning: model is {args.model!r}, of a run that goes on ({user}): it may be replaced, "
            "and these figures are of what it is now",
            file=sys.stderr,
        )
    logging.disable_progress_bar()  # of each weight that is loaded
    with run_lock(processes, args.output):  # makes it before the work, so that a bad place costs none
        return (evaluate_split if args.submission is None else submit)(args, source, processes)


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that do not go together, before anything is touched.

    Args:
        args (`argparse.Namespace`): The parsed arguments.

    Raises:
        ValueError: If there are some; the message names them.
    """
    if args.detections is not None:
        if args.data is not None:
            raise ValueError(f"both the model {args.model!r} and --detections are given; the rule is one of them.")
        if args.losses or args.against:
            raise ValueError("--losses needs a model: boxes and scores alone have no density.")
        if args.assignments or args.top_k_ratio is not None or args.dtype is not None:
            raise ValueError("--assignments, --top-k-ratio and --dtype need a model.")
        if args.freedom is not None and not args.freedom > 0:
            raise ValueError(f"freedom is {args.freedom}; the rule is above 0.")
    elif args.data is None:
        raise ValueError("DATA is missing: drmm evaluate MODEL DATA, or drmm evaluate DATA --detections FILE.")
    elif args.freedom is not None:
        raise ValueError("--freedom is for --detections; a model knows its own density.")
    for name in ("nms", "wta"):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; the rule is an IoU in [0, 1].")
    for name, written in (("against", "likelihood.json"), ("calibrators", "calibrators.json")):
        file, output = getattr(args, name), Path(args.output)
        if file is not None and Path(file).resolve() == (output / written).resolve():
            raise ValueError(f"{name} is {file!r}, a report of the folder that is written; name another --output.")
    if args.submission is not None:
        if args.detections is not None or args.images is None:
            raise ValueError("--submission needs a model, and --images for the json file of the pictures.")
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
        others = given - _OF_SUBMISSIONS
        if others:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(others))
            raise ValueError(f"--submission writes all that is found, as it is; the rule is to leave out {names}.")


# Arguments that a submission heeds, and those of every command.
_OF_SUBMISSIONS = {"model", "data", "images", "output", "batch_size", "top_k", "submission", "dtype", "device", "json"}
_OF_SUBMISSIONS |= {"command", "debug"}


def submit(args: argparse.Namespace, source: str, processes: PartialState | None) -> int:
    """Find the objects in pictures without annotations, and write the zip for a server.

    Args:
        args (`argparse.Namespace`): The parsed arguments.
        source (`str`): Folder or Hub id of the model.
        processes (`accelerate.PartialState`, *optional*): Those that share the pictures.

    Returns:
        `int`: 0.
    """
    from ..evaluation.predict import load_detector
    from ..evaluation.submission import write_submission

    model, processor = load_detector(source, args.device if processes is None else processes.device, args.dtype)
    options = {"batch_size": args.batch_size, "top_k": args.top_k, "processes": processes}
    path = write_submission(model, processor, args.data, args.images, args.output, args.submission, **options)
    if path is not None:
        args.document = {"written": str(path)}
        print(f"written to {path}")
    return 0


def evaluate_split(args: argparse.Namespace, source: str | None, processes: PartialState | None) -> int:
    """Do what `run` says, in a folder that no other run uses.

    Args:
        args (`argparse.Namespace`): The parsed arguments; of `--detections`, without a model.
        source (`str`, *optional*): Folder or Hub id of the model.
        processes (`accelerate.PartialState`, *optional*): Those that share the pictures.

    Returns:
        `int`: 0.
    """
    from ..evaluation.assignments import assignments, check_matching
    from ..evaluation.evaluate import category_of_label, class_table, evaluate, figures, saved_thresholds
    from ..evaluation.files import read_json, whole_files, write_text
    from ..evaluation.likelihood import check_density
    from ..evaluation.origin import origin
    from ..evaluation.output_folder import holds_figures, write_figures
    from ..evaluation.predict import load_detector
    from ..evaluation.recalibration import check_calibrators
    from ..evaluation.report import analyse, examples, load_results, load_split, measure_likelihood, read_picture
    from ..evaluation.tables import TABLES, calibration_note, comparison_table
    from ..modeling.mixture import tail_freedom
    from ..visualization.evaluation_pictures import draw_detections, draw_report

    places = {"images": args.images, "annotations": args.annotations, "streaming": args.streaming}
    with nullcontext() if processes is None else processes.main_process_first():  # the others find its cache
        dataset, annotations = load_split(args.data, args.split, **places, needs_pictures=args.model is not None)
    output = Path(args.output)
    of_a_run = (
        f"output is {args.output!r}, the folder of a training run, whose own figures would be replaced; name another, "
        f"such as {str(output / args.split)!r}."
    )
    if (output / "recipe.yaml").is_file() and args.model is not None:
        raise ValueError(of_a_run)
    other, calibrators = (None if file is None else read_json(file) for file in (args.against, args.calibrators))
    options = {"top_k": args.top_k, "nms": args.nms, "wta": args.wta}
    asked = {"annotations_file": args.annotations, "top_k": args.top_k, "top_k_ratio": args.top_k_ratio}
    about = partial(origin, source, args.data, args.split, annotations, dtype=args.dtype, **asked)

    calibration, thresholds, freedom = None, None, 1.0 if args.freedom is None else args.freedom
    if args.model is None:
        if calibrators is not None:
            check_calibrators(calibrators, annotations)
        detections, mapping = load_results(args.detections, annotations)
        found = [detections[image_id] for image_id in detections]
        if args.coverage and any(len(one["scores"]) and "box_scales" not in one for one in found):
            raise ValueError(f"--coverage needs box_scales; {args.detections} does not have them of every detection.")
        metrics, entries = figures(detections, annotations, mapping, **options)
        file, written_to = Path(args.detections), output / "detections.json"
        if file.resolve() == written_to.resolve() and file.read_text() != json.dumps(entries):
            raise ValueError(f"{args.detections} would be replaced by what remains of it; name another --output.")
        known = holds_figures(output, metrics, entries) and (output / "evaluation.json").is_file()
        if not known and (output / "recipe.yaml").is_file():
            raise ValueError(of_a_run)
        if known:  # the files there know more of their origin
            calibration = metrics["calibration"] = read_json(output / "metrics.json").get("calibration")
        else:
            write_figures(metrics, entries, output, about())
    else:
        model, processor = load_detector(source, args.device if processes is None else processes.device, args.dtype)
        if args.losses or other is not None or args.coverage:
            check_density(model.config)
        calibration = getattr(processor, "calibration", None)
        if args.calibrators and calibration:
            raise ValueError(
                "the model's processor calibrates already; --calibrators are for predictions as they are."
            )
        if calibrators is not None:
            check_calibrators(calibrators, annotations)
        if hasattr(model.config, "coordinate_distribution"):
            freedom = tail_freedom(model.config.coordinate_distribution, model.config.student_t_freedom)
        if args.assignments:
            check_matching(model.config)
        if args.top_k_ratio is not None:
            if not hasattr(model.config, "top_k_ratio"):
                raise ValueError(f"--top-k-ratio: a {model.config.model_type!r} has no stages with a top_k_ratio.")
            model.config.top_k_last_stage = False
            model.config.top_k_ratio = args.top_k_ratio
            model.config.validate_architecture()
        categories = annotations["categories"]
        mapping = category_of_label(model.config, categories)
        classes, thresholds = class_table(model.config, categories, mapping), saved_thresholds(processor, mapping)
        if processes is None or processes.is_main_process:
            print(classes, flush=True)
        options |= {"batch_size": args.batch_size, "processes": processes}
        options["about"] = about(revision=getattr(model.config, "_commit_hash", None))
        metrics = evaluate(model, processor, dataset, annotations, output, **options)
        if processes is not None:
            processes.destroy_process_group()
        if metrics is None:
            return 0  # the main process goes on
        entries = read_json(output / "detections.json")

    written = ["evaluation.json", "detections.json"]
    if dataset is not None:
        with whole_files(output) as aside:
            drawn = draw_detections(entries, annotations, examples(dataset), aside / "detections.jpg", thresholds)
            written.append(drawn.name)
    asked = {"thresholds": args.thresholds, "calibration": args.calibration, "duplicates": args.sweep}
    asked |= {"calibrators": calibrators, "breakdown": args.breakdown, "coverage": args.coverage}
    asked |= {"freedom": freedom, "saved": calibration}
    reports = chain([("metrics", metrics)], analyse(entries, annotations, output, args.top_k, **asked))
    if args.losses or other is not None:
        losses = measure_likelihood(model, processor, dataset, annotations, output, args.batch_size)
        reports = chain(reports, [("likelihood", losses)])
    picture = None if dataset is None else partial(read_picture, dataset)
    args.document = {"evaluation": read_json(output / "evaluation.json")}
    for name, report in reports:
        args.document[name] = report
        written.append(f"{name}.json")
        if "not_measured" in report:
            print(f"\n{name} was not measured: {report['not_measured']}", flush=True)
            continue
        print(f"\n{TABLES[name](report)}", flush=True)
        if "not_fitted" in report:
            print(f"\ncalibrators were not fitted: {report['not_fitted']}")
        if name == "metrics" and calibration:
            print(f"\n{calibration_note(calibration, annotations)}")
        with whole_files(output) as aside:
            written += draw_report(name, report, aside, picture)
        if name == "calibration" and args.calibration and not calibration and "not_fitted" not in report:
            written.append("calibrators.json")
    if other is not None:
        print(f"\n{comparison_table(losses, other)}")
    if args.assignments:
        matched = assignments(model, processor, dataset, annotations, num_images=args.assignments)
        write_text(output / "assignments.json", json.dumps(matched, allow_nan=False) + "\n")
        args.document["assignments"] = matched
        written.append("assignments.json")
    print(f"written to {args.output}: {', '.join(written)}")
    return 0
