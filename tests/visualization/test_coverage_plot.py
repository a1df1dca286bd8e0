"""The diagram of coverage."""

import numpy as np
from PIL import Image

from drmm_hf.visualization.coverage_plot import coverage_diagram


def group(shift, factor):
    levels = np.linspace(0.05, 0.95, 19)
    curve = np.clip(levels + shift, 0, 1)
    edges = dict.fromkeys(("left", "top", "right", "bottom", "expected"), levels.tolist())
    ends = np.stack([curve - 0.02, curve + 0.02], axis=1).tolist()
    return {"scale_factor": factor, "all": curve.tolist(), "all_interval": ends, **edges}


def test_a_panel_a_group_and_lines_where_the_figures_are(tmp_path):
    report = {"levels": np.linspace(0.05, 0.95, 19).tolist(), "predicted": group(0.3, 1.0)}
    one = Image.open(coverage_diagram(report, tmp_path / "one.png"))
    two = Image.open(coverage_diagram(report | {"rescaled": group(0.0, 1.5)}, tmp_path / "new" / "two.png"))
    assert two.width > 1.6 * one.width and two.height == one.height
    low = Image.open(coverage_diagram(report | {"predicted": group(-0.04, 1.0)}, tmp_path / "low.png"))

    def height(image):
        pixels = np.asarray(image.convert("RGB"), dtype=int)
        blue = np.abs(pixels - (0x38, 0x78, 0xC7)).max(axis=-1) < 12
        return np.nonzero(blue[:, : pixels.shape[1] // 2])[0].mean()

    assert height(one) < height(low) - 50


def test_the_title_says_whether_the_scales_are_corrected(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda axes, title, **_: titles.append(title))
    report = {"levels": np.linspace(0.05, 0.95, 19).tolist(), "predicted": group(0.3, 1.0)}
    for saved in (None, 0.741):
        coverage_diagram(report | {"saved_scale_factor": saved}, tmp_path / "one.png")
    coverage_diagram(report | {"rescaled": group(0.0, 1.5)}, tmp_path / "one.png")  # of an earlier version
    assert titles == ["As predicted", "Calibrated, scales times 0.74", "As predicted", "Scales times 1.50"]
