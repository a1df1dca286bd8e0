"""Digests tell weights and annotations from others of the same name, and from nothing else."""

import json
import random

import pytest

from drmm_hf.evaluation.origin import annotations_digest, input_settings, origin, other_input, weights_digest


ANNOTATIONS = {
    "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 4, "bbox": [1, 2, 3, 4]},
        {"id": 2, "image_id": 2, "category_id": 4, "bbox": [5.5, 2, 3, 4], "iscrowd": 1},
    ],
    "categories": [{"id": 4, "name": "cell"}],
}


def changed(**fields):
    first, second = ANNOTATIONS["annotations"]
    return ANNOTATIONS | {"annotations": [first | fields, second]}


def test_order_and_ids_of_records_do_not_count():
    shuffled = {name: random.Random(0).sample(records, len(records)) for name, records in ANNOTATIONS.items()}
    shuffled["annotations"] = [record | {"id": 7 + record["id"]} for record in shuffled["annotations"]]
    assert annotations_digest(shuffled) == annotations_digest(ANNOTATIONS)
    assert annotations_digest(changed(bbox=[1.0, 2.0, 3.0, 4.0])) == annotations_digest(ANNOTATIONS)


@pytest.mark.parametrize(
    "other",
    [
        changed(bbox=[1, 2, 3, 4.5]),
        changed(image_id=2),
        changed(iscrowd=1),
        changed(area=5.0),
        ANNOTATIONS | {"annotations": ANNOTATIONS["annotations"][:1]},
        ANNOTATIONS | {"images": [*ANNOTATIONS["images"], {"id": 3, "file_name": "c.png"}]},
        ANNOTATIONS | {"categories": [{"id": 4, "name": "cells"}]},
    ],
)
def test_other_annotations_have_another_digest(other):
    assert annotations_digest(other) != annotations_digest(ANNOTATIONS)


def test_weights_are_those_that_are_loaded(tmp_path):
    assert weights_digest(tmp_path) is None and weights_digest("owner/name") is None
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = weights_digest(tmp_path)
    (tmp_path / "model.raw.safetensors").write_bytes(b"in training")
    (tmp_path / "config.json").write_text("{}")
    assert weights_digest(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"others")
    assert weights_digest(tmp_path) != first
    about = origin(tmp_path, "data", "val", ANNOTATIONS, step=7)
    assert about["weights"] == weights_digest(tmp_path) and about["ground_truth"] == annotations_digest(ANNOTATIONS)
    assert origin(None, "data", "val", ANNOTATIONS)["weights"] is None


def test_the_input_is_what_the_processor_says_of_it(tmp_path):
    path, size = tmp_path / "preprocessor_config.json", {"shortest_edge": 240}
    assert input_settings(tmp_path) is None and other_input({"input": {"size": size}}, tmp_path) is None
    path.write_text(json.dumps({"size": size, "do_pad": True, "score_threshold": 0.3, "calibration": {}}))
    about = json.loads(json.dumps(origin(tmp_path, "data", "val", ANNOTATIONS)))
    assert about["input"] == {"do_pad": True, "size": size} and other_input(about, tmp_path) is None
    path.write_text(json.dumps({"size": size, "do_pad": True, "score_threshold": 0.5, "auto_map": {}}))
    assert other_input(about, tmp_path) is None
    path.write_text(json.dumps({"size": {"shortest_edge": 480}, "size_divisor": 32, "do_pad": True}))
    assert other_input(about, tmp_path) == (
        "size {'shortest_edge': 240} instead of {'shortest_edge': 480}, size_divisor None instead of 32"
    )
    del about["input"]  # of an earlier version
    assert other_input(about, tmp_path) is None and origin(None, "data", "val", ANNOTATIONS)["input"] is None
    path.write_text("[]")
    assert input_settings(tmp_path) is None
