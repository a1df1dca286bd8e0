"""The assignment against every possible one, and what it promises about padding, errors and transfers."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from drmm_hf.modeling import matching
from drmm_hf.modeling.matching import match


def random_costs(*shape, seed=0, dtype=torch.float64):
    return 10 * torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def everything(cost):
    return torch.ones_like(cost, dtype=torch.bool)


def best(cost, valid):
    """Try all assignments of a matrix: the largest number of valid pairs and the least cost among those."""
    num_truths, num_predictions = cost.shape
    results = []
    slots = [*range(num_predictions), *[None] * num_truths]
    for choice in set(itertools.permutations(slots, num_truths)):
        pairs = [(i, k) for i, k in enumerate(choice) if k is not None]
        if all(valid[i, k] for i, k in pairs):
            results.append((-len(pairs), sum(cost[i, k].item() for i, k in pairs)))
    count, total = min(results)
    return -count, total


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 10_000), st.floats(0, 1))
@settings(max_examples=60)
def test_takes_as_many_valid_pairs_as_possible_at_the_least_cost(num_truths, num_predictions, seed, share):
    cost = random_costs(1, 2, num_truths, num_predictions, seed=seed)
    valid = torch.rand(cost.shape, generator=torch.Generator().manual_seed(seed)) < share
    assigned = match(cost, valid)
    assert assigned.shape == (1, 2, num_truths) and assigned.dtype == torch.int64
    for picture in range(2):
        pairs = [(i, k) for i, k in enumerate(assigned[0, picture].tolist()) if k >= 0]
        assert len({k for _, k in pairs}) == len(pairs) and all(valid[0, picture, i, k] for i, k in pairs)
        total = sum(cost[0, picture, i, k].item() for i, k in pairs)
        most, least = best(cost[0, picture], valid[0, picture])
        assert len(pairs) == most and total == pytest.approx(least)


def test_two_dear_pairs_come_before_a_cheap_one():
    cost = torch.tensor([[[[0.0, 100.0], [100.0, 0.0]]]])
    assert match(cost, torch.tensor([[True, True], [True, False]])).tolist() == [[[1, 0]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("num_truths", "num_predictions"), [(4, 9), (9, 4), (5, 5)])
def test_every_stage_and_picture_is_scipys(num_truths, num_predictions, dtype):
    cost = random_costs(3, 2, num_truths, num_predictions, dtype=dtype)
    assigned = match(cost, everything(cost))
    for stage, picture in itertools.product(range(3), range(2)):
        rows, columns = linear_sum_assignment(cost[stage, picture].double().numpy())
        expected = torch.full((num_truths,), -1)
        expected[torch.from_numpy(rows)] = torch.from_numpy(columns)
        assert torch.equal(assigned[stage, picture], expected)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, -1e30])
def test_padding_takes_no_part_whatever_it_holds(garbage):
    """Rows and columns of padding: the others are matched as if they were alone, and never with padding."""
    cost = random_costs(2, 2, 4, 6)
    truths, predictions = torch.arange(7) < 4, torch.arange(8) < 6
    padded = cost.new_full((2, 2, 7, 8), garbage)
    padded[:, :, :4, :6] = cost
    assigned = match(padded, truths[:, None] & predictions)
    assert torch.equal(assigned[..., :4], match(cost, everything(cost))) and assigned[..., 4:].eq(-1).all()


def test_predictions_run_out():
    """Three of five predictions are padding: two of four ground truths go without, and padding is not given out."""
    cost = random_costs(1, 1, 4, 5)
    assigned = match(cost, torch.arange(5) < 2)[0, 0]
    assert sorted(assigned.tolist()) == [-1, -1, 0, 1]
    assert torch.equal(assigned, match(cost[..., :2], torch.tensor(True))[0, 0])


@pytest.mark.parametrize("shape", [(2, 3, 0, 5), (0, 3, 2, 5), (2, 0, 2, 5), (2, 3, 2, 0)])
def test_nothing_to_match(shape):
    cost = torch.zeros(shape)
    assert match(cost, everything(cost)).tolist() == torch.full(shape[:3], -1).tolist()


def test_nothing_valid():
    cost = random_costs(2, 2, 3, 4)
    assert match(cost, torch.zeros_like(cost, dtype=torch.bool)).eq(-1).all()
    assert match(cost, torch.tensor([True, False])[:, None, None])[:, 0].ge(0).all()


def test_costs_of_any_size():
    cost = random_costs(1, 1, 3, 5)
    expected = match(cost, everything(cost))
    for scale in (1e-30, 1e30):
        assert torch.equal(match(cost * scale, everything(cost)), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_valid_cost_that_is_not_finite_is_an_error_in_words(value):
    cost = random_costs(3, 4, 2, 5)
    cost[1, 2, 0, 3:] = value
    with pytest.raises(FloatingPointError, match="stage 1, picture 2 is not finite for 2 pairs of ground truth"):
        match(cost, everything(cost))
    assert match(cost, torch.arange(5) < 3).ge(0).all()


def test_scipy_is_asked_for_in_words(monkeypatch):
    monkeypatch.setattr(matching, "is_scipy_available", lambda: False)
    with pytest.raises(ImportError, match="focal_l1_giou.* need scipy.*pip install scipy"):
        match(torch.zeros(1, 1, 2, 3), torch.tensor(True))


def test_passes_no_gradient_and_changes_no_cost():
    cost = random_costs(1, 2, 3, 4).requires_grad_()
    before = cost.detach().clone()
    valid = torch.arange(4) < 3
    assigned = match(cost, valid)
    assert not assigned.requires_grad and torch.equal(cost.detach(), before)
    with torch.no_grad():
        assert torch.equal(match(cost, valid), assigned)
    with torch.inference_mode():
        assert torch.equal(match(cost, valid), assigned)


def test_costs_reach_the_host_in_one_transfer(monkeypatch):
    transfers, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda value: transfers.append(value.shape) or cpu(value))
    cost = random_costs(6, 3, 4, 5)
    match(cost, everything(cost))
    assert transfers == [cost.shape]


def test_a_compiled_function_breaks_its_graph_here_and_goes_on():
    """Two graphs, before and after; the values are those without compilation."""

    def total(cost):
        cost = 2 * cost
        assigned = match(cost, torch.tensor(True))
        return cost.gather(-1, assigned[..., None]).sum()

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    cost = random_costs(2, 2, 3, 4).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(total, backend=backend)(cost)
    assert len(graphs) == 2 and torch.equal(compiled, total(cost))
    (gradient,) = torch.autograd.grad(compiled, cost)
    assert gradient.eq(2).sum() == 12 and gradient.eq(0).sum() == 36
