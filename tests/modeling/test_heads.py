"""The mixture head: units, types and gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from conftest import tiny_config
from drmm_hf import DrmmForObjectDetection
from drmm_hf.modeling.boxes import move_cxcywh, move_xyzr
from drmm_hf.modeling.heads import HEADS, MixtureHead


BOXES = torch.tensor([[[10.0, 20.0, 50.0, 100.0], [5.0, 5.0, 5.2, 5.1], [30.0, 60.0, 20.0, 50.0]]])


def head(**overrides):
    torch.manual_seed(0)
    return MixtureHead(tiny_config(**overrides))


def features(dtype=torch.float32, seed=0):
    return torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)


def branch(module, x):
    """Linear without bias, layer norm, ReLU, as often as there are layers, from the parameters alone."""
    weights = list(module.parameters())
    for weight, gain, bias in zip(weights[::3], weights[1::3], weights[2::3], strict=True):
        x = (x @ weight.T - (x @ weight.T).mean(-1, keepdim=True)) / (
            (x @ weight.T).var(-1, False, keepdim=True) + 1e-5
        ).sqrt()
        x = (x * gain + bias).clamp(min=0)
    return x


@pytest.mark.parametrize(("class_layers", "box_layers"), [(1, 3), (2, 1)])
def test_outputs_in_pixels(class_layers, box_layers):
    module = head(num_class_layers=class_layers, num_box_layers=box_layers)
    assert len(list(module.class_branch.parameters())) == 3 * class_layers
    mixture = module(features(), BOXES)
    classes, boxes = branch(module.class_branch, features()), branch(module.box_branch, features())
    torch.testing.assert_close(mixture.boxes, BOXES + boxes @ module.box_delta.weight.T + module.box_delta.bias)
    scale = (boxes @ module.box_scale.weight.T + module.box_scale.bias).exp().log1p()
    torch.testing.assert_close(mixture.scales, scale)
    torch.testing.assert_close(mixture.class_logits, module.classifier(classes))
    torch.testing.assert_close(mixture.objectness_logits, module.objectness(classes)[..., 0])
    objectness = mixture.objectness_logits.sigmoid()
    torch.testing.assert_close(mixture.log_mixing.exp(), objectness / objectness.sum(-1, keepdim=True))


def test_outputs_in_sides_of_the_box():
    factors = {"box_delta_factor": 0.25, "box_scale_factor": 0.2}
    pixels = head()(features(), BOXES)
    module = head(box_delta_unit="box", **factors)
    boxes = BOXES.clone().requires_grad_()
    mixture = module(features(), boxes)
    # (w, h, w, h) of each box; sides below one pixel count as one, an inverted side as its length.
    sides = torch.tensor([[[40.0, 80, 40, 80], [1, 1, 1, 1], [10, 10, 10, 10]]])
    torch.testing.assert_close(mixture.boxes, BOXES + 0.25 * sides * (pixels.boxes - BOXES), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(mixture.scales, 0.2 * sides * pixels.scales)
    (gradient,) = torch.autograd.grad(mixture.boxes.sum() + mixture.scales.sum(), boxes)
    assert torch.equal(gradient, torch.ones_like(BOXES))  # the unit is a constant


@pytest.mark.parametrize("unit", ["pixels", "box"])
def test_predictions_are_float32_whatever_the_type_of_the_weights(unit):
    far = BOXES + 1000.25  # not a bfloat16 number
    plain = head(box_delta_unit=unit)
    expected = plain(features(), far)
    for dtype in (torch.bfloat16, torch.float16):
        mixture = head(box_delta_unit=unit).to(dtype)(features(dtype), far)
        assert {value.dtype for value in mixture} == {torch.float32}
        assert (mixture.boxes - expected.boxes).abs().max() < 0.5
        with torch.autocast("cpu", dtype):
            under_autocast = plain(features(), far)
        assert {value.dtype for value in under_autocast} == {torch.float32}
        assert (under_autocast.boxes - expected.boxes).abs().max() < 0.5
    double = head().double()(features(torch.float64), far.double())
    assert {value.dtype for value in double} == {torch.float64}


def test_zero_output_layers_leave_the_boxes_where_they_are():
    module = HEADS["mixture"](tiny_config()).bfloat16()
    nn.init.zeros_(module.box_delta.weight)
    nn.init.zeros_(module.box_delta.bias)
    far = BOXES + 1000.25
    assert torch.equal(module(features(torch.bfloat16), far).boxes, far)


def test_scales_are_positive_and_do_not_overflow():
    module = head()
    nn.init.zeros_(module.box_scale.weight)
    for raw in (-50.0, 0.0, 1e4):
        nn.init.constant_(module.box_scale.bias, raw)
        scales = module(features(), BOXES).scales
        torch.testing.assert_close(scales, F.softplus(torch.full_like(scales, raw)))
        assert scales.isfinite().all() and (scales > 0).all()


def box_head(**overrides):
    torch.manual_seed(0)
    return HEADS["box"](tiny_config(head_type="box", **overrides))


@pytest.mark.parametrize("decoder", ["sparse_rcnn", "adamixer"])
def test_box_head_moves_boxes_as_its_decoder_does(decoder):
    module = box_head(decoder_type=decoder, neck_type="fpn", max_log_size_delta=0.5)
    delta = module.box_delta(module.box_branch(features()))
    predictions = module(features(), BOXES)
    expected = move_xyzr(BOXES, delta) if decoder == "adamixer" else move_cxcywh(BOXES, delta, 0.5)
    torch.testing.assert_close(predictions.boxes, expected)
    torch.testing.assert_close(predictions.class_logits, module.classifier(module.class_branch(features())))
    assert (module.class_branch[0].bias is not None) == (decoder == "adamixer")
    assert len(module.box_branch) == 3 * (1 if decoder == "adamixer" else 3)


def test_box_head_predicts_in_float32_whatever_the_type_of_the_weights():
    predictions = box_head().to(torch.bfloat16)(features(torch.bfloat16), BOXES)
    assert {value.dtype for value in predictions} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        predictions = box_head()(features(), BOXES)
    assert {value.dtype for value in predictions} == {torch.float32}


@pytest.mark.parametrize("unit", ["pixels", "box"])
def test_mixture_on_adamixer_has_the_box_of_its_own_refinement(unit):
    module = head(decoder_type="adamixer", neck_type="fpn", box_delta_unit=unit, box_scale_factor=0.2)
    mixture = module(features(), BOXES)
    boxes = module.box_branch(features())
    torch.testing.assert_close(mixture.boxes, move_xyzr(BOXES, module.box_delta(boxes)))
    sides = torch.tensor([[[40.0, 80, 40, 80], [1, 1, 1, 1], [10, 10, 10, 10]]])
    scales = F.softplus(module.box_scale(boxes))
    torch.testing.assert_close(mixture.scales, scales if unit == "pixels" else 0.2 * sides * scales)
    assert (mixture.boxes[..., 2:] > mixture.boxes[..., :2]).all()


@pytest.mark.parametrize(
    ("decoder", "unit", "moves"),
    [("sparse_rcnn", "pixels", True), ("sparse_rcnn", "box", False), ("adamixer", "pixels", False)],
)
def test_refinement_starts_at_the_input_box_but_in_pixels(decoder, unit, moves):
    model = DrmmForObjectDetection(tiny_config(decoder_type=decoder, box_delta_unit=unit, hidden_size=32))
    for head in model.modules():
        if isinstance(head, MixtureHead):
            assert bool(head.box_delta.weight.any()) == moves and not head.box_delta.bias.any()
