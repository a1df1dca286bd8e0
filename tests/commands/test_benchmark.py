"""`drmm benchmark`, from the command line to its files."""

import json
from pathlib import Path

import pytest

from drmm_cli import main


def test_loader_prints_a_table_and_writes_json(coco_folder, tmp_path, capsys):
    output = tmp_path / "new" / "loader.json"
    sizes = ["--shortest-edge", "64", "--longest-edge", "96", "--batch-size", "2", "--repetitions", "2"]
    assert main(["benchmark", "loader", str(coco_folder), *sizes, "--output", str(output)]) == 0
    figures = json.loads(output.read_text())
    assert figures["size"] == {"shortest_edge": 64, "longest_edge": 96}
    assert (figures["num_pictures"], figures["batch_size"], figures["repetitions"]) == (3, 2, 2)
    shown = capsys.readouterr().out
    for name, title in (("drmm_hf", "drmm-hf"), ("transformers", "transformers DETR"), ("decoding", "decoding alone")):
        (line,) = (line for line in shown.splitlines() if line.startswith(title))
        for clock in ("pictures_per_core_second", "pictures_per_second"):
            assert f"{figures['loaders'][name][clock]['median']:.1f} (" in line
    assert f"{figures['ratio']['median']:.2f} (" in shown
    assert f"written to {output}" in shown


def test_a_wrong_number_is_said_in_one_line(coco_folder, capsys):
    assert main(["benchmark", "infer", "--peers", "yolo"]) == 2
    assert capsys.readouterr().err.startswith("drmm benchmark: peer is 'yolo', must be one of deformable_detr")
    with pytest.raises(SystemExit, match="2"):
        main(["benchmark", "loader", str(coco_folder), "--repetitions", "0"])
    assert "--repetitions: '0' is given; the rule is a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["speed"], ["loader"]])
def test_kind_and_data_are_required(capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        main(["benchmark", *arguments])
    assert exit_.value.code == 2
    assert "usage: drmm benchmark" in capsys.readouterr().err


def test_train_prints_parts_and_models_and_writes_json(tmp_path, capsys):
    recipe = Path(__file__).parents[1] / "training" / "tiny.yaml"
    output = tmp_path / "train.json"
    options = ["--size", "64", "96", "--batch-size", "3", "--repetitions", "1", "--dtype", "bfloat16"]
    assert main(["benchmark", "train", "--recipe", str(recipe), *options, "--output", str(output)]) == 0
    figures = json.loads(output.read_text())
    assert (figures["padded_size"], figures["batch_size"], figures["dtype"]) == ([64, 96], 3, "bf16")
    shown = capsys.readouterr().out
    for name, part in figures["parts"].items():
        (line,) = (line for line in shown.splitlines() if line.startswith(f"{name} "))
        assert f"{1000 * part['seconds']['median']:.1f} (" in line and f"{part['share']['median']:.1%}" in line
    (line,) = (line for line in shown.splitlines() if line.startswith("drmm-hf"))
    assert f"{figures['models']['drmm']['roofline_share']['median']:.2f} (" in line
    assert f"{figures['pictures_per_second']['median']:.2f} (" in shown


def test_loss_prints_a_line_a_case_and_writes_json(tmp_path, capsys):
    output = tmp_path / "loss.json"
    sizes = ["--queries", "6", "9", "--objects", "2", "--stages", "2", "--batch-size", "2", "--classes", "3"]
    assert main(["benchmark", "loss", *sizes, "--repetitions", "1", "--output", str(output)]) == 0
    figures = json.loads(output.read_text())
    shown = capsys.readouterr().out.splitlines()
    assert len(figures["cases"]) == 2
    for case, line in zip(figures["cases"], shown[1:], strict=False):
        assert line.split()[:2] == [str(case["num_queries"]), "2"]
        assert f"{case['ratio']['median']:.1f} (" in line


def test_pictures_are_either_drawn_or_read(capsys):
    assert main(["benchmark", "train", "--data", "x", "--size", "64", "64"]) == 2
    assert capsys.readouterr().err.startswith("drmm benchmark: data and size are both given")
