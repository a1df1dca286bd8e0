"""The sums of the default loss against the matrix of all ground truths and components."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import tiny_config
from drmm_hf.modeling import component_sums as module
from drmm_hf.modeling.component_sums import component_sums
from drmm_hf.modeling.criteria import nll_mcm, pad_targets
from drmm_hf.modeling.mixture import (
    MixtureParameters,
    log_class_probability,
    log_coordinate_density,
    log_mixing_coefficients,
)


STAGES, IMAGES, QUERIES, CLASSES = 2, 3, 7, 4


def drawn(num_objects, dtype=torch.float64, seed=0):
    """Return coordinates and labels, then leaves: boxes, scales, log pi and class logits."""
    generator = torch.Generator().manual_seed(seed)
    shape = (STAGES, IMAGES, QUERIES)

    def uniform(*size):
        return torch.rand(*size, generator=generator, dtype=dtype)

    coordinates = 50 * uniform(IMAGES, num_objects, 4)
    labels = torch.randint(CLASSES, (IMAGES, num_objects), generator=generator)
    log_mixing = log_mixing_coefficients(4 * uniform(*shape) - 2)
    leaves = [50 * uniform(*shape, 4), 0.1 + 9 * uniform(*shape, 4), log_mixing, 6 * uniform(*shape, CLASSES)]
    return (coordinates, labels), [leaf.requires_grad_() for leaf in leaves]


def from_the_matrix(coordinates, labels, boxes, scales, log_mixing, logits, unit, exponent, stopped):
    factors = {
        "pi": log_mixing[..., None, :],
        "F": log_coordinate_density(coordinates, boxes, scales, unit=unit),
        "P": log_class_probability(logits, labels.expand(STAGES, -1, -1), exponent),
    }
    log_p = sum(factors.values())
    log_q = sum(value.detach() if name in stopped else value for name, value in factors.items())
    return log_p.logsumexp(-1), log_q.logsumexp(-1), log_q.max(-1).values


@pytest.mark.parametrize("block", [1, 10**9])
@pytest.mark.parametrize(
    "stopped", [subset for size in range(4) for subset in itertools.combinations(("pi", "F", "P"), size)]
)
@pytest.mark.parametrize(("unit", "exponent", "num_objects"), [(1.0, 1.0, 5), (1e-12, 0.7, 4), (1e-12, 1.0, 1)])
def test_equal_the_reductions_of_the_matrix(monkeypatch, block, stopped, unit, exponent, num_objects):
    monkeypatch.setitem(module.BLOCK_ENTRIES, "cpu", block)
    monkeypatch.setattr(module, "BLOCK_OBJECTS", 1)
    truths, leaves = drawn(num_objects)
    ours = component_sums(*truths, *leaves, unit=unit, class_exponent=exponent, stop_gradient=stopped)
    plain = from_the_matrix(*truths, *leaves, unit, exponent, stopped)
    weights = torch.rand(3, *ours[0].shape, dtype=torch.float64)

    def gradients(sums):
        return torch.autograd.grad(sum((w * s).sum() for w, s in zip(weights, sums, strict=True)), leaves)

    for mine, expected in zip((*ours, *gradients(ours)), (*plain, *gradients(plain)), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-12)


def test_components_without_a_share_get_no_gradient():
    """Mixing coefficients of 0 are what `stack_stages` fills up with."""
    truths, leaves = drawn(3)
    with torch.no_grad():
        leaves[2][:, :, 4:] = -math.inf
    sums = component_sums(*truths, *leaves)
    cut = [leaf[:, :, :4] for leaf in leaves]
    for mine, expected in zip(sums, component_sums(*truths, *cut), strict=True):
        torch.testing.assert_close(mine, expected)
    found = torch.autograd.grad(sum(value.sum() for value in sums), leaves)
    assert all((gradient[:, :, 4:] == 0).all() and gradient[:, :, :4].abs().max() > 0 for gradient in found)


def test_no_ground_truth_is_no_sum():
    truths, leaves = drawn(0)
    sums = component_sums(*truths, *leaves)
    assert all(value.shape == (STAGES, IMAGES, 0) for value in sums)
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(sum(v.sum() for v in sums), leaves))


class LargestTensor(TorchDispatchMode):
    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return out


@pytest.mark.parametrize("num_objects", [40, 400])
def test_memory_does_not_grow_with_objects_times_queries(monkeypatch, num_objects):
    monkeypatch.setitem(module.BLOCK_ENTRIES, "cpu", 0)
    monkeypatch.setattr(module, "BLOCK_OBJECTS", 5)
    truths, leaves = drawn(num_objects)
    with LargestTensor() as largest:
        sums = component_sums(*truths, *leaves)
        sum(value.sum() for value in sums).backward()
    assert largest.entries == max(5 * STAGES * IMAGES * QUERIES, 4 * IMAGES * num_objects, leaves[1].numel())


@pytest.mark.parametrize("stopped", [["F"], []])
def test_a_compiled_criterion_is_one_graph_and_equal(stopped):
    config = tiny_config(mcm_stop_gradient=stopped)
    truths, leaves = drawn(3)
    labels = [{"boxes": torch.rand(n, 4), "class_labels": torch.randint(CLASSES, (n,))} for n in (3, 1, 0)]
    targets = pad_targets(labels, torch.tensor([[50, 60]] * IMAGES), torch.float64)

    def loss():
        boxes, scales, log_mixing, logits = leaves
        stages = [MixtureParameters(*s) for s in zip(boxes, scales, logits, log_mixing, log_mixing, strict=True)]
        terms = nll_mcm(stages, targets, config)
        return terms["nll"].sum() + terms["mcm"].sum()

    eager, compiled = loss(), torch.compile(loss, backend="aot_eager", fullgraph=True)()
    torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=0)
    for mine, expected in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)
