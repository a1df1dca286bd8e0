"""Figures in the paper's form that `plots` does not have: sweeps, speed, selection, pictures in rows, assignments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .plots import _INK, _PALE, _SHADES, _confidence_legend, _confident_boxes, _figure, _plain, _save


if TYPE_CHECKING:
    from PIL.Image import Image

_MARKERS = "osD^vPX*"
# Ground truth, prediction that learns it, and the others: colour, width and dashes of a box.
ASSIGNMENT_STYLES: dict[str, dict[str, Any]] = {
    "ground truth": {"edgecolor": "#d55e00", "linewidth": 2.4},
    "positive": {"edgecolor": "#009e73", "linewidth": 1.8},
    "negative": {"edgecolor": "#f0c000", "linewidth": 1.6, "linestyle": (0, (4, 2))},
}


def nms_curves(curves: Mapping[str, Sequence[tuple[float, float]]], path: str | Path) -> Path:
    """Draw AP against the IoU threshold of NMS, a line a model, with the values at both ends of interest.

    Args:
        curves (`Mapping[str, Sequence[tuple[float, float]]]`): By model, thresholds and AP (fractions). Threshold 1
            means without NMS.
        path (`str` or `Path`): Picture to write; its folder is made.

    Returns:
        `Path`: The picture.

    Source: Fig. 7.
    """
    figure = _figure(5.4, 4.2)
    axes = figure.subplots()
    for index, (name, points) in enumerate(curves.items()):
        thresholds, values = np.array(sorted(points)).T
        values = 100 * values
        style: dict[str, Any] = {"color": _SHADES[index % len(_SHADES)], "marker": _MARKERS[index % len(_MARKERS)]}
        axes.plot(thresholds, values, markersize=5.5, linewidth=1.8, label=name, **style)
        for place in {int(np.argmax(values)), len(values) - 1}:
            last = place == len(values) - 1
            place_of_text: dict[str, Any] = {"textcoords": "offset points", "xytext": (7, 0) if last else (0, 7)}
            place_of_text |= {"ha": "left", "va": "center"} if last else {"ha": "center"}
            axes.annotate(
                f"{values[place]:.1f}",
                (thresholds[place], values[place]),
                fontsize=8.5,
                color=style["color"],
                **place_of_text,
            )
    axes.set(xlabel="IoU threshold of NMS (1.0: none)", ylabel="AP (%)")
    axes.margins(x=0.1, y=0.12)
    axes.legend(frameon=False, fontsize=9.5)
    _plain(axes)
    return _save(figure, path)


def speed_diagram(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float, str]]]], path: str | Path, ylabel: str = "AP (%)"
) -> Path:
    """Draw AP against pictures a second.

    Args:
        panels (`Mapping`): By title, methods by name, each a list of pictures a second, AP (fraction) and a word
            beside the point; a line joins them where all have one.
        path (`str` or `Path`): Picture to write; its folder is made.
        ylabel (`str`): What is to the left.

    Returns:
        `Path`: The picture.

    Source: Fig. 10 and 12.
    """
    figure = _figure(0.6 + 5.6 * len(panels), 4.6)
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    for axes, (title, panel) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, points in panel.items():
            index = names.index(name)
            style: dict[str, Any] = {"color": _SHADES[index % len(_SHADES)], "marker": _MARKERS[index % len(_MARKERS)]}
            speeds, values = ([point[axis] for point in sorted(points)] for axis in (0, 1))
            style["linewidth"] = 1.4 if all(word for _, _, word in points) else 0  # unnamed ones are repetitions
            axes.plot(speeds, [100 * value for value in values], markersize=7, label=name, **style)
            for speed, value, word in points:
                offset = {"textcoords": "offset points", "xytext": (6, 5)}
                axes.annotate(word, (speed, 100 * value), fontsize=8, color=_INK, **offset)
        axes.set(xlabel="pictures a second", ylabel=ylabel)
        axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=_INK)
        axes.margins(0.12)
        axes.legend(frameon=False, fontsize=8.5, loc="best")
        _plain(axes)
        axes.grid(axis="x", color=_PALE, linewidth=0.7)
    return _save(figure, path)


def selection_curves(curves: Mapping[str, Sequence[tuple[float, float]]], path: str | Path) -> Path:
    """Draw AP against the share of queries that is kept after every stage, a line a number of queries.

    Args:
        curves (`Mapping[str, Sequence[tuple[float, float]]]`): By number of queries, ratios and AP (fractions).
        path (`str` or `Path`): Picture to write; its folder is made.

    Returns:
        `Path`: The picture.

    Source: Fig. 11.
    """
    figure = _figure(5.4, 4.2)
    axes = figure.subplots()
    for index, (name, points) in enumerate(curves.items()):
        ratios, values = np.array(sorted(points)).T
        style: dict[str, Any] = {"color": _SHADES[index % len(_SHADES)], "marker": _MARKERS[index % len(_MARKERS)]}
        axes.plot(ratios, 100 * values, markersize=5.5, linewidth=1.8, label=name, **style)
    axes.set(xlabel="queries kept after each stage (ratio)", ylabel="AP (%)")
    axes.margins(y=0.1)
    axes.legend(frameon=False, fontsize=9.5)
    _plain(axes)
    return _save(figure, path)


def confidence_grid(rows: Mapping[str, Sequence[tuple[Image, np.ndarray, np.ndarray]]], path: str | Path) -> Path:
    """Draw the boxes of several models on the same pictures, a row a model.

    Args:
        rows (`Mapping`): By model, a list of picture, boxes `(n, 4)` xyxy in its pixels and scores `(n,)`.
        path (`str` or `Path`): Picture to write; its folder is made.

    Returns:
        `Path`: The picture.

    Source: Fig. 15.
    """
    sizes = [image.size for image, _, _ in next(iter(rows.values()))]
    widths = [width / height for width, height in sizes]
    height = 2.1
    figure = _figure(sum(widths) * height + 0.5, len(rows) * (height + 0.12) + 0.4)
    grid = figure.subplots(len(rows), len(sizes), squeeze=False, width_ratios=widths)
    for line, (name, pictures) in zip(grid, rows.items(), strict=True):
        for axes, picture in zip(line, pictures, strict=True):
            _confident_boxes(axes, *picture)
        line[0].set_axis_on()
        line[0].set(xticks=[], yticks=[])
        line[0].spines[:].set_visible(False)
        line[0].set_ylabel(name, fontsize=10, color=_INK)
    _confidence_legend(figure)
    return _save(figure, path)


def assignment_diagram(
    panels: Sequence[tuple[str, Image, Sequence[tuple[Sequence[float], str, str]]]],
    names: Mapping[str, str],
    path: str | Path,
    columns: int = 4,
) -> Path:
    """Draw which predictions learn an object and which do not.

    Args:
        panels (`Sequence[tuple]`): Line above, picture, and boxes: xyxy in its pixels, a key of `ASSIGNMENT_STYLES`
            and a word beside it.
        names (`Mapping[str, str]`): What each key means, for the legend.
        path (`str` or `Path`): Picture to write; its folder is made.
        columns (`int`): Pictures in a row.

    Returns:
        `Path`: The picture.

    Source: Fig. 13 and 14, which have ground truth in red, positives in green and negatives in orange; here the
        colours are those that the colour-blind can tell apart, and negatives are dashed.
    """
    from matplotlib.patches import Rectangle

    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    width, height = panels[0][1].size
    figure = _figure(3.3 * columns, lines * (3.3 * height / width + 0.3) + 0.4)
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (title, image, boxes) in zip(grid.flat, panels, strict=False):
        axes.imshow(image)
        axes.set_title(title, loc="left", fontsize=9.5, color=_INK)
        for box, kind, word in boxes:
            left, top, right, bottom = box
            style = ASSIGNMENT_STYLES[kind]
            axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, **style))
            if word:
                white = {"facecolor": "white", "edgecolor": style["edgecolor"], "boxstyle": "round,pad=0.15"}
                white |= {"alpha": 0.85, "linewidth": 0.8}
                axes.text(left, top, word, fontsize=6.5, color=_INK, va="bottom", bbox=white, clip_on=True)
    samples = [Rectangle((0, 0), 1, 1, fill=False, **ASSIGNMENT_STYLES[key]) for key in names]
    figure.legend(samples, names.values(), loc="outside lower center", ncols=len(names), frameon=False, fontsize=9.5)
    return _save(figure, path)
