"""`drmm benchmark`, from the command line to its files."""

import json

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
    assert main(["benchmark", "loader", str(coco_folder), "--repetitions", "0"]) == 2
    assert capsys.readouterr().err == "drmm benchmark: repetitions is 0, must be at least 1\n"


@pytest.mark.parametrize("arguments", [[], ["speed"], ["loader"]])
def test_kind_and_data_are_required(capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        main(["benchmark", *arguments])
    assert exit_.value.code == 2
    assert "usage: drmm benchmark" in capsys.readouterr().err
