"""How many pictures fit into memory at once: tried with real steps, before a run begins."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from .arguments import TrainingArguments


def find_batch_size(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    training: TrainingArguments,
    longest_edge: int,
    most: int,
) -> tuple[int, int]:
    """Split a step's pictures into as few forward passes as fit into memory, the same in every process.

    `batch_size x accumulation_steps` of the recipe, which its learning rate is meant for, stays as it is. Each divisor
    of it is tried as a batch size, the largest first, with pictures of `longest_edge x longest_edge` (what a tall and
    a wide one are padded to) that have as many ground truths as any. Model, optimiser and random numbers are left as
    they were.

    Args:
        accelerator (`Accelerator`): Of the run.
        model (`DrmmForObjectDetection`): The prepared model, unwrapped: a process alone runs out of memory, and the
            others must not wait for it inside a pass.
        optimizer (`Optimizer`): The prepared optimiser, with no step taken.
        training (`TrainingArguments`): Batch size and accumulation steps.
        longest_edge (`int`): Longest side of a picture, pixels.
        most (`int`): Ground truths of the fullest picture.

    Returns:
        `tuple[int, int]`: Pictures in a forward pass of a process, and forward passes in a step.

    Raises:
        ValueError: If not even one picture fits.
    """
    pictures = training.batch_size * training.accumulation_steps
    for size in (size for size in range(pictures, 0, -1) if pictures % size == 0):
        fits = _fits(accelerator, model, optimizer, size, longest_edge, most)
        accelerator.print(f"batch size {size}: {'fits' if fits else 'does not fit'} into memory")
        if fits:
            return size, pictures // size
    raise ValueError(
        f"not even one picture of {longest_edge} x {longest_edge} pixels fits into memory: lower shortest_edge and "
        "longest_edge, or set gradient_checkpointing or mixed_precision"
    )


def _fits(accelerator: Accelerator, model, optimizer, size: int, edge: int, most: int) -> bool:
    """Try in every process; whether it went well in all of them."""
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.eval()  # in training they wait for other processes; the loop sets all back to training
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    criterion, fits = model.loss_function, True
    # Under other names, the terms of a box head are not divided by what is counted in all processes together.
    model.loss_function = lambda *args: {f"{name}, tried": term for name, term in criterion(*args).items()}
    with torch.random.fork_rng(devices):
        try:
            _step_twice(model, optimizer.optimizer, _batch(size, edge, most, accelerator.device))
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            fits = False
        finally:
            model.loss_function = criterion
    model.zero_grad()
    optimizer.optimizer.state.clear()
    for buffer, kept in buffers:
        buffer.copy_(kept)
    clear_device_cache(garbage_collection=True)
    return all(gather_object([fits]))


def _step_twice(model, optimizer, batch) -> None:
    """Need as much memory as a run: the second pass has the optimiser's state and the first one's gradients beside it.

    The step is one whose gradient is not finite: the fused kernel makes its state and changes nothing.
    """
    for _ in range(2):
        model(**batch, output_auxiliary=False).loss.backward()
        optimizer.found_inf = torch.ones((), device=batch["pixel_values"].device)
        optimizer.step()
    del optimizer.found_inf


def _batch(size: int, edge: int, most: int, device: torch.device) -> dict:
    label = {
        "class_labels": torch.zeros(most, dtype=torch.int64, device=device),
        "boxes": torch.full((most, 4), 0.5, device=device),
    }
    return {
        "pixel_values": torch.zeros(size, 3, edge, edge, device=device),
        "pixel_mask": torch.ones(size, edge, edge, dtype=torch.int64, device=device),
        "labels": [label] * size,
    }
