"""`drmm evaluate` says what it measured, keeps fewer queries, and tells what box heads are matched to."""

import json

import pytest
import torch

from drmm_cli import main
from drmm_hf import DrmmForObjectDetection, DrmmImageProcessor


@pytest.fixture
def box_folder(tmp_path):
    from conftest import tiny_config

    torch.manual_seed(0)
    config = tiny_config(head_type="box", id2label={0: "round", 1: "square"}, category_ids=[3, 8])
    DrmmForObjectDetection(config).save_pretrained(tmp_path / "box")
    DrmmImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(tmp_path / "box")
    return tmp_path / "box"


def test_assignments_are_written(box_folder, coco_folder, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["evaluate", str(box_folder), str(coco_folder), "--output", str(output), "--assignments", "2"]) == 0
    found = json.loads((output / "assignments.json").read_text())
    assert len(found["images"]) == 2 and "assignments.json" in capsys.readouterr().out
    about = {"model": str(box_folder), "data": str(coco_folder), "split": "val", "top_k_ratio": None}
    about |= {"top_k": 100, "dtype": None, "annotations": None}
    written = json.loads((output / "evaluation.json").read_text())
    assert about.items() <= written.items() and written["step"] is None
    assert len(written["weights"]) == len(written["ground_truth"]) == 64


def test_other_models_match_nothing_and_detr_has_no_selection(model_folder, coco_folder, tmp_path, capsys):
    words = ["evaluate", str(model_folder), str(coco_folder), "--output", str(tmp_path / "out")]
    assert main([*words, "--assignments", "2"]) == 2
    assert "box heads" in capsys.readouterr().err
    if "drmm" in model_folder.name:
        assert main([*words, "--top-k-ratio", "0.5"]) == 0
        entries = json.loads((tmp_path / "out" / "detections.json").read_text())
        assert len({(entry["image_id"], entry["query"]) for entry in entries}) <= 3 * 3  # 3 of 6 queries a picture
        assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["top_k_ratio"] == 0.5
    else:
        assert main([*words, "--top-k-ratio", "0.5"]) == 2
        assert "top_k_ratio" in capsys.readouterr().err
