"""The criterion against the recorded losses and gradients, in float32 and float64."""

import json

import pytest
import torch

from drmm_hf import DrmmConfig
from drmm_hf.modeling.criteria import (
    Targets,
    log_component_likelihood,
    log_likelihood_factors,
    maximum_component_maximization,
    negative_log_likelihood,
    nll_mcm,
    reduce_terms,
)
from drmm_hf.modeling.mixture import MixtureParameters, log_mixing_coefficients, take_components
from parity.conftest import Case, cases, error, gradient_error, objective_of


def _loss_cases():
    found = []
    for parameter in cases("drmm_loss*.safetensors"):
        path = parameter.values[0]
        names = json.loads(path.with_suffix(".json").read_text())["cases"]
        found += [pytest.param(path, name, id=f"{path.stem}-{name}") for name in names]
    return found


def _targets(tensors: dict, num_images: int, dtype) -> Targets:
    boxes = [tensors[f"in.gt_boxes.{index}"].to(dtype) for index in range(num_images)]
    labels = [tensors[f"in.gt_labels.{index}"] for index in range(num_images)]
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(b), dtype=torch.bool) for b in boxes], batch_first=True)
    return Targets(
        torch.nn.utils.rnn.pad_sequence(boxes, batch_first=True).reshape(num_images, -1, 4),
        torch.nn.utils.rnn.pad_sequence(labels, batch_first=True),
        mask,
        torch.ones(num_images, 2, dtype=torch.long),  # likelihoods do not look at them
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize(("path", "name"), _loss_cases())
def test_losses_and_gradients_equal_the_recorded_ones(path, name, dtype):
    case = Case(path)
    info, tensors = case.info["cases"][name], case.starting_with(f"{name}.")
    precision = "f64." if dtype == torch.float64 else "f32."
    recorded = {key[4:]: value for key, value in tensors.items() if key.startswith(precision)}
    config = DrmmConfig(num_labels=info["C"], **objective_of(info["cfg"]))
    targets = _targets(tensors, info["B"], dtype)
    tolerance = 1e-8 if dtype == torch.float64 else 1e-5

    raw = {key: tensors[f"in.{key}"].to(dtype).requires_grad_() for key in ("loc", "raw_sc", "raw_prob", "raw_fg")}
    objectness = raw["raw_fg"].squeeze(-1)
    scales = torch.nn.functional.softplus(raw["raw_sc"])
    mixture = MixtureParameters(raw["loc"], scales, raw["raw_prob"], objectness, log_mixing_coefficients(objectness))
    terms = nll_mcm([mixture], targets, config)
    loss, _ = reduce_terms(terms, targets, config)
    loss_sum = loss * info["B"]
    gradients = torch.autograd.grad(loss_sum, list(raw.values()))

    empty = sum(count == 0 for count in info["num_gt"])
    if sum(info["num_gt"]):
        assert error(loss_sum, recorded["loss_sum"]) < tolerance
        # An image without ground truth counts as one element of the recorded mean.
        assert error(loss_sum / (sum(info["num_gt"]) + empty), recorded["loss_mean"]) < max(tolerance, 1e-9)
    else:
        assert loss_sum.item() == 0 and abs(recorded["loss_sum"].item()) < 1e-9
    per_gt = config.loss_weight * (terms["nll"] + config.mcm_weight * terms["mcm"])[0]
    if not empty:
        assert error(per_gt[targets.mask], recorded["loss_per_gt"]) < tolerance
    for key, gradient in zip(raw, gradients, strict=True):
        expected = tensors[f"f64.grad.{key}"]
        if sum(info["num_gt"]):
            # The pseudo ground truth of an empty image leaves about 1e-12 of a gradient in the recorded values.
            assert gradient_error(gradient, expected) < tolerance, key
        else:
            assert gradient.abs().max() == 0 and expected.abs().max() < 1e-9


@pytest.mark.parametrize(("path", "name"), _loss_cases())
def test_gradients_of_the_mixture_parameters_equal_the_recorded_ones(path, name):
    """Gradients with respect to mu, gamma, p and pi as four independent leaves."""
    case = Case(path)
    info, tensors = case.info["cases"][name], case.starting_with(f"{name}.")
    if not sum(info["num_gt"]):
        return  # All recorded gradients are those of the pseudo ground truth, 1e-12 of a loss: see the test above.
    config = DrmmConfig(num_labels=info["C"], **objective_of(info["cfg"]))
    targets = _targets(tensors, info["B"], torch.float64)
    objectness = tensors["in.raw_fg"].double().sigmoid()
    leaves = {
        "loc": tensors["in.loc"].double(),
        "sc": torch.nn.functional.softplus(tensors["in.raw_sc"].double()),
        "prob": tensors["in.raw_prob"].double().softmax(-1),
        "mix": objectness / objectness.sum(1, keepdim=True),
    }
    leaves = {key: value.requires_grad_() for key, value in leaves.items()}
    log_mixing = leaves["mix"].squeeze(-1).log()
    factors = log_likelihood_factors(
        MixtureParameters(
            leaves["loc"][None], leaves["sc"][None], leaves["prob"][None], log_mixing[None], log_mixing[None]
        ),
        targets,
        config,
    )
    # The leaf is the probability itself, not a logit.
    log_probability = config.class_exponent * leaves["prob"].log().transpose(1, 2)
    factors["P"] = take_components(log_probability, targets.class_labels)[None]
    epsilon = config.likelihood_epsilon
    nll = negative_log_likelihood(log_component_likelihood(factors), epsilon)
    mcm = maximum_component_maximization(log_component_likelihood(factors, config.mcm_stop_gradient), epsilon)
    loss = config.loss_weight * (nll + config.mcm_weight * mcm)[0][targets.mask].sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    for key, gradient in zip(leaves, gradients, strict=True):
        assert gradient_error(gradient, tensors[f"f64.grad_direct.{key}"]) < 1e-8
