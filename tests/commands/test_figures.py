"""`drmm figures`: each figure is drawn from the right results, and says which command gives what is missing."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from drmm_cli import main
from drmm_hf.commands.figures import FIGURES
from drmm_hf.data.generated import generate_shapes
from drmm_hf.data.labels import LabelMap
from drmm_hf.evaluation.calibration import calibration_report
from drmm_hf.evaluation.coco_metrics import ground_truth
from drmm_hf.evaluation.deduplication import sweep
from drmm_hf.evaluation.detections import Detections
from drmm_hf.evaluation.evaluate import measure
from drmm_hf.training.arguments import make_recipe
from drmm_hf.visualization import paper_figures, plots


pytest.importorskip("matplotlib")
DATA = {"source": "generated", "num_val_images": 6, "image_size": [96, 128]}
ANNOTATIONS = ground_truth(generate_shapes(6, 1, image_size=(96, 128)))
BOX = {"head_type": "box", "criterion": "focal_l1_giou"}


def detections(duplicates, seed):
    """Make predictions: each object moved a little, with copies that share its confidence, and low-scoring noise."""
    random = np.random.default_rng(seed)
    entries = []
    for record in ANNOTATIONS["annotations"]:
        shares = random.dirichlet(np.full(duplicates, 2.0)) * random.uniform(0.55, 0.98)
        for share in shares:
            box = np.array(record["bbox"]) + random.normal(0, 1.5, 4)
            entry = {"image_id": record["image_id"], "category_id": record["category_id"], "bbox": box.tolist()}
            objectness = share ** random.uniform(0.5, 1)
            entries.append(
                entry | {"score": share, "objectness": objectness, "class_probability": min(share / objectness, 1)}
            )
        box = [random.uniform(0, 90), random.uniform(0, 60), 20.0, 20.0]
        noise = random.uniform(0, 0.2)
        entries.append(entry | {"bbox": box, "score": noise, "objectness": noise, "class_probability": 1.0})
    return entries


def matches(copies, seed):
    """Make assignments: each object has `copies` predictions, each further away, and there are others like them."""
    random, images = np.random.default_rng(seed), []
    for picture in ANNOTATIONS["images"]:
        records = [one for one in ANNOTATIONS["annotations"] if one["image_id"] == picture["id"]]
        predictions, matched = [], []
        for record in records:
            mine = []
            for copy in range(copies + 1):
                box = (np.array(record["bbox"]) + random.normal(0, 1 + 3 * copy, 4)).tolist()
                mine.append(len(predictions))
                score = 0.9 - 0.3 * copy
                predictions.append({"bbox": box, "category_id": record["category_id"], "score": score})
            scores = [predictions[one]["score"] for one in mine[:copies]]
            matched.append({"predictions": mine[:copies], "scores": scores})
        truths = [{name: record[name] for name in ("bbox", "category_id")} for record in records]
        stages = [{"predictions": predictions, "matched": matched}]
        images.append({"image_id": picture["id"], "ground_truths": truths, "stages": stages})
    return {"num_copies": copies, "images": images}


def write(folder, content):
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text(json.dumps(content))


def make_run(folder, model, duplicates, seed, with_copies=False):
    folder.mkdir(parents=True)
    make_recipe({"model": model, "data": DATA, "training": {"epochs": 1}}, {}).save(folder / "recipe.yaml")
    label_map = LabelMap.from_categories(ANNOTATIONS["categories"])
    entries = detections(duplicates, seed)
    found = Detections.from_coco(entries, label_map, [record["id"] for record in ANNOTATIONS["images"]])
    measure(found, ANNOTATIONS, dict(enumerate(label_map.category_ids)), folder)
    write(folder / "duplicates.json", sweep(found, ANNOTATIONS, progress=False))
    write(folder / "calibration.json", calibration_report(ANNOTATIONS, entries))
    write(folder / "cost.json", {"pictures_per_second": 10.0 + seed, "device": "CPU, 1 threads", "size": [96, 128]})
    if model.get("head_type") == "box":
        write(folder / "assignments.json", matches(3 if with_copies else 1, seed))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a folder of four runs, and evaluations of one of them with fewer queries."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "box", BOX, 1, 0)
    make_run(folder / "copies", BOX | {"num_ground_truth_copies": 3}, 2, 1, with_copies=True)
    make_run(folder / "nll", {"criterion": "nll"}, 3, 2)
    make_run(folder / "nll_mcm", {}, 1, 3)
    metrics = json.loads((folder / "nll_mcm" / "metrics.json").read_text())
    for ratio in (0.5, 0.7):
        place = folder / "nll_mcm" / f"top{ratio}"
        about = {"model": str(folder / "nll_mcm" / "best"), "data": "generated", "split": "val", "top_k": 100}
        about["top_k_ratio"] = ratio
        write(place / "evaluation.json", about)
        write(place / "metrics.json", metrics | {"AP": metrics["AP"] * ratio})
        write(place / "cost.json", {"pictures_per_second": 20 / ratio, "device": "CPU, 1 threads"})
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """Return the list of the figures that were saved."""
    saved, save = [], plots._save
    for module in (plots, paper_figures):
        monkeypatch.setattr(module, "_save", lambda figure, path: saved.append(figure) or save(figure, path))
    return saved


@pytest.mark.parametrize("number", FIGURES)
def test_every_figure_is_drawn(number, runs, tmp_path, drawn, capsys):
    path = tmp_path / "new" / f"figure{number}.png"
    assert main(["figures", str(number), "--results", str(runs), "--output", str(path)]) == 0, capsys.readouterr().err
    assert Image.open(path).width > 500 and f"written to {path}" in capsys.readouterr().out
    assert len(drawn) == 1


@pytest.mark.parametrize("suffix", ["pdf", "svg"])
def test_figures_are_vectors_where_the_name_says_so(suffix, runs, tmp_path):
    path = tmp_path / f"figure.{suffix}"
    assert main(["figures", "7", "--results", str(runs), "--output", str(path)]) == 0
    assert path.read_bytes().startswith({"pdf": b"%PDF", "svg": b"<?xml"}[suffix])
    assert suffix == "svg" or b"/FontFile2" in path.read_bytes()  # TrueType, not drawn shapes


def metric(folder, name="AP"):
    return json.loads((folder / "metrics.json").read_text())[name]


def test_figure_7_has_the_sweep_of_each_model(runs, tmp_path, drawn):
    main(["figures", "7", "--results", str(runs), "--output", str(tmp_path / "7.png")])
    lines = {line.get_label(): line for line in drawn[0].axes[0].lines}
    assert list(lines) == ["Sparse R-CNN (box head)", "NLL", "NLL + MCM"]
    for name, folder in zip(lines, ("box", "nll", "nll_mcm"), strict=True):
        assert lines[name].get_xdata().tolist() == [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
        assert lines[name].get_ydata()[-1] == pytest.approx(100 * metric(runs / folder))
    best = json.loads((runs / "nll" / "duplicates.json").read_text())
    assert max(lines["NLL"].get_ydata()) == pytest.approx(100 * max(entry["AP"] for entry in best["nms"]))


def test_figure_8_has_nll_by_three_methods_and_nll_with_mcm(runs, tmp_path, drawn):
    main(["figures", "8", "--results", str(runs), "--output", str(tmp_path / "8.png")])
    upper = drawn[0].axes[:4]
    assert [axes.get_title(loc="left") for axes in upper] == ["NLL", "NLL + NMS", "NLL + WTA", "NLL + MCM"]
    for axes, folder in ((upper[0], "nll"), (upper[3], "nll_mcm")):
        assert f"AP {100 * metric(runs / folder):.1f} %" in axes.get_title(loc="right")
        assert f"ECE {100 * metric(runs / folder, 'ECE'):.2f} %" in axes.get_title(loc="right")


def test_figure_10_keeps_published_and_measured_apart(runs, tmp_path, drawn):
    main(["figures", "10", "--results", str(runs), "--output", str(tmp_path / "10.png")])
    published, here = drawn[0].axes
    points = {line.get_label(): sorted(zip(*line.get_data(), strict=True)) for line in published.lines}
    assert points["D-RMM + AdaMixer"] == [(15.3, pytest.approx(49.6)), (19.3, pytest.approx(48.7))]
    assert "Dynamic DETR" not in points  # the paper has no FPS of it
    measured = [value for line in here.lines for value in line.get_ydata()]
    expected = [100 * metric(runs / name) for name in ("box", "copies", "nll", "nll_mcm")]
    assert sorted(measured) == pytest.approx(sorted(expected))
    assert here.get_title(loc="left") == "Here: generated val, CPU, 1 threads"


def test_figures_11_and_12_follow_the_ratio(runs, tmp_path, drawn):
    for number in (11, 12):
        main(["figures", str(number), "--results", str(runs), "--output", str(tmp_path / f"{number}.png")])
    (line,) = drawn[0].axes[0].lines
    ap = 100 * metric(runs / "nll_mcm")
    assert line.get_xdata().tolist() == [0.5, 0.7, 1.0]
    assert line.get_ydata().tolist() == pytest.approx([0.5 * ap, 0.7 * ap, ap])
    (mine,) = (line for line in drawn[1].axes[0].lines if line.get_label() == "D-RMM, Sparse R-CNN")
    assert sorted(mine.get_xdata()) == pytest.approx([13.0, 20 / 0.7, 40.0])
    words = {text.get_text() for text in drawn[1].axes[0].texts}
    assert {"#300", "#300 Top-0.7", "#300 Top-0.5"} <= words


def kinds(axes):
    """Count the boxes of each style in a panel."""
    colours = [torch.tensor(patch.get_edgecolor()[:3]) for patch in axes.patches]
    styles = {name: style["edgecolor"] for name, style in paper_figures.ASSIGNMENT_STYLES.items()}
    exact = {name: torch.tensor([part / 255 for part in bytes.fromhex(one[1:])]) for name, one in styles.items()}
    return {
        name: sum(bool(torch.allclose(colour, one, atol=1e-3)) for colour in colours) for name, one in exact.items()
    }


def test_figure_13_has_unmatched_predictions_that_fit(runs, tmp_path, drawn):
    main(["figures", "13", "--results", str(runs), "--output", str(tmp_path / "13.png")])
    panels = [axes for axes in drawn[0].axes if axes.patches]
    counts = [kinds(axes) for axes in panels]
    assert len(panels) == 4 and all(count["ground truth"] == count["positive"] > 0 for count in counts)
    assert [axes.get_title(loc="left") for axes in panels] == [
        f"{count['negative']} negatives at IoU 0.5" for count in counts
    ]
    assert counts[0]["negative"] >= counts[-1]["negative"] > 0


def test_figure_14_has_one_object_and_its_three_predictions(runs, tmp_path, drawn):
    main(["figures", "14", "--results", str(runs), "--output", str(tmp_path / "14.png"), "--image-ids", "1", "2"])
    panels = [axes for axes in drawn[0].axes if axes.patches]
    assert [kinds(axes) for axes in panels] == [{"ground truth": 1, "positive": 1, "negative": 2}] * 2


def test_figure_15_has_a_row_a_model_and_figure_6_four_panels(runs, tmp_path, drawn):
    for number in (15, 6):
        main(["figures", str(number), "--results", str(runs), "--output", str(tmp_path / f"{number}.png")])
    grid, panels = (figure.axes for figure in drawn)
    rows = [axes.get_ylabel() for axes in grid if axes.get_ylabel()]
    names = ["Sparse R-CNN (box head)", "NLL", "NLL + NMS", "NLL + WTA", "NLL + MCM"]
    assert [row.split("\n")[0] for row in rows] == names
    assert rows[1].split("\n")[1] == " / ".join(f"{100 * metric(runs / 'nll', key):.1f}" for key in ("AP", "AR100"))
    assert len(grid) == 5 * 4 and len(panels) == 4
    counts = np.array([len(axes.patches) for axes in grid]).reshape(5, 4)
    assert (counts[2] <= counts[1]).all() and counts[2].sum() < counts[1].sum()
    assert panels[1].get_title(loc="left").startswith("(b) NLL, ")


def test_what_is_missing_is_said_with_its_command(runs, tmp_path, capsys):
    output = ["--output", str(tmp_path / "figure.png")]
    for number, folder, words in (
        (8, runs / "nll_mcm", ("duplicates.json", "--criterion nll", "--sweep")),
        (7, runs / "nll", ("--head-type box",)),
        (14, runs / "box", ("assignments.json", "--num-ground-truth-copies 3", "--assignments")),
        (11, runs / "nll", ("--top-k-ratio",)),
    ):
        assert main(["figures", str(number), "--results", str(folder), *output]) == 2
        said = capsys.readouterr().err
        assert all(word in said for word in words), said
    assert main(["figures", "3", *output]) == 2
    assert "docs/concepts.md" in capsys.readouterr().err
    assert main(["figures", "16", *output]) == 2
    assert main(["figures", "7", "--results", str(tmp_path / "none"), "--output", "figure.xyz"]) == 2
    assert "output is 'figure.xyz'; it must end in .png, .pdf or .svg" in capsys.readouterr().err
    assert not (tmp_path / "figure.png").exists()


def said_of(folder, text):
    return [line for line in text.splitlines() if line.endswith(str(folder)) or f"  {folder}: " in line]


def test_what_is_shown_and_what_is_not_is_said(tmp_path, capsys):
    """An overfit run, one without recipe, a second evaluation and another split lie beside the right ones."""
    for index, (name, model) in enumerate((("a_overfit", {}), ("b", {}))):
        make_run(tmp_path / name, model, 1, index)
    recipe = {"model": {}, "data": DATA | {"overfit": 2}, "training": {"epochs": 1}}
    make_recipe(recipe, {}).save(tmp_path / "a_overfit" / "recipe.yaml")
    (tmp_path / "a_overfit" / "duplicates.json").unlink()
    (tmp_path / "stranger").mkdir()
    for place, split, top_k in (("again", "val", 100), ("other", "test", 100), ("many", "val", 300)):
        copied = {"calibration.json", "metrics.json"}
        shutil.copytree(
            tmp_path / "b", tmp_path / "b" / place, ignore=lambda _, names, copied=copied: set(names) - copied
        )
        about = {"model": str(tmp_path / "b" / "best"), "data": "generated", "split": split, "top_k": top_k}
        write(tmp_path / "b" / place / "evaluation.json", about)
    shutil.copy(tmp_path / "b" / "metrics.json", tmp_path / "stranger")
    for path in (tmp_path / "b").glob("*.json"):
        os.utime(path, (1, 1))
    arguments = ["figures", "9", "--results", str(tmp_path), "--output", str(tmp_path / "9.png")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "overfit 2 pictures" in said_of(tmp_path / "a_overfit", said)[0]
    assert "no evaluation.json" in said_of(tmp_path / "stranger", said)[0]
    assert "older than" in said_of(tmp_path / "b" / "metrics.json", said)[0]
    assert "evaluated otherwise (top_k 300)" in said_of(tmp_path / "b" / "many", said)[0]
    assert "D-RMM, Sparse R-CNN; generated test" in said_of(tmp_path / "b" / "other", said)[0]
    both = f"{tmp_path / 'b' / 'again'}, {tmp_path / 'b'}"  # the sweep is only in the second
    assert any(
        f"  {both}: " in line or f"  {', '.join(both.split(', ')[::-1])}: " in line for line in said.splitlines()
    )
    shutil.rmtree(tmp_path / "b")
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "overfit 2 pictures" in said and "figure 9 needs calibration.json" in said
