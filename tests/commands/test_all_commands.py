"""What holds of every command: one json document, one line for an error, nothing that only a terminal understands."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from drmm_cli import COMMANDS, main
from drmm_hf.conversion.class_names import coco_categories
from parity.conftest import Case, cases


TINY = str(Path(__file__).parents[1] / "training" / "tiny.yaml")


def checkpoint(file):
    """Write recorded weights as the public code saves them."""
    case = Case(cases("drmm_e2e_r50w8*.safetensors")[0].values[0])
    weights = {name: value.float() for name, value in case.starting_with("param.").items()}
    torch.save({"state_dict": weights, "meta": {"CLASSES": tuple(coco_categories().values())}}, file)
    return [file, file.with_suffix(""), "--num-attention-heads", case.info["num_heads"]]


@pytest.fixture
def arguments(drmm_folder, coco_folder, tmp_path):
    """Return a function from a command to the arguments of a small run of it."""
    mine, output = tmp_path / "mine", ["--output", tmp_path / "out"]
    shutil.copytree(drmm_folder, mine)
    of = {
        "train": lambda: [TINY, "--max-steps", 1, *output],
        "evaluate": lambda: [mine, coco_folder, "--losses", *output],
        "predict": lambda: [mine, coco_folder / "val" / "0.png", "--threshold", 0, *output],
        "convert": lambda: checkpoint(tmp_path / "drmm.pth"),
        "push": lambda: [mine, "--repo-id", "me/mine", "--dry-run", *output],
        "benchmark": lambda: ["pooling", "--size", 64, 64, "--boxes", 4, "--repetitions", 1],
        "tables": lambda: [2],
        "figures": lambda: [10, "--output", tmp_path / "figure.png"],
        "audit": lambda: [mine, coco_folder, "--split", "val", *output],
        "compare": lambda: [f"a={mine}", f"b={mine}", coco_folder, "--timed", 1, *output],
        "doctor": lambda: [coco_folder],
    }
    return lambda command: [command, *map(str, of[command]())]


# A value of the document that is known beforehand.
KNOWN = {
    "train": lambda found: found["steps"] == 1,
    "evaluate": lambda found: found["metrics"]["num_images"] == 3 and found["evaluation"]["split"] == "val",
    "predict": lambda found: [record["file"].rsplit("/")[-1] for record in found] == ["0.png"],
    "convert": lambda found: found["family"] == "mmdetection",
    "push": lambda found: found["address"] is None and found["files"]["config.json"] > 0 and found["checks"],
    "benchmark": lambda found: found["threads"] >= 1,
    "tables": lambda found: found["table"] == 2 and found["published"][0]["figures"]["AP"] > 0,
    "audit": lambda found: found["num_images"] == 3 and len(found["annotations"]) == 2,
    "compare": lambda found: list(found["models"]) == ["a", "b"],
    "doctor": lambda found: found["num_problems"] == 0 and found["splits"]["val"]["pictures"] == 3,
}


@pytest.mark.parametrize("command", KNOWN)
def test_json_is_one_document_and_the_rest_is_for_people(command, arguments, capfd):
    assert main([*arguments(command), "--json"]) == 0
    shown = capfd.readouterr()
    assert KNOWN[command](json.loads(shown.out))
    assert len(shown.err.splitlines()) > 1  # what it prints without --json
    assert not {"\r", "\x1b"} & set(shown.out + shown.err)  # no bars, no colours


def test_commands_without_figures_are_quiet_too(arguments, capfd):
    assert main(arguments("figures")) == 0
    shown = capfd.readouterr()
    assert "written to" in shown.out and not {"\r", "\x1b"} & set(shown.out + shown.err)
    # `--json` of two is in tests of their own; of the others one draws and one serves a page.
    assert COMMANDS.keys() - KNOWN.keys() == {"calibrate", "export", "figures", "demo"}


# What cannot be, of each command.
WRONG = {
    "train": ["nowhere.yaml"],
    "evaluate": ["nowhere", "."],
    "calibrate": ["nowhere", "."],
    "predict": ["nowhere", "nowhere.png"],
    "convert": ["nowhere.pth", "out"],
    "demo": ["nowhere/nowhere/nowhere"],
    "export": ["nowhere/nowhere/nowhere"],
    "push": ["nowhere", "--repo-id", "me/mine", "--dry-run"],
    "benchmark": ["loader", "."],
    "tables": ["12"],
    "figures": ["1", "--output", "figure.png"],
    "audit": ["nowhere", "."],
    "compare": ["one", "."],
    "doctor": ["."],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_error_is_one_line_and_a_traceback_only_with_debug(command, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    as_json = [] if command in ("figures", "demo") else ["--json"]
    assert main([command, *WRONG[command], *as_json]) == 2
    shown = capfd.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and shown.err.startswith(f"drmm {command}: ")
    with pytest.raises(Exception, match=r"\w"):  # goes up to the interpreter, which shows where it comes from
        main([command, *WRONG[command], "--debug"])


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_is_a_usage_error(command, capfd):
    try:  # some take fields of recipes and configurations as options, and so look at them later
        code = main([command, *WRONG[command], "--an-unknown-option", "3", "unknown"])
    except SystemExit as exit_:
        code = exit_.code
    shown = capfd.readouterr()
    assert code == 2 and shown.out == "" and shown.err.startswith(("usage: drmm", f"drmm {command}: "))
