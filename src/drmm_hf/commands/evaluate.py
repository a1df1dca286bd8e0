"""`drmm evaluate`: measure AP and calibration of a detector against untouched annotations."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image

    from ..evaluation.detections import Detections

_NUM_PICTURES = 4  # how many pictures are drawn


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
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="pictures a batch; changes no figure")
    parser.add_argument("--top-k", type=int, default=100, metavar="K", help="predictions a picture (default: 100)")
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
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")


def run(args: argparse.Namespace) -> int:
    """Evaluate, write figures and pictures, and print a table in per cent.

    Args:
        args (`argparse.Namespace`): The parsed arguments.

    Returns:
        `int`: 0.
    """
    if args.detections is not None:
        if args.data is not None:
            raise ValueError(f"both the model {args.model!r} and --detections are given; the rule is one of them.")
        if args.losses or args.against:
            raise ValueError("--losses needs a model: boxes and scores alone have no density.")
        freedom = 1.0 if args.freedom is None else args.freedom
        if not freedom > 0:
            raise ValueError(f"freedom is {freedom}; the rule is above 0.")
        args.model, args.data = None, args.model
    elif args.data is None:
        raise ValueError("DATA is missing: drmm evaluate MODEL DATA, or drmm evaluate DATA --detections FILE.")
    elif args.freedom is not None:
        raise ValueError("--freedom is for --detections; a model knows its own density.")

    from transformers.utils import logging

    from ..conversion.model_source import find_source
    from ..data.coco import coco_paths, load_detection_dataset
    from ..evaluation.coco_metrics import ground_truth, load_annotations
    from ..evaluation.coverage import coverage_table
    from ..evaluation.evaluate import category_of_label, class_table, evaluate, measure
    from ..evaluation.likelihood import check_density, likelihoods, summarize
    from ..evaluation.predict import load_detector
    from ..modeling.mixture import tail_freedom

    source_of_model = None if args.model is None else find_source(args.model)
    is_file = args.annotations is None and args.data.endswith(".json")
    source = str(Path(args.data).parent) if is_file else args.data
    places = {"images": args.images, "annotations": args.data if is_file else args.annotations}
    if args.detections is not None and is_file and args.images is None:
        dataset, annotations = None, load_annotations(args.data)  # pictures are only drawn
    else:
        paths = coco_paths(source, args.split, **places)
        # A box without area is an error in training data; here it counts in the untouched annotations as in COCO.
        dataset = load_detection_dataset(source, args.split, **places, invalid="skip")
        annotations = ground_truth(dataset) if paths is None else load_annotations(paths[0])
    logging.disable_progress_bar()  # of each weight that is loaded
    Path(args.output).mkdir(parents=True, exist_ok=True)  # before the work, so that a bad place costs none
    other = None if args.against is None else json.loads(Path(args.against).read_text())
    options = {"top_k": args.top_k, "nms": args.nms, "wta": args.wta}

    calibration = None
    if args.model is None:
        detections, mapping = load_results(args.detections, annotations)
        metrics = measure(detections, annotations, mapping, args.output, **options)
    else:
        model, processor = load_detector(source_of_model, args.device)
        if args.losses or other or args.coverage:
            check_density(model.config)
        calibration, freedom = getattr(processor, "calibration", None), 1.0
        if args.calibrators and calibration:
            raise ValueError(
                "the model's processor calibrates already; --calibrators are for predictions as they are."
            )
        if hasattr(model.config, "coordinate_distribution"):
            freedom = tail_freedom(model.config.coordinate_distribution, model.config.student_t_freedom)
        categories = annotations["categories"]
        print(class_table(model.config, categories, category_of_label(model.config, categories)), flush=True)
        metrics = evaluate(model, processor, dataset, annotations, args.output, batch_size=args.batch_size, **options)
    written = ["metrics.json", "detections.json", *draw_pictures(dataset, annotations, Path(args.output))]
    print(f"\n{table(metrics)}")
    if calibration:
        print(f"\n{calibration_note(calibration, annotations)}")
    if args.thresholds:
        curves, files = measure_thresholds(annotations, Path(args.output), args.top_k)
        written += files
        print(f"\n{threshold_table(curves)}")
    if args.calibration or args.calibrators:
        report, files = measure_calibration(
            annotations, Path(args.output), args.top_k, args.calibrators, freedom, calibration is None
        )
        written += files
        print(f"\n{calibration_table(report)}")
    if args.coverage:
        report, files = measure_coverage(annotations, Path(args.output), args.top_k, freedom, args.calibrators)
        written += files
        print(f"\n{coverage_table(report)}")
    if args.sweep:
        swept, files = measure_duplicates(dataset, annotations, Path(args.output), args.top_k)
        written += files
        print(f"\n{sweep_table(swept)}")
    if args.losses or other:
        found = likelihoods(model, processor, dataset, annotations, batch_size=args.batch_size)
        losses = summarize(found, annotations)
        (Path(args.output) / "likelihood.json").write_text(json.dumps(losses, indent=2, allow_nan=False) + "\n")
        written.append("likelihood.json")
        print(f"\n{likelihood_table(losses)}")
        if other:
            print(f"\n{comparison_table(losses, other)}")
    print(f"written to {args.output}: {', '.join(written)}")
    return 0


def load_results(path: str | Path, annotations: Mapping[str, Any]) -> tuple[Detections, dict[int, int]]:
    """Read COCO results and tell which picture each belongs to.

    Args:
        path (`str` or `Path`): Json file of any detector.
        annotations (`Mapping`): The COCO annotations. A picture without a result is one in which nothing was found.

    Returns:
        `tuple[Detections, dict[int, int]]`: The detections, and the category id of each of their labels.

    Raises:
        ValueError: If the file holds something else, or a category that the annotations do not have.
    """
    from ..data.labels import LabelMap
    from ..evaluation.detections import Detections

    label_map = LabelMap.from_categories(annotations["categories"])
    detections = Detections.load(path, label_map, [record["id"] for record in annotations["images"]])
    return detections, dict(enumerate(label_map.category_ids))


def table(metrics: Mapping[str, Any]) -> str:
    """Return the figures as lines of text, in per cent.

    Args:
        metrics (`Mapping`): From `drmm_hf.evaluation.evaluate.measure`.

    Returns:
        `str`: Precision, recall and calibration, then AP of each class, then the counts.
    """
    rows = [
        ("AP", "AP50", "AP75", "APs", "APm", "APl"),
        ("AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
        ("ECE", "ECE_0.1"),
    ]
    lines = []
    for names in rows:
        lines.append("".join(f"{name:>9}" for name in names))
        lines.append("".join(f"{_per_cent(metrics[name]):>9}" for name in names))
    width = max(map(len, metrics["AP_per_class"]))
    lines += ["", f"{'class':<{width}}  {'AP':>6}"]
    lines += [f"{name:<{width}}  {_per_cent(value):>6}" for name, value in metrics["AP_per_class"].items()]
    lines += [
        "",
        f"{metrics['num_images']} images, {metrics['num_ground_truths']} objects and {metrics['num_crowds']} crowds, "
        f"{metrics['num_detections']} detections; figures in per cent",
    ]
    for name, text in (
        ("num_boxes_without_size", "boxes without width or height were left out"),
        ("num_other_labels", "detections of classes that the data does not have were left out"),
    ):
        if metrics[name]:
            lines.append(f"{metrics[name]} {text}")
    if metrics["deduplication"]:
        name, iou = metrics["deduplication"]["method"].upper(), metrics["deduplication"]["iou_threshold"]
        lines.append(f"{metrics['deduplication']['num_removed']} detections were removed by {name} at IoU {iou:g}")
        if metrics["deduplication"]["num_capped"]:
            lines.append(f"{metrics['deduplication']['num_capped']} sums of confidences were stopped at 1")
    return "\n".join(lines)


def threshold_table(curves: Mapping[str, Any]) -> str:
    """Return the best score threshold of each class as lines of text.

    Args:
        curves (`Mapping`): From `drmm_hf.evaluation.thresholds.threshold_curves`.

    Returns:
        `str`: A line a class, then one for all together.
    """
    width = max(len("all classes"), *map(len, curves["classes"]), 0)
    lines = [f"{'':<{width}}{'best score':>12}{'F1':>8}"]
    for name, one in [*curves["classes"].items(), ("all classes", curves["all"])]:
        if one is not None and one["best_threshold"] is not None:
            lines.append(f"{name:<{width}}{one['best_threshold']:>12.3f}{_per_cent(one['best_f1']):>8}")
    return "\n".join(lines)


def measure_thresholds(annotations: Mapping[str, Any], output: Path, top_k: int) -> tuple[dict[str, Any], list[str]]:
    """Compute and draw curves over the score threshold, and the confusion matrix at the best one.

    Args:
        annotations (`Mapping`): The COCO annotations.
        output (`Path`): Folder that holds `detections.json`; `thresholds.json` and the figures go there too.
        top_k (`int`): Number of predictions a picture.

    Returns:
        `tuple[dict, list[str]]`: The curves, and the names of the files.
    """
    from transformers.utils import is_matplotlib_available

    from ..evaluation.thresholds import confusion_matrix, threshold_curves
    from ..visualization.plots import confusion_diagram, threshold_diagram

    entries = json.loads((output / "detections.json").read_text())
    curves, names = threshold_curves(annotations, entries, top_k), ["thresholds.json"]
    best = None if curves["all"] is None else curves["all"]["best_threshold"]
    confusion = confusion_matrix(annotations, entries, 0.5 if best is None else best, top_k)
    content = curves | {"confusion": confusion}
    (output / "thresholds.json").write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    if is_matplotlib_available():
        threshold_diagram(curves, output / "thresholds.png")
        confusion_diagram(confusion, output / "confusion.png")
        names += ["thresholds.png", "confusion.png"]
    return curves, names


def calibration_table(report: Mapping[str, Any]) -> str:
    """Return the figures of reliability as lines of text, in per cent.

    Args:
        report (`Mapping`): From `drmm_hf.evaluation.calibration.calibration_report`, with `calibrated` from
            `drmm_hf.evaluation.recalibration.apply_calibrators` where there are calibrators.

    Returns:
        `str`: A line a kind of score, an IoU threshold and a calibrator.
    """

    def interval(values: list[float | None]) -> str:
        return f"{_per_cent(values[0])} to {_per_cent(values[1])}"

    lines = [f"{'':<18}{'ECE':>8}{'95 %':>16}{'ECE_0.1':>10}{'95 %':>16}{'equal mass':>12}"]
    for name, kind in report["kinds"].items():
        lines.append(
            f"{name.replace('_', ' '):<18}{_per_cent(kind['ECE']):>8}{interval(kind['ECE_interval']):>16}"
            f"{_per_cent(kind['ECE_0.1']):>10}{interval(kind['ECE_0.1_interval']):>16}"
            f"{_per_cent(kind['ECE_mass']):>12}"
        )
    columns = ("ECE", "ECE_0.1", "ECE_any_class", "ECE_0.1_any_class")
    lines += ["", f"{'IoU':<18}" + "".join(f"{title:>12}" for title in ("ECE", "ECE_0.1", "any class", "any, 0.1"))]
    for entry in report["iou_thresholds"]:
        values = "".join(f"{_per_cent(entry[column]):>12}" for column in columns)
        lines.append(f"{entry['iou_threshold']:<18.2f}{values}")
    rest = {f"D-ECE, {name}": value for name, value in report["D-ECE"].items()}
    rest |= {name: report[name] for name in ("LaECE", "oLRP")}
    lines += ["", "   ".join(f"{name} {_per_cent(value)}" for name, value in rest.items())]
    if "calibrated" in report:
        lines += ["", f"{'calibrated by':<18}{'ECE':>12}{'ECE_0.1':>12}"]
        for name, entry in report["calibrated"].items():
            lines.append(f"{name:<18}{_per_cent(entry['ECE']):>12}{_per_cent(entry['ECE_0.1']):>12}")
    return "\n".join(lines)


def measure_calibration(
    annotations: Mapping[str, Any],
    output: Path,
    top_k: int,
    calibrators: str | None = None,
    freedom: float = 1.0,
    fit: bool = True,
) -> tuple[dict[str, Any], list[str]]:
    """Measure reliability and draw it; fit calibrators, or test those of another split.

    Args:
        annotations (`Mapping`): The COCO annotations.
        output (`Path`): Folder that holds `detections.json`; `calibration.json` and the figures go there too, and
            `calibrators.json` unless there are some to test.
        top_k (`int`): Number of predictions a picture.
        calibrators (`str`, *optional*): File of calibrators to test.
        freedom (`float`): Degrees of freedom of the density of the box scales.
        fit (`bool`): Whether to fit calibrators; not to scores that are calibrated already.

    Returns:
        `tuple[dict, list[str]]`: The report, and the names of the files.
    """
    from transformers.utils import is_matplotlib_available

    from ..evaluation.calibration import CalibrationResult, calibration_report
    from ..evaluation.recalibration import apply_calibrators, fit_calibrators
    from ..visualization.plots import reliability_diagrams

    entries = json.loads((output / "detections.json").read_text())
    report, names = calibration_report(annotations, entries, top_k), ["calibration.json"]
    if calibrators is None and fit:
        fitted = fit_calibrators(annotations, entries, top_k, freedom)
        (output / "calibrators.json").write_text(json.dumps(fitted, indent=2, allow_nan=False) + "\n")
        names.append("calibrators.json")
    elif calibrators is not None:
        fitted = json.loads(Path(calibrators).read_text())
        report["calibrated"] = apply_calibrators(fitted, annotations, entries, top_k)
    (output / "calibration.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    if is_matplotlib_available():
        figures = {"calibration.png": [(name.replace("_", " "), kind) for name, kind in report["kinds"].items()]}
        figures["calibration.png"].sort(key=lambda item: item[0] == "confidence")  # p, o and then p * o
        if calibrators is not None:
            figures["calibrated.png"] = [
                ("as predicted" if name == "none" else name, entry) for name, entry in report["calibrated"].items()
            ]
        for name, panels in figures.items():
            results = {title: CalibrationResult.from_dict(entry["reliability"]) for title, entry in panels}
            labels = list(results) if name == "calibration.png" else None
            notes = [f"above 0.1: {_per_cent(entry['ECE_0.1'])} %" for _, entry in panels]
            reliability_diagrams(results, output / name, labels, notes)
            names.append(name)
    return report, names


def calibration_note(calibration: Mapping[str, Any], annotations: Mapping[str, Any]) -> str:
    """Say that a processor's calibration is in the figures.

    Args:
        calibration (`Mapping`): Of the processor.
        annotations (`Mapping`): The COCO annotations.

    Returns:
        `str`: One line, or two if it was fitted on the same pictures.
    """
    from ..evaluation.recalibration import same_pictures

    parts = []
    scores = calibration.get("scores")
    if scores:
        number = f" {scores['temperature']:.3f}" if scores["method"] == "temperature" else ""
        parts.append(f"scores are calibrated ({scores['method']}{number})")
    if "scale_factor" in calibration:
        parts.append(f"box scales are multiplied by {calibration['scale_factor']:.3f}")
    note = f"measured as the processor gives them: {' and '.join(parts)}"
    if same_pictures(calibration, annotations):
        note += "\nthis was fitted on these very pictures; measure on others"
    return note


def measure_coverage(
    annotations: Mapping[str, Any], output: Path, top_k: int, freedom: float, calibrators: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Measure and draw how often intervals hold the annotated sides.

    Args:
        annotations (`Mapping`): The COCO annotations.
        output (`Path`): Folder that holds `detections.json`; `coverage.json` and the figure go there too.
        top_k (`int`): Number of predictions a picture.
        freedom (`float`): Degrees of freedom of the density of the box scales.
        calibrators (`str`, *optional*): File of calibrators whose factor on the scales is tested.

    Returns:
        `tuple[dict, list[str]]`: The report, and the names of the files.
    """
    from transformers.utils import is_matplotlib_available

    from ..evaluation.coverage import coverage_report
    from ..visualization.coverage_plot import coverage_diagram

    entries = json.loads((output / "detections.json").read_text())
    factor = None if calibrators is None else json.loads(Path(calibrators).read_text()).get("scale_factor")
    report = coverage_report(annotations, entries, freedom, top_k, factor)
    (output / "coverage.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    if not is_matplotlib_available():
        return report, ["coverage.json"]
    coverage_diagram(report, output / "coverage.png")
    return report, ["coverage.json", "coverage.png"]


def sweep_table(swept: Mapping[str, Any]) -> str:
    """Return the figures of a sweep as lines of text, in per cent.

    Args:
        swept (`Mapping`): From `drmm_hf.evaluation.deduplication.sweep`.

    Returns:
        `str`: A line for the detections as they are, then one for each method and IoU.

    Source: Figure 7; Table 3 are the lines at the best IoU of NMS.
    """
    columns = ("AP", "AR100", "ECE", "ECE_0.1", "duplicate_rate")
    titles = "".join(f"{title:>12}" for title in ("AP", "AR100", "ECE", "ECE_0.1", "duplicates"))
    lines = [f"{'':<10}{titles}{'removed':>12}{'capped':>12}"]
    named = [("none", swept["none"])]
    for method in ("nms", "wta"):
        named += [(f"{method.upper()} {entry['iou_threshold']:.2f}", entry) for entry in swept[method]]
    for name, entry in named:
        values = "".join(f"{_per_cent(entry[column]):>12}" for column in columns)
        best = "  *" if name == f"NMS {swept['best_iou_threshold']:.2f}" else ""
        lines.append(f"{name:<10}{values}{entry['num_removed']:>12}{entry['num_capped']:>12}{best}")
    lines += [
        "",
        "duplicates: of the predictions scoring above 0.1, those whose object a more confident one took; capped: sums "
        "of confidences stopped at 1; *: NMS is best",
    ]
    return "\n".join(lines)


def measure_duplicates(
    dataset: datasets.Dataset | None, annotations: Mapping[str, Any], output: Path, top_k: int
) -> tuple[dict[str, Any], list[str]]:
    """Sweep over NMS and winner-take-all, and draw what they change.

    Args:
        dataset (`datasets.Dataset`, *optional*): The evaluated pictures. None: draw none.
        annotations (`Mapping`): Their COCO annotations.
        output (`Path`): Folder that holds `detections.json`; `duplicates.json` and the figures go there too.
        top_k (`int`): Number of predictions a picture.

    Returns:
        `tuple[dict, list[str]]`: What `drmm_hf.evaluation.deduplication.sweep` returns, and the names of the files.
    """
    from transformers.utils import is_matplotlib_available

    from ..data.labels import LabelMap
    from ..evaluation.calibration import CalibrationResult
    from ..evaluation.deduplication import deduplicate, sweep
    from ..evaluation.detections import Detections
    from ..visualization.plots import confidence_boxes, deduplication_curves, reliability_diagrams

    label_map = LabelMap.from_categories(annotations["categories"])
    image_ids = [record["id"] for record in annotations["images"]]
    detections = Detections.load(output / "detections.json", label_map, image_ids)
    swept = sweep(detections, annotations, top_k=top_k)
    (output / "duplicates.json").write_text(json.dumps(swept, indent=2, allow_nan=False) + "\n")
    names = ["duplicates.json"]
    if not is_matplotlib_available():
        return swept, names

    deduplication_curves(swept, output / "duplicates.png")
    best = swept["best_iou_threshold"]
    entries = {"as predicted": swept["none"]}
    for method in ("nms", "wta"):
        entry = next(entry for entry in swept[method] if entry["iou_threshold"] == best)
        entries[f"{method.upper()} at IoU {best:g}"] = entry
    results = {name: CalibrationResult.from_dict(entry["reliability"]) for name, entry in entries.items()}
    notes = [f"AP {_per_cent(entry['AP'])} %" for entry in entries.values()]
    reliability_diagrams(results, output / "duplicates_reliability.png", notes=notes)
    names += ["duplicates.png", "duplicates_reliability.png"]
    if dataset is not None:
        found = [detections, *(deduplicate(detections, method, best)[0] for method in ("nms", "wta"))]
        confident = [{one: int((part[one]["scores"] > 0.1).sum()) for one in image_ids} for part in found]
        most = max(image_ids, key=lambda one: confident[0][one] - confident[1][one])
        image = _picture(dataset, most)
        panels = [
            (f"{name}, {counts[most]} boxes above 0.1", image, part[most]["boxes"], part[most]["scores"])
            for name, part, counts in zip(entries, found, confident, strict=True)
        ]
        confidence_boxes(panels, output / "duplicates_boxes.png")
        names.append("duplicates_boxes.png")
    return swept, names


def _picture(dataset: datasets.Dataset, image_id: int) -> Image:
    """Return one picture of a dataset."""
    import datasets

    from ..data.loading import load_image

    row = list(dataset["image_id"]).index(image_id)
    return load_image(dataset.cast_column("image", datasets.Image(decode=False))[row])


def likelihood_table(losses: Mapping[str, Any]) -> str:
    """Return validation likelihoods as lines of text.

    Args:
        losses (`Mapping`): From `drmm_hf.evaluation.likelihood.summarize`.

    Returns:
        `str`: A line a stage, then a line a size and a class for the last stage.

    Source: Tables 4 and 9.
    """
    columns = ("nll", "share", "effective_positives", "public_nll", "public_share")
    titles = ("NLL", "exp(-MCM)", "positives", "public NLL", "exp(-MCM)")
    groups = [*losses["sizes"].items(), *losses["classes"].items()]
    width = max(len("last stage"), *(len(name) for name, _ in groups))
    lines = [f"{'stage':<{width}}{'':9}" + "".join(f"{title:>12}" for title in titles)]
    for stage in range(len(losses["all"]["nll"])):
        values = "".join(f"{losses['all'][column][stage]:>12.3f}" for column in columns)
        lines.append(f"{stage + 1:<{width}}{'':9}{values}")
    lines += ["", f"{'last stage':<{width}}{'objects':>9}" + "".join(f"{title:>12}" for title in titles)]
    for name, group in groups:
        if group["num_ground_truths"]:
            values = "".join(f"{group[column][-1]:>12.3f}" for column in columns)
            lines.append(f"{name:<{width}}{group['num_ground_truths']:>9}{values}")
    lines += [
        "",
        f"means over {losses['num_ground_truths']} objects, {losses['num_crowds']} crowds left out; densities in "
        "pixels of the model input; public: with the factor n and the 1e-12 of the public code",
    ]
    return "\n".join(lines)


def comparison_table(losses: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return the likelihoods of two models and their ratios as lines of text.

    Args:
        losses (`Mapping`): Of this model, from `drmm_hf.evaluation.likelihood.summarize`; in the paper's table the one
            trained with the MCM loss.
        other (`Mapping`): Of the other.

    Returns:
        `str`: A line a stage.

    Raises:
        ValueError: If `other` is something else, or the two were not measured on the same objects in pictures of the
            same size.

    Source: Table 9; its last line is Table 4.
    """
    names = ("num_images", "num_ground_truths", "mean_log_scale")
    if not isinstance(other, Mapping) or {*names, "all"} - other.keys():
        raise ValueError("the file to compare with is no likelihood.json, which `drmm evaluate --losses` writes.")
    for name in names:
        if not math.isclose(losses[name], other[name], abs_tol=1e-9):
            raise ValueError(
                f"{name} is {losses[name]} here and {other[name]} there; the rule is the same pictures, objects and "
                "input size, since a density has a unit."
            )
    titles = "".join(f"{title:>12}" for title in ("this", "other", "other/this"))
    lines = [f"{'':<5}{'NLL':>12}{'exp(-MCM)':>36}", f"{'stage':<5}{titles}{titles}"]
    columns = [group["all"][name] for name in ("nll", "share") for group in (losses, other)]
    for stage, (nll, other_nll, share, other_share) in enumerate(zip(*columns, strict=False), start=1):
        values = (nll, other_nll, other_nll / nll, share, other_share, other_share / share)
        lines.append(f"{stage:<5}" + "".join(f"{value:>12.3f}" for value in values))
    return "\n".join(lines)


def _per_cent(value: float | None) -> str:
    """Return a fraction in per cent."""
    return "-" if value is None else f"{100 * value:.2f}"


def draw_pictures(dataset: datasets.Dataset | None, annotations: Mapping[str, Any], output: Path) -> list[str]:
    """Draw a few pictures, annotations on the left and detections on the right, and the reliability diagram.

    Args:
        dataset (`datasets.Dataset`, *optional*): The evaluated pictures, in the canonical schema. None: draw none.
        annotations (`Mapping`): Their COCO annotations.
        output (`Path`): Folder that holds `detections.json` and `metrics.json`; the pictures go there too.

    Returns:
        `list[str]`: Names of the files: `detections.jpg` if there are pictures and `reliability.png` if there is
            matplotlib.
    """
    from transformers.utils import is_matplotlib_available

    from ..evaluation.calibration import CalibrationResult
    from ..visualization.plots import reliability_diagram

    names = []
    if dataset is not None:
        _draw_detections(dataset, annotations, output, output / "detections.jpg")
        names.append("detections.jpg")
    if is_matplotlib_available():
        metrics = json.loads((output / "metrics.json").read_text())
        reliability_diagram(CalibrationResult.from_dict(metrics["reliability"]), output / "reliability.png")
        names.append("reliability.png")
    return names


def _draw_detections(dataset: datasets.Dataset, annotations: Mapping[str, Any], output: Path, path: Path) -> None:
    """Draw a few pictures twice, with their annotations and with the detections of `output`."""
    import datasets

    from ..data.labels import LabelMap
    from ..data.loading import load_image
    from ..evaluation.detections import Detections
    from ..visualization.draw_boxes import draw_boxes, grid

    label_map = LabelMap.from_categories(annotations["categories"])
    detections = Detections.load(output / "detections.json", label_map, dataset["image_id"])
    truth = [
        {"image_id": record["image_id"], "category_id": record["category_id"], "bbox": record["bbox"], "score": 1.0}
        for record in annotations["annotations"]
    ]
    objects = Detections.from_coco(truth, label_map, dataset["image_id"])
    few = min(_NUM_PICTURES, len(dataset))
    images, captions = [], []
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    for index in range(few):
        row = dataset[index * len(dataset) // few]
        image = load_image(row)
        annotated = {name: objects[row["image_id"]][name] for name in ("boxes", "labels")}
        images += [
            draw_boxes(image, annotated, label_map.id2label),
            draw_boxes(image, detections[row["image_id"]], label_map.id2label),
        ]
        captions += [f"{row['file_name']}: annotations", "detections scoring 0.3 and more"]
    grid(images, columns=2, captions=captions).save(path, quality=90)
