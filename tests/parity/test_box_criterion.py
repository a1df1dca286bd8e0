"""The box criterion against the recorded costs, assignments, losses and gradients, in float32 and float64."""

import json
import math

import pytest
import torch

from drmm_hf import DrmmConfig
from drmm_hf.modeling.boxes import BoxPredictions
from drmm_hf.modeling.criteria import Targets, focal_l1_giou, match, matching_costs, reduce_terms
from parity.conftest import Case, cases, error, gradient_error


NAMES = {"class": "cls", "bbox": "bbox", "giou": "iou"}
COSTS = {"class": "cls", "bbox": "l1", "giou": "giou"}


def _cases():
    found = []
    for parameter in cases("sparse_rcnn_loss*.safetensors"):
        path = parameter.values[0]
        names = json.loads(path.with_suffix(".json").read_text())["cases"]
        found += [pytest.param(path, name, id=f"{path.stem}-{name}") for name in names]
    return found


def _config(case: Case) -> DrmmConfig:
    weights = case.info["weights"]
    return DrmmConfig(
        head_type="box",
        num_labels=case.info["C"],
        class_cost=weights["cost"]["focal"],
        bbox_cost=weights["cost"]["l1"],
        giou_cost=weights["cost"]["giou"],
        class_loss_coefficient=weights["loss"]["focal"],
        bbox_loss_coefficient=weights["loss"]["l1"],
        giou_loss_coefficient=weights["loss"]["giou"],
        focal_alpha=weights["focal_alpha"],
        focal_gamma=weights["focal_gamma"],
    )


def _inputs(case: Case, name: str, dtype) -> tuple[dict, BoxPredictions, Targets]:
    tensors = case.starting_with(f"{name}.")
    images = range(len(tensors["in.boxes"]))
    boxes = [tensors[f"in.gt_boxes.{index}"].to(dtype) for index in images]
    labels = [tensors[f"in.gt_labels.{index}"] for index in images]
    mask = [torch.ones(len(label), dtype=torch.bool) for label in labels]
    boxes, labels, mask = (torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in (boxes, labels, mask))
    targets = Targets(boxes.reshape(len(images), -1, 4), labels, mask, tensors["in.img_hw"])
    leaves = (tensors[f"in.{key}"].to(dtype).requires_grad_() for key in ("boxes", "cls_score"))
    return tensors, BoxPredictions(*leaves), targets


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize(("path", "name"), _cases())
def test_costs_and_assignments_equal_the_recorded_ones(path, name, dtype):
    case = Case(path)
    tensors, predictions, targets = _inputs(case, name, dtype)
    stacked = BoxPredictions(*(value[None] for value in predictions))
    costs = matching_costs(stacked, targets, _config(case))
    assigned = match(sum(costs.values()), targets.mask[..., None])[0]
    for image, count in enumerate(case.info["cases"][name]["num_gt"]):
        for key, recorded in COSTS.items():
            if count:
                ours = costs[key][0, image, :count].T
                tolerance = 1e-8 if dtype == torch.float64 else 1e-5
                assert error(ours, tensors[f"cost_{recorded}.{image}"]) < tolerance, key
        ours = torch.zeros_like(tensors["assigned_gt_plus1"][image])
        matched = assigned[image] >= 0
        ours[assigned[image, matched]] = matched.nonzero()[:, 0] + 1
        assert torch.equal(ours, tensors["assigned_gt_plus1"][image])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize(("path", "name"), _cases())
def test_losses_and_gradients_equal_the_recorded_ones(path, name, dtype):
    case, info = Case(path), Case(path).info["cases"][name]
    tensors, predictions, targets = _inputs(case, name, dtype)
    config = _config(case)
    recorded = {key[4:]: value for key, value in tensors.items() if key.startswith(f"f{dtype.itemsize * 8}.")}
    tolerance = 1e-8 if dtype == torch.float64 else 1e-5

    loss, parts = reduce_terms(focal_l1_giou([predictions], targets, config), targets, config)
    gradients = torch.autograd.grad(loss, predictions)
    assert all(value.isfinite().all() for value in (loss, *parts.values(), *gradients))
    total = 0.0
    for term, weight in (
        ("class", config.class_loss_coefficient),
        ("bbox", config.bbox_loss_coefficient),
        ("giou", config.giou_loss_coefficient),
    ):
        total += weight * parts[f"{term}.stage0"]
        if term == "class" and not info["num_pos"]:
            # The public code divides by 0 here; ours is the loss of the background, counted as one match.
            assert f"loss_{NAMES[term]}" not in recorded and math.isinf(float(info["loss"]["loss_cls"]))
            logits = predictions.class_logits.double()
            background = (1 - config.focal_alpha) * logits.sigmoid() ** config.focal_gamma * (1 + logits.exp()).log()
            assert error(parts["class.stage0"], background.sum()) < tolerance and parts["class.stage0"] > 0
            continue
        assert error(weight * parts[f"{term}.stage0"], recorded[f"loss_{NAMES[term]}"]) < tolerance, term
    assert error(loss, total) < 1e-6
    for key, gradient in zip(("boxes", "cls_score"), gradients, strict=True):
        if not info["num_pos"]:
            assert key == "cls_score" or not (gradient.any() or recorded["grad.boxes"].any())
            continue
        assert gradient_error(gradient, tensors[f"f64.grad.{key}"]) < tolerance, key
        assert gradient_error(gradient, recorded[f"grad.{key}"]) < tolerance, key
