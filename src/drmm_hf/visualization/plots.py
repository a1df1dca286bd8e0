"""Diagrams: reliability of confidences, duplicates, and the course of a training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

_INK, _PALE, _BLUE, _RED, _ORANGE = "#2b2f36", "#d9dde3", "#3878c7", "#e0533d", "#f0962e"
# Okabe and Ito's, which the colour-blind can tell apart.
_SHADES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c8c00", "#7f7f7f")


def reliability_diagram(result: Any, path: str | Path, title: str = "Reliability") -> Path:
    """Draw accuracy against confidence, bin by bin, and the number of predictions in each bin.

    The dark bar of a bin is its accuracy, the hatched one its gap to the mean confidence, the dashed diagonal perfect
    calibration. Counts stand on a logarithmic scale: most of the top predictions of a picture score near 0.

    Args:
        result (`CalibrationResult`): With `ece`, `bin_edges`, `bin_confidence`, `bin_accuracy` and `bin_count`.
        path (`str` or `Path`): Picture to write; its folder is made.
        title (`str`): Line above the diagram.

    Returns:
        `Path`: The picture.

    Source: Fig. 8.
    """
    return reliability_diagrams({title: result}, path)


def reliability_diagrams(
    results: Mapping[str, Any], path: str | Path, xlabels: Sequence[str] | None = None, notes: Sequence[str] = ()
) -> Path:
    """Draw several reliability diagrams side by side, on the same axes.

    Args:
        results (`Mapping[str, CalibrationResult]`): By the line above each diagram.
        path (`str` or `Path`): Picture to write; its folder is made.
        xlabels (`Sequence[str]`, *optional*): What is below each diagram; "confidence" by default.
        notes (`Sequence[str]`): What to say beside the calibration error of each, such as its AP.

    Returns:
        `Path`: The picture.

    Source: Fig. 8 and 9.
    """
    figure = _figure(5.4 if len(results) == 1 else 1.2 + 3.6 * len(results), 6.4 if len(results) == 1 else 5.4)
    axes = figure.subplots(2, len(results), sharex=True, sharey="row", height_ratios=[3, 1], squeeze=False)
    highest = max((int(np.max(result.bin_count, initial=1)) for result in results.values()), default=1)
    for column, (title, result) in enumerate(results.items()):
        upper, lower = axes[:, column]
        _reliability(upper, result, legend=column == 0)
        _bin_counts(lower, result, highest)
        upper.set_title(title, loc="left", fontweight="bold", color=_INK)
        ece = "no predictions" if np.isnan(result.ece) else f"ECE {result.ece * 100:.2f} %"
        if len(results) == 1:
            upper.set_title(ece, loc="right", color=_INK)
        else:
            said = "\n".join([ece, *notes[column : column + 1]])
            upper.set_title(said, loc="right", color=_INK, fontsize=8.5)
        lower.set_xlabel(xlabels[column] if xlabels else "confidence")
        if column == 0:
            upper.set_ylabel("accuracy at IoU 0.5")
            lower.set_ylabel("predictions")
        for one in (upper, lower):
            _plain(one)
    return _save(figure, path)


def deduplication_curves(swept: Mapping[str, Any], path: str | Path) -> Path:
    """Draw AP, calibration error and duplicates against the IoU of NMS and of winner-take-all.

    Args:
        swept (`Mapping`): From `drmm_hf.evaluation.deduplication.sweep`.
        path (`str` or `Path`): Picture to write; its folder is made.

    Returns:
        `Path`: The picture.

    Source: Fig. 7, with the calibration error of Fig. 8.
    """
    figure = _figure(11, 3.9)
    panels = (("AP", "AP"), ("ECE_0.1", "ECE of scores above 0.1"), ("duplicate_rate", "Duplicates above 0.1"))
    for axes, (key, title) in zip(figure.subplots(1, 3), panels, strict=True):
        alone = swept["none"][key]
        if alone is not None:
            axes.axhline(100 * alone, color=_INK, linewidth=1, linestyle=(0, (4, 3)), label="as predicted")
        # The second is dashed and hollow: often one lies on the other.
        styles: tuple[tuple[Any, ...], ...] = (
            ("nms", "NMS", _BLUE, "o", {}),
            ("wta", "WTA", _RED, "s", {"linestyle": "--", "mfc": "white"}),
        )
        for method, name, colour, marker, style in styles:
            points = [(entry["iou_threshold"], entry[key]) for entry in swept[method] if entry[key] is not None]
            if points:
                thresholds, values = np.array(points).T
                axes.plot(thresholds, 100 * values, color=colour, marker=marker, markersize=5, label=name, **style)
        axes.set_xlabel("IoU threshold (1: none removed)")
        axes.set_title(f"{title} (%)", loc="left", fontweight="bold", color=_INK)
        _plain(axes)
    figure.axes[0].legend(frameon=False)
    return _save(figure, path)


def confidence_boxes(panels: Sequence[tuple[str, Image, np.ndarray, np.ndarray]], path: str | Path) -> Path:
    """Draw boxes in two colours, those of middling and those of high confidence, panel beside panel.

    Args:
        panels (`Sequence[tuple]`): Line above the panel, picture, boxes `(n, 4)` xyxy in its pixels, scores `(n,)`.
        path (`str` or `Path`): Picture to write; its folder is made.

    Returns:
        `Path`: The picture.

    Source: Fig. 6 and 15, which have red for 0.1 to 0.5 and green for 0.5 to 1; here those are dashed orange and blue.
    """
    width, height = panels[0][1].size
    figure = _figure(4.4 * len(panels), 4.4 * height / width + 0.6)
    for axes, (title, image, boxes, scores) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        axes.set_title(title, loc="left", fontsize=10, color=_INK)
        _confident_boxes(axes, image, boxes, scores)
    _confidence_legend(figure)
    return _save(figure, path)


def threshold_diagram(curves: Mapping[str, Any], path: str | Path) -> Path:
    """Draw precision against recall, and F1 against the score threshold with its best point.

    Args:
        curves (`Mapping`): From `drmm_hf.evaluation.thresholds.threshold_curves`. Up to eight classes are named; of
            more, each is a pale line.
        path (`str` or `Path`): Picture to write; its folder is made.

    Returns:
        `Path`: The picture.
    """
    figure = _figure(10.5, 4.6)
    left, right = figure.subplots(1, 2)
    few = len(curves["classes"]) <= len(_SHADES)
    shades = _SHADES if few else [_PALE] * len(curves["classes"])
    lines = [(name, one, shade, 1.3) for (name, one), shade in zip(curves["classes"].items(), shades, strict=False)]
    if curves["all"] is not None:
        lines.append(("all classes", curves["all"], _INK, 2.2))
    for name, one, shade, width in lines:
        label = name if few or shade == _INK else None
        left.plot(one["recall"], one["precision"], color=shade, linewidth=width, label=label)
        right.plot(curves["thresholds"], one["f1"], color=shade, linewidth=width)
        if one["best_threshold"] is not None and label:
            right.plot(one["best_threshold"], one["best_f1"], color=shade, marker="o", markersize=5)
    left.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
    right.set(xlabel="score threshold", ylabel="F1", xlim=(0, 1.02), ylim=(0, 1.02))
    left.set_title("Precision and recall at IoU 0.5", loc="left", fontweight="bold", color=_INK)
    right.set_title("F1", loc="left", fontweight="bold", color=_INK)
    if lines:
        left.legend(loc="lower left", frameon=False)
    for one in (left, right):
        _plain(one)
    return _save(figure, path)


def confusion_diagram(confusion: Mapping[str, Any], path: str | Path) -> Path:
    """Draw which class is predicted for which, as shares of the annotated class, with the counts in small matrices.

    Args:
        confusion (`Mapping`): From `drmm_hf.evaluation.thresholds.confusion_matrix`.
        path (`str` or `Path`): Picture to write; its folder is made.

    Returns:
        `Path`: The picture.
    """
    matrix = np.asarray(confusion["matrix"], dtype=float)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    size = len(matrix)
    side = min(4 + 0.35 * size, 16)
    figure = _figure(side + 0.8, side)
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, shrink=0.7, label="share of the row")
    letters = 9 if size <= 20 else 5.5
    axes.set_xticks(range(size), [*confusion["names"], "missed"], rotation=90 if size > 6 else 0, fontsize=letters)
    axes.set_yticks(range(size), [*confusion["names"], "no object"], fontsize=letters)
    axes.set(xlabel="predicted", ylabel="annotated")
    title = f"Boxes at IoU 0.5 scoring {confusion['threshold']:.3f} and more"
    axes.set_title(title, loc="left", fontweight="bold", color=_INK)
    if size <= 20:
        for row, column in np.argwhere(matrix > 0):
            shade = "white" if shares[row, column] > 0.6 else _INK
            count = _short(int(matrix[row, column]))
            axes.text(column, row, count, ha="center", va="center", fontsize=letters, color=shade)
    return _save(figure, path)


def audit_curves(scored: Mapping[str, Any], path: str | Path) -> Path:
    """Draw precision against recall of finding planted errors, a panel a kind, a line a ranking.

    Args:
        scored (`Mapping`): Name of the ranking to what `drmm_hf.evaluation.audit.score_audit` returns.
        path (`str` or `Path`): Picture to write; its folder is made.

    Returns:
        `Path`: The picture.
    """
    kinds = [kind for kind, one in next(iter(scored.values())).items() if one is not None and kind != "annotations"]
    figure = _figure(1 + 3.6 * len(kinds), 3.9)
    styles = dict(zip(scored, ((_BLUE, "-"), (_ORANGE, (0, (4, 2)))), strict=False))
    for axes, kind in zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds, strict=True):
        for name, one in scored.items():
            shade, dashes = styles[name]
            label = f"{name}, AP {100 * one[kind]['average_precision']:.1f} %"
            axes.plot(one[kind]["recall"], one[kind]["precision"], color=shade, linestyle=dashes, label=label)
        axes.set(xlabel="recall", xlim=(0, 1), ylim=(0, 1.02))
        axes.set_title(
            f"{kind} ({next(iter(scored.values()))[kind]['num']})", loc="left", fontweight="bold", color=_INK
        )
        axes.legend(frameon=False, fontsize=9, loc="best")
        _plain(axes)
    figure.axes[0].set_ylabel("precision")
    return _save(figure, path)


def breakdown_diagram(report: Mapping[str, Any], path: str | Path) -> Path:
    """Draw AP, recall and calibration error by size, aspect ratio and crowding, and what each kind of error costs.

    Args:
        report (`Mapping`): From `drmm_hf.evaluation.breakdown.breakdown`. Bins without objects are left out.
        path (`str` or `Path`): Picture to write; its folder is made.

    Returns:
        `Path`: The picture.
    """
    titles = {
        "size": "side of the object (pixels)",
        "aspect_ratio": "width / height",
        "objects": "objects in the picture",
        "overlap": "IoU with one of its class",
    }
    lines = {
        "AP": ("AP", _SHADES[0], "o"),
        "recall": ("recall at IoU 0.5", _SHADES[2], "s"),
        "ECE_0.1": ("ECE of scores above 0.1", _SHADES[4], "^"),
    }
    errors = report["errors"]
    figure = _figure(3.6 * 3 if errors else 3.9 * 2, 6.6)
    axes = figure.subplots(2, 3 if errors else 2)
    panels = axes[:, :2].flatten() if errors else axes.flatten()
    for one, (name, title) in zip(panels, titles.items(), strict=True):
        bins = [entry for entry in report[name] if entry["num_ground_truths"]]
        for key, (label, shade, marker) in lines.items():
            points = [(place, 100 * entry[key]) for place, entry in enumerate(bins) if entry[key] is not None]
            if points:
                one.plot(*zip(*points, strict=True), color=shade, marker=marker, markersize=5, label=label)
        names = []
        for entry in bins:
            low, high = entry["low"], entry["high"]
            if high is not None and name == "objects":  # whole numbers below the end of the bin
                high -= 1
            names.append(f"{low:.3g}+" if high is None else f"{low:.3g}" if low == high else f"{low:.3g}-{high:.3g}")
        names = [f"{label}\n({_short(entry['num_ground_truths'])})" for label, entry in zip(names, bins, strict=True)]
        one.set_xticks(range(len(bins)), names)
        one.set(ylim=(0, 103), xlim=(-0.4, max(len(bins), 1) - 0.6), ylabel="%")
        one.set_xlabel("in brackets: number of objects", fontsize=8.5, color=_INK)
        one.set_title(title[0].upper() + title[1:], loc="left", fontweight="bold", color=_INK)
        _plain(one)
        one.tick_params(axis="x", labelsize=7.5)
    panels[3].legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="lower left", fontsize=8.5)
    if errors:
        kinds = {"Cls": "class", "Loc": "place", "Both": "both", "Dupe": "duplicate", "Bkg": "nothing\nthere"}
        kinds["Miss"] = "missed"
        deltas = [100 * errors["delta"][kind] for kind in kinds]
        axes[0, 2].barh(list(kinds.values()), deltas, color=_BLUE)
        axes[0, 2].set_title("Errors: AP50 without them", loc="left", fontweight="bold", color=_INK)
        axes[0, 2].set_xlabel("gain in points")
        axes[1, 2].barh(list(kinds.values()), [errors["counts"][kind] for kind in kinds], color="#8a94a3")
        axes[1, 2].set_title("Number of errors", loc="left", fontweight="bold", color=_INK)
        axes[1, 2].set_xscale("symlog", linthresh=1)
        axes[1, 2].set_xlabel("count (logarithmic)")
        for one in axes[:, 2]:
            one.invert_yaxis()
            _plain(one)
            one.grid(axis="y", visible=False)
            one.grid(axis="x", color=_PALE, linewidth=0.7)
    return _save(figure, path)


def training_curves(log: str | Path, path: str | Path, title: str = "Training") -> Path:
    """Draw the loss and, for each stage, the share of the leading component over the training steps.

    exp(-L_MCM) is the share that the most responsible component has in the likelihood of a ground truth: 1 means that
    one component explains it alone. The log holds means of L_MCM over ground truths, so the curve is the geometric
    mean of the shares.

    Args:
        log (`str` or `Path`): Json lines. Those with `step` and `loss` are drawn; `mcm.stage0`, `mcm.stage1`, ... are
            means over ground truths, and drawn as stages 1, 2, ..., as the paper counts. Other lines and keys are left
            out.
        path (`str` or `Path`): Picture to write; its folder is made.
        title (`str`): Line above the diagram.

    Returns:
        `Path`: The picture.

    Raises:
        ValueError: If no line has `step` and `loss`.

    Source: Eq. (6)-(8).
    """
    records = [json.loads(line) for line in Path(log).read_text().splitlines() if line.strip()]
    records = [record for record in records if "step" in record and "loss" in record]
    if not records:
        raise ValueError(f"log {log} has no line with step and loss; there is nothing to draw.")
    stages = sorted(
        {key for record in records for key in record if key.startswith("mcm.stage")},
        key=lambda key: int(key.removeprefix("mcm.stage")),
    )
    figure = _figure(10 if stages else 5.4, 4.2)
    axes = figure.subplots(1, 2 if stages else 1, squeeze=False)[0]
    _curve(axes[0], records, "loss", lambda values: values, _BLUE)
    axes[0].set(xlabel="step", ylabel="loss")
    axes[0].set_title(title, loc="left", fontweight="bold", color=_INK)
    if stages:
        import matplotlib

        shades = matplotlib.colormaps["viridis"](np.linspace(0.85, 0.1, len(stages)))
        for shade, key in zip(shades, stages, strict=True):
            name = f"stage {int(key.removeprefix('mcm.stage')) + 1}"
            _curve(axes[1], records, key, lambda values: np.exp(-values), shade, name)
        axes[1].set(xlabel="step", ylabel=r"$\exp(-L_{MCM})$", ylim=(0, 1.02))
        axes[1].set_title("Share of the leading component", loc="left", fontweight="bold", color=_INK)
        axes[1].legend(frameon=False, loc="lower right", ncols=2)
    for one in axes:
        _plain(one)
    return _save(figure, path)


# Style of a box by the range of its confidence.
_CONFIDENCES: dict[str, dict[str, Any]] = {
    "0.1 to 0.5": {"edgecolor": _ORANGE, "linestyle": (0, (4, 2))},
    "0.5 to 1": {"edgecolor": _BLUE},
}


def _confident_boxes(axes: Axes, image: Image, boxes: np.ndarray, scores: np.ndarray) -> None:
    """Draw a picture and its boxes of confidence above 0.1."""
    from matplotlib.patches import Rectangle

    axes.imshow(image)
    axes.set_axis_off()
    for box, score in zip(boxes, scores, strict=True):
        if score > 0.1:
            style = _CONFIDENCES["0.5 to 1" if score > 0.5 else "0.1 to 0.5"]
            axes.add_patch(Rectangle(box[:2], *(box[2:] - box[:2]), fill=False, linewidth=1.6, **style))


def _confidence_legend(figure: Figure) -> None:
    """Say below a figure what its boxes mean."""
    from matplotlib.patches import Rectangle

    samples = [Rectangle((0, 0), 1, 1, fill=False, linewidth=1.6, **style) for style in _CONFIDENCES.values()]
    names = [f"confidence {name}" for name in _CONFIDENCES]
    figure.legend(samples, names, loc="outside lower center", ncols=2, frameon=False, fontsize=10)


def _reliability(axes: Axes, result: Any, legend: bool) -> None:
    """Draw the accuracy of every bin and its gap to the confidence."""
    edges = np.asarray(result.bin_edges, dtype=float)
    filled = np.asarray(result.bin_count) > 0
    centres, width = (edges[:-1] + edges[1:])[filled] / 2, np.diff(edges)[filled] * 0.92
    accuracy = np.asarray(result.bin_accuracy, dtype=float)[filled]
    confidence = np.asarray(result.bin_confidence, dtype=float)[filled]
    axes.plot([0, 1], [0, 1], linestyle=(0, (4, 3)), color=_INK, linewidth=1, label="perfect", zorder=3)
    axes.bar(centres, accuracy, width, color=_BLUE, label="accuracy")
    axes.bar(
        centres,
        confidence - accuracy,
        width,
        bottom=accuracy,
        facecolor=(*_rgb(_RED), 0.18),
        edgecolor=_RED,
        hatch="////",
        linewidth=1,
        label="gap to confidence",
    )
    axes.set(xlim=(0, 1), ylim=(0, 1))
    if legend:
        axes.legend(loc="upper left", frameon=False)


def _bin_counts(axes: Axes, result: Any, highest: int) -> None:
    """Draw the number of predictions of every bin, with `highest` the largest of all panels."""
    edges = np.asarray(result.bin_edges, dtype=float)
    count = np.asarray(result.bin_count)
    filled = count > 0
    centres, width = (edges[:-1] + edges[1:])[filled] / 2, np.diff(edges)[filled] * 0.92
    axes.bar(centres, count[filled], width, color="#8a94a3")
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.set_ylim(0.5, max(highest, 1) * 9)
    axes.set_xticks(np.linspace(0, 1, 11) if len(edges) < 30 else np.linspace(0, 1, 6))
    axes.set_xticklabels([f"{tick:g}" for tick in np.round(axes.get_xticks(), 2)])
    if len(edges) < 30:
        for centre, number in zip(centres, count[filled], strict=True):
            axes.text(centre, number * 1.25, _short(int(number)), ha="center", va="bottom", fontsize=7.5, color=_INK)


def _curve(axes: Axes, records: list[dict[str, Any]], key: str, transform: Any, shade: Any, label: str = "") -> None:
    """Draw one logged value over the steps: every point pale, a running mean over it."""
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    steps, values = np.array(points, dtype=float).T
    values = transform(values)
    window = max(1, len(values) // 40)
    total = np.cumsum(np.concatenate([[0.0], values]))
    low = np.maximum(np.arange(len(values)) - window, 0)
    high = np.minimum(np.arange(len(values)) + window + 1, len(values))
    smooth = (total[high] - total[low]) / (high - low)
    axes.plot(steps, values, color=shade, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth, color=shade, linewidth=1.8, label=label, marker="o" if len(values) == 1 else None)


def _figure(width: float, height: float) -> Figure:
    """Return a figure that needs no display and leaves matplotlib's global state alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _plain(axes: Axes) -> None:
    """Take away what says nothing."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa3ae")
    axes.tick_params(color="#9aa3ae", labelcolor=_INK, labelsize=9)
    axes.grid(axis="y", color=_PALE, linewidth=0.7)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: str | Path) -> Path:
    """Write a figure; what it is follows from the name: png, pdf, svg."""
    import matplotlib

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"pdf.fonttype": 42}):  # letters stay letters, as publishers ask
        figure.savefig(path)
    return path


def _short(number: int) -> str:
    """Return a count in few letters."""
    for limit, letter in ((1_000_000, "M"), (1_000, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{letter}"
    return str(number)


def _rgb(colour: str) -> tuple[float, ...]:
    """Return the parts of a hexadecimal colour."""
    return tuple(part / 255 for part in bytes.fromhex(colour[1:]))
