"""Checkpoints that are whole or absent: model folders, and the complete state that resumes a run exactly.

A checkpoint is an ordinary `save_pretrained` folder with its image processor, so `from_pretrained` reads it; the state
of training (weights in training, optimiser, random numbers, progress, moving average) lies beside the model in
`training_state/`. Where a moving average is the model, `from_pretrained(folder, variant="raw")` reads the weights in
training.

A folder is written aside, brought to the disk (fsync of every file and folder) and renamed when complete: after a
killed process or a power cut the earlier one is whole. A checkpoint ends with a record of its files, their sizes and
checksums, so that one which was damaged later is noticed and the one before it is used. The settings of the
processor may be changed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import nn


STATE_FOLDER = "training_state"
RECORD = f"{STATE_FOLDER}/record.json"
RAW_VARIANT = "raw"
# Of a model folder: `drmm calibrate` changes it, and a run that goes on does not read it.
SETTINGS = ("preprocessor_config.json",)


@dataclass
class Progress:
    """Count what a run has done; saved and restored with the training state.

    Args:
        step (`int`): Optimiser steps taken.
        epoch (`int`): Epochs completed.
        step_in_epoch (`int`): Optimiser steps taken in the epoch in progress.
        positions (`list[dict]`, *optional*): Where each process stands in its stream; None at the start of an epoch,
            and without a stream.
        images (`int`): Pictures seen, by all processes.
        seconds (`float`): Wall clock used, evaluation included.
        best_value (`float`, *optional*): Best value of the chosen metric so far.
        best_step (`int`, *optional*): Step at which it was reached.
        evaluation_due (`bool`): Whether the weights were to be evaluated after they were saved.
        evaluations_since_best (`int`): Evaluations since the best value.
        skipped_steps (`int`): Steps whose loss or gradient was not finite.
        skipped_in_a_row (`int`): Those of them since the last good step.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    positions: list[dict[str, Any]] | None = None
    images: int = 0
    seconds: float = 0.0
    best_value: float | None = None
    best_step: int | None = None
    evaluation_due: bool = False
    evaluations_since_best: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, as `Accelerator.register_for_checkpointing` asks."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the counts.

        Args:
            state (`dict`): From `state_dict`.
        """
        for name, value in state.items():
            setattr(self, name, value)


def start_folder(path: str | Path) -> Path:
    """Make an empty folder beside a folder's final place, to write into.

    Args:
        path (`str` or `Path`): The final place.

    Returns:
        `Path`: The empty folder, `<path>.partial`; what a killed process left there is gone.
    """
    partial = _partial(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def finish_folder(path: str | Path, keep_as: str | Path | None = None) -> None:
    """Bring the folder from `start_folder` to the disk and put it in its place by renaming.

    Args:
        path (`str` or `Path`): The final place.
        keep_as (`str` or `Path`, *optional*): Where to move the folder that stands there; deleted by default.
    """
    path = Path(path)
    for written in (*_partial(path).rglob("*"), _partial(path)):
        _flush(written)
    replaced = Path(keep_as) if keep_as is not None else path.with_name(path.name + ".replaced")
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(path, replaced)
    os.replace(_partial(path), path)
    _flush(path.parent)
    if keep_as is None:
        shutil.rmtree(replaced, ignore_errors=True)


def save_model(path: str | Path, model: nn.Module, processor: Any, raw_model: nn.Module | None = None) -> None:
    """Write a model and its image processor as one folder that `from_pretrained` reads, atomically.

    Args:
        path (`str` or `Path`): The folder.
        model (`PreTrainedModel`): The model, unwrapped.
        processor (`BaseImageProcessor`): Its image processor.
        raw_model (`PreTrainedModel`, *optional*): The model in training, if `model` is its moving average; written as
            the variant `raw`.

    Raises:
        OSError: If the folder cannot be written, as on a full disk; what stood there before is whole.
    """
    try:
        folder = start_folder(path)
        _save_parts(folder, model, processor)
        if raw_model is not None:
            raw_model.save_pretrained(folder, variant=RAW_VARIANT)
        finish_folder(path)
    except _WRITE_ERRORS as error:
        models = [model] if raw_model is None else [model, raw_model]
        raise _unwritten(path, _reason(error), models) from error


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | Path,
    model: nn.Module,
    processor: Any,
    progress: Progress,
    keep_last: int,
    raw_model: nn.Module | None = None,
) -> None:
    """Write `last/` with the model and the complete training state; the one before becomes `step-N/`.

    To be called by every process.

    Args:
        accelerator (`Accelerator`): Knows what to save.
        output_dir (`str` or `Path`): Folder of the run.
        model (`PreTrainedModel`): The model to write, unwrapped: the moving average if there is one.
        processor (`BaseImageProcessor`): Its image processor.
        progress (`Progress`): Names the step.
        keep_last (`int`): Checkpoints to keep, `last/` included.
        raw_model (`PreTrainedModel`, *optional*): The model in training, if `model` is its moving average; its weights
            are there as the variant `raw`, at no cost where those of the training state are such a file: a link to it.

    Raises:
        OSError: If it cannot be written, as on a full disk; the checkpoints before it are whole.
    """
    last = Path(output_dir) / "last"
    parts = (model, *accelerator._models, *accelerator._optimizers, *accelerator._custom_objects)
    together = partial(_all_or_none, accelerator, last, parts)
    with together():
        if accelerator.is_main_process:
            start_folder(last)
    with together(), _unwrapped(accelerator):
        folder = _partial(last)
        accelerator.save_state(str(folder / STATE_FOLDER))
        if accelerator.is_main_process:
            _save_parts(folder, model, processor)
            raw_weights = folder / STATE_FOLDER / "model.safetensors"
            if raw_model is not None and raw_weights.is_file():
                _link(raw_weights, folder / f"model.{RAW_VARIANT}.safetensors")
            elif raw_model is not None:
                raw_model.save_pretrained(folder, variant=RAW_VARIANT)
    with together():
        if accelerator.is_main_process:
            _write_record(folder, progress.step, accelerator.num_processes)
            finish_folder(last, keep_as=_step_folder(last))
    if accelerator.is_main_process:
        for folder in _earlier_checkpoints(output_dir)[keep_last - 1 :]:
            shutil.rmtree(folder)
    accelerator.wait_for_everyone()


def _save_parts(folder: Path, model: nn.Module, processor: Any) -> None:
    """Write model and processor; transformers silently writes no model where it thinks that another process does."""
    before = {*folder.iterdir()}
    model.save_pretrained(folder)
    if {*folder.iterdir()} == before:
        raise OSError(f"{folder} has got no model: RANK is {os.environ.get('RANK')!r}, and this process is alone")
    processor.save_pretrained(folder)


def find_checkpoint(output_dir: str | Path, accelerator: Accelerator | None = None) -> Path | None:
    """Find the newest whole checkpoint of a run; damaged ones are named.

    Args:
        output_dir (`str` or `Path`): Folder of the run.
        accelerator (`Accelerator`, *optional*): With several processes, which all call this: the first one looks, and
            the others get its answer.

    Returns:
        `Path` or None: `last/`, or the one before it if `last/` is damaged, or missing because the process was killed
        while it was being replaced; None if the run has saved nothing.

    Raises:
        ValueError: If there are checkpoints, but none is whole.
    """
    found = [None, {}]
    if accelerator is None or accelerator.is_main_process:
        found = list(_newest_whole(output_dir))
    if accelerator is not None:
        found = broadcast_object_list(found)
    folder, damages = found
    named = "; ".join(f"{name} ({damage})" for name, damage in damages.items())
    if damages and folder is None:
        raise ValueError(
            f"output_dir {str(output_dir)!r} holds no whole checkpoint: {named}. Move them away to start afresh"
        )
    if damages and (accelerator is None or accelerator.is_main_process):
        print(f"warning: damaged in {output_dir}: {named}; {folder.name} is the newest whole checkpoint")
    return folder


def load_checkpoint(accelerator: Accelerator, folder: Path) -> None:
    """Restore the training state of a checkpoint into everything that was prepared or registered.

    With another number of processes than it was saved with, everything is restored but the random numbers of the
    processes; a line says so. Newer checkpoints that are damaged are moved to `<name>.damaged`, out of the way of
    those that the run will write.

    Args:
        accelerator (`Accelerator`): As it was when the checkpoint was saved.
        folder (`Path`): From `find_checkpoint`.
    """
    with _unwrapped(accelerator):
        accelerator.load_state(str(folder / STATE_FOLDER))
    saved_by = _read_record(folder)["processes"]
    if saved_by != accelerator.num_processes:
        accelerator.print(
            f"{folder} was saved with num_processes {saved_by} and goes on with {accelerator.num_processes}: weights, "
            "optimizer, average and progress are exact; random numbers are not, and the rest of the epoch in progress "
            "has other pictures"
        )
    if accelerator.is_main_process:
        candidates = _checkpoints(folder.parent)
        for newer in candidates[: candidates.index(folder)]:
            if _damage(newer) is not None:
                aside = newer.with_name(newer.name + ".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(newer, aside)
    accelerator.wait_for_everyone()


_WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)  # torch.save raises the last


@contextmanager
def _unwrapped(accelerator: Accelerator) -> Iterator[None]:
    """Save or load models without the prefix of DistributedDataParallel, so that other numbers of processes fit."""

    def unwrap_weights(models: list[nn.Module], weights: list[Mapping[str, Any]], _) -> None:
        for index in range(len(weights)):  # none where FSDP or DeepSpeed save their own way
            weights[index] = accelerator.unwrap_model(models[index]).state_dict()

    def unwrap_models(models: list[nn.Module], _) -> None:
        models[:] = [accelerator.unwrap_model(model) for model in models]

    handles = (
        accelerator.register_save_state_pre_hook(unwrap_weights),
        accelerator.register_load_state_pre_hook(unwrap_models),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _write_record(folder: Path, step: int, processes: int) -> None:
    files = {
        path.relative_to(folder).as_posix(): _checksum(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    record = {"step": step, "processes": processes, "files": files}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def _read_record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RECORD).read_text())


def _checksum(path: Path) -> list[int]:
    """Return the size of a file in bytes and its CRC-32."""
    size = checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return [size, checksum]


def _damage(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint; None if it is whole."""
    try:
        files = _read_record(folder)["files"]
    except FileNotFoundError:
        return f"{RECORD} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{RECORD} cannot be read"
    for name, (size, checksum) in files.items():
        if name in SETTINGS:
            continue
        try:
            found = _checksum(folder / name)
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if found[0] != size:
            return f"{name} has {found[0]} bytes instead of {size}"
        if found[1] != checksum:
            return f"{name} has other contents than were written"
    return None


def _newest_whole(output_dir: str | Path) -> tuple[Path | None, dict[str, str]]:
    """Return the newest whole checkpoint, and what is wrong with those that are newer."""
    damages = {}
    for folder in _checkpoints(output_dir):
        damage = _damage(folder)
        if damage is None:
            return folder, damages
        damages[folder.name] = damage
    return None, damages


@contextmanager
def _all_or_none(accelerator: Accelerator, path: Path, parts: Sequence[Any]) -> Iterator[None]:
    """Wait for all processes to write their share of a folder; raise in all of them if one could not."""
    error = None
    try:
        yield
    except _WRITE_ERRORS as caught:
        error = caught
    reasons = gather_object([error and _reason(error)])
    if any(reasons):
        raise _unwritten(path, next(filter(None, reasons)), parts) from error


def _unwritten(path: str | Path, reason: str, parts: Sequence[Any]) -> OSError:
    """Take a partial folder away and return the error to raise; `parts` are what it was to hold."""
    shutil.rmtree(_partial(path), ignore_errors=True)
    parent = next(folder for folder in Path(path).absolute().parents if folder.exists())
    needed, free = sum(_count_bytes(part.state_dict()) for part in parts), shutil.disk_usage(parent).free
    return OSError(
        f"{str(path)!r} cannot be written: {'the disk is full' if free < needed else reason}. It needs "
        f"{needed / 1e6:.1f} MB beside what is there, and {free / 1e6:.1f} MB are free; what was saved before is whole"
    )


def _reason(error: Exception) -> str:
    """Return the words of an error of the system, or the first line of one of the libraries that write tensors."""
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]


def _count_bytes(state: Any) -> int:
    if isinstance(state, torch.Tensor):
        return state.nbytes
    if isinstance(state, Mapping):
        return sum(map(_count_bytes, state.values()))
    return sum(map(_count_bytes, state)) if isinstance(state, (list, tuple)) else 0


def _flush(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    if path.is_dir() and os.name == "nt":  # which has no handle of a folder
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _partial(path: str | Path) -> Path:
    return Path(path).with_name(Path(path).name + ".partial")


def _step_folder(last: Path) -> Path | None:
    """Return what `last/` is called once there is a newer one; None if it does not exist or cannot be read."""
    try:
        return last.with_name(f"step-{_read_record(last)['step']:08d}")
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _checkpoints(output_dir: str | Path) -> list[Path]:
    """List all checkpoints of a run, the newest first."""
    last = Path(output_dir) / "last"
    return [last] * last.is_dir() + _earlier_checkpoints(output_dir)


def _earlier_checkpoints(output_dir: str | Path) -> list[Path]:
    folders = (path for path in Path(output_dir).glob("step-*") if re.fullmatch(r"step-\d+", path.name))
    return sorted((folder for folder in folders if folder.is_dir()), key=lambda folder: folder.name, reverse=True)
