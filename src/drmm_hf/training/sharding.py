"""Runs whose processes share out model or optimiser (FSDP2, DeepSpeed): what works, and how to get the whole."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .arguments import TrainingArguments


def check_sharding(accelerator: Accelerator, training: TrainingArguments) -> None:
    """Refuse what would be wrong, or silently not happen, with what accelerate's config asks for.

    DeepSpeed steps and clips by itself: its config gets the recipe's batch size and bound of the gradient.

    Args:
        accelerator (`Accelerator`): Of the run.
        training (`TrainingArguments`): The recipe's section.

    Raises:
        ValueError: With the setting, its value and what to do.
    """
    kind = accelerator.distributed_type
    for name, wanted in (("FSDP", DistributedType.FSDP), ("DEEPSPEED", DistributedType.DEEPSPEED)):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true" and kind != wanted:
            raise ValueError(
                f"accelerate's config asks for {name}, which accelerate does with GPU processes of its launcher only; "
                f"here it would be {kind.value} on {accelerator.device.type}: use a config without it"
            )
    if kind == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(f"fsdp_version is {plugin.fsdp_version} in accelerate's config: it must be 2")
        if plugin.cpu_ram_efficient_loading:
            raise ValueError(
                "fsdp_cpu_ram_efficient_loading is true in accelerate's config: it must be false, since accelerate "
                "cannot shard a model with batch-norm statistics that way"
            )
    elif kind == DistributedType.DEEPSPEED:
        plugin = accelerator.state.deepspeed_plugin
        if plugin.zero_stage == 3:
            raise ValueError("zero_stage is 3 in accelerate's config: it must be at most 2; FSDP2 shards the weights")
        if training.mixed_precision != "no":
            raise ValueError(
                f"training.mixed_precision is {training.mixed_precision!r}: it must be 'no' with DeepSpeed, which "
                "would keep boxes and statistics in that precision too"
            )
        plugin.deepspeed_config |= {
            "gradient_accumulation_steps": 1,  # ours are weighed already
            "gradient_clipping": training.max_grad_norm or 0.0,
            "train_micro_batch_size_per_gpu": training.batch_size,
        }
    else:
        return
    # torch's FSDP refuses weights in channels-last order, deep in `prepare`.
    for name in ("channels_last", "find_batch_size", *["compile"] * (kind == DistributedType.DEEPSPEED)):
        if getattr(training, name):
            raise ValueError(f"training.{name} is true: it must be false with {kind.value}")


@torch.no_grad()
def gather_weights(model: nn.Module, whole: nn.Module) -> None:
    """Copy a sharded model's weights and buffers into a whole one. To be called by every process.

    Args:
        model (`nn.Module`): The model in training.
        whole (`nn.Module`): Its copy from before it was sharded; if it is the model itself there is nothing to do.
    """
    if whole is not model:
        for mine, part in zip(whole.state_dict().values(), model.state_dict().values(), strict=True):
            mine.copy_(whole_tensor(part))


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor of which processes may hold a part each.

    Args:
        tensor (`Tensor`): A sharded tensor, in every process, or any other.

    Returns:
        `Tensor`: All of it.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
