"""`drmm doctor`, from the command line to its exit code."""

import argparse
import json
import shlex

import pytest

from drmm_cli import main
from drmm_hf.commands.doctor import next_step
from drmm_hf.commands.train import add_arguments, read_rest
from drmm_hf.data.coco import save_coco
from drmm_hf.data.generated import generate_shapes
from drmm_hf.training.presets import choose_recipe


@pytest.fixture
def folder(tmp_path):
    """A clean COCO folder of two splits."""
    for seed, split in enumerate(("train", "val")):
        save_coco(generate_shapes(2, seed, image_size=(48, 64)), tmp_path, split)
    return tmp_path


def break_a_box(folder, count=1):
    path = folder / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    for record in content["annotations"][:count]:
        record["bbox"] = [5, 5, -1, 5]
    path.write_text(json.dumps(content))


def test_clean_data_exit_with_0(folder, capsys):
    assert main(["doctor", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "COCO, splits train, val" in printed and "\nno problems\n" in printed
    assert printed.splitlines()[-1] == f"next: drmm train --data {folder} --output runs/mine"
    (row,) = (line.split() for line in printed.splitlines() if line.startswith("pictures"))
    assert row == ["pictures", "2", "2"]
    for name in ("ellipse", "rectangle", "triangle", "small / medium / large", "beyond 100 queries"):
        assert name in printed


def test_problems_are_counted_named_and_exit_with_1(folder, capsys):
    break_a_box(folder, 6)
    assert main(["doctor", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert "problems: 6" in printed and "val, boxes without area inside their picture (box_without_area): 6" in printed
    assert printed.count("instances_val.json: annotations[") == 5 and "and 1 more, all in --json" in printed
    assert "-> correct boxes that are empty, inverted or outside" in printed
    assert printed.splitlines()[-1] == (
        f"next: mend them, then drmm doctor {folder}; or leave them out: drmm train --data {folder} "
        "--invalid-data skip --output runs/mine"
    )
    assert main(["doctor", str(folder), "--split", "train"]) == 0


def test_the_next_command_is_one_that_works(folder, capsys):
    assert main(["doctor", str(folder), "--split", "val"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"next: drmm doctor {folder}, for all splits"
    (folder / "annotations" / "instances_train.json").rename(folder / "annotations" / "instances_learn.json")
    (folder / "train").rename(folder / "learn")
    spaced = folder.rename(folder.with_name("my data"))
    assert main(["doctor", str(spaced)]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"next: drmm train --data '{spaced}' --train-split NAME --output runs/mine"
    report = {"source": "me/cells", "splits": {"train": {}}, "num_problems": 0}
    assert next_step(report, None, "xyxy") == (
        "next: drmm train --data me/cells --bbox-format xyxy --output runs/mine"
    )
    words = shlex.split(said.removeprefix("next: drmm train "))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args, rest = parser.parse_known_args(words)
    recipe, _ = choose_recipe(args.data, read_rest(rest)[1] | {"train_split": "learn"})
    assert recipe.data.train_split == "learn" and recipe.data.val_split == "val"


def test_queries_are_those_of_the_recipe_that_is_chosen(tmp_path, capsys):
    save_coco(generate_shapes(2, 0, (256, 256), num_objects=(50, 60), object_sizes=(0.02, 0.05)), tmp_path, "train")
    save_coco(generate_shapes(2, 1, (64, 64)), tmp_path, "val")
    recipe, _ = choose_recipe(str(tmp_path), {"backbone_weights": "none"})
    assert main(["doctor", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_queries"] == recipe.model["num_queries"] == 300


def test_json_holds_everything(folder, capsys):
    break_a_box(folder, 6)
    assert main(["doctor", str(folder), "--json", "--num-queries", "1"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["num_problems"] == 6 and report["num_queries"] == 1
    assert len(report["splits"]["val"]["problems"]["box_without_area"]["first"]) == 6
    assert len(report["splits"]["train"]["beyond_queries"]["pictures"]) == 2


def test_many_classes_are_cut_in_the_table_and_whole_in_json(folder, capsys):
    for split in ("train", "val"):
        path = folder / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        content["categories"] += [{"id": 100 + i, "name": f"thing {i}"} for i in range(40)]
        path.write_text(json.dumps(content))
    assert main(["doctor", str(folder)]) == 0
    assert "... 13 more, all in --json" in capsys.readouterr().out
    assert main(["doctor", str(folder), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["splits"]["train"]["classes"]) == 43


def test_an_unknown_split_exits_with_2(folder, capsys):
    assert main(["doctor", str(folder), "--split", "test"]) == 2
    assert "split 'test' is not in" in capsys.readouterr().err
