"""The objective against plain loops in probability space, and the promises about batches, padding and extremes."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import random_labels, tiny_config
from drmm_hf.modeling.criteria import (
    Targets,
    check_labels,
    maximum_component_maximization,
    negative_log_likelihood,
    nll_mcm,
    pad_targets,
    reduce_terms,
    stack_stages,
)
from drmm_hf.modeling.mixture import MixtureParameters, log_mixing_coefficients


def random_stage(batch_size, num_components, num_labels=3, seed=0, dtype=torch.float64):
    """Return a stage's raw predictions as leaves: boxes near the ground truths, raw scales, two kinds of logits."""
    generator = torch.Generator().manual_seed(seed)
    corners = 60 * torch.rand(batch_size, num_components, 2, 2, generator=generator).sort(dim=2).values
    shapes = ((4,), (num_labels,), ())
    others = [3 * torch.randn(batch_size, num_components, *shape, generator=generator) for shape in shapes]
    return [value.to(dtype).requires_grad_() for value in (corners.flatten(2), *others)]


def mixture_of(boxes, raw_scales, class_logits, objectness_logits):
    scales = F.softplus(raw_scales)
    return MixtureParameters(
        boxes, scales, class_logits, objectness_logits, log_mixing_coefficients(objectness_logits)
    )


def targets_of(*counts, seed=0, dtype=torch.float64, size=(64, 96)):
    labels = random_labels(*counts, seed=seed, dtype=dtype)
    return labels, pad_targets(labels, torch.tensor([size] * len(counts)), dtype)


def density(distance, scale, config):
    if config.coordinate_distribution == "gaussian":
        return math.exp(-0.5 * (distance / scale) ** 2) / (scale * math.sqrt(2 * math.pi))
    if config.coordinate_distribution == "cauchy":
        return 1 / (math.pi * scale * (1 + (distance / scale) ** 2))
    v = config.student_t_freedom
    constant = math.gamma((v + 1) / 2) / (math.gamma(v / 2) * math.sqrt(v * math.pi) * scale)
    return constant * (1 + (distance / scale) ** 2 / v) ** (-(v + 1) / 2)


def oracle(mixture, labels, size, config):
    """Eq. 2-8 as written: one number after the other, products of probabilities, per image a list of (nll, mcm)."""
    height, width = size
    boxes, scales = mixture.boxes.tolist(), mixture.scales.tolist()
    objectness, classes = mixture.objectness_logits.sigmoid().tolist(), mixture.class_logits.softmax(-1).tolist()
    epsilon, result = config.likelihood_epsilon, []
    for image, label in enumerate(labels):
        terms = []
        for box, name in zip(label["boxes"].tolist(), label["class_labels"].tolist(), strict=True):
            x, y, w, h = (value * side for value, side in zip(box, (width, height, width, height), strict=True))
            truth = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
            likelihoods = []
            for k in range(len(boxes[image])):
                pi = objectness[image][k] / sum(objectness[image])
                if config.scale_mixing_by_num_objects:
                    pi *= len(label["boxes"])
                left, top, right, bottom = boxes[image][k]
                product = pi * classes[image][k][name] ** config.class_exponent
                for d, side in enumerate((right - left, bottom - top) * 2):
                    scale = max(scales[image][k][d], config.min_scale_ratio * side)
                    product *= density(truth[d] - boxes[image][k][d], scale, config)
                likelihoods.append(product)
            nll = -math.log(sum(likelihoods) + epsilon)
            mcm = -math.log(max(likelihoods) / (sum(likelihoods) + epsilon) + epsilon)
            terms.append((nll, mcm))
        result.append(terms)
    return result


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"likelihood_epsilon": 0},
        {"likelihood_epsilon": 1e-12, "min_scale_ratio": 0},
        {"min_scale_ratio": 0.3, "scale_mixing_by_num_objects": False},
        {"class_exponent": 0.5},
        {"coordinate_distribution": "gaussian"},
        {"coordinate_distribution": "gaussian", "likelihood_epsilon": 0, "min_scale_ratio": 0.5},
        {"coordinate_distribution": "student_t", "student_t_freedom": 3.5},
    ],
    ids=str,
)
def test_equals_the_formulas_written_as_loops(options):
    config = tiny_config(**options)
    labels, targets = targets_of(3, 0, 7)
    with torch.no_grad():
        stages = [mixture_of(*random_stage(3, 5, seed=seed)) for seed in range(2)]
    terms = nll_mcm(stages, targets, config)
    assert terms["nll"].shape == terms["mcm"].shape == (2, 3, 7)
    for stage, mixture in enumerate(stages):
        for image, expected in enumerate(oracle(mixture, labels, (64, 96), config)):
            ours = [terms[name][stage, image].tolist() for name in ("nll", "mcm")]
            assert list(zip(*ours, strict=True))[: len(expected)] == [pytest.approx(e, rel=1e-9) for e in expected]
            assert all(value == 0 for row in ours for value in row[len(expected) :])


def test_float32_is_close_to_float64():
    config = tiny_config()
    values = {}
    for dtype in (torch.float32, torch.float64):
        raw = random_stage(2, 6, dtype=dtype)
        _, targets = targets_of(4, 2, dtype=dtype)
        loss, _ = reduce_terms(nll_mcm([mixture_of(*raw)], targets, config), config)
        values[dtype] = [loss, *torch.autograd.grad(loss, raw)]
        assert loss.dtype == dtype
    for single, double in zip(*values.values(), strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5 * double.abs().max().item())


def gradients(raw, targets, config):
    loss, _ = reduce_terms(nll_mcm([mixture_of(*raw)], targets, config), config)
    return [loss, *torch.autograd.grad(loss, raw)]


@given(st.permutations(range(5)), st.permutations(range(4)))
@settings(max_examples=15, deadline=None)
def test_order_of_components_and_ground_truths_means_nothing(components, truths):
    config = tiny_config()
    raw = [value.detach() for value in random_stage(2, 5)]
    _, targets = targets_of(4, 4)
    shuffled = Targets(*(value[:, truths] for value in targets))
    before = nll_mcm([mixture_of(*raw)], targets, config)
    after = nll_mcm([mixture_of(*(value[:, components] for value in raw))], shuffled, config)
    for name in before:
        torch.testing.assert_close(after[name], before[name][:, :, truths], rtol=1e-12, atol=1e-12)


@given(st.integers(1, 6), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_bounds_of_both_terms(num_components, seed):
    """Without epsilon: 0 <= MCM <= log K, 0 where K is 1, and the NLL is at most that of the largest component."""
    log_likelihood = 30 * torch.randn(
        4, num_components, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    nll = negative_log_likelihood(log_likelihood, 0)
    mcm = maximum_component_maximization(log_likelihood, 0)
    largest = log_likelihood.max(-1).values
    assert (nll <= -largest).all() and (nll >= -largest - math.log(num_components) - 1e-12).all()
    assert (mcm >= 0).all() and (mcm <= math.log(num_components) + 1e-12).all()
    torch.testing.assert_close(mcm, -largest - nll, rtol=1e-10, atol=1e-10)
    if num_components == 1:
        assert (mcm == 0).all()
    alone = log_likelihood.clone()
    alone[:, 1:] = -math.inf
    assert (maximum_component_maximization(alone, 0) == 0).all()
    if num_components > 1:
        near = log_likelihood.new_zeros(1, num_components)
        near[:, 1:] = -20.0
        assert maximum_component_maximization(near, 0) > 0


def test_epsilon_saturates_both_terms_as_the_public_code_does():
    unit = math.log(1e-12)
    hopeless = torch.full((1, 3), -300.0, dtype=torch.float64, requires_grad=True)
    for term in (negative_log_likelihood, maximum_component_maximization):
        value = term(hopeless - unit, 1e-12)
        assert value.item() == pytest.approx(-unit)
        (gradient,) = torch.autograd.grad(value.sum(), hopeless)
        assert gradient.abs().max() < 1e-12
        (gradient,) = torch.autograd.grad(term(hopeless + torch.tensor([3.0, 2, 1]), 0).sum(), hopeless)
        assert gradient.abs().max() > 0.1


class TestStopGradient:
    """Boxes and scales belong to F, class logits to P; log pi is taken as a leaf of its own."""

    owners = {"pi": (4,), "F": (0, 1), "P": (2,)}

    def terms(self, stop_gradient):
        boxes, raw_scales, classes, objectness = random_stage(2, 5)
        leaves = [boxes, raw_scales, classes, objectness, log_mixing_coefficients(objectness).detach()]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        mixture = MixtureParameters(leaves[0], F.softplus(leaves[1]), *leaves[2:])
        config = tiny_config(mcm_stop_gradient=list(stop_gradient), min_scale_ratio=0)
        return leaves, nll_mcm([mixture], targets_of(3, 2)[1], config)

    @pytest.mark.parametrize(
        "stopped", [subset for size in range(3) for subset in itertools.combinations(("pi", "F", "P"), size)]
    )
    def test_stops_exactly_the_chosen_factors_of_the_mcm_term(self, stopped):
        leaves, terms = self.terms(stopped)
        found = torch.autograd.grad(terms["mcm"].sum(), leaves, allow_unused=True)
        free_leaves, free_terms = self.terms(())
        free = torch.autograd.grad(free_terms["mcm"].sum(), free_leaves, allow_unused=True)
        assert torch.equal(terms["mcm"], free_terms["mcm"])
        for factor, indices in self.owners.items():
            for index in indices:
                if factor in stopped:
                    assert found[index] is None or found[index].abs().max() == 0, factor
                else:
                    assert found[index].abs().max() > 1e-3
                    torch.testing.assert_close(found[index], free[index], rtol=1e-12, atol=1e-14)

    def test_stopping_everything_leaves_the_nll_alone(self):
        leaves, terms = self.terms(("pi", "F", "P"))
        assert not terms["mcm"].requires_grad
        _, free = self.terms(())
        loss = torch.autograd.grad(terms["nll"].sum(), [leaves[i] for i in (0, 1, 2, 4)])
        assert all(gradient.abs().max() > 1e-3 for gradient in loss)
        assert torch.equal(terms["nll"], free["nll"])


def test_a_batch_is_its_images():
    config = tiny_config()
    labels, targets = targets_of(3, 0, 7, 1)
    raw = random_stage(4, 5)
    batch = nll_mcm([mixture_of(*raw)], targets, config)
    _, *batch_gradients = gradients(raw, targets, config)
    for image, label in enumerate(labels):
        alone = [value[image : image + 1].detach().requires_grad_() for value in raw]
        single = pad_targets([label], torch.tensor([[64, 96]]), torch.float64)
        terms = nll_mcm([mixture_of(*alone)], single, config)
        count = len(label["class_labels"])
        for name in batch:
            torch.testing.assert_close(batch[name][:, image, :count], terms[name][:, 0], rtol=1e-12, atol=1e-12)
        _, *expected = gradients(alone, single, config)
        for ours, value in zip(batch_gradients, expected, strict=True):
            torch.testing.assert_close(4 * ours[image], value[0], rtol=1e-10, atol=1e-12)


def test_padding_changes_neither_values_nor_gradients():
    config = tiny_config()
    _, targets = targets_of(3, 5)
    garbage = Targets(
        F.pad(targets.boxes, (0, 0, 0, 3), value=1e6),
        F.pad(targets.class_labels, (0, 3), value=2),
        F.pad(targets.mask, (0, 3)),
    )
    raw = random_stage(2, 5)
    plain, padded = (nll_mcm([mixture_of(*raw)], t, config) for t in (targets, garbage))
    for name in plain:
        assert torch.equal(padded[name][:, :, :5], plain[name])
        assert not padded[name][:, :, 5:].any()
    for ours, expected in zip(gradients(raw, garbage, config), gradients(raw, targets, config), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_stages_of_different_lengths_are_stacked_without_a_trace():
    config = tiny_config()
    _, targets = targets_of(3, 2)
    raws = [random_stage(2, count, seed=count) for count in (6, 4, 1)]
    terms = nll_mcm([mixture_of(*raw) for raw in raws], targets, config)
    total = sum(term.sum() for term in terms.values())
    stacked = torch.autograd.grad(total, sum(raws, []))
    expected = []
    for stage, raw in enumerate(raws):
        alone = nll_mcm([mixture_of(*raw)], targets, config)
        for name in terms:
            torch.testing.assert_close(terms[name][stage], alone[name][0], rtol=1e-12, atol=1e-12)
        expected += torch.autograd.grad(sum(term.sum() for term in alone.values()), raw)
    for ours, value in zip(stacked, expected, strict=True):
        torch.testing.assert_close(ours, value, rtol=1e-10, atol=1e-12)
    assert stack_stages([mixture_of(*raw) for raw in raws]).log_mixing[2, :, 1:].eq(-math.inf).all()


class TestEmptyImages:
    def test_contribute_exactly_nothing(self):
        config = tiny_config()
        raw = random_stage(3, 5)
        _, targets = targets_of(4, 0, 2)
        loss, *found = gradients(raw, targets, config)
        assert all(not gradient[1].any() for gradient in found)
        kept = [value[[0, 2]].detach().requires_grad_() for value in raw]
        kept_loss, *expected = gradients(kept, Targets(*(value[[0, 2]] for value in targets)), config)
        torch.testing.assert_close(3 * loss, 2 * kept_loss, rtol=1e-12, atol=0)
        for ours, gradient in zip(found, expected, strict=True):
            torch.testing.assert_close(3 * ours[[0, 2]], 2 * gradient, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("num_components", [1, 5])
    def test_a_batch_of_nothing_else_stays_connected(self, num_components):
        raw = random_stage(2, num_components)
        loss, *found = gradients(raw, targets_of(0, 0)[1], tiny_config())
        assert loss.item() == 0 and all(not gradient.any() for gradient in found)


class TestReduction:
    def test_is_the_weighted_sum_over_stages_divided_by_images(self):
        terms = {"nll": torch.rand(3, 2, 4), "mcm": torch.rand(3, 2, 4)}
        loss, parts = reduce_terms(terms, tiny_config(mcm_weight=0.3, loss_weight=5))
        assert list(parts) == [f"{name}.stage{stage}" for name in terms for stage in range(3)]
        for stage in range(3):
            assert parts[f"mcm.stage{stage}"].item() == pytest.approx(terms["mcm"][stage].sum().item() / 2)
        expected = 5 * sum(parts[f"nll.stage{s}"] + 0.3 * parts[f"mcm.stage{s}"] for s in range(3))
        torch.testing.assert_close(loss, expected)
        assert not any(value.requires_grad for value in parts.values())

    def test_one_batch_of_eight_is_the_mean_of_four_of_two(self):
        config = tiny_config()
        labels, targets = targets_of(3, 0, 7, 1, 2, 2, 0, 5)
        raw = random_stage(8, 5)
        loss, *whole = gradients(raw, targets, config)
        losses, parts = [], [torch.zeros_like(value) for value in raw]
        for first in range(0, 8, 2):
            pair = [value[first : first + 2].detach().requires_grad_() for value in raw]
            value, *found = gradients(
                pair, pad_targets(labels[first : first + 2], torch.tensor([[64, 96]] * 2), torch.float64), config
            )
            losses.append(value)
            for total, gradient in zip(parts, found, strict=True):
                total[first : first + 2] = gradient / 4
        torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-12, atol=0)
        for ours, expected in zip(whole, parts, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)

    def test_weight_two_is_the_public_form_also_after_clipping(self):
        """Public form: sum over the 2 images of a GPU, gradients averaged over 4 GPUs, clipped at norm 1."""
        labels, targets = targets_of(3, 1, 7, 1, 2, 2, 0, 5)
        weight = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) / 4
        raw = [value.detach() for value in random_stage(8, 5)]

        def clipped(gradient, max_norm=1.0):
            return gradient * (max_norm / gradient.norm()).clamp(max=1)

        def mixture(parameter, images):
            boxes, *others = (value[images] for value in raw)
            return mixture_of(boxes + boxes @ parameter, *others)

        config = tiny_config(loss_weight=2)
        parameter = weight.clone().requires_grad_()
        loss, _ = reduce_terms(nll_mcm([mixture(parameter, slice(0, 8))], targets, config), config)
        (ours,) = torch.autograd.grad(loss, parameter)

        public = torch.zeros_like(weight)
        for first in range(0, 8, 2):
            parameter = weight.clone().requires_grad_()
            pair = pad_targets(labels[first : first + 2], torch.tensor([[64, 96]] * 2), torch.float64)
            terms = nll_mcm([mixture(parameter, slice(first, first + 2))], pair, config)
            gpu_loss = (terms["nll"] + 0.5 * terms["mcm"]).sum()
            public += torch.autograd.grad(gpu_loss, parameter)[0] / 4
        assert public.norm() > 1.5
        torch.testing.assert_close(ours, public, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(clipped(ours), clipped(public), rtol=1e-10, atol=1e-12)
        # With weight 1 the clipped gradient would be another one wherever the norm is below 2.
        shrunk = public * (1.5 / public.norm())
        assert not torch.allclose(clipped(shrunk / 2), clipped(shrunk))


@pytest.mark.parametrize("options", [{}, {"likelihood_epsilon": 0, "coordinate_distribution": "gaussian"}], ids=str)
def test_gradients_are_those_of_the_value(options):
    config = tiny_config(mcm_stop_gradient=[], min_scale_ratio=0.1, **options)
    _, targets = targets_of(2, 1)
    raw = random_stage(2, 3)
    for name in ("nll", "mcm"):

        def term(*values, name=name):
            return nll_mcm([mixture_of(*values)], targets, config)[name]

        assert gradcheck(term, raw, fast_mode=True)


@pytest.mark.parametrize(
    ("distribution", "epsilon", "ratio"),
    itertools.product(["cauchy", "gaussian", "student_t"], [0, 1e-12], [0, 0.04]),
)
def test_extreme_predictions_give_finite_losses_and_gradients(distribution, epsilon, ratio):
    config = tiny_config(coordinate_distribution=distribution, likelihood_epsilon=epsilon, min_scale_ratio=ratio)
    _, targets = targets_of(2, 0, dtype=torch.float32)
    for scale, shift, logit in itertools.product((0.0, 1e-30, 1.0, 1e30), (0.0, 1e6), (0.0, 1e4, -1e4)):
        boxes, _, classes, objectness = (value.detach() for value in random_stage(2, 4, dtype=torch.float32))
        classes, objectness = (
            classes + logit * torch.tensor([1, 0, -1]),
            objectness + logit * torch.tensor([1, -1, 1, -1]),
        )
        leaves = [boxes + shift, torch.full((2, 4, 4), scale), classes, objectness]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        mixture = MixtureParameters(*leaves, log_mixing_coefficients(leaves[3]))
        loss, _ = reduce_terms(nll_mcm([mixture], targets, config), config)
        found = torch.autograd.grad(loss, leaves)
        assert loss.isfinite() and all(value.isfinite().all() for value in found), (scale, shift, logit)


class CountOperations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_work_is_batched_over_images_and_ground_truths():
    """The number of tensor operations depends on neither."""
    config, counts = tiny_config(), []
    for truths in ((1,), (4, 9, 2, 7, 3)):
        _, targets = targets_of(*truths)
        stages = [mixture_of(*random_stage(len(truths), 5)) for _ in range(2)]
        with CountOperations() as operations:
            reduce_terms(nll_mcm(stages, targets, config), config)
        counts.append(operations.count)
    assert counts[0] == counts[1] > 20


class TestPadTargets:
    def test_brings_labels_of_any_type_into_pixels_of_their_own_picture(self):
        labels = [
            {"class_labels": torch.tensor([2], dtype=torch.int32), "boxes": torch.tensor([[0.5, 0.5, 0.2, 1.0]])},
            {"class_labels": torch.zeros(0), "boxes": torch.zeros(0, 4)},
            {"class_labels": torch.tensor([1, 0]), "boxes": torch.full((2, 4), 0.25, dtype=torch.float64)},
        ]
        sizes = torch.tensor([[100, 200], [10, 10], [40, 80]])
        boxes, class_labels, mask = pad_targets(labels, sizes, torch.float64)
        assert boxes.dtype == torch.float64 and class_labels.dtype == torch.int64
        assert mask.tolist() == [[True, False], [False, False], [True, True]]
        assert class_labels[mask].tolist() == [2, 1, 0]
        torch.testing.assert_close(boxes[0, 0], torch.tensor([80.0, 0, 120, 100], dtype=torch.float64))
        torch.testing.assert_close(boxes[2, 1], torch.tensor([10.0, 5, 30, 15], dtype=torch.float64))

    def test_refuses_what_does_not_fit(self):
        size = torch.tensor([[10, 10]])
        with pytest.raises(ValueError, match="labels holds 2 entries for 1 images"):
            pad_targets(random_labels(1, 1), size, torch.float32)
        boxes, classes = torch.rand(2, 4), torch.tensor([0, 1])
        for label in (
            {"boxes": boxes[:1], "class_labels": classes},
            {"boxes": boxes, "class_labels": classes[:, None]},
            {"boxes": boxes[:, :3], "class_labels": classes},
            {"boxes": torch.tensor([]), "class_labels": classes[:0]},
        ):
            with pytest.raises(ValueError, match=r"labels\[0\] has boxes of shape .* must be \(N, 4\) and \(N,\)"):
                pad_targets([label], size, torch.float32)


def test_labels_that_nothing_can_learn_are_refused():
    good = random_labels(2, 0, 3)
    check_labels(good, 3)
    check_labels([{"class_labels": torch.tensor([]), "boxes": torch.zeros(0, 4)}], 3)
    for classes, message in (
        (torch.tensor([0, 3]), r"labels\[0\].* from 0 to 3; .*num_labels=3"),
        (torch.tensor([-1, 2]), r"from -1 to 2"),
        (torch.tensor([0.0, 1.5]), "float32; they must be integers"),
    ):
        with pytest.raises(ValueError, match=message):
            check_labels([good[0] | {"class_labels": classes}], 3)
    with pytest.raises(ValueError, match=r"labels\[1\] has boxes .*nan.* must be finite"):
        check_labels([good[1], good[0] | {"boxes": torch.tensor([[0.5, 0.5, 0.1, math.nan]] * 2)}], 3)
