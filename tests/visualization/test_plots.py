"""Diagrams: they are written, and they say what their data say."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from drmm_hf.visualization import plots


pytest.importorskip("matplotlib")


def reliability(count):
    edges = np.arange(11) / 10
    confidence = np.where(count > 0, edges[1:] - 0.05, np.nan)
    return SimpleNamespace(
        ece=0.1 if count.any() else float("nan"),
        bin_edges=edges,
        bin_confidence=confidence,
        bin_accuracy=confidence**2,
        bin_count=count,
    )


@pytest.fixture
def figures(monkeypatch):
    """Return the list of the figures that were saved."""
    saved = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: saved.append(figure) or save(figure, path))
    return saved


def test_reliability_diagram_shows_accuracy_gap_and_counts(tmp_path, figures):
    count = np.array([90000, 300, 0, 20, 4, 3, 2, 1, 1, 7])
    result = reliability(count)
    path = plots.reliability_diagram(result, tmp_path / "new" / "reliability.png")
    assert Image.open(path).size[0] > 500
    upper, lower = figures[0].axes
    accuracy, gap = upper.containers
    filled = count > 0
    assert [bar.get_height() for bar in accuracy] == pytest.approx(result.bin_accuracy[filled])
    assert [bar.get_y() + bar.get_height() for bar in gap] == pytest.approx(result.bin_confidence[filled])
    assert [bar.get_height() for bar in lower.containers[0]] == count[filled].tolist()
    assert lower.get_yscale() == "log" and lower.get_ylim()[1] > 90000
    assert upper.get_title(loc="right") == "ECE 10.00 %"


def test_reliability_of_no_predictions_is_an_empty_diagram(tmp_path, figures):
    plots.reliability_diagram(reliability(np.zeros(10, dtype=int)), tmp_path / "reliability.png")
    assert figures[0].axes[0].get_title(loc="right") == "no predictions"


def log(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_training_curves_show_the_loss_and_the_share_of_each_stage(tmp_path, figures):
    records = [
        {"step": step, "loss": 100.0 - step, "mcm.stage0": 1.0, "mcm.stage10": 0.5, "mcm.stage2": step / 100}
        for step in range(0, 100, 10)
    ]
    records.insert(3, {"epoch": 1, "AP": 0.3})
    plots.training_curves(log(tmp_path / "log.jsonl", records), tmp_path / "curves.png")
    left, right = figures[0].axes
    assert left.lines[0].get_ydata().tolist() == [100.0 - step for step in range(0, 100, 10)]
    assert [line.get_label() for line in right.lines[1::2]] == ["stage 1", "stage 3", "stage 11"]
    assert right.lines[0].get_ydata() == pytest.approx(np.full(10, np.exp(-1)))
    assert right.lines[2].get_ydata() == pytest.approx(np.exp(-np.arange(0, 1, 0.1)))
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_training_curves_without_mixture_show_the_loss_alone(tmp_path, figures):
    plots.training_curves(log(tmp_path / "log.jsonl", [{"step": 1, "loss": 2.0}]), tmp_path / "curves.png")
    assert len(figures[0].axes) == 1


def test_an_empty_log_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no line with step and loss"):
        plots.training_curves(log(tmp_path / "log.jsonl", [{"epoch": 1}]), tmp_path / "curves.png")


def test_pyplot_and_its_global_state_stay_away(tmp_path):
    plots.training_curves(log(tmp_path / "log.jsonl", [{"step": 1, "loss": 2.0}]), tmp_path / "curves.png")
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_diagrams_side_by_side_share_their_axes(tmp_path, figures):
    counts = [np.array([9000, 30, 0, 20, 4, 3, 2, 1, 1, 7]), np.array([5, 3, 2, 20, 4, 3, 2, 1, 1, 7])]
    results = dict(zip(("before", "after"), map(reliability, counts), strict=True))
    path = plots.reliability_diagrams(results, tmp_path / "two.png", ["p", "o"], ["AP 1 %", "AP 2 %"])
    assert Image.open(path).size[0] > 1000
    axes = figures[0].axes
    assert [one.get_title(loc="left") for one in axes[:2]] == ["before", "after"]
    assert [one.get_xlabel() for one in axes[2:]] == ["p", "o"]
    assert len({one.get_ylim() for one in axes[2:]}) == 1 and axes[2].get_ylim()[1] > 9000
    assert [one.get_title(loc="right") for one in axes[:2]] == ["ECE 10.00 %\nAP 1 %", "ECE 10.00 %\nAP 2 %"]
    for one, count in zip(axes[2:], counts, strict=True):
        assert [bar.get_height() for bar in one.containers[0]] == count[count > 0].tolist()


def test_curves_of_a_sweep(tmp_path, figures):
    def entry(value, iou_threshold=None):
        return {"AP": value, "ECE_0.1": value / 2, "duplicate_rate": None, "iou_threshold": iou_threshold}

    swept = {"none": entry(0.3)}
    swept |= {"nms": [entry(0.5, 0.5), entry(0.3, 1.0)], "wta": [entry(0.6, 0.5), entry(0.3, 1.0)]}
    assert Image.open(plots.deduplication_curves(swept, tmp_path / "sweep.png")).size[0] > 1000
    precision, error, duplicates = figures[0].axes
    lines = {line.get_label(): (line.get_xdata(), line.get_ydata()) for line in precision.lines}
    assert list(lines["NMS"][0]) == [0.5, 1.0] and list(lines["NMS"][1]) == [50, 30]
    assert list(lines["WTA"][1]) == [60, 30] and set(lines["as predicted"][1]) == {30}
    assert list(error.lines[1].get_ydata()) == [25, 15] and not duplicates.lines


def test_boxes_are_drawn_by_confidence(tmp_path, figures):
    image = Image.new("RGB", (60, 40), "white")
    boxes = np.array([[0, 0, 10, 20], [5, 5, 30, 30], [1, 1, 2, 2]], dtype=float)
    panels = [("one", image, boxes, np.array([0.9, 0.3, 0.05])), ("two", image, boxes[:1], np.array([0.5]))]
    plots.confidence_boxes(panels, tmp_path / "boxes.png")
    first, second = figures[0].axes
    drawn = [(patch.get_bbox().extents.tolist(), patch.get_linestyle() == "solid") for patch in first.patches]
    assert drawn == [([0, 0, 10, 20], True), ([5, 5, 30, 30], False)]
    assert [patch.get_linestyle() == "solid" for patch in second.patches] == [False]


def threshold_curve(value, best=0.5):
    return {"precision": [value, 1.0], "recall": [1.0, value], "f1": [value, 0.0]} | {
        "best_threshold": best,
        "best_f1": value,
    }


@pytest.mark.parametrize("num_classes", [0, 2, 30])
def test_curves_over_the_threshold(num_classes, tmp_path, figures):
    classes = {f"c{index}": threshold_curve(0.4) for index in range(num_classes)}
    curves = {"thresholds": [0.0, 1.0], "all": threshold_curve(0.6, 0.25), "classes": classes}
    assert Image.open(plots.threshold_diagram(curves, tmp_path / "thresholds.png")).size[0] > 1000
    left, right = figures[0].axes
    named = [text.get_text() for text in left.get_legend().get_texts()]
    assert named == [*(classes if num_classes < 9 else ()), "all classes"]
    assert len(left.lines) == num_classes + 1 and list(left.lines[-1].get_ydata()) == [0.6, 1.0]
    assert list(right.lines[-1].get_xdata()) == [0.25] and list(right.lines[-1].get_ydata()) == [0.6]


def test_a_confusion_matrix_shows_shares_and_counts(tmp_path, figures):
    confusion = {"threshold": 0.5, "names": ["cat", "dog"], "matrix": [[3, 1, 0], [0, 2000, 0], [1, 0, 0]]}
    plots.confusion_diagram(confusion, tmp_path / "confusion.png")
    axes = figures[0].axes[0]
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25, 0], [0, 1, 0], [1, 0, 0]]
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (0, 0): "3",
        (1, 0): "1",
        (1, 1): "2k",
        (0, 2): "1",
    }
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog", "no object"]


def test_audit_curves_have_a_panel_a_kind_and_a_line_a_ranking(tmp_path, figures):
    def one(precision, num=4):
        return {"num": num, "average_precision": 0.5, "precision": precision, "recall": [0.25, 0.5]}

    kinds = {"annotations": one([1, 1]), "moved": one([1, 0.5]), "relabelled": None, "removed": one([0.5, 0.25], 7)}
    other = kinds | {"moved": one([0.2, 0.1])}
    path = plots.audit_curves({"density": kinds, "confidence": other}, tmp_path / "new" / "planted.png")
    assert Image.open(path).width > 500
    moved, removed = figures[0].axes
    assert [axes.get_title(loc="left") for axes in (moved, removed)] == ["moved (4)", "removed (7)"]
    assert [line.get_ydata().tolist() for line in moved.lines] == [[1, 0.5], [0.2, 0.1]]
    labels = [text.get_text() for text in removed.get_legend().get_texts()]
    assert labels == ["density, AP 50.0 %", "confidence, AP 50.0 %"]


def test_a_breakdown_shows_the_bins_that_have_objects(tmp_path, figures):
    def one(low, high, count, ap=0.5):
        return {"low": low, "high": high, "num_ground_truths": count, "AP": ap, "recall": 0.75, "ECE_0.1": None}

    bins = [one(1.0, 2.0, 3), one(2.0, 4.0, 0), one(4.0, 8.0, 2000), one(8.0, None, 1, None)]
    names = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")
    errors = {"AP50": 0.5, "delta": dict.fromkeys(names, 0.1), "counts": dict.fromkeys(names, 3)}
    report = dict.fromkeys(("size", "aspect_ratio", "objects", "overlap"), bins) | {"errors": errors}
    plots.breakdown_diagram(report, tmp_path / "breakdown.png")
    axes = figures[0].axes
    panels = {panel.get_title(loc="left"): panel for panel in axes}
    ticks = [label.get_text() for label in panels["Objects in the picture"].get_xticklabels()]
    assert ticks == ["1\n(3)", "4-7\n(2k)", "8+\n(1)"]
    ap, recall = panels["Side of the object (pixels)"].lines
    assert ap.get_ydata().tolist() == [50, 50] and recall.get_ydata().tolist() == [75, 75, 75]
    assert [bar.get_width() for bar in panels["Errors: AP50 without them"].patches] == [10] * 6
    plots.breakdown_diagram(report | {"errors": None}, tmp_path / "breakdown.png")
    assert len(figures[1].axes) == 4
