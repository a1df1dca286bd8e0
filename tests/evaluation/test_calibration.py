"""Calibration: matching and error against plain Python, and the properties that define them."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from drmm_hf.evaluation.calibration import (
    bootstrap_interval,
    calibration,
    calibration_report,
    detection_calibration_error,
    expected_calibration_error,
    localization_aware_error,
    match_predictions,
    optimal_lrp,
)
from drmm_hf.evaluation.matches import match


SCORES = hnp.arrays(np.float64, st.integers(1, 60), elements=st.floats(0, 1))


def overlap(detection, truth, crowd):
    """Return intersection over union, over the detection alone for a crowd."""
    x0, y0, w0, h0 = detection
    x1, y1, w1, h1 = truth
    width = min(x0 + w0, x1 + w1) - max(x0, x1)
    height = min(y0 + h0, y1 + h1) - max(y0, y1)
    area = width * height if width > 0 and height > 0 else 0.0
    return area / (w0 * h0 if crowd else w0 * h0 + w1 * h1 - area)


def oracle_matches(truth, detections, top_k, threshold=0.5):
    """Return the sorted (score, correct) pairs: COCO's greedy rule in plain Python."""
    pairs = []
    for image in truth["images"]:
        mine = sorted((d for d in detections if d["image_id"] == image["id"]), key=lambda d: -d["score"])[:top_k]
        free = {i: t for i, t in enumerate(truth["annotations"]) if t["image_id"] == image["id"]}
        for detection in mine:
            same = {i: t for i, t in free.items() if t["category_id"] == detection["category_id"]}
            ious = {i: overlap(detection["bbox"], t["bbox"], t["iscrowd"]) for i, t in same.items()}
            objects = [i for i in ious if not same[i]["iscrowd"] and ious[i] >= threshold]
            crowds = [i for i in ious if same[i]["iscrowd"] and ious[i] >= threshold]
            if objects:
                del free[max(objects, key=ious.get)]
                pairs.append((detection["score"], True))
            elif not crowds:
                pairs.append((detection["score"], False))
    return sorted(pairs)


def oracle_error(pairs, num_bins, min_score=None):
    """Return Eq. (9) with one loop over the bins."""
    if min_score is not None:
        pairs = [pair for pair in pairs if pair[0] > min_score]
    error = 0.0
    for index in range(num_bins):
        low, high = index / num_bins, (index + 1) / num_bins
        inside = [pair for pair in pairs if low < pair[0] <= high or (index == 0 and pair[0] == 0)]
        if inside:
            confidence = sum(score for score, _ in inside) / len(inside)
            accuracy = sum(correct for _, correct in inside) / len(inside)
            error += len(inside) / len(pairs) * abs(accuracy - confidence)
    return error


@settings(max_examples=80)
@given(seed=st.integers(0, 10_000), top_k=st.sampled_from([1, 3, 8, 100]))
def test_matching_and_error_agree_with_plain_python(scene, seed, top_k):
    truth, detections = scene(seed)
    expected = oracle_matches(truth, detections, top_k)
    scores, correct = match_predictions(truth, detections, top_k=top_k)
    assert sorted(zip(scores.tolist(), correct.tolist(), strict=True)) == expected
    for min_score in (0.0, 0.1, 0.37):
        above = [pair for pair in expected if pair[0] > min_score]
        ece = calibration(truth, detections, top_k=top_k, min_score=min_score).ece
        assert ece == pytest.approx(oracle_error(above, 10)) if above else np.isnan(ece)


def one_object(*scores_and_boxes, crowd=0, area=100.0, category_id=1):
    truth = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [
            {"id": 0, "image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "area": area, "iscrowd": crowd}
        ],
    }
    detections = [
        {"image_id": 1, "category_id": category_id, "bbox": box, "score": score} for score, box in scores_and_boxes
    ]
    return match_predictions(truth, detections)


def test_duplicates_are_wrong_and_the_best_score_takes_the_object():
    scores, correct = one_object((0.3, [0, 0, 10, 10]), (0.8, [0, 0, 10, 9]))
    assert dict(zip(scores.tolist(), correct.tolist(), strict=True)) == {0.3: False, 0.8: True}


def test_iou_of_exactly_one_half_is_correct():
    assert one_object((0.5, [0, 0, 10, 5]))[1].tolist() == [True]
    assert one_object((0.5, [0, 0, 10, 4.99]))[1].tolist() == [False]


def test_class_and_crowd_and_size():
    assert one_object((0.5, [0, 0, 10, 10]), category_id=2)[1].tolist() == [False]
    assert one_object((0.5, [0, 0, 10, 10]), crowd=1)[1].tolist() == []
    assert one_object((0.5, [0, 0, 10, 10]), area=1e12)[1].tolist() == [True]


def test_top_k_counts_over_all_classes_of_a_picture(scene):
    truth, _ = scene(0, num_images=2, num_classes=2)
    detections = [
        {"image_id": image["id"], "category_id": category["id"], "bbox": [0, 0, 1, 1], "score": score / 1000}
        for image in truth["images"]
        for category in truth["categories"]
        for score in range(80)
    ]
    scores, _ = match_predictions(truth | {"annotations": []}, detections)
    assert len(scores) == 200  # 100 a picture, not 80 a class
    assert scores.min() == pytest.approx(0.030)


@settings(max_examples=100)
@given(scores=SCORES, data=st.data(), num_bins=st.integers(1, 20))
def test_error_lies_in_the_unit_interval_and_forgets_the_order(scores, data, num_bins):
    correct = data.draw(hnp.arrays(bool, len(scores)))
    order = np.array(data.draw(st.permutations(range(len(scores)))))
    result = expected_calibration_error(scores, correct, num_bins)
    shuffled = expected_calibration_error(scores[order], correct[order], num_bins)
    assert 0 <= result.ece <= 1
    assert result.ece == pytest.approx(shuffled.ece, abs=1e-12)
    assert result.bin_count.sum() == len(scores)
    assert result.ece == pytest.approx(oracle_error(list(zip(scores, correct, strict=True)), num_bins), abs=1e-12)


@settings(max_examples=50)
@given(hits=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=10))
def test_perfect_calibration_has_no_error(hits):
    """Groups of n predictions with score k / n of which k are right."""
    scores, correct = [], []
    for n, k in hits:
        k = min(k, n)
        scores += [k / n] * n
        correct += [True] * k + [False] * (n - k)
    assert expected_calibration_error(scores, correct).ece == pytest.approx(0, abs=1e-12)


def test_bins_are_open_below_and_closed_above():
    edges = np.arange(11) / 10
    result = expected_calibration_error(edges, np.ones(11))
    assert result.bin_count.tolist() == [2] + [1] * 9  # 0 and 0.1 in the first, 1 in the last
    assert result.bin_edges.tolist() == edges.tolist()
    assert result.bin_confidence.tolist() == pytest.approx([0.05, *edges[2:]])


def test_no_prediction_has_no_error_and_says_so(scene):
    result = expected_calibration_error(np.array([0.05, 0.1]), np.array([True, False]), min_score=0.1)
    assert np.isnan(result.ece) and result.to_dict()["ece"] is None and result.to_dict()["bin_accuracy"] == [None] * 10
    assert np.isnan(calibration(scene(1)[0], []).ece)


def test_scores_of_exactly_zero_count_without_a_threshold():
    assert expected_calibration_error(np.zeros(4), np.array([1, 0, 0, 0])).ece == pytest.approx(0.25)


def test_scores_that_are_no_confidences_are_refused():
    with pytest.raises(ValueError, match=r"1.5; confidences lie in \[0, 1\]"):
        expected_calibration_error(np.array([0.2, 1.5]), np.array([True, True]))


@settings(max_examples=50)
@given(scores=SCORES, data=st.data(), num_bins=st.integers(1, 12))
def test_bins_of_equal_mass_hold_equally_many(scores, data, num_bins):
    """Bin m ends at the smallest score that at least m / M of the predictions do not exceed."""
    correct = data.draw(hnp.arrays(bool, len(scores)))
    result = expected_calibration_error(scores, correct, num_bins, binning="mass")
    ranked = sorted(scores.tolist())
    ends = {ranked[int(np.ceil(m / num_bins * len(ranked) - 1e-9)) - 1] for m in range(1, num_bins)} | {0.0, 1.0}
    assert result.bin_edges.tolist() == sorted(ends)
    expected = 0.0
    for low, high in zip(sorted(ends), sorted(ends)[1:], strict=False):
        inside = [i for i, s in enumerate(scores) if low < s <= high or (low == 0 and s == 0)]
        expected += abs(sum(correct[i] - scores[i] for i in inside)) / len(scores)
    assert result.ece == pytest.approx(expected, abs=1e-12)
    distinct = np.linspace(0.01, 0.99, 12)
    counts = expected_calibration_error(distinct, np.ones(12), 4, binning="mass").bin_count
    assert counts.tolist() == [3, 3, 3, 3]


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), num_bins=st.integers(1, 4), min_count=st.integers(1, 6))
def test_detection_error_equals_loops_over_cells(seed, num_bins, min_count):
    rng = np.random.default_rng(seed)
    scores, correct, places = rng.random(60), rng.random(60) < 0.4, rng.uniform(-0.2, 1.2, (60, 2))
    cells = {}
    for score, right, place in zip(scores, correct, places, strict=True):
        key = []
        for value in (score, *place):
            inside = [m for m in range(num_bins) if m / num_bins < value <= (m + 1) / num_bins]
            key.append(inside[0] if inside else 0 if value <= 0 else num_bins - 1)
        cells.setdefault(tuple(key), []).append(right - score)
    counted = [gaps for gaps in cells.values() if len(gaps) >= min_count]
    error = detection_calibration_error(scores, correct, places, num_bins, min_count)
    if counted:
        assert error == pytest.approx(sum(abs(sum(gaps)) for gaps in counted) / sum(map(len, counted)))
    else:
        assert np.isnan(error)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000))
def test_localisation_aware_error_and_lrp_equal_loops(scene, seed):
    truth, detections = scene(seed)
    matches = match(truth, detections, [0.1, 0.5])
    rows = [
        [
            (detections[index]["category_id"], detections[index]["score"], right, iou)
            for index, right, iou, ignored in zip(
                matches.indices.tolist(), matches.correct[row], matches.ious[row], matches.ignored[row], strict=True
            )
            if not ignored
        ]
        for row in (0, 1)
    ]
    errors = []
    for category_id in {entry[0] for entry in rows[0]}:
        mine = [entry for entry in rows[0] if entry[0] == category_id]
        error = 0.0
        for m in range(25):
            inside = [entry for entry in mine if m / 25 < entry[1] <= (m + 1) / 25]
            if inside:
                hits = [entry[3] for entry in inside if entry[2]]
                precision = len(hits) / len(inside)
                quality = precision * (sum(hits) / len(hits) if hits else 0.0)
                error += len(inside) / len(mine) * abs(np.mean([entry[1] for entry in inside]) - quality)
        errors.append(error)
    assert localization_aware_error(matches) == pytest.approx(np.mean(errors) if errors else np.nan, nan_ok=True)

    objects = [record["category_id"] for record in truth["annotations"] if not record["iscrowd"]]
    expected = {}
    for category_id in set(objects):
        mine = [entry for entry in rows[1] if entry[0] == category_id]
        expected[category_id] = (1.0, None)
        for threshold in sorted({entry[1] for entry in mine}, reverse=True):
            kept = [entry for entry in mine if entry[1] >= threshold]
            hits = [entry[3] for entry in kept if entry[2]]
            wrong, missed = len(kept) - len(hits), objects.count(category_id) - len(hits)
            error = (sum((1 - iou) / 0.5 for iou in hits) + wrong + missed) / (len(hits) + wrong + missed)
            if error < expected[category_id][0] - 1e-12:
                expected[category_id] = (error, threshold)
    found = optimal_lrp(matches, 1)
    assert found.keys() == expected.keys()
    for category_id, (error, threshold) in expected.items():
        assert found[category_id][0] == pytest.approx(error) and found[category_id][1] == threshold


def test_the_interval_covers_what_other_pictures_would_give():
    """Of a miscalibrated detector whose true error, 0.2, is known: accuracy is score - 0.2 in every bin."""
    inside = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        image_ids = np.repeat(np.arange(60) * 3 + 1, 10)
        scores = rng.choice([0.25, 0.45, 0.65, 0.85], 600)
        correct = rng.random(600) < scores - 0.2
        low, high = bootstrap_interval(scores, correct, image_ids, np.arange(60) * 3 + 1, num_samples=200, seed=seed)
        assert 0 < low < high < 1
        inside += low <= 0.2 <= high
    assert 34 <= inside <= 40


def test_the_interval_draws_pictures_and_not_predictions():
    """Copies of a picture's predictions add nothing: the interval stays as wide."""
    rng = np.random.default_rng(0)
    scores, correct, image_ids = rng.random(50), rng.random(50) < 0.5, np.arange(50)
    alone = bootstrap_interval(scores, correct, image_ids, image_ids)
    copied = bootstrap_interval(np.tile(scores, 9), np.tile(correct, 9), np.tile(image_ids, 9), image_ids)
    assert copied == pytest.approx(alone)
    assert np.isnan(bootstrap_interval(scores, correct, image_ids, image_ids, min_score=0.999)).all()


def test_the_report_has_the_figures_of_every_kind_and_threshold(scene):
    truth, detections = scene(3, num_images=8)
    rng = np.random.default_rng(0)
    for entry in detections[::3]:
        entry["category_id"] = truth["categories"][0]["id"]  # often another class than that of the object
    for entry in detections:
        entry["objectness"] = float(rng.uniform(entry["score"], 1))
        entry["class_probability"] = entry["score"] / entry["objectness"]
    report = calibration_report(truth, detections)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert list(report["kinds"]) == ["confidence", "class_probability", "objectness"]
    half = match(truth, detections)
    counted = ~half.ignored[0]
    for name, kind in report["kinds"].items():
        key = "score" if name == "confidence" else name
        scores = np.array([detections[index][key] for index in half.indices])[counted]
        pairs = list(zip(scores.tolist(), half.correct[0][counted].tolist(), strict=True))
        assert kind["ECE"] == kind["reliability"]["ece"] == pytest.approx(oracle_error(pairs, 10))
        assert kind["ECE_0.1"] == pytest.approx(oracle_error(pairs, 10, 0.1))
        assert kind["ECE_interval"][0] < kind["ECE_interval"][1]
    for entry in report["iou_thresholds"]:
        alone = calibration(truth, detections, entry["iou_threshold"])
        assert entry["ECE"] == pytest.approx(alone.ece)
        agnostic = match(truth, detections, [entry["iou_threshold"]], class_aware=False)
        solid = ~agnostic.ignored[0]
        pairs = list(zip(agnostic.scores[solid].tolist(), agnostic.correct[0][solid].tolist(), strict=True))
        assert entry["ECE_any_class"] == pytest.approx(oracle_error(pairs, 10))
        assert entry["ECE_0.1_any_class"] == pytest.approx(oracle_error(pairs, 10, 0.1))
    assert [entry["iou_threshold"] for entry in report["iou_thresholds"]][::9] == [0.5, 0.95]
    assert report["iou_thresholds"][0]["ECE_any_class"] != report["iou_thresholds"][0]["ECE"]
    lrp = optimal_lrp(half)
    assert report["oLRP"] == pytest.approx(np.mean([error for error, _ in lrp.values()]))
    assert set(report["best_thresholds"]) <= {record["name"] for record in truth["categories"]}
    plain = [{key: entry[key] for key in ("image_id", "category_id", "bbox", "score")} for entry in detections]
    assert list(calibration_report(truth, plain)["kinds"]) == ["confidence"]
    assert calibration_report(truth, [])["kinds"]["confidence"]["ECE"] is None
