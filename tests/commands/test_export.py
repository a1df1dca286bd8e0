"""`drmm export` writes the graph, compares it with the model and times it."""

import json

import pytest

from drmm_cli import main


@pytest.mark.parametrize("on_terminal", [True, False])
def test_the_command_exports_compares_and_measures(
    drmm_folder, coco_folder, tmp_path, capsys, monkeypatch, on_terminal
):
    monkeypatch.setattr("sys.stderr.isatty", lambda: on_terminal)
    output = tmp_path / "out"
    command = ["export", str(drmm_folder), "--format", "torch", "--data", str(coco_folder), "--output", str(output)]
    assert main(command if on_terminal else [*command, "--json"]) == 0
    shown, bars = capsys.readouterr()
    said = shown if on_terminal else bars  # with --json what is for people is on standard error
    words = "tracing the model ...\nwriting torch ...\ncomparing with the model ...\n"
    assert ("timing both ..." in bars) == (words in bars) == on_terminal
    assert "largest difference to the model in float32" in said and "times as fast" in said
    about = json.loads((output / "export.json").read_text())
    assert on_terminal or (json.loads(shown) == about and not {"\r", "\x1b"} & set(said))
    assert about["AP"]["eager"] == pytest.approx(about["AP"]["exported"], abs=1e-3)
    assert f"AP in per cent: {100 * about['AP']['eager']:.3f} in torch" in said
    assert main(command) == 2
    assert "exists; give a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "torch", "--int8"], "int8 is not for torch in float32"),
        (["--dtype", "bfloat16"], "dtype bfloat16 is not for onnx"),
    ],
)
def test_what_cannot_be_exported_is_said_before_the_work(drmm_folder, tmp_path, capsys, options, message):
    assert main(["export", str(drmm_folder), *options, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
