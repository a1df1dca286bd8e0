"""AdaMixer's pieces against plain loops and `grid_sample`; the stage by finite differences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from conftest import tiny_config
from drmm_hf.modeling.adamixer_stage import (
    AdaMixerStage,
    AdaptiveMixing,
    initial_offset_bias,
    position_embedding,
    sample_maps,
    sample_points,
)
from drmm_hf.modeling.boxes import xyxy_to_xyzr
from drmm_hf.modeling.query_layers import log_overlap


STRIDES = (4, 8, 16, 32)


def config(**overrides):
    fields = {
        "decoder_type": "adamixer",
        "hidden_size": 32,
        "num_sampling_groups": 4,
        "num_sampling_points": 5,
        "num_mixing_points": 6,
    }
    result = tiny_config(**(fields | overrides))
    result._attn_implementation = "sdpa"
    return result


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def maps_of(height, width, channels, batch=2, seed=0):
    return [random(batch, channels, -(-height // s), -(-width // s), seed=seed + s) for s in STRIDES]


def boxes_of(batch, count, height=64, width=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(batch, count, 2, dtype=torch.float64, generator=generator) * torch.tensor([width, height])
    size = 4 + 40 * torch.rand(batch, count, 2, dtype=torch.float64, generator=generator)
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def disturbed(module, std=0.3):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module.double().eval()


def test_position_embedding_term_by_term():
    xyzr = torch.tensor([[500.0, 20.0, 6.5, -1.0]], dtype=torch.float64)
    embedding = position_embedding(xyzr, 6)[0]
    for coordinate, value in enumerate([0.5, 0.02, 6.5, -1.0]):
        for feature in range(6):
            angle = value / 10000 ** (2 * (feature // 2) / 6)
            expected = math.cos(angle) if feature % 2 else math.sin(angle)
            assert embedding[6 * coordinate + feature].item() == pytest.approx(expected, abs=1e-12)


def test_points_lie_relative_to_the_box():
    xyzr = xyxy_to_xyzr(torch.tensor([[10.0, 20, 30, 60]]))  # 20 wide, 40 high, centre (20, 40)
    points = sample_points(xyzr, torch.tensor([[[0.5, -0.25, 1.0]]]))
    torch.testing.assert_close(points, torch.tensor([[[30, 30, 0.5 * math.log2(800) + 1]]]))


def by_grid_sample(maps, points, strides):
    """The same by torch's `grid_sample`, level after level."""
    batch, queries, groups, count, _ = points.shape
    z = points[..., 2]
    weights = torch.stack([-((z - math.log2(stride)) ** 2) / 2 for stride in strides]).softmax(0)
    total = 0
    for level_map, stride, weight in zip(maps, strides, weights, strict=True):
        height, width = level_map.shape[-2:]
        grid = points[..., :2] / torch.tensor([width, height]) / stride * 2 - 1
        grid = grid.transpose(1, 2).reshape(batch * groups, queries, count, 2)
        parts = level_map.reshape(batch * groups, -1, height, width)
        sampled = F.grid_sample(parts, grid, "bilinear", "zeros", align_corners=False)
        sampled = sampled.view(batch, groups, -1, queries, count).permute(0, 3, 1, 4, 2)
        total = total + sampled * weight[..., None]
    return total


@settings(max_examples=20)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 1000))
def test_samples_and_gradients_equal_grid_sample(height, width, seed):
    maps = [value.requires_grad_() for value in maps_of(height, width, 8, seed=seed)]
    points = random(2, 3, 4, 5, 3, seed=seed)
    points = points * torch.tensor([width, height, 3.0]) + torch.tensor([width / 2, height / 2, 4.0])
    points.requires_grad_()
    ours, expected = sample_maps(maps, points, STRIDES), by_grid_sample(maps, points, STRIDES)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    direction = random(*ours.shape, seed=seed + 1)
    for mine, theirs in zip(
        torch.autograd.grad((ours * direction).sum(), [*maps, points]),
        torch.autograd.grad((expected * direction).sum(), [*maps, points]),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30, -1e30])
def test_points_beyond_the_picture_sample_zeros(bad):
    points = torch.full((2, 1, 4, 1, 3), bad, dtype=torch.float64)
    points[..., 2] = 4
    assert torch.equal(sample_maps(maps_of(64, 96, 8), points, STRIDES), torch.zeros(2, 1, 4, 1, 2).double())


def test_groups_of_queries_read_their_own_picture():
    maps, points = maps_of(64, 96, 8), random(6, 3, 4, 5, 3) * 20 + 30
    grouped = sample_maps(maps, points, STRIDES)
    for image in range(2):
        for group in range(3):
            row = 3 * image + group
            alone = sample_maps([m[image : image + 1] for m in maps], points[row : row + 1], STRIDES)
            torch.testing.assert_close(grouped[row : row + 1], alone)


def test_mixing_equals_loops():
    module = disturbed(AdaptiveMixing(config()))
    features, samples = random(2, 3, 32), random(2, 3, 4, 5, 8, seed=1)
    ours = module(features, samples)
    numbers = F.linear(features, module.generator.weight, module.generator.bias)

    def normalised(x):
        return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()

    for image in range(2):
        for query in range(3):
            mixed = []
            for group in range(4):
                weights = numbers[image, query, group * 94 : (group + 1) * 94]  # 8 * 8 + 6 * 5
                over_channels, over_points = weights[:64].reshape(8, 8), weights[64:].reshape(6, 5)
                x = normalised(samples[image, query, group] @ over_channels).clamp(min=0)
                mixed.append(normalised(over_points @ x).clamp(min=0).flatten())
            expected = module.projection(torch.cat(mixed))
            torch.testing.assert_close(ours[image, query], expected)


def stage_and_inputs(**overrides):
    stage = disturbed(AdaMixerStage(config(**overrides)), 0.15)
    return stage, maps_of(64, 96, 32), boxes_of(2, 4), random(2, 4, 32, seed=7)


def test_order_of_the_parts():
    stage, maps, boxes, features = stage_and_inputs()
    xyzr = xyxy_to_xyzr(boxes)
    x = features + position_embedding(xyzr, 8)
    bias = torch.stack([scale * log_overlap(boxes) for scale in stage.iof_scale], dim=1)
    x = stage.attention_norm(x + stage.attention(x, bias)[0])
    offsets = stage.sampling_offset(x).view(2, 4, 20, 3)
    samples = by_grid_sample(maps, sample_points(xyzr, offsets).view(2, 4, 4, 5, 3), STRIDES)
    x = stage.mixing_norm(x + stage.mixing(x, samples))
    torch.testing.assert_close(stage(maps, boxes, features), stage.feed_forward_norm(x + stage.feed_forward(x)))


def test_gradients_by_finite_differences():
    stage, maps, boxes, features = stage_and_inputs()
    inputs = [*(value.requires_grad_() for value in maps), features.requires_grad_()]
    inputs += [stage.sampling_offset.weight, stage.iof_scale, stage.mixing.generator.bias]
    direction = random(2, 4, 32, seed=3)

    def value(*_):
        return (stage(maps, boxes, features) * direction).sum()

    analytic = torch.autograd.grad(value(), inputs)
    for tensor, gradient in zip(inputs, analytic, strict=True):
        step = random(*tensor.shape, seed=5) * 1e-6
        with torch.no_grad():
            tensor += step
            ahead = value()
            tensor -= 2 * step
            behind = value()
            tensor += step
        numeric = (ahead - behind) / 2
        torch.testing.assert_close(numeric, (gradient * step).sum(), rtol=1e-4, atol=1e-12)


def test_no_gradient_flows_into_the_boxes():
    stage, maps, boxes, features = stage_and_inputs()
    features.requires_grad_()
    assert torch.autograd.grad(stage(maps, boxes.requires_grad_(), features).sum(), boxes, allow_unused=True) == (
        None,
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_points_are_placed_in_float32(autocast, monkeypatch):
    from drmm_hf.modeling import adamixer_stage

    stage, maps, boxes, features = stage_and_inputs()
    dtype = torch.float32 if autocast else torch.bfloat16
    stage.to(dtype)
    seen = []
    sample = adamixer_stage.sample_maps
    monkeypatch.setattr(adamixer_stage, "sample_maps", lambda m, p, s: seen.append(p.dtype) or sample(m, p, s))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = stage([value.to(dtype) for value in maps], boxes.float(), features.to(dtype))
    assert seen == [torch.float32] and result.isfinite().all()


@pytest.mark.parametrize("points", [9, 16])
def test_square_numbers_of_points_start_on_a_grid(points):
    side = round(points**0.5)
    bias = initial_offset_bias(points, 2)
    expected = [[(i + 0.5) / side - 0.5, (j + 0.5) / side - 0.5, -1] for i in range(side) for j in range(side)]
    torch.testing.assert_close(bias, torch.tensor([expected, expected]))


def test_other_numbers_of_points_start_at_random_within_the_box():
    bias = initial_offset_bias(32, 4)
    assert bias[..., :2].abs().max() <= 0.5 and bias[..., :2].std() > 0.2
    assert (bias[..., 2] == -1).all() and not torch.equal(bias[0], bias[1])
