"""What is planted is what the record says, and nothing else is touched."""

import copy
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor
from torchvision.ops import box_convert, box_iou

from drmm_hf.evaluation.planted_errors import KINDS, plant_errors


SCRIPT = Path(__file__).parents[2] / "scripts" / "plant_errors.py"


def make_annotations(num=30, seed=0):
    """Return boxes of a picture of 100 x 80, some over its border, every seventh a crowd."""
    rng = np.random.default_rng(seed)
    sides = rng.uniform(1, 60, (num, 2))
    corners = rng.uniform(-0.4, 0.9, (num, 2)) * [100, 80]
    records = [
        {
            "id": 100 + index,
            "image_id": 4,
            "category_id": (2, 9, 5)[index % 3],
            "bbox": [*corner, *side],
            "area": float(side.prod()),
            "iscrowd": int(index % 7 == 0),
            "segmentation": [[0, 0, 1, 1, 0, 1]],
        }
        for index, (corner, side) in enumerate(zip(corners.tolist(), sides, strict=True))
    ]
    for record in records:
        record["bbox"] = [float(value) for value in record["bbox"]]
    categories = [{"id": one, "name": f"class {one}"} for one in (2, 9, 5)]
    return {"images": [{"id": 4, "width": 100, "height": 80}], "annotations": records, "categories": categories}


@settings(max_examples=15)
@given(st.integers(0, 10_000), st.floats(0.05, 1))
def test_the_record_tells_every_change(seed, share):
    content = make_annotations(seed=seed)
    before = copy.deepcopy(content)
    spoilt, planted = plant_errors(content, share, seed)
    assert content == before
    old = {record["id"]: record for record in content["annotations"]}
    new = {record["id"]: record for record in spoilt["annotations"]}
    kinds = {entry["annotation_id"]: entry["kind"] for entry in planted}
    num_objects = sum(not record["iscrowd"] for record in content["annotations"])
    assert len(kinds) == len(planted) == round(share * num_objects)
    counts = [list(kinds.values()).count(kind) for kind in KINDS]
    assert max(counts) - min(counts) <= 1
    for entry in planted:
        was = old[entry["annotation_id"]]
        assert not was["iscrowd"]
        assert {key: entry[key] for key in ("image_id", "bbox", "category_id")} == {
            key: was[key] for key in ("image_id", "bbox", "category_id")
        }
    for identity, was in old.items():
        kind, now = kinds.get(identity), new.get(identity)
        if kind is None:
            assert now == was
        elif kind == "removed":
            assert now is None
        elif kind == "relabelled":
            assert now["category_id"] in {2, 9, 5} - {was["category_id"]}
            assert now == was | {"category_id": now["category_id"]}
        else:
            first, second = (box_convert(tensor([one["bbox"]]).double(), "xywh", "xyxy") for one in (was, now))
            assert 0.3 - 1e-5 <= box_iou(first, second).item() <= 0.6 + 1e-5
            assert now["area"] == pytest.approx(now["bbox"][2] * now["bbox"][3]) and "segmentation" not in now
            assert now["category_id"] == was["category_id"]
            low, high = second[0, :2].numpy(), second[0, 2:].numpy()
            assert (low >= np.minimum(first[0, :2], 0).numpy() - 1e-4).all()
            assert (high <= np.maximum(first[0, 2:].numpy(), [100, 80]) + 1e-4).all()


def test_the_seed_decides():
    content = make_annotations()
    assert plant_errors(content, 0.3, 1) == plant_errors(content, 0.3, 1)
    assert plant_errors(content, 0.3, 1) != plant_errors(content, 0.3, 2)


def test_what_cannot_be_planted_is_refused():
    content = make_annotations()
    for share in (0, 1.5):
        with pytest.raises(ValueError, match=f"share is {share}"):
            plant_errors(content, share)
    with pytest.raises(ValueError, match="one category only"):
        plant_errors({**content, "categories": content["categories"][:1]})


def test_the_script_writes_both_files_and_counts(tmp_path, monkeypatch, capsys):
    source, target = tmp_path / "in.json", tmp_path / "out" / "instances_train.json"
    content = make_annotations()
    source.write_text(json.dumps(content))
    monkeypatch.setattr(sys, "argv", ["plant_errors.py", str(source), str(target), "--share", "0.5", "--seed", "3"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    spoilt, planted = plant_errors(content, 0.5, 3)
    assert json.loads(target.read_text()) == spoilt
    assert json.loads((tmp_path / "out" / "planted_errors.json").read_text()) == planted
    counts = {kind: sum(entry["kind"] == kind for entry in planted) for kind in KINDS}
    assert capsys.readouterr().out == f"{len(planted)} of 30 annotations spoilt: {counts}\n"
