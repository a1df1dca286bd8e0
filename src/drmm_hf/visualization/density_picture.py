"""The density over boxes that D-RMM predicts for a picture, drawn: where centres may be, and where sides may run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .plots import _INK, _figure, _save


if TYPE_CHECKING:
    from PIL.Image import Image

# The density is evaluated at this many places along the longer edge at most.
_LONG_EDGE = 800
_NUM_QUANTILES = 64
# Smallest and largest height over width of a panel: beyond it pictures are stretched, or nothing of them would show.
_SHAPES = 0.3, 2.5


class Mixture(NamedTuple):
    """Hold the density over boxes of one picture: K components of four independent Student's t densities.

    Attributes:
        boxes (`np.ndarray` of shape `(K, 4)`): Locations, xyxy in pixels of the picture.
        scales (`np.ndarray` of shape `(K, 4)`): Scales of left, top, right and bottom, in pixels.
        weights (`np.ndarray` of shape `(K,)`): Mixing coefficients.
    """

    boxes: np.ndarray
    scales: np.ndarray
    weights: np.ndarray


def mixture_of_result(result: Mapping[str, Any], label: int | None = None) -> Mixture:
    """Put the mixture of a picture together again.

    Args:
        result (`Mapping`): Of post-processing that kept every pair of query and class: `boxes`, `box_scales`,
            `objectness`, `class_probabilities`, `labels` and `query_indices`.
        label (`int`, *optional*): Only this class: weights are pi times its probability, and no longer sum to 1.

    Returns:
        `Mixture`: A component a query.

    Raises:
        ValueError: If the result is not of a mixture head.
    """
    lacking = {"box_scales", "objectness", "class_probabilities", "query_indices"} - result.keys()
    if lacking:
        raise ValueError(f"result has no {', '.join(sorted(lacking))}; a density needs a D-RMM model's mixture head.")
    _, first = np.unique(np.asarray(result["query_indices"]), return_index=True)
    total = np.asarray(result["objectness"], dtype=float)[first].sum()
    weights = np.asarray(result["objectness"], dtype=float) / total
    if label is not None:
        first = np.flatnonzero(np.asarray(result["labels"]) == label)
        weights = weights * np.asarray(result["class_probabilities"], dtype=float)
    boxes, scales = (np.asarray(result[name], dtype=float)[first] for name in ("boxes", "box_scales"))
    return Mixture(boxes, scales, weights[first])


def centre_density(mixture: Mixture, x: np.ndarray, y: np.ndarray, freedom: float = 1.0) -> np.ndarray:
    """Evaluate the density of the centre of a box.

    The mean of two independent Cauchy variables is one whose scale is the mean of their scales, and that of Gaussians
    likewise with the root of their squares: exact. With other degrees of freedom one of the two is averaged over its
    quantiles.

    Args:
        mixture (`Mixture`): The density over boxes.
        x (`np.ndarray` of shape `(W,)`): Coordinates in pixels.
        y (`np.ndarray` of shape `(H,)`): Likewise.
        freedom (`float`): Degrees of freedom: 1 is Cauchy, infinity Gaussian.

    Returns:
        `np.ndarray` of shape `(H, W)`: In 1 / pixel^2.
    """
    from scipy.stats import t

    factors = []
    for places, (low, high) in ((x, (0, 2)), (y, (1, 3))):
        centre = (mixture.boxes[:, low] + mixture.boxes[:, high])[:, None] / 2
        scales = mixture.scales[:, low, None], mixture.scales[:, high, None]
        if freedom == 1 or np.isinf(freedom):
            scale = sum(scales) / 2 if freedom == 1 else np.hypot(*scales) / 2
            factors.append(t.pdf(places, freedom, centre, scale))
            continue
        narrow, wide = np.minimum(*scales) / 2, np.maximum(*scales) / 2
        offsets = t.ppf((np.arange(_NUM_QUANTILES) + 0.5) / _NUM_QUANTILES, freedom)
        factors.append(np.mean([t.pdf(places, freedom, centre + one * narrow, wide) for one in offsets], axis=0))
    return (factors[1] * mixture.weights[:, None]).T @ factors[0]


def side_density(mixture: Mixture, x: np.ndarray, y: np.ndarray, freedom: float = 1.0) -> np.ndarray:
    """Evaluate how likely a side of a box runs through each place: exact, since the four sides are independent.

    The left side is at x with the density of left, and passes y if top lies above it and bottom below.

    Args:
        mixture (`Mixture`): The density over boxes.
        x (`np.ndarray` of shape `(W,)`): Coordinates in pixels.
        y (`np.ndarray` of shape `(H,)`): Likewise.
        freedom (`float`): Degrees of freedom: 1 is Cauchy, infinity Gaussian.

    Returns:
        `np.ndarray` of shape `(H, W)`: Expected length of sides in a pixel, in 1 / pixel.
    """
    from scipy.stats import t

    location, scale = mixture.boxes.T[..., None], mixture.scales.T[..., None]
    across = t.pdf(x, freedom, location[::2], scale[::2]).sum(axis=0)
    along = t.pdf(y, freedom, location[1::2], scale[1::2]).sum(axis=0)
    within_x = t.cdf(x, freedom, location[0], scale[0]) * t.sf(x, freedom, location[2], scale[2])
    within_y = t.cdf(y, freedom, location[1], scale[1]) * t.sf(y, freedom, location[3], scale[3])
    weights = mixture.weights[:, None]
    return (weights * within_y).T @ across + (weights * along).T @ within_x


def density_picture(image: Image, mixture: Mixture, path: str | Path, freedom: float = 1.0) -> Path:
    """Draw the densities of centres and of sides over a picture, on a logarithmic scale.

    A picture that is very long or high is stretched.

    Args:
        image (`Image`): The picture.
        mixture (`Mixture`): The density over boxes, in its pixels.
        path (`str` or `Path`): Picture to write; its folder is made.
        freedom (`float`): Degrees of freedom: 1 is Cauchy, infinity Gaussian.

    Returns:
        `Path`: The picture.
    """
    import matplotlib
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator

    step = max(1.0, max(image.size) / _LONG_EDGE)
    counts = [max(1, round(side / step)) for side in image.size]
    x, y = ((np.arange(count) + 0.5) * side / count for side, count in zip(image.size, counts, strict=True))
    extent = (0, image.width, image.height, 0)
    shape = np.clip(image.height / image.width, *_SHAPES)
    figure = _figure(11.6, 4.6 * shape + 0.4)
    panels = (
        # How many decades below the peak are drawn: further down, the tails of Cauchy cover everything.
        ("Centre of a box", centre_density(mixture, x, y, freedom), 3, "density (1 / pixel²)"),
        ("Sides of a box", side_density(mixture, x, y, freedom), 1.5, "density (1 / pixel)"),
    )
    grey = np.asarray(image.convert("L"))
    for axes, (title, density, decades, unit) in zip(figure.subplots(1, 2), panels, strict=True):
        norm = LogNorm(density.max() / 10**decades, density.max(), clip=True)
        axes.imshow(grey, cmap="gray", vmin=-120, vmax=255, extent=extent)
        opacity = np.minimum(0.9, 1.8 * norm(density).filled(0))
        shown = axes.imshow(density, cmap="inferno", norm=norm, alpha=opacity, extent=extent, interpolation="nearest")
        axes.set_aspect(shape * image.width / image.height)
        axes.set_axis_off()
        axes.set_title(title, loc="left", fontweight="bold", color=_INK)
        scale = matplotlib.cm.ScalarMappable(norm, shown.cmap)
        bar = figure.colorbar(scale, ax=axes, pad=0.015, shrink=0.9, label=unit, ticks=LogLocator(subs=(1, 3)))
        bar.formatter = LogFormatterSciNotation(minor_thresholds=(np.inf, np.inf))
        bar.minorticks_off()
        bar.outline.set_visible(False)
    return _save(figure, path)
