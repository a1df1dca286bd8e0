"""The figures of an evaluation as lines of text, in per cent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .breakdown import ERRORS
from .coverage import coverage_table
from .recalibration import same_pictures


BREAKDOWNS = {
    "size": "side of the object (px)",
    "aspect_ratio": "width / height",
    "objects": "objects in the picture",
    "overlap": "IoU with one of its class",
}


def metrics_table(metrics: Mapping[str, Any]) -> str:
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


def calibration_note(calibration: Mapping[str, Any], annotations: Mapping[str, Any]) -> str:
    """Say that a processor's calibration is in the figures.

    Args:
        calibration (`Mapping`): Of the processor.
        annotations (`Mapping`): The COCO annotations.

    Returns:
        `str`: One line, or two if it was fitted on the same pictures.
    """
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


def breakdown_table(report: Mapping[str, Any]) -> str:
    """Return figures by size, aspect ratio and crowding as lines of text, in per cent.

    Args:
        report (`Mapping`): From `drmm_hf.evaluation.breakdown.breakdown`.

    Returns:
        `str`: A line a bin that has objects, then a line a kind of error.
    """
    figures = ("AP", "recall", "AR", "ECE", "ECE_0.1")
    lines = []
    for name, title in BREAKDOWNS.items():
        lines += ["", f"{title:<26}{'objects':>9}" + "".join(f"{figure:>9}" for figure in figures)]
        for one in report[name]:
            if one["num_ground_truths"]:
                values = "".join(f"{_per_cent(one[figure]):>9}" for figure in figures)
                lines.append(f"{range_name(one, name == 'objects'):<26}{one['num_ground_truths']:>9}{values}")
    if report["errors"] is None:
        return "\n".join([*lines[1:], "", 'for the kinds of errors: pip install "drmm-hf[fast-eval]"'])
    lines += ["", f"{'error':<26}{'number':>9}{'AP50':>9}"]
    for name, title in ERRORS.items():
        delta = f"+{100 * report['errors']['delta'][name]:.2f}"
        lines.append(f"{title:<26}{report['errors']['counts'][name]:>9}{delta:>9}")
    lines += ["", f"AP50 is {_per_cent(report['errors']['AP50'])}; beside each error, what it would gain without them"]
    return "\n".join(lines[1:])


def range_name(one: Mapping[str, Any], whole: bool = False) -> str:
    """Return the name of a bin.

    Args:
        one (`Mapping`): With `low` and, unless it has no end, `high`.
        whole (`bool`): Whether only whole numbers fall into it.

    Returns:
        `str`: Such as "16 to 32", or "4 to 7" for whole numbers below 8.
    """
    if one["high"] is None:
        return f"{one['low']:.3g} and more"
    last = one["high"] - 1 if whole else one["high"]
    return f"{one['low']:.3g}" if last == one["low"] else f"{one['low']:.3g} to {last:.3g}"


def _per_cent(value: float | None) -> str:
    """Return a fraction in per cent."""
    return "-" if value is None else f"{100 * value:.2f}"


# The table of each part of an evaluation, by its name.
TABLES = {
    "metrics": metrics_table,
    "thresholds": threshold_table,
    "calibration": calibration_table,
    "coverage": coverage_table,
    "duplicates": sweep_table,
    "breakdown": breakdown_table,
    "likelihood": likelihood_table,
}
