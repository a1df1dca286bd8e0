"""Matching against the rule in plain Python."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drmm_hf.evaluation.matches import match


def overlap(detection, truth, crowd):
    """Return intersection over union, over the detection alone for a crowd."""
    x0, y0, w0, h0 = detection
    x1, y1, w1, h1 = truth
    width = min(x0 + w0, x1 + w1) - max(x0, x1)
    height = min(y0 + h0, y1 + h1) - max(y0, y1)
    area = width * height if width > 0 and height > 0 else 0.0
    return area / (w0 * h0 if crowd else w0 * h0 + w1 * h1 - area)


def oracle(truth, detections, threshold, top_k, class_aware):
    """Return {position: (right, wrong because taken, on a crowd, IoU taken, best IoU)}, one after another."""
    found = {}
    for image in truth["images"]:
        mine = [index for index, entry in enumerate(detections) if entry["image_id"] == image["id"]]
        mine = sorted(mine, key=lambda index: -detections[index]["score"])[:top_k]
        objects = [record for record in truth["annotations"] if record["image_id"] == image["id"]]
        taken = set()
        for index in mine:
            entry = detections[index]
            alike = [o for o in objects if not class_aware or o["category_id"] == entry["category_id"]]
            ious = {o["id"]: overlap(entry["bbox"], o["bbox"], o["iscrowd"]) for o in alike}
            solid = {o["id"]: ious[o["id"]] for o in alike if not o["iscrowd"]}
            free = {key: iou for key, iou in solid.items() if key not in taken and iou >= threshold}
            crowd = any(o["iscrowd"] and ious[o["id"]] >= threshold for o in alike)
            best = max(solid.values(), default=0.0)
            if free:
                chosen = max(free, key=free.get)
                taken.add(chosen)
                found[index] = (True, False, False, free[chosen], best)
            else:
                found[index] = (False, best >= threshold and not crowd, crowd, 0.0, best)
    return found


@settings(max_examples=50)
@given(
    seed=st.integers(0, 10_000),
    top_k=st.sampled_from([1, 3, 8, 100]),
    thresholds=st.lists(st.sampled_from([0.1, 0.3, 0.5, 0.75, 0.95]), min_size=1, max_size=3, unique=True),
    class_aware=st.booleans(),
)
def test_every_prediction_is_what_the_rule_says(scene, seed, top_k, thresholds, class_aware):
    truth, detections = scene(seed)
    matches = match(truth, detections, thresholds, top_k, class_aware)
    for row, threshold in enumerate(thresholds):
        expected = oracle(truth, detections, threshold, top_k, class_aware)
        assert sorted(matches.indices.tolist()) == sorted(expected)
        columns = (matches.correct, matches.duplicates, matches.ignored, matches.ious)
        for place, index in enumerate(matches.indices.tolist()):
            if class_aware:
                taken = detections[index]["category_id"] if expected[index][0] else -1
                assert matches.matched_category_ids[row, place] == taken
            found = (*(column[row, place] for column in columns), matches.best_ious[place])
            assert found == pytest.approx(expected[index])
            if expected[index][0]:
                record = truth["annotations"][matches.matched_annotations[row, place]]
                assert overlap(detections[index]["bbox"], record["bbox"], False) == pytest.approx(found[3])
                assert record["image_id"] == detections[index]["image_id"] and not record["iscrowd"]
            else:
                assert matches.matched_annotations[row, place] == -1
    for name in ("image_id", "category_id", "score"):
        values = [detections[index][name] for index in matches.indices.tolist()]
        assert getattr(matches, f"{name}s").tolist() == values
    objects = [record for record in truth["annotations"] if not record["iscrowd"]]
    for record in truth["categories"]:
        count = sum(one["category_id"] == record["id"] for one in objects)
        assert matches.num_ground_truths[record["id"]] == count
    assert matches.pictures.tolist() == [record["id"] for record in truth["images"]]


def test_nothing_found_and_nothing_to_find(scene):
    truth, detections = scene(1)
    nothing = match(truth, [], [0.5, 0.7])
    assert nothing.correct.shape == nothing.ious.shape == nothing.duplicates.shape == (2, 0)
    empty = match(truth | {"annotations": []}, detections, [0.5])
    assert not empty.correct.any() and not empty.best_ious.any() and len(empty.scores) == len(detections)
    assert np.unique(list(empty.num_ground_truths.values())).tolist() == [0]


def test_what_the_annotations_do_not_know_is_refused(scene):
    truth, detections = scene(1)
    for key in ("image_id", "category_id"):
        with pytest.raises(ValueError, match=f"detections have {key} 999, which the annotations do not have"):
            match(truth, [*detections, detections[0] | {key: 999}])
