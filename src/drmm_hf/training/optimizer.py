"""AdamW with parameter groups chosen by module, and the learning-rate schedule as a pure function of progress."""

from __future__ import annotations

import math

import torch
from torch import nn

from .arguments import TrainingArguments


# Longest warm-up of a schedule by time, as a share of the run.
LONGEST_WARMUP = 0.1
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def parameter_groups(
    model: nn.Module, backbone: nn.Module, learning_rate: float, backbone_lr_factor: float, weight_decay: float
) -> list[dict]:
    """Split the trainable parameters into backbone and rest, decayed and not.

    Decayed are the weight matrices and kernels only: parameters of two or more dimensions that their module calls
    `weight` (or, as `nn.MultiheadAttention`, `..._weight`). Norms, biases, scales, embedding tables (query boxes and
    features) and tables of positions are not.

    Args:
        model (`nn.Module`): The model.
        backbone (`nn.Module`): Its backbone, one of its submodules.
        learning_rate (`float`): Peak learning rate.
        backbone_lr_factor (`float`): The backbone's as a fraction of it.
        weight_decay (`float`): Decoupled weight decay.

    Returns:
        `list[dict]`: Up to four groups with `name`, `params`, `lr`, `initial_lr` and `weight_decay`. Each trainable
        parameter is in exactly one of them.
    """
    backbone_modules = set(backbone.modules())
    groups, seen = {}, set()
    for module in model.modules():
        part = "backbone" if module in backbone_modules else "head"
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            is_weight = parameter.ndim >= 2 and (name == "weight" or name.endswith("_weight"))
            decayed = is_weight and not isinstance(module, (*_NORMS, nn.Embedding))
            groups.setdefault((part, decayed), []).append(parameter)
    rates = {"backbone": learning_rate * backbone_lr_factor, "head": learning_rate}
    return [
        {
            "name": part if decayed else f"{part}_no_decay",
            "params": parameters,
            "lr": rates[part],
            "initial_lr": rates[part],
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for (part, decayed), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def build_optimizer(model: nn.Module, backbone: nn.Module, training: TrainingArguments) -> torch.optim.AdamW:
    """Build AdamW over `parameter_groups`.

    Args:
        model (`nn.Module`): The model.
        backbone (`nn.Module`): Its backbone.
        training (`TrainingArguments`): Learning rate, its backbone factor, weight decay and betas.

    Returns:
        `torch.optim.AdamW`: The fused kernel, on CPU and GPU alike.
    """
    groups = parameter_groups(
        model, backbone, training.learning_rate, training.backbone_lr_factor, training.weight_decay
    )
    return torch.optim.AdamW(groups, betas=tuple(training.betas), fused=True)


def schedule_factor(training: TrainingArguments, step: int, progress: float) -> float:
    """Compute the factor of the learning rate for one optimiser step.

    Args:
        training (`TrainingArguments`): `schedule` and its numbers, and those of `warmup_factor`.
        step (`int`): Optimiser steps already taken.
        progress (`float`): Share of the run that is over, in [0, 1], by steps or by time.

    Returns:
        `float`: Warm-up factor times schedule factor.

    Source:
        Linear warm-up and division by 10 at 3/4 and 11/12 of the run: Appendix B and the public code. The cosine is
        not the paper's.
    """
    return warmup_factor(training, step, progress) * _schedule(training, progress)


def warmup_factor(training: TrainingArguments, step: int, progress: float) -> float:
    """Compute the factor of the learning rate that is the warm-up's.

    Args:
        training (`TrainingArguments`): `warmup_steps`, `warmup_start_factor` and `schedule_by`. By time, the warm-up
            is over after a tenth of the run at the latest.
        step (`int`): Optimiser steps already taken.
        progress (`float`): Share of the run that is over, in [0, 1].

    Returns:
        `float`: From `warmup_start_factor` to 1.
    """
    if step >= training.warmup_steps:
        return 1.0
    start = training.warmup_start_factor
    by_steps = start + (1 - start) * step / training.warmup_steps
    if training.schedule_by == "steps":
        return by_steps
    return min(1.0, max(by_steps, start + (1 - start) * progress / LONGEST_WARMUP))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's learning rate to its initial one times a factor.

    Args:
        optimizer (`torch.optim.Optimizer`): Its groups have `initial_lr`.
        factor (`float`): The factor.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def _schedule(training: TrainingArguments, progress: float) -> float:
    if training.schedule == "multi_step":
        return training.decay_factor ** sum(progress >= milestone for milestone in training.milestones)
    if training.schedule == "cosine":
        cosine = math.cos(math.pi * min(progress, 1.0))
        return training.final_factor + (1 - training.final_factor) * (1 + cosine) / 2
    return 1.0
