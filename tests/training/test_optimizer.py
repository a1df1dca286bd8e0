import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import SwinConfig

from conftest import STAGES
from drmm_hf.modeling.configuration_drmm import DrmmConfig
from drmm_hf.modeling.modeling_drmm import DrmmForObjectDetection
from drmm_hf.training.arguments import TrainingArguments
from drmm_hf.training.optimizer import build_optimizer, parameter_groups, schedule_factor, set_learning_rate


class Block(nn.Module):
    """One of each kind of parameter."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 1)
        self.batch_norm = nn.BatchNorm2d(4)
        self.layer_norm = nn.LayerNorm([4, 4])
        self.group_norm = nn.GroupNorm(2, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.queries = nn.Embedding(5, 4)
        self.position_table = nn.Parameter(torch.zeros(9, 2))
        self.scale = nn.Parameter(torch.zeros(4))


@pytest.fixture
def model():
    model = nn.Sequential()
    model.backbone, model.rest = Block(), Block()
    return model


def test_only_matrices_and_kernels_decay(model):
    groups = parameter_groups(model, model.backbone, 1.0, 0.1, 0.05)
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    decayed = {name for name, parameter in model.rest.named_parameters() if decays[id(parameter)] == 0.05}
    assert decayed == {"convolution.weight", "attention.in_proj_weight", "attention.out_proj.weight"}
    assert set(decays.values()) == {0.0, 0.05}


def test_the_backbone_has_its_own_learning_rate(model):
    groups = parameter_groups(model, model.backbone, 2e-3, 0.1, 0.05)
    rates = {id(parameter): (group["lr"], group["initial_lr"]) for group in groups for parameter in group["params"]}
    assert {rates[id(parameter)] for parameter in model.backbone.parameters()} == {(2e-4, 2e-4)}
    assert {rates[id(parameter)] for parameter in model.rest.parameters()} == {(2e-3, 2e-3)}


def test_frozen_and_shared_parameters(model):
    model.backbone.requires_grad_(False)
    model.rest.convolution.weight = model.rest.attention.in_proj_weight
    groups = parameter_groups(model, model.backbone, 1.0, 0.1, 0.05)
    assert [group["name"] for group in groups] == ["head_no_decay", "head"]
    assert sum(len(group["params"]) for group in groups) == len(list(model.rest.parameters()))


def test_the_detectors_query_boxes_and_norms_do_not_decay(tiny_recipe):
    model = DrmmForObjectDetection(DrmmConfig(**tiny_recipe().model))
    optimizer = build_optimizer(model, model.model.backbone, TrainingArguments(epochs=1, backbone_lr_factor=0.5))
    members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(members) == len({id(parameter) for parameter in members}) == len(list(model.parameters()))
    free = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in free}
    assert {"model.queries.boxes", "model.queries.features"} <= names
    for name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                assert (id(parameter) in free) == (parameter_name == "bias"), (name, parameter_name)


def test_norms_and_position_tables_of_swin_do_not_decay(tiny_recipe):
    """As Swin's authors train it; its tables of relative positions have two dimensions, but are no weight matrices."""
    swin = SwinConfig(embed_dim=8, depths=[2, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, out_features=STAGES)
    model = DrmmForObjectDetection(DrmmConfig(**tiny_recipe().model | {"backbone_config": swin}))
    backbone = model.model.backbone
    groups = parameter_groups(model, backbone, 1.0, 1.0, 0.05)
    decays = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    decayed = {name: decays[value] == 0.05 for name, value in backbone.named_parameters() if value.requires_grad}
    kinds = {
        kind: {decayed[name] for name in decayed if kind in name}
        for kind in ("relative_position_bias_table", "norm", "bias", "q_proj.weight", "reduction.weight")
    }
    assert kinds == {
        "relative_position_bias_table": {False},
        "norm": {False},
        "bias": {False},
        "q_proj.weight": {True},
        "reduction.weight": {True},
    }
    assert len([name for name in decayed if "relative_position_bias_table" in name]) == 5


@given(st.integers(0, 2000), st.integers(0, 1000), st.floats(0, 1))
def test_warm_up_is_a_straight_line(step, warmup_steps, start):
    training = TrainingArguments(epochs=1, schedule="constant", warmup_steps=warmup_steps, warmup_start_factor=start)
    expected = 1.0 if step >= warmup_steps else (start * (warmup_steps - step) + step) / warmup_steps
    assert schedule_factor(training, step, 0.5) == pytest.approx(expected, abs=1e-12)


@given(st.integers(0, 2000), st.integers(1, 1000), st.floats(0, 1), st.floats(0, 1))
def test_a_warm_up_by_time_is_over_after_a_tenth_of_it(step, warmup_steps, start, progress):
    """Along whichever of the two lines is higher: of steps, and of a tenth of the run."""
    options = {"schedule": "constant", "warmup_steps": warmup_steps, "warmup_start_factor": start}
    by_time = TrainingArguments(max_minutes=5, schedule_by="time", **options)
    lines = np.interp(step, [0, warmup_steps], [start, 1]), np.interp(progress, [0, 0.1], [start, 1])
    assert schedule_factor(by_time, step, progress) == pytest.approx(max(lines), abs=1e-12)


@given(st.integers(1, 5000))
def test_multi_step_is_the_papers_36_epochs(total):
    """By the definition: divided by 10 once epoch 27 of 36 is done, and again after epoch 33."""
    training = TrainingArguments(epochs=36, warmup_steps=0)
    for step in {0, total // 2, total * 27 // 36, total * 33 // 36, total - 1}:
        epochs_done = 36 * step / total
        expected = 1.0 if epochs_done < 27 else 0.1 if epochs_done < 33 else 0.01
        assert schedule_factor(training, step, step / total) == pytest.approx(expected)


@given(st.floats(0, 1), st.floats(0, 1))
def test_cosine_follows_the_half_angle_form(progress, final):
    training = TrainingArguments(epochs=1, schedule="cosine", final_factor=final, warmup_steps=0)
    expected = final + (1 - final) * math.cos(math.pi * progress / 2) ** 2
    assert schedule_factor(training, 0, progress) == pytest.approx(expected, abs=1e-12)


def test_cosine_stays_at_its_end_when_time_runs_over():
    training = TrainingArguments(epochs=1, schedule="cosine", final_factor=0.2, warmup_steps=0)
    assert schedule_factor(training, 0, 1.3) == pytest.approx(0.2)


def test_learning_rates_keep_their_proportion(model):
    training = TrainingArguments(epochs=1, learning_rate=1e-3, backbone_lr_factor=0.1)
    optimizer = build_optimizer(model, model.backbone, training)
    for factor in (0.5, 0.25):
        set_learning_rate(optimizer, factor)
        assert {group["lr"] for group in optimizer.param_groups} == {1e-3 * factor, 1e-4 * factor}


def test_one_step_is_adamw_by_hand(model):
    training = TrainingArguments(epochs=1, learning_rate=1e-2, weight_decay=0.3, betas=[0.8, 0.99])
    optimizer = build_optimizer(model, model.backbone, training)
    weight = model.rest.convolution.weight
    before, gradient = weight.detach().double(), torch.randn_like(weight)
    weight.grad = gradient.clone()
    optimizer.step()
    gradient = gradient.double()
    direction = gradient / (gradient.abs() + 1e-8)  # the bias corrections cancel the decay rates in the first step
    torch.testing.assert_close(
        weight.detach().double(), before * (1 - 1e-2 * 0.3) - 1e-2 * direction, atol=1e-6, rtol=0
    )
