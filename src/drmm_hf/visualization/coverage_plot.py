"""A diagram of coverage: how often the intervals about predicted sides hold the annotated ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .plots import _BLUE, _INK, _SHADES, _figure, _plain, _save


_EDGES = {"left": "-", "top": (0, (5, 1.5)), "right": (0, (1.2, 1.2)), "bottom": (0, (5, 1.5, 1.2, 1.5))}


def coverage_diagram(report: Mapping[str, Any], path: str | Path) -> Path:
    """Draw observed against nominal coverage, of all sides and of each, and what a right density would show.

    Args:
        report (`Mapping`): From `drmm_hf.evaluation.coverage.coverage_report`; `rescaled` has a panel of its own. With
            `saved_scale_factor`, the scales are those that the processor has corrected.
        path (`str` or `Path`): Picture to write; its folder is made.

    Returns:
        `Path`: The picture.
    """
    saved = report.get("saved_scale_factor")
    groups = {"As predicted" if saved is None else f"Calibrated, scales times {saved:.2f}": report["predicted"]}
    if "rescaled" in report:
        groups[f"Scales times {report['rescaled']['scale_factor']:.2f}"] = report["rescaled"]
    figure = _figure(0.7 + 4.2 * len(groups), 4.9)
    levels = np.array(report["levels"])
    for index, (axes, (title, group)) in enumerate(
        zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True)
    ):
        axes.plot([0, 1], [0, 1], color=_INK, linewidth=1, linestyle=(0, (4, 3)), label="nominal")
        axes.plot(
            levels, group["expected"], color=_INK, linewidth=1.6, linestyle=(0, (1, 1.5)), label="of a right density"
        )
        for (edge, style), shade in zip(_EDGES.items(), _SHADES[1:], strict=False):
            axes.plot(levels, group[edge], color=shade, linewidth=1.2, linestyle=style, label=edge)
        low, high = np.array(group["all_interval"]).T
        axes.fill_between(levels, low, high, color=_BLUE, alpha=0.2, linewidth=0, label="their 95 % interval")
        axes.plot(levels, group["all"], color=_BLUE, linewidth=2.2, marker="o", markersize=3.5, label="all sides")
        axes.set(xlim=(0, 1), ylim=(0, 1.01), aspect="equal", xlabel="nominal coverage of the interval")
        axes.set_title(title, loc="left", fontweight="bold", color=_INK)
        _plain(axes)
        if index == 0:
            axes.set_ylabel("share of annotated sides inside")
            axes.legend(loc="lower right", frameon=False, fontsize=9)
    return _save(figure, path)
