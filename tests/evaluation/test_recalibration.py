"""Calibrators against brute force, and on predictions whose miscalibration is known."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drmm_hf.evaluation.calibration import calibration, match_predictions
from drmm_hf.evaluation.recalibration import (
    Calibrator,
    apply_calibrators,
    calibration_fields,
    fit_calibrators,
    fit_isotonic,
    fit_temperature,
    held_out_errors,
    same_pictures,
)
from drmm_hf.evaluation.thresholds import threshold_curves


def predictions(seed, size=4000, temperature=1.0):
    """Return scores whose log-odds are `temperature` times the true ones, and whether each is right."""
    rng = np.random.default_rng(seed)
    log_odds = rng.normal(-1, 1.5, size)
    correct = rng.random(size) < 1 / (1 + np.exp(-log_odds))
    return 1 / (1 + np.exp(-temperature * log_odds)), correct


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_is_found_and_helps_on_other_predictions(temperature):
    calibrate = fit_temperature(*predictions(0, temperature=temperature))
    assert calibrate.temperature == pytest.approx(temperature, rel=0.1)
    scores, correct = predictions(1, temperature=temperature)
    right, _ = predictions(1)
    np.testing.assert_allclose(calibrate(scores), right, atol=0.03)


def test_the_temperature_is_the_most_likely_one():
    scores, correct = predictions(2, 200, 1.7)

    def loss(temperature):
        p = 1 / (1 + ((1 - scores) / scores) ** (1 / temperature))
        return -np.log(np.where(correct, p, 1 - p)).mean()

    best = fit_temperature(scores, correct).temperature
    assert loss(best) <= min(loss(temperature) for temperature in np.geomspace(0.3, 20, 400)) + 1e-9


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=2, max_size=14))
def test_isotonic_regression_is_the_best_rising_map(pairs):
    """The max-min formula: at each score, the largest over starts of the smallest over ends of a mean."""
    scores, correct = np.array([pair[0] / 8 for pair in pairs]), np.array([pair[1] for pair in pairs])
    if correct.all() or not correct.any():
        with pytest.raises(ValueError, match="the rule is some, not all"):
            fit_isotonic(scores, correct)
        return
    calibrate = fit_isotonic(scores, correct)
    for score in set(scores.tolist()):
        starts, ends = {s for s in scores.tolist() if s <= score}, {s for s in scores.tolist() if s >= score}
        expected = max(min(correct[(scores >= a) & (scores <= b)].mean() for b in ends) for a in starts)
        assert calibrate(np.array([score]))[0] == pytest.approx(expected)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), temperature=st.sampled_from([0.4, 1.0, 3.0]))
def test_the_order_is_kept_and_json_keeps_the_map(seed, temperature):
    scores, correct = predictions(seed, 200, temperature)
    grid = np.concatenate([[0.0], np.sort(np.random.default_rng(seed).random(50)), [1.0]])
    for fit in (fit_temperature, fit_isotonic):
        calibrate = fit(scores, correct)
        assert (np.diff(calibrate(grid)) >= 0).all() and 0 <= calibrate(grid).min() <= calibrate(grid).max() <= 1
        again = Calibrator.from_dict(json.loads(json.dumps(calibrate.to_dict())))
        assert again == calibrate


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({}, "method is None; the rule is 'temperature' or 'isotonic'"),
        ({"method": "temperature"}, "temperature is None; the rule is a number above 0"),
        ({"method": "temperature", "temperature": -1.0}, "temperature is -1.0"),
        ({"method": "isotonic", "scores": [0.1], "calibrated": []}, "equally many rising numbers"),
        ({"method": "isotonic", "scores": [0.1, 0.2], "calibrated": [0.5, 0.4]}, "equally many rising numbers"),
        ({"method": "isotonic", "scores": [0.1, 0.2], "calibrated": [0.5, 1.4]}, "equally many rising numbers"),
    ],
)
def test_what_is_no_calibrator_is_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        Calibrator.from_dict(numbers)


def test_maps_of_one_split_are_tested_on_another(scene):
    (truth, detections), (other, found) = scene(3, num_images=12), scene(4, num_images=12)  # of the same names
    for entry in (*detections, *found):
        entry["score"] = entry["score"] ** 0.3  # far too confident
    fitted = json.loads(json.dumps(fit_calibrators(truth, detections)))
    tested = apply_calibrators(fitted, other, found)
    assert tested["none"]["ECE"] == pytest.approx(calibration(other, found).ece)
    for method in ("temperature", "isotonic"):
        calibrate = Calibrator.from_dict(fitted[method])
        changed = [entry | {"score": float(calibrate(np.array([entry["score"]]))[0])} for entry in found]
        assert tested[method]["ECE"] == tested[method]["reliability"]["ece"]
        assert tested[method]["ECE"] < tested["none"]["ECE"]
        if method == "temperature":  # isotonic ties may change the matching
            assert tested[method]["ECE"] == pytest.approx(calibration(other, changed).ece)
            assert tested[method]["ECE_0.1"] == pytest.approx(calibration(other, changed, min_score=0.1).ece)

    with pytest.raises(ValueError, match="fitted on these very pictures"):
        apply_calibrators(fitted, truth, detections)
    with pytest.raises(ValueError, match="no isotonic, temperature; --calibration writes one"):
        apply_calibrators({"fitted_on": {}}, other, found)


def test_held_out_errors_are_those_of_maps_that_never_saw_the_picture(scene):
    """With a part a picture, an oracle fits to all other pictures through the files."""
    truth, detections = scene(3, num_images=8)
    for entry in detections:
        entry["score"] = entry["score"] ** 0.3
    numbers, rights = {"none": [], "temperature": [], "isotonic": []}, []
    for image in truth["images"]:
        only = {**truth, "images": [image]}
        rest = {**truth, "images": [one for one in truth["images"] if one is not image]}
        for part, inside in ((only, True), (rest, False)):
            part["annotations"] = [a for a in truth["annotations"] if (a["image_id"] == image["id"]) == inside]
        fitted = fit_calibrators(rest, [one for one in detections if one["image_id"] != image["id"]])
        scores, correct = match_predictions(only, [one for one in detections if one["image_id"] == image["id"]])
        rights.append(correct)
        for method, values in numbers.items():
            values.append(scores if method == "none" else Calibrator.from_dict(fitted[method])(scores))
    errors = held_out_errors(truth, detections, num_folds=8)
    assert list(errors) == list(numbers)
    for method, values in numbers.items():
        mean = np.square(np.concatenate(values) - np.concatenate(rights)).mean()
        assert errors[method]["squared_error"] == pytest.approx(mean)
    assert errors["none"]["ECE"] == pytest.approx(calibration(truth, detections).ece)
    assert errors["isotonic"]["squared_error"] < errors["none"]["squared_error"]


def test_nothing_is_held_out_of_too_little(scene):
    truth, detections = scene(3, num_images=8)
    assert held_out_errors(truth, detections, num_folds=9) == {}
    first = truth["annotations"][0]["image_id"]  # all that is right lies in one picture
    one = truth | {"annotations": [record for record in truth["annotations"] if record["image_id"] == first]}
    assert held_out_errors(one, detections) == {}


def with_scales(detections):
    rng = np.random.default_rng(0)
    return [entry | {"box_scales": rng.uniform(0.5, 4, 4).tolist()} for entry in detections]


def test_the_fields_are_the_fitted_maps(scene):
    truth, detections = scene(3, num_images=12)
    fitted = fit_calibrators(truth, with_scales(detections))
    fields = calibration_fields(truth, with_scales(detections))
    expected = {
        "scores": fitted["temperature"],
        "scale_factor": fitted["scale_factor"],
        "fitted_on": fitted["fitted_on"],
    }
    assert fields == {"calibration": expected, "score_threshold": None}
    assert same_pictures(fields["calibration"], truth) and not same_pictures(fields["calibration"], scene(4)[0])
    assert "scale_factor" not in fit_calibrators(truth, detections)
    fields = calibration_fields(truth, detections, method="isotonic", scales=False)
    assert fields["calibration"] == {"scores": fitted["isotonic"], "fitted_on": fitted["fitted_on"]}
    assert calibration_fields(truth, detections, method=None, scales=False)["calibration"] is None
    with pytest.raises(ValueError, match="no box_scales that a factor could correct"):
        calibration_fields(truth, detections)


@pytest.mark.parametrize("method", [None, "temperature", "isotonic"])
@pytest.mark.parametrize("threshold", ["all", "class"])
def test_thresholds_are_best_for_calibrated_scores(scene, method, threshold):
    truth, detections = scene(3, num_images=12)
    for entry in detections:
        entry["score"] = entry["score"] ** 0.3
    fields = calibration_fields(truth, detections, method=method, scales=False, threshold=threshold)
    if method:
        calibrate = Calibrator.from_dict(fields["calibration"]["scores"])
        detections = [entry | {"score": float(calibrate(np.array([entry["score"]]))[0])} for entry in detections]
    found = fields["score_threshold"]
    curves = threshold_curves(truth, detections)
    for record in truth["categories"]:
        limit = found if threshold == "all" else found[record["name"]]
        mine = [entry for entry in detections if entry["category_id"] == record["id"]]
        assert limit not in {entry["score"] for entry in mine}  # between two scores
        if threshold == "class":
            kept = [entry for entry in mine if entry["score"] > limit]
            again = threshold_curves(truth, kept)["classes"][record["name"]]
            assert again["f1"][0] == pytest.approx(curves["classes"][record["name"]]["best_f1"])
    if threshold == "all":
        kept = [entry for entry in detections if entry["score"] > found]
        assert threshold_curves(truth, kept)["all"]["f1"][0] == pytest.approx(curves["all"]["best_f1"])


def test_no_threshold_without_objects(scene):
    truth, detections = scene(3, num_images=12)
    with pytest.raises(ValueError, match="the rule is some, not all"):
        calibration_fields(truth | {"annotations": []}, detections, scales=False, threshold="all")
