"""The objectives against plain loops in probability space, and the promises about batches, padding and extremes."""

import datetime
import itertools
import math

import pytest
import torch
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import generalized_box_iou, sigmoid_focal_loss

from conftest import random_labels, tiny_config
from drmm_hf.modeling import criteria
from drmm_hf.modeling.boxes import BoxPredictions
from drmm_hf.modeling.criteria import (
    CRITERIA,
    Targets,
    check_labels,
    focal_l1_giou,
    focal_loss,
    generalized_iou,
    maximum_component_maximization,
    negative_log_likelihood,
    nll_mcm,
    pad_targets,
    reduce_terms,
    stack_stages,
)
from drmm_hf.modeling.matching import match
from drmm_hf.modeling.mixture import (
    MixtureParameters,
    effective_number_of_positives,
    log_mixing_coefficients,
    responsibilities,
)


MATCHING = ["nll_mcm_bipartite", "bipartite_nll"]
LIKELIHOODS = ["nll_mcm", "nll", "max_nll", *MATCHING]


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


def random_boxes(batch_size, num_queries, num_labels=3, seed=0, dtype=torch.float64):
    """Return a stage's boxes and class logits as leaves; one box in three is inverted along x."""
    boxes, _, class_logits, _ = random_stage(batch_size, num_queries, num_labels, seed, dtype)
    boxes = boxes.detach().clone()
    boxes[:, ::3] = boxes[:, ::3, [2, 1, 0, 3]]
    return [boxes.requires_grad_(), class_logits]


def box_gradients(raw, targets, config):
    loss, _ = reduce_terms(focal_l1_giou([BoxPredictions(*raw)], targets, config), targets, config)
    return [loss, *torch.autograd.grad(loss, raw)]


def density(distance, scale, config):
    if config.coordinate_distribution == "gaussian":
        return math.exp(-0.5 * (distance / scale) ** 2) / (scale * math.sqrt(2 * math.pi))
    if config.coordinate_distribution == "cauchy":
        return 1 / (math.pi * scale * (1 + (distance / scale) ** 2))
    v = config.student_t_freedom
    constant = math.gamma((v + 1) / 2) / (math.gamma(v / 2) * math.sqrt(v * math.pi) * scale)
    return constant * (1 + (distance / scale) ** 2 / v) ** (-(v + 1) / 2)


def oracle(mixture, labels, size, config):
    """Eq. 2-8 and Tables 2-3 as written: one number after the other, products of probabilities.

    Gives per image a list of (nll, mcm), with 0 for a term that is not there.
    """
    height, width = size
    boxes, scales = mixture.boxes.tolist(), mixture.scales.tolist()
    objectness, classes = mixture.objectness_logits.sigmoid().tolist(), mixture.class_logits.softmax(-1).tolist()
    result = []
    for image, label in enumerate(labels):
        matrix = []
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
            matrix.append(likelihoods)
        result.append(reduce_as_written(matrix, config.criterion, config.likelihood_epsilon))
    return result


def reduce_as_written(matrix, criterion, epsilon):
    """Reduce the likelihoods of one picture, a row for each ground truth."""
    chosen, terms = {}, []
    if matrix and criterion in MATCHING:
        costs = [[-math.log(likelihood) for likelihood in row] for row in matrix]
        chosen = {i: matrix[i][k] for i, k in zip(*linear_sum_assignment(costs), strict=True)}
    for truth, row in enumerate(matrix):
        likelihood = {"max_nll": max(row), "bipartite_nll": chosen.get(truth)}.get(criterion, sum(row))
        winner = {"nll_mcm": max(row), "nll_mcm_bipartite": chosen.get(truth)}.get(criterion)
        nll = 0.0 if likelihood is None else -math.log(likelihood + epsilon)
        mcm = 0.0 if winner is None else -math.log(winner / (sum(row) + epsilon) + epsilon)
        terms.append((nll, mcm))
    return terms


def terms_of(stages, targets, config):
    return CRITERIA[config.criterion](stages, targets, config)


@pytest.mark.parametrize(
    ("criterion", "options"),
    [
        *itertools.product(
            LIKELIHOODS,
            [
                {},
                {"likelihood_epsilon": 0},
                {"likelihood_epsilon": 1e-12, "min_scale_ratio": 0},
                {"likelihood_epsilon": 1e-6},
                {"min_scale_ratio": 0.3, "scale_mixing_by_num_objects": False},
                {"class_exponent": 0.5},
                {"coordinate_distribution": "student_t", "student_t_freedom": 3.5},
            ],
        ),
        # Products of normal densities underflow in the oracle, which a matching cannot take.
        ("nll_mcm", {"coordinate_distribution": "gaussian"}),
        ("nll_mcm", {"coordinate_distribution": "gaussian", "likelihood_epsilon": 0, "min_scale_ratio": 0.5}),
        ("max_nll", {"coordinate_distribution": "gaussian"}),
    ],
    ids=str,
)
def test_equals_the_formulas_written_as_loops(criterion, options):
    """The last picture has more ground truths than components: two of them stay without a partner."""
    config = tiny_config(criterion=criterion, **options)
    labels, targets = targets_of(3, 0, 7)
    with torch.no_grad():
        stages = [mixture_of(*random_stage(3, 5, seed=seed)) for seed in range(2)]
    terms = terms_of(stages, targets, config)
    assert terms.keys() == ({"nll", "mcm"} if "mcm" in criterion else {"nll"})
    assert all(term.shape == (2, 3, 7) for term in terms.values())
    ours = torch.stack([terms["nll"], terms.get("mcm", torch.zeros_like(terms["nll"]))], dim=-1)
    for stage, mixture in enumerate(stages):
        for image, expected in enumerate(oracle(mixture, labels, (64, 96), config)):
            rows = ours[stage, image].tolist()
            assert rows[: len(expected)] == [pytest.approx(list(e), rel=1e-9) for e in expected]
            assert all(row == [0, 0] for row in rows[len(expected) :])
    unmatched = {"nll_mcm_bipartite": ours[:, 2, :, 1] == 0, "bipartite_nll": ours[:, 2, :, 0] == 0}.get(criterion)
    assert unmatched is None or unmatched.sum(-1).tolist() == [2, 2]


@pytest.mark.parametrize("criterion", LIKELIHOODS)
def test_float32_is_close_to_float64(criterion):
    config = tiny_config(criterion=criterion)
    values = {}
    for dtype in (torch.float32, torch.float64):
        raw = random_stage(2, 6, dtype=dtype)
        _, targets = targets_of(4, 2, dtype=dtype)
        loss, _ = reduce_terms(terms_of([mixture_of(*raw)], targets, config), targets, config)
        values[dtype] = [loss, *torch.autograd.grad(loss, raw)]
        assert loss.dtype == dtype
    for single, double in zip(*values.values(), strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5 * double.abs().max().item())


def gradients(raw, targets, config):
    loss, _ = reduce_terms(terms_of([mixture_of(*raw)], targets, config), targets, config)
    return [loss, *torch.autograd.grad(loss, raw)]


@pytest.mark.parametrize("criterion", LIKELIHOODS)
@given(components=st.permutations(range(5)), truths=st.permutations(range(7)))
@settings(max_examples=15)
def test_order_of_components_and_ground_truths_means_nothing(criterion, components, truths):
    config = tiny_config(criterion=criterion)
    raw = [value.detach() for value in random_stage(2, 5)]
    _, targets = targets_of(7, 7)
    shuffled = Targets(*(value[:, truths] for value in targets[:3]), targets.image_sizes)
    before = terms_of([mixture_of(*raw)], targets, config)
    after = terms_of([mixture_of(*(value[:, components] for value in raw))], shuffled, config)
    for name in before:
        torch.testing.assert_close(after[name], before[name][:, :, truths], rtol=1e-12, atol=1e-12)


@given(st.integers(1, 6), st.integers(0, 10_000))
@settings(max_examples=40)
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


@given(st.integers(1, 6), st.integers(0, 10_000), st.sampled_from([0, 1e-12]))
@settings(max_examples=25)
def test_order_of_the_objectives(num_components, seed, epsilon):
    """A sum is at least its largest entry, which is at least the matched one."""
    values = {}
    for criterion in LIKELIHOODS:
        config = tiny_config(criterion=criterion, likelihood_epsilon=epsilon)
        raw = [value.detach() for value in random_stage(2, num_components, seed=seed)]
        values[criterion] = terms_of([mixture_of(*raw)], targets_of(4, 1, seed=seed)[1], config)
    slack, both = 1e-10, values["nll_mcm"]
    assert (values["nll"]["nll"] <= values["max_nll"]["nll"] + slack).all()
    matched = values["bipartite_nll"]["nll"] != 0
    assert matched.sum(-1).tolist() == [[min(4, num_components), 1]]
    assert (values["max_nll"]["nll"] <= values["bipartite_nll"]["nll"] + slack)[matched].all()
    assert (both["mcm"] <= values["nll_mcm_bipartite"]["mcm"] + slack)[matched].all()
    for criterion in ("nll", "nll_mcm_bipartite"):
        torch.testing.assert_close(values[criterion]["nll"], both["nll"], rtol=1e-12, atol=1e-12)
    if epsilon == 0:
        torch.testing.assert_close(both["nll"] + both["mcm"], values["max_nll"]["nll"], rtol=1e-12, atol=1e-10)


def test_an_objectness_without_a_partner_is_only_lowered():
    """`bipartite_nll`: 2 of 5 components are matched; the others learn nothing but through the normaliser of pi."""
    config = tiny_config(criterion="bipartite_nll", likelihood_epsilon=0, min_scale_ratio=0)
    raw = random_stage(1, 5)
    _, *found = gradients(raw, targets_of(2)[1], config)
    unmatched = [k for k in range(5) if not found[0][0, k].any()]
    assert len(unmatched) == 3 and not found[1][0, unmatched].any() and not found[2][0, unmatched].any()
    objectness = raw[3].detach().sigmoid()
    lowered = 2 * objectness * (1 - objectness) / objectness.sum()  # each of 2 matches divides by sum o
    torch.testing.assert_close(found[3][0, unmatched], lowered[0, unmatched], rtol=1e-9, atol=0)


def test_matching_never_gives_two_ground_truths_the_same_component():
    """Two equal ground truths: the largest component serves both, the matched ones differ."""
    config = {name: tiny_config(criterion=name, likelihood_epsilon=0) for name in ("nll_mcm", "nll_mcm_bipartite")}
    _, targets = targets_of(1)
    targets = Targets(*(value.repeat(1, 2, *[1] * (value.dim() - 2)) for value in targets[:3]), targets.image_sizes)
    stage = mixture_of(*random_stage(1, 5))
    largest, matched = (terms_of([stage], targets, c)["mcm"][0, 0] for c in config.values())
    assert largest[0] == largest[1] == matched.min() < matched.max()


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


@pytest.mark.parametrize("criterion", ["nll", "max_nll", "bipartite_nll"])
def test_epsilon_saturates_every_likelihood(criterion):
    raw = [torch.zeros(1, 3, 4), torch.full((1, 3, 4), -20.0), torch.zeros(1, 3, 3), torch.zeros(1, 3)]
    raw = [value.double().requires_grad_() for value in raw]
    _, targets = targets_of(2)
    loss, *found = gradients(raw, targets, tiny_config(criterion=criterion))
    assert loss.item() == pytest.approx(-2 * math.log(1e-12)) and all(g.abs().max() < 1e-9 for g in found)
    loss, *found = gradients(raw, targets, tiny_config(criterion=criterion, likelihood_epsilon=0))
    assert loss > 80 and found[0].abs().max() > 1e-3


@pytest.mark.parametrize("criterion", ["nll_mcm", "nll_mcm_bipartite"])
class TestStopGradient:
    """Boxes and scales belong to F, class logits to P; log pi is taken as a leaf of its own."""

    owners = {"pi": (4,), "F": (0, 1), "P": (2,)}

    def terms(self, criterion, stop_gradient):
        boxes, raw_scales, classes, objectness = random_stage(2, 5)
        leaves = [boxes, raw_scales, classes, objectness, log_mixing_coefficients(objectness).detach()]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        mixture = MixtureParameters(leaves[0], F.softplus(leaves[1]), *leaves[2:])
        config = tiny_config(criterion=criterion, mcm_stop_gradient=list(stop_gradient), min_scale_ratio=0)
        return leaves, terms_of([mixture], targets_of(3, 2)[1], config)

    @pytest.mark.parametrize(
        "stopped", [subset for size in range(3) for subset in itertools.combinations(("pi", "F", "P"), size)]
    )
    def test_stops_exactly_the_chosen_factors_of_the_mcm_term(self, criterion, stopped):
        leaves, terms = self.terms(criterion, stopped)
        found = torch.autograd.grad(terms["mcm"].sum(), leaves, allow_unused=True)
        free_leaves, free_terms = self.terms(criterion, ())
        free = torch.autograd.grad(free_terms["mcm"].sum(), free_leaves, allow_unused=True)
        assert torch.equal(terms["mcm"], free_terms["mcm"])
        for factor, indices in self.owners.items():
            for index in indices:
                if factor in stopped:
                    assert found[index] is None or found[index].abs().max() == 0, factor
                else:
                    assert found[index].abs().max() > 1e-3
                    torch.testing.assert_close(found[index], free[index], rtol=1e-12, atol=1e-14)

    def test_stopping_everything_leaves_the_nll_alone(self, criterion):
        leaves, terms = self.terms(criterion, ("pi", "F", "P"))
        assert not terms["mcm"].requires_grad
        _, free = self.terms(criterion, ())
        loss = torch.autograd.grad(terms["nll"].sum(), [leaves[i] for i in (0, 1, 2, 4)])
        assert all(gradient.abs().max() > 1e-3 for gradient in loss)
        assert torch.equal(terms["nll"], free["nll"])


@pytest.mark.parametrize("criterion", LIKELIHOODS)
def test_a_batch_is_its_images(criterion):
    config = tiny_config(criterion=criterion)
    labels, targets = targets_of(3, 0, 7, 1)
    raw = random_stage(4, 5)
    batch = terms_of([mixture_of(*raw)], targets, config)
    _, *batch_gradients = gradients(raw, targets, config)
    for image, label in enumerate(labels):
        alone = [value[image : image + 1].detach().requires_grad_() for value in raw]
        single = pad_targets([label], torch.tensor([[64, 96]]), torch.float64)
        terms = terms_of([mixture_of(*alone)], single, config)
        count = len(label["class_labels"])
        for name in batch:
            torch.testing.assert_close(batch[name][:, image, :count], terms[name][:, 0], rtol=1e-12, atol=1e-12)
        _, *expected = gradients(alone, single, config)
        for ours, value in zip(batch_gradients, expected, strict=True):
            torch.testing.assert_close(4 * ours[image], value[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("criterion", LIKELIHOODS)
def test_padding_changes_neither_values_nor_gradients(criterion):
    config = tiny_config(criterion=criterion)
    _, targets = targets_of(3, 5)
    garbage = Targets(
        F.pad(targets.boxes, (0, 0, 0, 3), value=1e6),
        F.pad(targets.class_labels, (0, 3), value=2),
        F.pad(targets.mask, (0, 3)),
        targets.image_sizes,
    )
    raw = random_stage(2, 5)
    plain, padded = (terms_of([mixture_of(*raw)], t, config) for t in (targets, garbage))
    for name in plain:
        assert torch.equal(padded[name][:, :, :5], plain[name])
        assert not padded[name][:, :, 5:].any()
    for ours, expected in zip(gradients(raw, garbage, config), gradients(raw, targets, config), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("criterion", LIKELIHOODS)
def test_stages_of_different_lengths_are_stacked_without_a_trace(criterion):
    """The last stage has fewer components than ground truths, and filled up ones that nothing may be matched to."""
    config = tiny_config(criterion=criterion)
    _, targets = targets_of(3, 2)
    raws = [random_stage(2, count, seed=count) for count in (6, 4, 1)]
    terms = terms_of([mixture_of(*raw) for raw in raws], targets, config)
    total = sum(term.sum() for term in terms.values())
    stacked = torch.autograd.grad(total, sum(raws, []))
    expected = []
    for stage, raw in enumerate(raws):
        alone = terms_of([mixture_of(*raw)], targets, config)
        for name in terms:
            torch.testing.assert_close(terms[name][stage], alone[name][0], rtol=1e-12, atol=1e-12)
        expected += torch.autograd.grad(sum(term.sum() for term in alone.values()), raw)
    for ours, value in zip(stacked, expected, strict=True):
        torch.testing.assert_close(ours, value, rtol=1e-10, atol=1e-12)
    assert stack_stages([mixture_of(*raw) for raw in raws]).log_mixing[2, :, 1:].eq(-math.inf).all()


@pytest.mark.parametrize("criterion", LIKELIHOODS)
class TestEmptyImages:
    def test_contribute_exactly_nothing(self, criterion):
        config = tiny_config(criterion=criterion)
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
    def test_a_batch_of_nothing_else_stays_connected(self, criterion, num_components):
        raw = random_stage(2, num_components)
        loss, *found = gradients(raw, targets_of(0, 0)[1], tiny_config(criterion=criterion))
        assert loss.item() == 0 and all(not gradient.any() for gradient in found)


class TestReduction:
    def test_is_the_weighted_sum_over_stages_divided_by_images(self):
        terms = {"nll": torch.rand(3, 2, 4), "mcm": torch.rand(3, 2, 4)}
        loss, parts = reduce_terms(terms, targets_of(4, 4)[1], tiny_config(mcm_weight=0.3, loss_weight=5))
        assert list(parts) == [f"{name}.stage{stage}" for name in terms for stage in range(3)]
        for stage in range(3):
            assert parts[f"mcm.stage{stage}"].item() == pytest.approx(terms["mcm"][stage].sum().item() / 2)
        expected = 5 * sum(parts[f"nll.stage{s}"] + 0.3 * parts[f"mcm.stage{s}"] for s in range(3))
        torch.testing.assert_close(loss, expected)
        assert not any(value.requires_grad for value in parts.values())

    def test_the_maximum_term_may_be_of_the_last_stage_alone(self):
        terms = {"nll": torch.rand(3, 2, 4), "mcm": torch.rand(3, 2, 4)}
        loss, parts = reduce_terms(terms, targets_of(4, 4)[1], tiny_config(mcm_weight=0.3, mcm_stages="last"))
        torch.testing.assert_close(loss, terms["nll"].sum() / 2 + 0.3 * terms["mcm"][2].sum() / 2)
        assert len(parts) == 6  # all are told

    def test_a_term_of_another_name_counts_once_an_image(self):
        """A criterion of one's own may bring its own terms."""
        terms = {"nll": torch.rand(3, 2, 4), "smoothness": torch.rand(3, 2, 7, 5)}
        loss, parts = reduce_terms(terms, targets_of(4, 4)[1], tiny_config(loss_weight=5))
        torch.testing.assert_close(loss, 5 * sum(term.sum() / 2 for term in terms.values()))
        torch.testing.assert_close(parts["smoothness.stage2"], terms["smoothness"][2].sum() / 2)

    @pytest.mark.parametrize("criterion", LIKELIHOODS)
    def test_one_batch_of_eight_is_the_mean_of_four_of_two(self, criterion):
        config = tiny_config(criterion=criterion)
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
        loss, _ = reduce_terms(nll_mcm([mixture(parameter, slice(0, 8))], targets, config), targets, config)
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


@pytest.mark.parametrize("criterion", LIKELIHOODS)
@pytest.mark.parametrize("options", [{}, {"likelihood_epsilon": 0, "coordinate_distribution": "gaussian"}], ids=str)
def test_gradients_are_those_of_the_value(criterion, options):
    config = tiny_config(criterion=criterion, mcm_stop_gradient=[], min_scale_ratio=0.1, **options)
    _, targets = targets_of(2, 1)
    raw = random_stage(2, 3)
    for name in terms_of([mixture_of(*raw)], targets, config):

        def term(*values, name=name):
            return terms_of([mixture_of(*values)], targets, config)[name]

        assert gradcheck(term, raw, fast_mode=True)


@pytest.mark.parametrize(
    ("criterion", "distribution", "epsilon", "ratio"),
    [
        *itertools.product(["nll_mcm"], ["cauchy", "gaussian", "student_t"], [0, 1e-12], [0, 0.04]),
        *itertools.product(LIKELIHOODS[1:], ["cauchy", "gaussian"], [0], [0]),
        *itertools.product(LIKELIHOODS[1:], ["cauchy"], [1e-12], [0.04]),
    ],
)
def test_extreme_predictions_give_finite_losses_and_gradients(criterion, distribution, epsilon, ratio):
    config = tiny_config(
        criterion=criterion,
        coordinate_distribution=distribution,
        likelihood_epsilon=epsilon,
        min_scale_ratio=ratio,
    )
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
        loss, _ = reduce_terms(terms_of([mixture], targets, config), targets, config)
        found = torch.autograd.grad(loss, leaves)
        assert loss.isfinite() and all(value.isfinite().all() for value in found), (scale, shift, logit)


class CountOperations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def generalized_iou_as_written(box, other):
    """Signed areas; union and hull of at least 1e-6."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    other_area = (other[2] - other[0]) * (other[3] - other[1])
    sides = [(min(box[d + 2], other[d + 2]) - max(box[d], other[d])) for d in (0, 1)]
    overlap = max(sides[0], 0) * max(sides[1], 0)
    sides = [(max(box[d + 2], other[d + 2]) - min(box[d], other[d])) for d in (0, 1)]
    hull = max(max(sides[0], 0) * max(sides[1], 0), 1e-6)
    union = max(area + other_area - overlap, 1e-6)
    return overlap / union - (hull - union) / hull


def box_oracle(boxes, logits, labels, size, config):
    """Match and sum one picture of one stage with numbers alone; return the three sums and the number of matches."""
    height, width = size
    truths = []
    for box, name in zip(labels["boxes"].tolist(), labels["class_labels"].tolist(), strict=True):
        x, y, w, h = (value * side for value, side in zip(box, (width, height, width, height), strict=True))
        truths += [((x - w / 2, y - h / 2, x + w / 2, y + h / 2), name)] * config.num_ground_truth_copies
    alpha, gamma = config.focal_alpha, config.focal_gamma

    def distance(box, truth):
        return sum(abs(a - b) / (width, height)[d % 2] for d, (a, b) in enumerate(zip(box, truth, strict=True)))

    def cost(box, scores, truth, name):
        right = -alpha * (1 - scores[name]) ** gamma * math.log(scores[name] + 1e-12)
        wrong = -(1 - alpha) * scores[name] ** gamma * math.log(1 - scores[name] + 1e-12)
        overlap = generalized_iou_as_written(box, truth)
        return (
            config.class_cost * (right - wrong) + config.bbox_cost * distance(box, truth) - config.giou_cost * overlap
        )

    boxes, scores = boxes.tolist(), logits.sigmoid().tolist()
    pairs = {}
    if truths:
        costs = [[cost(*prediction, *truth) for truth in truths] for prediction in zip(boxes, scores, strict=True)]
        pairs = {k.item(): truths[i] for k, i in zip(*linear_sum_assignment(costs), strict=True)}
    sums = {"class": 0.0, "bbox": 0.0, "giou": 0.0}
    for k, row in enumerate(scores):
        for name, score in enumerate(row):
            if k in pairs and pairs[k][1] == name:
                sums["class"] -= alpha * (1 - score) ** gamma * math.log(score)
            else:
                sums["class"] -= (1 - alpha) * score**gamma * math.log(1 - score)
        if k in pairs:
            sums["bbox"] += distance(boxes[k], pairs[k][0])
            sums["giou"] += 1 - generalized_iou_as_written(boxes[k], pairs[k][0])
    return sums, len(pairs)


class TestBoxCriterion:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"num_ground_truth_copies": 3},
            {"class_cost": 0.5, "bbox_cost": 3, "giou_cost": 0},
            {"focal_alpha": 0.6, "focal_gamma": 0.5},
            {"class_loss_coefficient": 1, "bbox_loss_coefficient": 0, "giou_loss_coefficient": 7, "loss_weight": 3},
        ],
        ids=str,
    )
    def test_equals_the_formulas_written_as_loops(self, options):
        """The third picture has more ground truths than queries; the copies of the first are more too."""
        config = config_for("focal_l1_giou", **options)
        labels, targets = targets_of(2, 0, 7)
        with torch.no_grad():
            stages = [BoxPredictions(*random_boxes(3, 5, seed=seed)) for seed in range(2)]
        terms = focal_l1_giou(stages, targets, config)
        loss, parts = reduce_terms(terms, targets, config)
        assert list(parts) == [f"{name}.stage{stage}" for name in ("class", "bbox", "giou") for stage in range(2)]
        expected_loss = 0.0
        for index, stage in enumerate(stages):
            totals, num_matched = dict.fromkeys(terms, 0.0), 0
            for image, label in enumerate(labels):
                sums, count = box_oracle(stage.boxes[image], stage.class_logits[image], label, (64, 96), config)
                num_matched += count
                for name, value in sums.items():
                    assert terms[name][index, image].sum().item() == pytest.approx(value, rel=1e-9)
                    totals[name] += value
            assert num_matched == min(2 * config.num_ground_truth_copies, 5) + 5
            for name, value in totals.items():
                assert parts[f"{name}.stage{index}"].item() == pytest.approx(value / num_matched, rel=1e-9)
                weight = getattr(config, f"{name}_loss_coefficient")
                expected_loss += config.loss_weight * weight * value / num_matched
        assert loss.item() == pytest.approx(expected_loss, rel=1e-9)

    @given(st.permutations(range(5)), st.permutations(range(7)), st.integers(1, 3))
    @settings(max_examples=20)
    def test_order_of_queries_and_ground_truths_means_nothing(self, queries, truths, copies):
        config = config_for("focal_l1_giou", num_ground_truth_copies=copies)
        raw = [value.detach() for value in random_boxes(2, 5)]
        _, targets = targets_of(7, 3)
        shuffled = Targets(*(value[:, truths] for value in targets[:3]), targets.image_sizes)
        before = focal_l1_giou([BoxPredictions(*raw)], targets, config)
        after = focal_l1_giou([BoxPredictions(*(value[:, queries] for value in raw))], shuffled, config)
        torch.testing.assert_close(after["class"], before["class"][:, :, queries], rtol=1e-12, atol=1e-12)
        for name in ("bbox", "giou"):
            # Copies of a ground truth share their predictions in any order.
            ours, expected = (value[name].unflatten(-1, (copies, 7)).sum(2) for value in (after, before))
            torch.testing.assert_close(ours, expected[..., truths], rtol=1e-12, atol=1e-12)

    def test_a_batch_is_its_images_and_their_matches(self):
        """Each picture's own loss counts by its matched predictions: 3, 5 (of 7), 1."""
        config = config_for("focal_l1_giou")
        labels, targets = targets_of(3, 7, 1)
        raw = random_boxes(3, 5)
        batch, *found = box_gradients(raw, targets, config)
        total = 0.0
        for image, (label, matched) in enumerate(zip(labels, (3, 5, 1), strict=True)):
            alone = [value[image : image + 1].detach().requires_grad_() for value in raw]
            single = pad_targets([label], torch.tensor([[64, 96]]), torch.float64)
            loss, *expected = box_gradients(alone, single, config)
            total += loss * matched / 9
            for ours, gradient in zip(found, expected, strict=True):
                torch.testing.assert_close(ours[image], gradient[0] * matched / 9, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(batch, total, rtol=1e-12, atol=0)

    def test_padding_changes_neither_values_nor_gradients(self):
        config = config_for("focal_l1_giou", num_ground_truth_copies=2)
        _, targets = targets_of(3, 1)
        garbage = Targets(
            F.pad(targets.boxes, (0, 0, 0, 3), value=math.nan),
            F.pad(targets.class_labels, (0, 3), value=2),
            F.pad(targets.mask, (0, 3)),
            targets.image_sizes,
        )
        raw = random_boxes(2, 5)
        for ours, expected in zip(
            box_gradients(raw, garbage._replace(boxes=garbage.boxes.nan_to_num(1e6)), config),
            box_gradients(raw, targets, config),
            strict=True,
        ):
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)

    def test_a_picture_without_ground_truth_is_background(self):
        config = config_for("focal_l1_giou")
        raw = random_boxes(2, 5)
        terms = focal_l1_giou([BoxPredictions(*raw)], targets_of(0, 2)[1], config)
        background = focal_loss(raw[1][0], torch.tensor(False), 0.25, 2).sum(-1)
        torch.testing.assert_close(terms["class"][0, 0], background, rtol=1e-12, atol=0)
        assert not terms["bbox"][0, 0].any() and not terms["giou"][0, 0].any()
        assert terms["bbox"][0, 1].gt(0).tolist() == terms["giou"][0, 1].gt(0).tolist() == [True, True]

    @pytest.mark.parametrize("copies", [1, 4])
    def test_a_batch_without_ground_truth_has_a_finite_loss(self, copies):
        """Documented deviation: the public code divides the background by 0 matches; ours by at least 1."""
        config = config_for("focal_l1_giou", num_ground_truth_copies=copies)
        raw = random_boxes(2, 5)
        _, targets = targets_of(0, 0)
        loss, *found = box_gradients(raw, targets, config)
        background = 2 * sigmoid_focal_loss(raw[1], torch.zeros_like(raw[1]), 0.25, 2, reduction="sum")
        torch.testing.assert_close(loss, background, rtol=1e-10, atol=0)
        assert not found[0].any() and found[1].isfinite().all() and found[1].gt(0).all()
        _, parts = reduce_terms(focal_l1_giou([BoxPredictions(*raw)], targets, config), targets, config)
        assert parts["bbox.stage0"] == parts["giou.stage0"] == 0

    def test_perfect_predictions_cost_only_their_uncertainty(self):
        config = config_for("focal_l1_giou")
        _, targets = targets_of(3)
        logits = 40 * F.one_hot(targets.class_labels, 3) - 20.0
        terms = focal_l1_giou([BoxPredictions(targets.boxes, logits)], targets, config)
        assert terms["bbox"].max() == 0 and terms["giou"].abs().max() < 1e-12 and terms["class"].max() < 1e-15

    def test_float32_is_close_to_float64(self):
        config, values = config_for("focal_l1_giou"), {}
        for dtype in (torch.float32, torch.float64):
            values[dtype] = box_gradients(random_boxes(2, 6, dtype=dtype), targets_of(4, 2, dtype=dtype)[1], config)
            assert values[dtype][0].dtype == dtype
        for single, double in zip(*values.values(), strict=True):
            torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5 * double.abs().max().item())

    @pytest.mark.parametrize("name", ["class", "bbox", "giou"])
    def test_gradients_are_those_of_the_value(self, name):
        config = config_for("focal_l1_giou", num_ground_truth_copies=2)
        _, targets = targets_of(2, 1)

        def term(*raw):
            # Copies of a ground truth may change their predictions with one another: only their sum is smooth.
            return focal_l1_giou([BoxPredictions(*raw)], targets, config)[name].sum(-1)

        assert gradcheck(term, random_boxes(2, 5), fast_mode=True)

    @pytest.mark.parametrize("gamma", [0, 0.5, 2])
    def test_extreme_predictions_give_finite_losses_and_gradients(self, gamma):
        config = config_for("focal_l1_giou", focal_gamma=gamma)
        _, targets = targets_of(2, 0, dtype=torch.float32)
        for scale, shift, logit in itertools.product((0.0, 1e-20, 1.0, 1e12), (0.0, 1e6), (0.0, 100.0, 1e4, -1e4)):
            boxes, classes = (value.detach() for value in random_boxes(2, 4, dtype=torch.float32))
            raw = [boxes * scale + shift, classes + logit * torch.tensor([1, 0, -1])]
            loss, *found = box_gradients([value.requires_grad_() for value in raw], targets, config)
            assert loss.isfinite() and all(value.isfinite().all() for value in found), (scale, shift, logit)

    def test_predictions_that_are_no_numbers_are_named(self):
        config = config_for("focal_l1_giou")
        stages = [BoxPredictions(*(value.detach() for value in random_boxes(3, 5, seed=seed))) for seed in range(2)]
        stages[1].boxes[2, 4, 0] = math.nan
        with pytest.raises(FloatingPointError, match="stage 1, picture 2 is not finite for 2 pairs"):
            focal_l1_giou(stages, targets_of(1, 3, 2)[1], config)


@given(st.integers(0, 10_000), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=30)
def test_generalized_iou_equals_torchvision_on_proper_boxes(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    corners = (100 * torch.rand(2, 6, 2, 2, generator=generator, dtype=dtype)).sort(dim=2).values
    boxes, others = corners.flatten(2)
    ours = generalized_iou(boxes[:, None], others[None])
    torch.testing.assert_close(ours, generalized_box_iou(boxes, others), rtol=1e-4, atol=1e-5)
    assert (ours <= 1).all() and (ours > -1).all()
    assert torch.equal(generalized_iou(others[None], boxes[:, None]), ours)
    torch.testing.assert_close(generalized_iou(boxes, boxes), torch.ones(6, dtype=dtype))


@pytest.mark.parametrize(
    ("box", "other"),
    [
        ((3.0, 4, 1, 9), (1.0, 3, 6, 8)),
        ((3.0, 9, 1, 4), (1.0, 3, 6, 8)),
        ((40.0, 0, -40, 20), (1.0, 3, 6, 8)),  # its area outweighs the other's: a negative union
        ((2.0, 2, 2, 2), (1.0, 3, 6, 8)),
        ((2.0, 2, 2, 2), (2.0, 2, 2, 2)),
        ((2.0, 2, 2.0002, 2.0002), (2.0001, 2.0001, 2.0004, 2.0004)),  # union and hull below the floor
    ],
    ids=str,
)
def test_generalized_iou_of_inverted_and_empty_boxes(box, other):
    ours = generalized_iou(torch.tensor(box, dtype=torch.float64), torch.tensor(other, dtype=torch.float64))
    assert ours.item() == pytest.approx(generalized_iou_as_written(box, other), rel=1e-6)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2), (0.7, 1.5), (0, 1), (1, 0)])
def test_focal_loss_equals_torchvision(alpha, gamma):
    logits = 5 * torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positive = torch.arange(200) % 2 == 0
    expected = sigmoid_focal_loss(logits, positive.double(), alpha, gamma)
    torch.testing.assert_close(focal_loss(logits, positive, alpha, gamma), expected, rtol=1e-9, atol=1e-12)


class TestCountOfMatches:
    """The divisor of the box terms."""

    terms = {"class": torch.ones(2, 3, 5), "bbox": torch.ones(2, 3, 4), "giou": torch.ones(2, 3, 4)}

    @pytest.mark.parametrize(("copies", "expected"), [(1, 3 + 1), (2, 5 + 2), (4, 5 + 4)])
    def test_is_limited_by_the_queries_of_each_picture(self, copies, expected):
        config = config_for("focal_l1_giou", num_ground_truth_copies=copies)
        _, parts = reduce_terms(self.terms, targets_of(3, 0, 1)[1], config)
        assert parts["class.stage1"].item() == pytest.approx(15 / expected)
        assert parts["bbox.stage0"].item() == pytest.approx(12 / expected)

    def test_is_averaged_over_processes(self, tmp_path):
        """Two processes, one of them without a ground truth: the mean of their losses is that of the whole batch."""
        arguments = (str(tmp_path / "store"), str(tmp_path))
        torch.multiprocessing.start_processes(reduce_in_a_process, arguments, nprocs=2, start_method="fork")
        losses = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
        config = config_for("focal_l1_giou")
        assert [loss["bbox.stage0"].item() for loss in losses] == [pytest.approx(8 / 1.5), pytest.approx(8 / 1.5)]
        whole = {name: torch.cat([term, term], dim=1) for name, term in two_pictures().items()}
        loss, _ = reduce_terms(whole, targets_of(1, 2, 0, 0)[1], config)
        assert loss.item() == pytest.approx(sum(loss["loss"].item() for loss in losses) / 2)


def two_pictures():
    return {"class": torch.ones(1, 2, 5), "bbox": torch.ones(1, 2, 4), "giou": torch.ones(1, 2, 4)}


def reduce_in_a_process(rank, store, folder):
    timeout = datetime.timedelta(seconds=30)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout
    )
    counts = [(1, 2), (0, 0)][rank]
    loss, parts = reduce_terms(two_pictures(), targets_of(*counts)[1], config_for("focal_l1_giou"))
    torch.save({"loss": loss, **parts}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


class TestGradientsOfManyPositives:
    """Appendix F: a mixture shares a ground truth by how well each component fits, copies of it do not."""

    likelihoods = torch.tensor([[0.5, 0.02, 0.3, 0.001, 0.1]], dtype=torch.float64)

    def test_the_likelihood_gives_every_component_the_same_gradient(self):
        """Eq. 11b: dL/dp_k = -1 / sum p."""
        likelihoods = self.likelihoods.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(negative_log_likelihood(likelihoods.log(), 0).sum(), likelihoods)
        torch.testing.assert_close(gradient, torch.full_like(gradient, -1 / 0.921), rtol=1e-12, atol=0)

    def test_copies_pull_hardest_at_the_worst_component(self):
        """Eq. 10b: three copies of a ground truth give -1/p_i, -1/p_j and -1/p_k to those they are matched with."""
        likelihoods = self.likelihoods.clone().requires_grad_()
        copies = likelihoods.log().expand(1, 1, 3, 5)
        assigned = match(-copies, torch.ones_like(copies, dtype=torch.bool))
        assert sorted(assigned.flatten().tolist()) == [0, 2, 4]
        loss = negative_log_likelihood(copies.gather(-1, assigned[..., None]), 0).sum()
        (gradient,) = torch.autograd.grad(loss, likelihoods)
        expected = torch.tensor([[-1 / 0.5, 0, -1 / 0.3, 0, -1 / 0.1]], dtype=torch.float64)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)

    def test_responsibilities_are_the_gradients_of_the_likelihood(self):
        log_likelihood = (self.likelihoods.log() + 5).requires_grad_()
        (gradient,) = torch.autograd.grad(negative_log_likelihood(log_likelihood, 0).sum(), log_likelihood)
        torch.testing.assert_close(responsibilities(log_likelihood), -gradient, rtol=1e-12, atol=0)
        torch.testing.assert_close(responsibilities(log_likelihood.detach()), self.likelihoods / 0.921)

    @given(st.integers(1, 8), st.integers(0, 10_000), st.floats(0, 60), st.floats(-500, 500))
    @settings(max_examples=50)
    def test_positives_are_counted_between_the_bounds_that_mcm_sets(self, num_components, seed, spread, unit):
        generator = torch.Generator().manual_seed(seed)
        log_likelihood = spread * torch.rand(3, num_components, dtype=torch.float64, generator=generator) + unit
        count = effective_number_of_positives(log_likelihood)
        mcm = maximum_component_maximization(log_likelihood, 0)
        assert (count >= mcm.exp() - 1e-9).all() and (count <= (2 * mcm).exp() + 1e-9).all()
        assert (count >= 1 - 1e-9).all() and (count <= num_components + 1e-9).all()
        torch.testing.assert_close(count, 1 / responsibilities(log_likelihood).square().sum(-1), rtol=1e-9, atol=0)

    @pytest.mark.parametrize("equal", [1, 3, 6])
    def test_equal_shares_count_as_many_positives(self, equal):
        log_likelihood = torch.full((6,), -math.inf)
        log_likelihood[:equal] = -40.0
        assert effective_number_of_positives(log_likelihood).item() == pytest.approx(equal, rel=1e-5)


def stages_for(criterion, batch_size, num_stages=2):
    """Return random predictions of the kind that the criterion reads."""
    if criterion == "focal_l1_giou":
        return [BoxPredictions(*random_boxes(batch_size, 5, seed=seed)) for seed in range(num_stages)]
    return [mixture_of(*random_stage(batch_size, 5, seed=seed)) for seed in range(num_stages)]


def config_for(criterion, **options):
    return tiny_config(head_type="box" if criterion == "focal_l1_giou" else "mixture", criterion=criterion, **options)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_work_is_batched_over_images_and_ground_truths(criterion, monkeypatch):
    """The number of tensor operations depends on neither, save in the host's part of the matching."""
    monkeypatch.setattr(criteria, "match", lambda cost, valid: cost.argmin(-1).where(valid.any(-1), -1))
    config, counts = config_for(criterion), []
    for truths in ((2,), (4, 9, 2, 7, 3)):
        _, targets = targets_of(*truths)
        stages = stages_for(criterion, len(truths))
        with CountOperations() as operations:
            reduce_terms(terms_of(stages, targets, config), targets, config)
        counts.append(operations.count)
    assert counts[0] == counts[1] > 20


@pytest.mark.parametrize("criterion", CRITERIA)
def test_nothing_but_the_matching_waits_for_the_host(criterion, monkeypatch):
    """Tensors without data refuse every look at a value; their losses and gradients come out all the same."""
    monkeypatch.setattr(criteria, "match", lambda cost, valid: cost.argmin(-1).where(valid.any(-1), -1))
    config = config_for(criterion)
    stages = [type(stage)(*(value.detach().to("meta") for value in stage)) for stage in stages_for(criterion, 3)]
    leaves = [value.requires_grad_() for stage in stages for value in stage]
    targets = Targets(*(value.to("meta") for value in targets_of(3, 0, 7)[1]))
    loss, _ = reduce_terms(terms_of(stages, targets, config), targets, config)
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    assert loss.is_meta and sum(gradient is not None for gradient in found) >= 2 * len(stages)
    with pytest.raises((RuntimeError, NotImplementedError)):
        loss.item()


class TestPadTargets:
    def test_brings_labels_of_any_type_into_pixels_of_their_own_picture(self):
        labels = [
            {"class_labels": torch.tensor([2], dtype=torch.int32), "boxes": torch.tensor([[0.5, 0.5, 0.2, 1.0]])},
            {"class_labels": torch.zeros(0), "boxes": torch.zeros(0, 4)},
            {"class_labels": torch.tensor([1, 0]), "boxes": torch.full((2, 4), 0.25, dtype=torch.float64)},
        ]
        sizes = torch.tensor([[100, 200], [10, 10], [40, 80]])
        boxes, class_labels, mask, image_sizes = pad_targets(labels, sizes, torch.float64)
        assert torch.equal(image_sizes, sizes)
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
