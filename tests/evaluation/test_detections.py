"""The result type: checks, order, COCO json and back, merging."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from drmm_hf.data.labels import LabelMap
from drmm_hf.evaluation.detections import Detections


LABELS = LabelMap((5, 3, 90), ("a", "b", "c"))


def result(boxes, scores, labels, **extra):
    return {"boxes": boxes, "scores": scores, "labels": labels, **extra}


def full_result():
    return result(
        torch.tensor([[0.0, 1.0, 10.0, 21.0], [5.0, 5.0, 5.0, 9.0], [3.0, 3.0, 4.0, 5.0]]),
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.bfloat16),
        torch.tensor([0, 1, 2]),
        query_indices=torch.tensor([8, 9, 4]),
        objectness=torch.tensor([0.5, 0.6, 0.8]),
        class_probabilities=torch.tensor([0.5, 0.7, 0.9]),
        box_scales=torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0] * 4, [6.0] * 4]),
    )


def test_results_are_sorted_by_score_in_every_field():
    detections = Detections()
    detections.add(3, full_result())
    assert detections[3]["scores"].tolist() == [0.75, 0.5, 0.25]
    assert detections[3]["query_indices"].tolist() == [4, 9, 8]
    assert detections[3]["box_scales"][2].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert (len(detections), detections.num_boxes, detections.num_boxes_without_size) == (1, 3, 1)


def test_coco_results_have_original_ids_xywh_and_what_the_model_says():
    detections = Detections()
    detections.add(3, full_result())
    first, second = detections.to_coco(LABELS)  # the box without width is left out
    assert first["category_id"] == 90 and second["category_id"] == 5
    assert second == {
        "image_id": 3,
        "category_id": 5,
        "bbox": [0.0, 1.0, 10.0, 20.0],
        "score": 0.25,
        "query": 8,
        "objectness": 0.5,
        "class_probability": 0.5,
        "box_scales": [1.0, 2.0, 3.0, 4.0],
    }
    json.dumps([first, second], allow_nan=False)


def test_inverted_boxes_are_counted_and_left_out():
    detections = Detections()
    detections.add(1, result([[10, 0, 5, 5], [0, 10, 5, 5], [0, 0, 5, 5]], [0.1, 0.2, 0.3], [0, 0, 0]))
    assert detections.num_boxes_without_size == 2
    assert len(detections.to_coco(LABELS)) == 1


@settings(max_examples=50)
@given(
    boxes=hnp.arrays(np.float64, st.tuples(st.integers(0, 6), st.just(4)), elements=st.floats(0.01, 2000)),
    seed=st.integers(0, 100),
)
def test_json_and_back_changes_nothing(boxes, seed, tmp_path_factory):
    rng = np.random.default_rng(seed)
    boxes[:, 2:] += boxes[:, :2]
    detections = Detections()
    detections.add(4, result([], [], []))
    detections.add(2, result(boxes, rng.random(len(boxes), dtype=np.float32), rng.integers(0, 3, len(boxes))))
    path = tmp_path_factory.mktemp("detections") / "new" / "detections.json"
    detections.save(path, LABELS)
    again = Detections.load(path, LABELS, image_ids=[4, 2])
    assert list(again) == [4, 2] and len(again[4]["scores"]) == 0
    assert (again[2]["scores"] == detections[2]["scores"]).all()  # every float32 survives
    assert (again[2]["labels"] == detections[2]["labels"]).all()
    assert np.abs(again[2]["boxes"] - detections[2]["boxes"]).max(initial=0) <= 1.01e-4
    assert again.to_coco(LABELS) == detections.to_coco(LABELS)


def test_extra_fields_come_back_from_json():
    detections = Detections()
    detections.add(3, full_result())
    again = Detections.from_coco(detections.to_coco(LABELS), LABELS)
    for name in ("query_indices", "objectness", "class_probabilities", "box_scales"):
        assert (again[3][name] == np.delete(detections[3][name], 1, axis=0)).all()


def test_a_picture_counts_once():
    first, second = Detections(), Detections()
    first.add(1, result([[0, 0, 1, 1]], [0.5], [0]))
    second.add(1, result([[0, 0, 2, 2]], [0.9], [0]))
    second.add(2, result([], [], []))
    merged = Detections.merge([first, second])
    assert list(merged) == [1, 2] and merged[1]["scores"].tolist() == [0.5]
    with pytest.raises(ValueError, match="image_id 1 was added twice"):
        second.add(1, result([], [], []))


def test_top_k_and_relabel():
    detections = Detections()
    detections.add(1, result(np.tile([0, 0, 1, 1], (3, 1)), [0.1, 0.3, 0.2], [0, 1, 2]))
    assert detections.top_k(2)[1]["labels"].tolist() == [1, 2]
    relabelled = detections.relabel({2: 0, 0: 1})
    assert relabelled[1]["labels"].tolist() == [0, 1]
    assert detections.num_boxes == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (result([[0, 0, 1]], [0.5], [0]), "boxes of image_id 1 has shape"),
        (result([[0, 0, 1, 1]], [0.5, 0.6], [0]), "different lengths"),
        (result([[0, 0, 1, 1]], [float("nan")], [0]), "scores of image_id 1 holds numbers that are not finite"),
        ({"boxes": [], "scores": []}, "has no labels"),
    ],
)
def test_wrong_results_are_refused_in_words(wrong, message):
    with pytest.raises(ValueError, match=message):
        Detections().add(1, wrong)


def test_a_label_that_the_map_does_not_know_is_an_error():
    detections = Detections()
    detections.add(1, result([[0, 0, 1, 1]], [0.5], [3]))
    with pytest.raises(ValueError, match="3"):
        detections.to_coco(LABELS)


def test_what_is_no_list_of_coco_results_is_refused(tmp_path):
    label_map = LabelMap((3,), ("cat",))
    entry = {"image_id": 1, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 0.5}
    for content, message in (
        ({"annotations": []}, "holds a dict; COCO results are a list of dicts"),
        ([entry, 1], "results.json: entry 1 is '1'; the rule is a dict"),
        ([entry, {"image_id": 1, "bbox": [0, 0, 1, 1]}], "entry 1 has no category_id, score"),
        ([entry | {"category_id": 4}], "category id 4 is not in the label map"),
    ):
        path = tmp_path / "results.json"
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            Detections.load(path, label_map)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("bbox", [0, 0, 1], "4 numbers"),
        ("bbox", [0, 0, "1", 1], "4 numbers"),
        ("bbox", [0, 0, float("nan"), 1], "4 numbers"),
        ("bbox", 5, "4 numbers"),
        ("image_id", None, "a whole number"),
        ("image_id", 1.7, "a whole number"),
        ("image_id", "1", "a whole number"),
        ("category_id", None, "a whole number"),
        ("category_id", [3], "a whole number"),
        ("score", "high", r"a number in \[0, 1\]"),
        ("score", True, r"a number in \[0, 1\]"),
        ("score", 10**400, r"a number in \[0, 1\]"),
        ("score", float("nan"), r"a number in \[0, 1\]"),
        ("score", 1.5, r"a number in \[0, 1\]"),
        ("box_scales", [1, 1, -1, 1], "4 numbers of at least 0"),
        ("objectness", "none", r"a number in \[0, 1\]"),
        ("class_probability", 1.5, r"a number in \[0, 1\]"),
        ("query", 0.5, "a whole number of at least 0"),
        ("query", -1, "a whole number of at least 0"),
        ("query", 10**30, "a whole number of at least 0"),
        ("image_id", 10**30, "a whole number"),
    ],
)
def test_a_wrong_field_is_named_with_file_entry_and_rule(key, value, rule, tmp_path):
    entry = {"image_id": 1, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 0.5}
    path = tmp_path / "results.json"
    path.write_text(json.dumps([entry, entry | {key: value}]))
    with pytest.raises(ValueError, match=f"results.json: {key} of entry 1 is .*; the rule is {rule}"):
        Detections.load(path, LABELS)


@pytest.mark.parametrize("k", [0, -1])
def test_no_detection_or_fewer_cannot_be_kept(k):
    detections = Detections()
    detections.add(1, result(np.tile([0, 0, 1, 1], (3, 1)), [0.1, 0.3, 0.2], [0, 1, 2]))
    with pytest.raises(ValueError, match=f"top_k is {k}; the rule is at least 1"):
        detections.top_k(k)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
def test_damaged_arrays_are_named(damage, tmp_path):
    detections = Detections()
    detections.add(3, full_result())
    path = tmp_path / "000000.npz"
    detections.save_arrays(path)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[:-30]
    elif damage == "flipped":
        content[200] ^= 255
    else:
        content = b"" if damage == "empty" else b"no arrays at all"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="000000.npz is damaged: "):
        Detections.load_arrays(path)
