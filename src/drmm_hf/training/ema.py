"""An exponential moving average of a model's parameters and buffers, on torch's own `AveragedModel`."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def averaged_model(model: nn.Module, decay: float) -> AveragedModel:
    """Copy a model and average it from then on with `update_parameters(model)`.

    The decay warms up, as `min(decay, (1 + n) / (10 + n))` at the n-th average after the first update (which copies),
    so that a short run is not dominated by its random start. Buffers of integers are copied.

    Args:
        model (`nn.Module`): The model in training, unwrapped.
        decay (`float`): Decay after the warm-up, between 0 and 1.

    Returns:
        `AveragedModel`: `module` is the averaged model, in evaluation mode and without gradients; `state_dict` holds
        its weights and the number of updates.
    """
    average = AveragedModel(model, use_buffers=True)

    @torch.no_grad()
    def update(averaged: list[torch.Tensor], current: list[torch.Tensor], _) -> None:
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1 - warmed_decay(int(average.n_averaged), decay))
        else:
            torch._foreach_copy_(averaged, current)

    average.multi_avg_fn = update
    average.module.requires_grad_(False)
    average.module.eval()
    return average


def warmed_decay(num_averaged: int, decay: float) -> float:
    """Compute the decay of one update.

    Args:
        num_averaged (`int`): Updates so far.
        decay (`float`): Decay after the warm-up.

    Returns:
        `float`: The decay of the next update.
    """
    return min(decay, (1 + num_averaged) / (10 + num_averaged))
