import copy

import pytest
import torch
from torch import nn

from drmm_hf.training.ema import averaged_model, warmed_decay


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).double()


def change(model):
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn(tensor.shape).to(tensor.dtype) if tensor.is_floating_point() else 3)


def test_the_average_follows_its_recurrence(model):
    average = averaged_model(model, 0.5)
    expected = None
    for update in range(20):
        change(model)
        average.update_parameters(model)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        decay = min(0.5, (1 + update) / (10 + update))
        if expected is None:
            expected = state
        for name, tensor in state.items():
            mixed = decay * expected[name] + (1 - decay) * tensor if tensor.is_floating_point() else tensor
            expected[name] = mixed
    for name, tensor in average.module.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])


def test_the_decay_warms_up_to_its_value():
    assert warmed_decay(0, 0.999) == 0.1
    decays = [warmed_decay(count, 0.999) for count in range(20_000)]
    assert decays == sorted(decays)
    assert decays[-1] == 0.999


def test_the_average_neither_trains_nor_changes_the_model(model):
    before = copy.deepcopy(model.state_dict())
    average = averaged_model(model, 0.9)
    average.update_parameters(model)
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert not average.module.training
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_restored_average_goes_on_bit_by_bit(model):
    average = averaged_model(model, 0.9)
    for _ in range(3):
        change(model)
        average.update_parameters(model)
    restored = averaged_model(copy.deepcopy(model), 0.9)
    restored.load_state_dict(average.state_dict())
    for _ in range(3):
        change(model)
        average.update_parameters(model)
        restored.update_parameters(model)
    for name, tensor in average.state_dict().items():
        assert torch.equal(tensor, restored.state_dict()[name]), name


def test_frozen_weights_do_not_drift(model):
    model.requires_grad_(False)
    average = averaged_model(model, 0.9)
    for _ in range(50):
        average.update_parameters(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, average.module.state_dict()[name]), name
