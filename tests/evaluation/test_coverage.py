"""Coverage where it is known: annotations drawn from the very densities, and what the matching then leaves."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from drmm_hf.evaluation.coverage import (
    EDGES,
    LEVELS,
    coverage_report,
    coverage_table,
    fit_scale_factor,
    matched_boxes,
)


def world(freedom=1.0, size=400.0, scale=2.0, told=1.0, num_images=300, each=4, seed=0):
    """Return annotations drawn from the densities of predictions, whose scales are told as `told` times too small."""
    rng = np.random.default_rng(seed)
    images = [{"id": 3 * index, "file_name": f"{index}.png", "width": 9, "height": 9} for index in range(num_images)]
    annotations, detections = [], []
    errors = iter(stats.t.ppf(rng.random((num_images * each, 4)), freedom))
    for image in images:
        for place in range(each):
            corner = np.array([5000.0 * place, 0.0])  # far from the others
            predicted = np.concatenate([corner, corner + size])
            scales = scale * rng.uniform(0.5, 2, 4)
            drawn = predicted + scales * next(errors)
            ids = {"image_id": image["id"], "category_id": 1}
            box = [*predicted[:2], *(predicted[2:] - predicted[:2])]
            entry = {"bbox": box, "score": float(rng.uniform()), "box_scales": (scales / told).tolist()}
            detections.append(ids | entry)
            if (drawn[2:] > drawn[:2]).all():
                box = [*drawn[:2], *(drawn[2:] - drawn[:2])]
                annotations.append(ids | {"id": len(annotations) + 1, "bbox": box, "iscrowd": 0})
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}, detections


@pytest.mark.parametrize("freedom", [1.0, 3.5, math.inf])
def test_a_right_density_covers_what_it_says(freedom):
    report = coverage_report(*world(freedom), freedom)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    group = report["predicted"]
    np.testing.assert_allclose(group["all"], LEVELS, atol=0.02)
    np.testing.assert_allclose(group["expected"], LEVELS, atol=0.02)
    for edge in EDGES:
        np.testing.assert_allclose(group[edge], LEVELS, atol=0.04)
    np.testing.assert_allclose(np.mean([group[edge] for edge in EDGES], axis=0), group["all"])
    low, high = np.array(group["all_interval"]).T
    assert (low <= group["all"]).all() and (group["all"] <= high).all() and (high - low < 0.06).all()
    assert report["best_scale_factor"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("freedom", [1.0, math.inf])
def test_the_expected_coverage_is_that_of_the_matching(freedom):
    """Small boxes of large scales: the matching leaves the near ones, and the coverage of a right density says so."""
    report = coverage_report(*world(freedom, size=40.0, scale=4.0, num_images=600), freedom)
    assert report["num_matched"] < 0.9 * report["num_ground_truths"] or freedom > 1
    np.testing.assert_allclose(report["predicted"]["all"], report["predicted"]["expected"], atol=0.02)
    if freedom == 1:
        above = np.array(report["predicted"]["all"]) - LEVELS
        assert above[LEVELS.index(0.9)] > 0.04


@pytest.mark.parametrize(("freedom", "told"), [(1.0, 1.6), (1.0, 0.5), (3.5, 2.0), (math.inf, 1.3)])
def test_a_factor_on_the_scales_is_found_and_mends_other_pictures(freedom, told):
    factor = fit_scale_factor(matched_boxes(*world(freedom, told=told)), freedom)
    assert factor == pytest.approx(told, rel=0.08)
    report = coverage_report(*world(freedom, told=told, seed=1), freedom, scale_factor=factor)
    assert report["rescaled"]["scale_factor"] == factor
    gaps = [np.abs(np.array(report[name]["all"]) - LEVELS).max() for name in ("predicted", "rescaled")]
    assert gaps[1] < 0.04 < gaps[0]


def test_the_factor_makes_half_of_the_sides_covered():
    truth, detections = world(told=3.0, num_images=50)
    factor = fit_scale_factor(matched_boxes(truth, detections))
    report = coverage_report(truth, detections, scale_factor=factor)
    assert report["rescaled"]["all"][LEVELS.index(0.5)] == pytest.approx(0.5, abs=0.005)
    assert report["best_scale_factor"] == factor


def test_pairs_are_those_of_the_matching_in_plain_loops(scene):
    truth, detections = scene(5, num_images=6)
    rng = np.random.default_rng(0)
    for entry in detections:
        entry["box_scales"] = rng.uniform(0.5, 4, 4).tolist()
    matched = matched_boxes(truth, detections)
    num_pairs = len(matched.predicted)
    assert 3 < num_pairs < len(detections)
    used = set()
    for predicted, scales, annotated, image_id in zip(
        matched.predicted, matched.scales, matched.annotated, matched.image_ids, strict=True
    ):
        (entry,) = [one for one in detections if np.allclose(one["box_scales"], scales)]
        (record,) = [
            one
            for one in truth["annotations"]
            if one["image_id"] == image_id
            and np.allclose([*annotated[:2], *(annotated[2:] - annotated[:2])], one["bbox"])
        ]
        assert entry["image_id"] == image_id and entry["category_id"] == record["category_id"]
        assert np.allclose([*predicted[:2], *(predicted[2:] - predicted[:2])], entry["bbox"])
        assert not record["iscrowd"] and record["id"] not in used
        used.add(record["id"])
    report = coverage_report(truth, detections)
    for level, observed in zip(LEVELS, report["predicted"]["left"], strict=True):
        reach = math.tan(math.pi * level / 2)
        inside = [
            abs(a[0] - p[0]) <= reach * s[0]
            for p, s, a in zip(matched.predicted, matched.scales, matched.annotated, strict=True)
        ]
        assert observed == pytest.approx(sum(inside) / num_pairs)


def test_the_table_has_the_figures():
    truth, detections = world(num_images=30)
    report = coverage_report(truth, detections, scale_factor=1.5)
    text = coverage_table(report)
    for name in ("predicted", "rescaled"):
        assert f"{100 * report[name]['all'][LEVELS.index(0.9)]:.2f}" in text
    assert "scales times 1.500" in text and f"{report['num_matched']} correct predictions" in text


def test_the_share_of_scales_at_the_floor_is_found():
    truth, detections = world(num_images=40)
    report = coverage_report(truth, detections)
    assert "at the floor" not in coverage_table(report)
    for entry in detections:
        width, height = entry["bbox"][2:]
        floors = 0.005 * np.array([width, height, width, height])
        entry["box_scales"] = np.float32(np.maximum(entry["box_scales"], floors)).tolist()
    matched = matched_boxes(truth, detections)
    boxes = matched.predicted
    sides = np.stack([boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]] * 2, axis=1)
    share = np.isclose(matched.scales, 0.005 * sides, rtol=1e-5).mean()
    report = coverage_report(truth, detections)
    assert 0.05 < share < 1 and report["share_at_smallest"] == pytest.approx(share, abs=0.01)
    assert report["smallest_scale_ratio"] == pytest.approx(0.005, rel=1e-4)
    assert (
        f"{100 * report['share_at_smallest']:.1f} % of their scales are at the floor (min_scale_ratio), 0.005 of"
        in coverage_table(report)
    )


def test_what_cannot_be_measured_is_said_in_words():
    truth, detections = world(math.inf, num_images=2)
    with pytest.raises(ValueError, match="1 of 8 detections have no box_scales"):
        coverage_report(truth, [*detections[:7], {k: v for k, v in detections[7].items() if k != "box_scales"}])
    with pytest.raises(ValueError, match="none of 0 detections is correct"):
        coverage_report(truth, [])


def test_a_scale_of_zero_and_exact_boxes_are_no_trouble():
    truth, detections = world(math.inf, num_images=2)
    zero = coverage_report(truth, [entry | {"box_scales": [0.0] * 4} for entry in detections])
    assert zero["predicted"]["all"] == [0.0] * len(LEVELS)
    exact = [{**entry, "bbox": record["bbox"]} for entry, record in zip(detections, truth["annotations"], strict=True)]
    report = coverage_report(truth, exact)
    assert report["best_scale_factor"] is None and report["predicted"]["all"] == [1.0] * len(LEVELS)
    assert "factor" not in coverage_table(report)
