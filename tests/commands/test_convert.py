"""`drmm convert`, from the command line to a detector that gives the recorded detections."""

import os

import pytest
import torch
from transformers import AutoModelForObjectDetection

from drmm_cli import main
from drmm_hf.conversion.class_names import coco_categories
from parity.conftest import Case, cases, check_detections, error


@pytest.mark.parametrize("path", cases("drmm_e2e_r50w8*.safetensors"))
def test_recorded_weights_give_the_recorded_detections(path, tmp_path, capsys):
    case = Case(path)
    weights = {name: value.float() for name, value in case.starting_with("param.").items()}
    names = tuple(coco_categories().values())
    torch.save({"state_dict": weights, "meta": {"CLASSES": names}}, tmp_path / "drmm.pth")
    heads = ["--num-attention-heads", str(case.info["num_heads"])]
    assert main(["convert", str(tmp_path / "drmm.pth"), str(tmp_path / "out"), *heads]) == 0
    printed = capsys.readouterr().out
    assert "drmm.pth: D-RMM on Sparse R-CNN, ResNet of depths 3-4-6-3 and width 256" in printed
    assert f"{len(weights)} tensors mapped to " in printed and "conversion.json" in printed

    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "out").eval()
    assert model.config.id2label[79] == "toothbrush" and model.config.category_ids[79] == 90
    height, width = case.info["padded_hw"]
    sizes = case["in.img_hw"]
    mask = (torch.arange(height)[:, None] < sizes[:, :1, None]) & (torch.arange(width) < sizes[:, 1:, None])
    with torch.no_grad():
        outputs = model(case["in.image"], mask.long())
    assert error(outputs.logits.sigmoid(), case["final.conf"]) < 2e-4
    check_detections(case, outputs)


class Payload:
    def __reduce__(self):
        return os.getcwd, ()


def test_a_file_with_code_is_refused_in_one_line(tmp_path, capsys):
    torch.save({"state_dict": {"x": torch.ones(1)}, "meta": {"hook": Payload()}}, tmp_path / "drmm.pth")
    arguments = ["convert", str(tmp_path / "drmm.pth"), str(tmp_path / "out")]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "getcwd" in said and "--trust-pickle" in said
    assert main([*arguments, "--trust-pickle"]) == 2
    assert "no D-RMM, Sparse R-CNN or AdaMixer" in capsys.readouterr().err


def test_labels_that_do_not_fit_are_said(tmp_path, capsys):
    case = Case(cases("drmm_e2e_r50w8*.safetensors")[0].values[0])
    torch.save({name: value.float() for name, value in case.starting_with("param.").items()}, tmp_path / "drmm.pth")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    arguments = ["convert", str(tmp_path / "drmm.pth"), str(tmp_path / "out"), "--labels", str(tmp_path / "names.txt")]
    assert main(arguments) == 2
    assert "know 80 classes, but there are 2 names" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!DOCTYPE html><title>404</title>", "a web page: the download failed"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"", "is empty"),
        (None, "is a folder"),
    ],
    ids=["web page", "pointer", "empty", "folder"],
)
def test_what_is_no_checkpoint_is_said_in_one_line_and_nothing_is_written(content, words, tmp_path, capsys):
    path = tmp_path / "mödel.pth"
    path.mkdir() if content is None else path.write_bytes(content)
    assert main(["convert", str(path), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("drmm convert: ") and "mödel.pth" in said and words in said
    assert [entry.name for entry in tmp_path.iterdir()] == ["mödel.pth"]


def test_values_of_fields_are_read_as_in_a_recipe(tmp_path, capsys, monkeypatch):
    given = {}
    monkeypatch.setattr("drmm_hf.conversion.convert.convert_checkpoint", lambda *args: given.update(args[-1]))
    fields = ["--likelihood-epsilon", "1e-9", "--top-k-ratio=null", "--criterion", "no"]
    assert main(["convert", "x.pth", str(tmp_path / "out"), *fields]) == 0
    assert given == {"likelihood_epsilon": 1e-9, "top_k_ratio": None, "criterion": "no"}
    assert main(["convert", "x.pth", str(tmp_path / "out"), "--hidden-size", "[1"]) == 2
    assert "--hidden-size is not valid yaml" in capsys.readouterr().err
