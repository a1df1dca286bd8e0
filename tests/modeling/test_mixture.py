"""The density in log space against torch.distributions, and its limits."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch.autograd import gradcheck
from torch.distributions import Categorical, Cauchy, Normal, StudentT

from drmm_hf.modeling.mixture import (
    SMALLEST_SCALE,
    MixtureParameters,
    central_quantile,
    floor_scales,
    log_class_probability,
    log_confidence,
    log_coordinate_density,
    log_mixing_coefficients,
    log_odds,
    tail_freedom,
    take_components,
)


DISTRIBUTIONS = {
    "cauchy": lambda location, scale: Cauchy(location, scale),
    "gaussian": lambda location, scale: Normal(location, scale),
    "student_t": lambda location, scale: StudentT(3.5, location, scale),
}


def density_inputs(num_truths=5, num_components=4, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    return 300 * random(2, num_truths, 4), 300 * random(2, num_components, 4), 0.1 + 40 * random(2, num_components, 4)


@pytest.mark.parametrize("unit", [1.0, 1e-12])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_density_equals_torch_distributions(name, unit):
    coordinates, boxes, scales = density_inputs()
    ours = log_coordinate_density(coordinates, boxes, scales, name, freedom=3.5, unit=unit)
    assert ours.shape == (2, 5, 4)
    reference = DISTRIBUTIONS[name](boxes[:, None], scales[:, None]).log_prob(coordinates[:, :, None]).sum(-1)
    torch.testing.assert_close(ours, reference - math.log(unit), atol=1e-10, rtol=1e-12)


def test_student_t_with_one_degree_is_cauchy():
    inputs = density_inputs()
    torch.testing.assert_close(
        log_coordinate_density(*inputs, "student_t", 1.0), log_coordinate_density(*inputs, "cauchy")
    )


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_gradients_of_the_density(name):
    inputs = [value[:1].requires_grad_() for value in density_inputs(num_truths=2, num_components=2)]
    assert gradcheck(lambda *values: log_coordinate_density(*values, name, 3.5), inputs)


@pytest.mark.parametrize(
    ("name", "scale", "distance"),
    itertools.product(DISTRIBUTIONS, [0.0, 1e-30, 1.0, 1e30], [0.0, 1.0, 1e6, 1e9]),
)
def test_extreme_scales_and_distances_stay_finite(name, scale, distance):
    coordinates = torch.zeros(1, 1, 4)
    boxes = torch.full((1, 1, 4), distance, requires_grad=True)
    scales = torch.full((1, 1, 4), scale, requires_grad=True)
    value = log_coordinate_density(coordinates, boxes, scales, name, 3.5)
    gradients = torch.autograd.grad(value.sum(), [boxes, scales])
    assert value.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_tiny_scale_is_still_a_density():
    """A softplus that underflows to 0 is taken as `SMALLEST_SCALE`, where the peak is 1 / (pi s) a side."""
    peak = log_coordinate_density(torch.zeros(1, 4), torch.zeros(1, 4), torch.zeros(1, 4)).item()
    assert peak == pytest.approx(-4 * math.log(math.pi * SMALLEST_SCALE), rel=1e-6)


def test_mixing_coefficients_are_normalised_objectness():
    logits = torch.tensor([[-3.0, 0.0, 2.0, 9.0]], dtype=torch.float64)
    share = logits.sigmoid() / logits.sigmoid().sum()
    torch.testing.assert_close(log_mixing_coefficients(logits).exp(), share)
    extreme = log_mixing_coefficients(torch.tensor([[-1e4, -1e4], [1e4, -1e4]]))
    torch.testing.assert_close(extreme.exp(), torch.tensor([[0.5, 0.5], [1.0, 0.0]]), atol=1e-3, rtol=0)


def test_class_probability_is_categorical_and_takes_an_exponent():
    logits = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 2, 2], [1, 1, 0]])
    expected = torch.stack(
        [Categorical(logits=logits).log_prob(labels[:, i, None].expand(2, 4)) for i in range(3)], dim=1
    )
    torch.testing.assert_close(log_class_probability(logits, labels), expected)
    torch.testing.assert_close(log_class_probability(logits, labels, 0.5), 0.5 * expected)


def test_log_odds_give_the_confidence_back_through_a_sigmoid():
    generator = torch.Generator().manual_seed(0)
    objectness, classes = 4 * torch.randn(2, 5, generator=generator), 4 * torch.randn(2, 5, 3, generator=generator)
    product = objectness.sigmoid()[..., None] * classes.softmax(-1)
    torch.testing.assert_close(log_odds(log_confidence(objectness, classes)).sigmoid(), product)


def test_log_odds_are_finite_and_ordered_at_both_ends():
    log_probability = torch.tensor([-1e4, -100.0, -1.0, -1e-3, -1e-6, -1e-30, 0.0], requires_grad=True)
    odds = log_odds(log_probability)
    odds.sum().backward()
    assert odds.isfinite().all() and log_probability.grad.isfinite().all()
    assert (odds.diff() >= 0).all() and (odds.diff()[:-2] > 0).all()
    assert odds[0].item() == -1e4 and odds[-1].sigmoid().item() == pytest.approx(1, abs=2e-7)


class TestFloor:
    boxes = torch.tensor([[10.0, 20.0, 110.0, 70.0]])  # 100 x 50

    def test_each_side_has_the_floor_of_its_own_length(self):
        scales = torch.tensor([[1.0, 1.0, 9.0, 9.0]])
        assert floor_scales(scales, self.boxes, 0.04).tolist() == [[4.0, 2.0, 9.0, 9.0]]
        assert floor_scales(scales, self.boxes, 0) is scales

    def test_where_it_holds_the_gradient_goes_to_the_box(self):
        boxes = self.boxes.clone().requires_grad_()
        scales = torch.tensor([[1.0, 9.0, 1.0, 9.0]], requires_grad=True)
        floor_scales(scales, boxes, 0.04).sum().backward()
        assert scales.grad.tolist() == [[0, 1, 0, 1]]
        torch.testing.assert_close(boxes.grad, torch.tensor([[-0.08, 0.0, 0.08, 0.0]]))

    def test_never_holds_on_an_inverted_box(self):
        scales = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
        assert torch.equal(floor_scales(scales, torch.tensor([[50.0, 60.0, 40.0, 20.0]]), 0.04), scales)


def test_selection_takes_every_parameter_of_the_same_components():
    generator = torch.Generator().manual_seed(0)
    mixture = MixtureParameters(
        *(torch.randn(2, 5, *rest, generator=generator) for rest in ((4,), (4,), (3,), (), ()))
    )
    index = torch.tensor([[4, 0], [1, 3]])
    for name, value in mixture.select(index)._asdict().items():
        for image, components in enumerate(index.tolist()):
            assert torch.equal(value[image], getattr(mixture, name)[image, components])
    assert torch.equal(take_components(mixture.boxes, index), mixture.select(index).boxes)


@given(
    level=st.floats(1e-6, 1 - 1e-6), freedom=st.one_of(st.floats(0.25, 60), st.sampled_from([1e3, 1e5, 1e9, math.inf]))
)
def test_quantiles_equal_scipy(level, freedom):
    # isf of the tail keeps the digits that 1 - tail loses; lgamma of large numbers costs some of ours.
    exact = stats.t.isf((1 - level) / 2, freedom)
    assert central_quantile(level, freedom) == pytest.approx(exact, rel=1e-9 if freedom < 1e3 else 1e-5, abs=1e-9)


@pytest.mark.parametrize(("level", "cauchy", "gaussian"), [(0.5, 1.0, 0.674490), (0.9, 6.313752, 1.644854)])
def test_quantiles_of_the_tables(level, cauchy, gaussian):
    assert central_quantile(level, tail_freedom("cauchy", 7.0)) == pytest.approx(cauchy, abs=1e-6)
    assert central_quantile(level, tail_freedom("gaussian", 7.0)) == pytest.approx(gaussian, abs=1e-6)
    assert central_quantile(level, tail_freedom("student_t", 1.0 + 1e-12)) == pytest.approx(cauchy, abs=1e-6)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_quantile_is_that_of_the_density(name):
    """An integral over the density itself, so that no two tables of names can drift apart."""
    reach = central_quantile(0.8, tail_freedom(name, 3.5))
    grid = torch.linspace(-reach, reach, 20_001, dtype=torch.float64)
    sides = torch.stack([grid, *[torch.zeros_like(grid)] * 3], dim=-1)
    unit = torch.tensor([[0.0, 0, 0, 0]], dtype=torch.float64), torch.ones(1, 4, dtype=torch.float64)
    log_density = log_coordinate_density(sides, *unit, name, 3.5)[:, 0]
    centre = log_coordinate_density(torch.zeros(1, 4, dtype=torch.float64), *unit, name, 3.5)[0, 0]
    share = torch.trapezoid((log_density - 0.75 * centre).exp(), grid)  # three sides stay at their locations
    assert share.item() == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize("level", [0.0, 1.0, -0.5, 90, math.nan])
def test_an_interval_holds_a_share(level):
    with pytest.raises(ValueError, match=r"interval=.*must lie between 0 and 1"):
        central_quantile(level)
