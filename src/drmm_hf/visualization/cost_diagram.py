"""What a pass of a detector costs, as a picture: contestants side by side, and what more of anything adds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .plots import _BLUE, _INK, _PALE, _RED, _SHADES, _figure, _plain, _save


TITLES = {
    "height": "height of the picture (px)",
    "batch_size": "pictures",
    "num_queries": "queries",
    "num_stages": "stages",
}


def cost_diagram(figures: Mapping[str, Any], path: str | Path) -> Path:
    """Draw bars of the time of each contestant, and time and memory along each curve.

    A bar's dark part is what the detector's products alone would take at the machine's matrix rate, its whole length
    the median, the whisker the spread.

    Args:
        figures (`Mapping`): From `drmm_hf.benchmarks.inference.benchmark_inference`.
        path (`str` or `Path`): Picture to write; its folder is made.

    Returns:
        `Path`: The picture.
    """
    clock = "processor_seconds" if figures["device"] == "cpu" else "seconds"
    contestants, curves = figures["contestants"], figures["curves"]
    columns = min(2, len(curves))
    lines = -(-len(curves) // 2)
    figure = _figure(8.4, 0.9 + 0.34 * len(contestants) + 2.6 * lines)
    heights = [1 + 0.34 * len(contestants), 2.6 * lines] if curves else [1]
    rows = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    axes = figure.add_subplot(rows[0])
    dtypes = list(figures["matmul"])
    for place, one in enumerate(contestants):
        taken, shade = one[clock], _SHADES[dtypes.index(one["dtype"])]
        floor = one["roofline_share"]["median"] * taken["median"]
        axes.barh(place, taken["median"], color=shade, alpha=0.35, height=0.68)
        axes.barh(place, floor, color=shade, height=0.68)
        axes.plot([taken["min"], taken["max"]], [place, place], color=_INK, linewidth=1.2)
        axes.annotate(
            f"{taken['median']:.2g} s",
            (max(taken["max"], taken["median"]), place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=_INK,
        )
    axes.set_yticks(range(len(contestants)), [_name(one) for one in contestants], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(one[clock]["max"] for one in contestants))
    seconds = "seconds of one core" if figures["device"] == "cpu" else "seconds"
    axes.set_xlabel(f"{seconds} a pass; dark: what its matrix products take at the machine's rate", fontsize=8.5)
    _plain(axes)
    if curves:
        below = rows[1].subgridspec(lines, columns)
        for place, (axis, points) in enumerate(curves.items()):
            panel = figure.add_subplot(below[place // 2, place % 2])
            values = [point["value"] for point in points]
            panel.plot(values, [point[clock]["median"] for point in points], "o-", color=_BLUE, markersize=4)
            panel.set_ylim(0, 1.1 * max(point[clock]["median"] for point in points))
            panel.set_xticks(values if len(values) < 4 else panel.get_xticks())
            panel.set_xlim(0, 1.05 * max(values))
            panel.tick_params(labelsize=8)
            panel.set_xlabel(TITLES[axis], fontsize=8.5)
            if place % 2 == 0:
                panel.set_ylabel(seconds, color=_BLUE, fontsize=8.5)
            _plain(panel)
            if all(point["bytes"] is not None for point in points):
                other = panel.twinx()
                other.plot(values, [point["bytes"] / 2**20 for point in points], "s--", color=_RED, markersize=3.5)
                other.set_ylim(0, 1.1 * max(point["bytes"] for point in points) / 2**20)
                other.tick_params(labelsize=8, colors=_RED)
                other.spines[["top", "left"]].set_visible(False)
                other.spines[["right", "bottom"]].set_color(_PALE)
                if place % 2 == columns - 1 or place == len(curves) - 1:
                    other.set_ylabel("MiB besides weights", color=_RED, fontsize=8.5)
    return _save(figure, path)


def _name(one: Mapping[str, Any]) -> str:
    return f"{one['name']}, {one['dtype']}{', compiled' if one['compiled'] else ''}"
