"""`drmm tables`, from the command line to what it prints, and the runs that it starts."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

from drmm_cli import main
from drmm_hf import DrmmConfig
from drmm_hf.commands import tables
from drmm_hf.commands.train import read_rest
from drmm_hf.evaluation.paper_tables import paper_table
from drmm_hf.training.arguments import load_recipe


ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "training" / "tiny.yaml"


@pytest.mark.parametrize("number", range(1, 12))
def test_every_published_figure_is_printed_and_nothing_is_invented(number, capsys):
    assert main(["tables", str(number)]) == 0
    text = capsys.readouterr().out
    table = paper_table(number)
    rows = text.splitlines()[-len(table.rows) :]
    for line, row in zip(rows, table.rows, strict=True):
        figures = line.split("not run")[0].split()
        assert [figure for figure in figures if figure.replace(".", "").isdigit()][-len(row.figures) :] or row.figures
        for value in row.figures.values():
            assert value is None or any(float(figure) == value for figure in figures if figure[0].isdigit())
        assert line.count("not run") >= 1


def test_markdown_and_json(capsys):
    assert main(["tables", "3", "--markdown"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert lines[0] == "| method | AP | AR | AP here | AR here |" and lines[1] == "|---|---:|---:|---:|---:|"
    assert lines[4] == "| (III) (I) and WTA | 45.8 | 65.0 | not run | not run |"
    assert main(["tables", "3", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [row["figures"]["AP"] for row in content["published"]] == [35.6, 42.7, 45.8, 45.7, 47.0]
    assert content["measured"][0]["rows"][0]["figures"] == {}


def test_what_no_row_shows_is_said(tmp_path, capsys):
    load_recipe(TINY).save(tmp_path / "recipe.yaml")
    (tmp_path / "calibration.json").write_text(json.dumps({"kinds": {}}))
    assert main(["tables", "3", "--results", str(tmp_path)]) == 0
    assert f"left out, no row of table 3 is of it (generated val): {tmp_path}" in capsys.readouterr().err


def test_an_unknown_table_and_fields_without_run_are_said_in_one_line(capsys):
    assert main(["tables", "12"]) == 2
    assert "the paper has tables 1 to 11" in capsys.readouterr().err
    assert main(["tables", "2", "--epochs", "3"]) == 2
    assert "need --run" in capsys.readouterr().err
    assert main(["tables", "6", "--run", str(TINY)]) == 2
    assert "test-dev2017" in capsys.readouterr().err


def recipe_of(words):
    """Return what `drmm train` would make of a command."""
    assert words[0] == "train" and words[-1] == "--resume"
    path, fields = read_rest([word for word in words[1:-1]])
    fields["output_dir"] = fields.pop("output")
    fields.pop("data", None)
    return load_recipe(path, fields)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 7, 8, 9, 10, 11])
def test_other_recipes_are_trained_as_every_row_of_the_table(number):
    table = paper_table(number)
    commands = tables.training_commands(table, [str(TINY)], [0, 1], "out", {"hidden-size": "32"})  # as AdaMixer needs
    seen = set()
    for folder, words in commands.items():
        recipe = recipe_of(words)
        assert Path(recipe.training.output_dir) == folder and folder.name == f"seed{recipe.training.seed}"
        config = DrmmConfig(**recipe.model)
        matching = [
            row
            for row in table.rows
            if row.recipe and all(getattr(config, name) == value for name, value in row.fields.items())
        ]
        assert matching, folder
        seen |= {json.dumps(row.fields) for row in matching}
    assert seen == {json.dumps(row.fields) for row in table.rows if row.recipe}
    assert len(commands) == 2 * len(seen)


def test_a_paper_recipe_gives_its_own_rows_with_their_overrides(capsys):
    path = ROOT / "scripts" / "recipes" / "drmm_sparse_rcnn_r50.yaml"
    words = ["tables", "2", "--run", str(path), "--data", "COCO", "--output", "out", "--dry-run", "--epochs", "3"]
    assert main(words) == 0
    printed = capsys.readouterr().err.splitlines()
    recipes = [recipe_of(shlex.split(line)[1:]) for line in printed]
    assert [recipe.model["criterion"] for recipe in recipes] == [
        "bipartite_nll",
        "nll",
        "nll_mcm_bipartite",
        "nll_mcm",
    ]
    assert all(
        recipe.training.epochs == 3 and "--data COCO" in line for recipe, line in zip(recipes, printed, strict=True)
    )


@pytest.fixture
def in_process(monkeypatch):
    """Run what would be a process of its own in this one; return the list of commands."""
    started, others = [], subprocess.run

    def start(words, **options):
        if words[1:3] != ["-m", "drmm_hf"]:
            return others(words, **options)
        started.append(words[3:])
        assert main(words[3:]) == 0
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    monkeypatch.setattr(subprocess, "run", start)
    return started


def test_missing_rows_are_trained_measured_and_printed_and_not_again(in_process, tmp_path, capsys):
    words = ["tables", "4", "--run", str(TINY), "--output", str(tmp_path / "runs"), "--epochs", "1", "--markdown"]
    assert main(words) == 0
    assert [Path(command[command.index("--output") + 1]).parent.name for command in in_process] == [
        "drmm_sparse_rcnn_nll",
        "drmm_sparse_rcnn",
    ]
    printed = capsys.readouterr().out
    block = printed.partition("Measured on generated, split val, 3 pictures")[2].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in block if line.startswith("| w/")]
    for (label, nll, share, runs, *_), name in zip(cells, ("drmm_sparse_rcnn_nll", "drmm_sparse_rcnn"), strict=True):
        likelihood = json.loads((tmp_path / "runs" / "tiny" / name / "seed0" / "likelihood.json").read_text())["all"]
        assert (nll, share) == (f"{likelihood['nll'][-1]:.3f}", f"{likelihood['share'][-1]:.3f}")
        assert runs == "1" and label == ("w/o MCM" if name.endswith("nll") else "w/ MCM")
    in_process.clear()
    assert main(words) == 0
    assert not in_process and capsys.readouterr().out.splitlines()[-4:] == printed.splitlines()[-4:]


def test_a_finished_run_is_not_taken_for_one_with_other_fields(in_process, tmp_path, capsys):
    words = ["tables", "4", "--run", str(TINY), "--output", str(tmp_path / "runs"), "--epochs", "1"]
    assert main(words) == 0
    assert main([*words[:-1], "2"]) == 2
    assert "is a finished run with epochs 1, and 2 is asked for" in capsys.readouterr().err
    run = tmp_path / "runs" / "tiny" / "drmm_sparse_rcnn" / "seed0"
    (run / "likelihood.json").unlink()
    about = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps(about | {"ground_truth": "0" * 64}))
    assert main(words) == 2
    said = capsys.readouterr().err
    assert f"{run}: its figures are of other annotations" in said and "likelihood would not be of the same" in said
