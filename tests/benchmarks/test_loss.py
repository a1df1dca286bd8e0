"""Both losses see the same predictions, and each is the loss that its detector trains with."""

import math

import pytest
import torch
from transformers import DeformableDetrConfig

from drmm_hf import DrmmConfig
from drmm_hf.benchmarks.loss import _losses, benchmark_loss
from drmm_hf.modeling.criteria import nll_mcm


def test_every_prediction_of_every_stage_gets_a_gradient_from_both():
    losses = _losses(3, 2, 12, 5, 4, torch.device("cpu"))
    # Ours takes each stage's boxes, scales and two kinds of logits as its head gives them; theirs takes stacks.
    for name, expected, shape in (("drmm", 3 * 4, (2, 12)), ("deformable_detr", 2, (3, 2, 12))):
        loss = losses[name]()
        assert loss.isfinite()
        leaves = {node for node in _leaves(loss.grad_fn)}
        assert len(leaves) == expected
        loss.backward()
        for leaf in leaves:
            assert leaf.grad.shape[: len(shape)] == shape
            by_stage = leaf.grad.flatten(1) if len(shape) == 3 else leaf.grad.flatten()[None]
            assert leaf.grad.isfinite().all() and (by_stage != 0).any(1).all()


def test_a_pass_does_not_add_to_the_gradients_of_the_one_before():
    losses = _losses(2, 1, 6, 3, 2, torch.device("cpu"))
    for loss in losses.values():
        gradients = []
        for _ in range(2):
            value = loss()
            value.backward()
            gradients.append([leaf.grad.clone() for leaf in sorted(_leaves(value.grad_fn), key=id)])
        assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_the_defaults_are_the_detectors():
    assert DrmmConfig().criterion == nll_mcm.__name__
    assert DeformableDetrConfig().num_queries == 300


def test_figures():
    figures = benchmark_loss(
        num_queries=(6, 12), num_objects=(2, 3), num_stages=2, batch_size=2, num_labels=4, repetitions=2
    )
    assert [(case["num_queries"], case["num_objects"]) for case in figures["cases"]] == [
        (6, 2),
        (6, 3),
        (12, 2),
        (12, 3),
    ]
    for case in figures["cases"]:
        assert 0 < case["ratio"]["min"] <= case["ratio"]["median"] <= case["ratio"]["max"] < math.inf
        for name in ("drmm", "deformable_detr"):
            assert 0 < case[name]["processor_seconds"]["median"] < 10


@pytest.mark.parametrize("name", ["num_queries", "num_objects"])
def test_numbers_out_of_range(name):
    with pytest.raises(ValueError, match=f"{name} is 0, must be at least 1"):
        benchmark_loss(**{name: (0,)})


def _leaves(node, seen=None):
    """Yield the tensors that a graph accumulates gradients into."""
    seen = set() if seen is None else seen
    if node is None or node in seen:
        return
    seen.add(node)
    if hasattr(node, "variable"):
        yield node.variable
    for following, _ in node.next_functions:
        yield from _leaves(following, seen)
