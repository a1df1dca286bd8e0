"""Diagrams: reliability of confidences and the course of a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _PALE, _BLUE, _RED = "#2b2f36", "#d9dde3", "#3878c7", "#e0533d"


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
    figure = _figure(5.4, 6.4)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    edges = np.asarray(result.bin_edges, dtype=float)
    count = np.asarray(result.bin_count)
    filled = count > 0
    centres, width = (edges[:-1] + edges[1:])[filled] / 2, np.diff(edges)[filled] * 0.92
    accuracy = np.asarray(result.bin_accuracy, dtype=float)[filled]
    confidence = np.asarray(result.bin_confidence, dtype=float)[filled]

    upper.plot([0, 1], [0, 1], linestyle=(0, (4, 3)), color=_INK, linewidth=1, label="perfect", zorder=3)
    upper.bar(centres, accuracy, width, color=_BLUE, label="accuracy")
    upper.bar(
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
    upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy at IoU 0.5", aspect="auto")
    upper.set_title(title, loc="left", fontweight="bold", color=_INK)
    ece = "no predictions" if np.isnan(result.ece) else f"ECE {result.ece * 100:.2f} %"
    upper.set_title(ece, loc="right", color=_INK)
    upper.legend(loc="upper left", frameon=False)

    lower.bar(centres, count[filled], width, color="#8a94a3")
    lower.set_yscale("log")
    lower.minorticks_off()
    highest = max(int(count.max(initial=1)), 1)
    lower.set(ylim=(0.5, highest * 9), xlabel="confidence", ylabel="predictions")
    lower.set_xticks(edges[:: max(1, (len(edges) - 1) // 10)])
    for centre, number in zip(centres, count[filled], strict=True):
        lower.text(centre, number * 1.25, _short(int(number)), ha="center", va="bottom", fontsize=7.5, color=_INK)
    for axes in (upper, lower):
        _plain(axes)
    return _save(figure, path)


def training_curves(log: str | Path, path: str | Path, title: str = "Training") -> Path:
    """Draw the loss and, for each stage, the share of the leading component over the training steps.

    exp(-L_MCM) is the share that the most responsible component has in the likelihood of a ground truth: 1 means that
    one component explains it alone. The log holds means of L_MCM over ground truths, so the curve is the geometric
    mean of the shares.

    Args:
        log (`str` or `Path`): Json lines. Those with `step` and `loss` are drawn; `mcm.stage0`, `mcm.stage1`, ... are
            means over ground truths. Other lines and keys are left out.
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
    axes = np.atleast_1d(figure.subplots(1, 2 if stages else 1))
    _curve(axes[0], records, "loss", lambda values: values, _BLUE)
    axes[0].set(xlabel="step", ylabel="loss")
    axes[0].set_title(title, loc="left", fontweight="bold", color=_INK)
    if stages:
        import matplotlib

        shades = matplotlib.colormaps["viridis"](np.linspace(0.85, 0.1, len(stages)))
        for shade, key in zip(shades, stages, strict=True):
            _curve(axes[1], records, key, lambda values: np.exp(-values), shade, key.replace("mcm.stage", "stage "))
        axes[1].set(xlabel="step", ylabel=r"$\exp(-L_{MCM})$", ylim=(0, 1.02))
        axes[1].set_title("Share of the leading component", loc="left", fontweight="bold", color=_INK)
        axes[1].legend(frameon=False, loc="lower right", ncols=2)
    for one in axes:
        _plain(one)
    return _save(figure, path)


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
    """Write a figure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
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
