"""Figures in the paper's form show what they are given."""

import numpy as np
import pytest
from PIL import Image

from drmm_hf.visualization import paper_figures


pytest.importorskip("matplotlib")


@pytest.fixture
def figures(monkeypatch):
    """Return the list of the figures that were saved."""
    saved, save = [], paper_figures._save
    monkeypatch.setattr(paper_figures, "_save", lambda figure, path: saved.append(figure) or save(figure, path))
    return saved


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_the_sweep_names_its_best_and_last_values(tmp_path, figures):
    curves = {"one": [(1.0, 0.4), (0.5, 0.45), (0.7, 0.43)], "two": [(0.5, 0.1), (1.0, 0.2)]}
    assert Image.open(paper_figures.nms_curves(curves, tmp_path / "new" / "sweep.png")).width > 500
    first, second = figures[0].axes[0].lines
    assert first.get_xdata().tolist() == [0.5, 0.7, 1.0]
    assert first.get_ydata().tolist() == pytest.approx([45, 43, 40])
    assert second.get_ydata().tolist() == pytest.approx([10, 20])
    assert sorted(texts(figures[0].axes[0])) == ["20.0", "40.0", "45.0"]
    assert first.get_color() != second.get_color() and first.get_marker() != second.get_marker()


def test_a_method_looks_the_same_in_every_panel(tmp_path, figures):
    panels = {
        "there": {"a": [(1.0, 0.3, "R50")], "b": [(3.0, 0.2, "R101"), (2.0, 0.1, "R50")]},
        "here": {"b": [(9.0, 0.6, ""), (8.0, 0.5, "")]},
    }
    paper_figures.speed_diagram(panels, tmp_path / "speed.png")
    there, here = figures[0].axes
    assert there.lines[1].get_color() == here.lines[0].get_color() != there.lines[0].get_color()
    assert there.lines[1].get_xdata().tolist() == [2.0, 3.0]
    assert there.lines[1].get_ydata().tolist() == pytest.approx([10, 20])
    assert there.lines[1].get_linewidth() > 0 == here.lines[0].get_linewidth()
    assert texts(there) == ["R50", "R101", "R50"] and there.get_title(loc="left") == "there"


def test_ratios_are_in_order(tmp_path, figures):
    paper_figures.selection_curves({"300": [(1.0, 0.4), (0.5, 0.2)]}, tmp_path / "ratios.png")
    (line,) = figures[0].axes[0].lines
    assert line.get_xdata().tolist() == [0.5, 1.0] and line.get_ydata().tolist() == pytest.approx([20, 40])


def test_rows_of_pictures_hold_their_boxes(tmp_path, figures):
    wide, tall = Image.new("RGB", (60, 40)), Image.new("RGB", (30, 40))
    boxes = np.array([[0, 0, 10, 20], [5, 5, 30, 30], [1, 1, 2, 2]], dtype=float)
    rows = {
        "one": [(wide, boxes, np.array([0.9, 0.3, 0.05])), (tall, boxes[:0], np.zeros(0))],
        "two": [(wide, boxes[:1], np.array([0.2])), (tall, boxes[:2], np.array([0.6, 0.7]))],
    }
    paper_figures.confidence_grid(rows, tmp_path / "grid.png")
    axes = figures[0].axes
    assert [len(one.patches) for one in axes] == [2, 0, 1, 2]
    assert [one.get_ylabel() for one in axes] == ["one", "", "two", ""]


def test_assignments_have_their_styles_and_words(tmp_path, figures):
    image = Image.new("RGB", (60, 40))
    boxes = [([0, 0, 10, 20], "ground truth", ""), ([1, 2, 11, 21], "positive", "0.9"), ([3, 3, 9, 9], "negative", "")]
    names = {"ground truth": "truth", "positive": "matched", "negative": "not"}
    paper_figures.assignment_diagram([("a", image, boxes), ("b", image, boxes[:1])], names, tmp_path / "assigned.png")
    first, second = figures[0].axes
    assert [patch.get_bbox().extents.tolist() for patch in first.patches] == [box for box, _, _ in boxes]
    assert len({patch.get_edgecolor() for patch in first.patches}) == 3 and len(second.patches) == 1
    assert texts(first) == ["0.9"] and first.get_title(loc="left") == "a"
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["truth", "matched", "not"]
