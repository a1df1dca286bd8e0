import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForObjectDetection

from drmm_cli import main
from drmm_hf.commands import train
from drmm_hf.commands.train import parse_fields
from drmm_hf.data.coco import save_coco
from drmm_hf.data.generated import generate_shapes
from drmm_hf.training.presets import few, many


TINY = str(Path(__file__).parents[1] / "training" / "tiny.yaml")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def shapes(tmp_path):
    for split, seed in (("train", 1), ("val", 2)):
        save_coco(generate_shapes(4, seed, (64, 64)), tmp_path / "shapes", split)
    return str(tmp_path / "shapes")


def test_train_from_a_folder_and_go_on(shapes, tmp_path, capsys):
    output = tmp_path / "run"
    command = ["train", TINY, "--data", shapes, "--output", str(output), "--mcm-weight", "0.25", "--max_steps=1"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "ellipse" in shown
    assert str(output / "best") in shown
    assert (output / "curves.png").stat().st_size > 1000
    recipe = yaml.safe_load((output / "recipe.yaml").read_text())
    assert (recipe["data"]["source"], recipe["model"]["mcm_weight"], recipe["training"]["max_steps"]) == (
        shapes,
        0.25,
        1,
    )
    assert AutoModelForObjectDetection.from_pretrained(output / "best").config.mcm_weight == 0.25

    assert main(command) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*command[:-1], "--max-steps", "2", "--resume"]) == 0
    assert json.loads((output / "summary.json").read_text())["steps"] == 2
    assert [json.loads(line)["step"] for line in (output / "log.jsonl").read_text().splitlines()] == [1, 1, 2, 2]


def test_a_saved_recipe_repeats_the_run(shapes, tmp_path):
    for output, recipe in ((tmp_path / "first", TINY), (tmp_path / "second", str(tmp_path / "first" / "recipe.yaml"))):
        assert main(["train", recipe, "--data", shapes, "--output", str(output), "--max-steps", "2"]) == 0
    losses = [
        [json.loads(line).get("loss") for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("first", "second")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--learning-rat", "1"], ["'learning-rat'", "'learning_rate'"]),
        (["--epochs", "0"], ["training.epochs", "0", "at least 1"]),
        (["--data", "/nowhere/at/all"], ["/nowhere/at/all"]),
        (["--epochs", "3", "4"], ["'4'"]),
        (["--epochs", "3", "--epochs=4"], ["--epochs", "twice"]),
        (["--num-queries", "15"], ["num_queries=15"]),
    ],
)
def test_wrong_options_are_said_in_one_line(tmp_path, capsys, options, words):
    assert main(["train", TINY, "--output", str(tmp_path / "run"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("drmm train: ")
    assert error.count("\n") == 1
    assert [word for word in words if word not in error] == []
    assert not (tmp_path / "run").exists()


def test_a_missing_recipe(capsys):
    assert main(["train", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err


NAMES = st.from_regex(r"[a-z][a-z0-9_-]{0,8}[a-z0-9]", fullmatch=True)
VALUES = st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S"]), min_size=1, max_size=8).filter(
    lambda value: not value.startswith("--")
)


@given(st.lists(st.tuples(NAMES, VALUES | st.none(), st.booleans()), unique_by=lambda entry: entry[0]))
def test_fields_are_read_in_every_form(entries):
    arguments = []
    for name, value, with_equals in entries:
        if value is None:
            arguments.append(f"--{name}")
        else:
            arguments += [f"--{name}={value}"] if with_equals else [f"--{name}", value]
    expected = {name: "true" if value is None else value for name, value, _ in entries}
    assert parse_fields(arguments) == expected


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_pictures_is_named(shapes, tmp_path, capsys, split):
    path = Path(shapes) / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"images": [], "annotations": []}))
    assert main(["train", TINY, "--data", shapes, "--output", str(tmp_path / "run"), "--max-minutes", "1"]) == 2
    assert f"split '{split}' of {shapes} has no pictures" in capsys.readouterr().err


def test_a_split_without_boxes_is_no_training_data(shapes, tmp_path, capsys):
    path = Path(shapes) / "annotations" / "instances_train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    assert main(["train", TINY, "--data", shapes, "--output", str(tmp_path / "run"), "--max-minutes", "1"]) == 2
    assert f"split 'train' of {shapes} has no boxes, crowds aside" in capsys.readouterr().err


def test_without_a_recipe_one_is_chosen_and_kept(shapes, tmp_path, capsys):
    sizes = "--shortest-edge 64 --longest-edge 96 --short-edges [64] --crop-short-edges [64] --crop-sizes [48,64]"
    command = f"train --data {shapes} --output {tmp_path / 'run'} --backbone-weights none --batch-size 2 {sizes}"
    command += " --trackers [] --num-workers 0 --resume --max-steps"
    assert main([*command.split(), "1"]) == 0
    said = capsys.readouterr().out
    assert "no recipe is given; chosen from the data" in said and "num_queries: 100" in said
    assert re.search(r"best checkpoint \(step 1\) on the validation split, in per cent: AP \d+\.\d\d  AP50 ", said)
    assert main([*command.split(), "2"]) == 0
    assert f"going on with {tmp_path / 'run' / 'recipe.yaml'}" in capsys.readouterr().out
    assert main(["train", "--max-steps", "1"]) == 2
    assert "recipe is missing" in capsys.readouterr().err


def test_the_help_knows_what_is_chosen_without_a_recipe():
    facts = {"num_images": 205, "width": 640, "height": 480, "shortest_edge": 480, "most": 29}
    chosen = {"warmup_steps"}
    for choose in (few, many):
        sections = choose(facts)
        chosen |= sections["data"].keys() | sections["training"].keys()
    assert set(train._USUAL) & chosen == train._CHOSEN


def test_the_traceback_of_a_defect_lies_with_the_run(shapes, tmp_path, capsys, monkeypatch):
    """Also where the recipe names the folder."""

    def defect(*_):
        raise RuntimeError("after hours")

    monkeypatch.setattr("drmm_hf.training.loop.find_checkpoint", defect)
    (tmp_path / "run").mkdir()
    assert main(["train", TINY, "--data", shapes, "--output_dir", str(tmp_path / "run")]) == 1
    file = tmp_path / "run" / "traceback.txt"
    assert capsys.readouterr().err == f"drmm train: RuntimeError: after hours ({file} has where it comes from)\n"
    assert "in defect" in file.read_text()


def test_all_fields_are_listed(capsys):
    with pytest.raises(SystemExit) as left:
        main(["train", "--fields"])
    assert left.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("--learning-rate 5e-05  # training, float: Peak") for line in lines)


def test_the_help_explains_the_usual_fields(capsys):
    with pytest.raises(SystemExit) as left:
        main(["train", "--help"])
    assert left.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    chosen = "without a recipe: as chosen from the data and printed)"
    assert f"--learning-rate float Peak learning rate of AdamW. (default of recipes: 5e-05; {chosen}" in words
    assert f"(default of recipes: 1000; {chosen} --epochs int Passes over the training split. ({chosen} --" in words
    assert "(default of recipes: error) --num-workers" in words
    assert "example: drmm train" in words
