"""Assignments: what training would match, in pixels of the original picture."""

import pytest
import torch

from conftest import tiny_config
from drmm_hf import DrmmForObjectDetection, DrmmImageProcessor
from drmm_hf.data.generated import generate_shapes
from drmm_hf.evaluation.assignments import assignments
from drmm_hf.evaluation.coco_metrics import ground_truth
from drmm_hf.evaluation.predict import predict


@pytest.fixture(scope="module")
def scene():
    dataset = generate_shapes(4, 3, image_size=(64, 96))
    return dataset, ground_truth(dataset)


def make_model(annotations, **overrides):
    torch.manual_seed(0)
    names = {index: record["name"] for index, record in enumerate(annotations["categories"])}
    ids = [record["id"] for record in annotations["categories"]]
    config = tiny_config(
        head_type="box", id2label=names, category_ids=ids, num_queries=36, proposal_grid=[6, 6], **overrides
    )
    return DrmmForObjectDetection(config), DrmmImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})


def iou(first, second):
    left, top = max(first[0], second[0]), max(first[1], second[1])
    right, bottom = min(first[0] + first[2], second[0] + second[2]), min(first[1] + first[3], second[1] + second[3])
    common = max(right - left, 0) * max(bottom - top, 0)
    return common / (first[2] * first[3] + second[2] * second[3] - common)


@pytest.mark.parametrize("copies", [1, 2])
def test_every_ground_truth_has_as_many_predictions_as_copies_and_none_has_two(scene, copies):
    dataset, annotations = scene
    model, processor = make_model(annotations, num_ground_truth_copies=copies)
    found = assignments(model, processor, dataset, annotations, num_images=3, progress=False)
    assert found["num_copies"] == copies and len(found["images"]) == 3
    for image in found["images"]:
        records = [record for record in annotations["annotations"] if record["image_id"] == image["image_id"]]
        assert [one["bbox"] for one in image["ground_truths"]] == [record["bbox"] for record in records]
        assert len(image["stages"]) == 2
        for stage in image["stages"]:
            matched = [query for entry in stage["matched"] for query in entry["predictions"]]
            assert len(matched) == len(set(matched)) == copies * len(records)
            assert all(0 <= query < len(stage["predictions"]) == 36 for query in matched)


def test_predictions_are_those_of_evaluation(scene):
    dataset, annotations = scene
    model, processor = make_model(annotations)
    found = assignments(model, processor, dataset, annotations, progress=False)
    detections = predict(model, processor, dataset, top_k=1, progress=False)
    for image in found["images"]:
        best = max(image["stages"][-1]["predictions"], key=lambda one: one["score"])
        left, top, right, bottom = detections[image["image_id"]]["boxes"][0].tolist()
        assert best["bbox"] == pytest.approx([left, top, right - left, bottom - top], abs=0.02)
        assert best["score"] == pytest.approx(detections[image["image_id"]]["scores"][0], abs=1e-3)


def test_perfect_predictions_are_matched_to_what_they_show(scene):
    """With boxes and scores that encode the annotations, each ground truth finds its own."""
    dataset, annotations = scene
    model, processor = make_model(annotations)
    forward = model.model.forward
    labels = {record["id"]: index for index, record in enumerate(annotations["categories"])}
    queue = list(dataset["image_id"])

    def encode(*args, **kwargs):
        outputs, image_id = forward(*args, **kwargs), queue.pop(0)
        records = [one for one in annotations["annotations"] if one["image_id"] == image_id]
        for stage in outputs.stages:
            height, width = outputs.image_sizes[0].tolist()
            factor = torch.tensor([width / 96, height / 64] * 2)
            for index, record in enumerate(reversed(records)):
                x, y, w, h = record["bbox"]
                stage.boxes[0, index] = torch.tensor([x, y, x + w, y + h]) * factor
                stage.class_logits[0, index] = -5.0
                stage.class_logits[0, index, labels[record["category_id"]]] = 5.0
        return outputs

    model.model.forward = encode
    found = assignments(model, processor, dataset, annotations, progress=False)
    for image in found["images"]:
        number = len(image["ground_truths"])
        for stage in image["stages"]:
            assert [entry["predictions"] for entry in stage["matched"]] == [
                [number - 1 - one] for one in range(number)
            ]
            for truth, entry in zip(image["ground_truths"], stage["matched"], strict=True):
                prediction = stage["predictions"][entry["predictions"][0]]
                assert iou(truth["bbox"], prediction["bbox"]) > 0.99
                assert prediction["category_id"] == truth["category_id"]
                assert entry["scores"] == [prediction["score"]] == [pytest.approx(0.9933, abs=1e-4)]


def test_a_mixture_matches_nothing(scene):
    dataset, annotations = scene
    model, processor = DrmmForObjectDetection(tiny_config()), DrmmImageProcessor()
    with pytest.raises(ValueError, match="without head_type 'box'"):
        assignments(model, processor, dataset, annotations)
    with pytest.raises(ValueError, match="matches nothing"):
        model.assignments(torch.zeros(1, 3, 64, 64), [])
