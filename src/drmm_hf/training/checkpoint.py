"""Checkpoints that are whole or absent: model folders, and the complete state that resumes a run exactly.

A checkpoint is an ordinary `save_pretrained` folder with its image processor, so `from_pretrained` reads it; the state
of training (weights in training, optimiser, random numbers, progress, moving average) lies beside the model in
`training_state/`. A folder is written aside and renamed when complete: a killed process leaves the earlier one whole.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn


STATE_FOLDER = "training_state"


@dataclass
class Progress:
    """Count what a run has done; saved and restored with the training state.

    Args:
        step (`int`): Optimiser steps taken.
        epoch (`int`): Epochs completed.
        step_in_epoch (`int`): Optimiser steps taken in the epoch in progress.
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
    """Put the folder from `start_folder` in its place by renaming.

    Args:
        path (`str` or `Path`): The final place.
        keep_as (`str` or `Path`, *optional*): Where to move the folder that stands there; deleted by default.
    """
    path = Path(path)
    replaced = Path(keep_as) if keep_as is not None else path.with_name(path.name + ".replaced")
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(path, replaced)
    os.replace(_partial(path), path)
    if keep_as is None:
        shutil.rmtree(replaced, ignore_errors=True)


def save_model(path: str | Path, model: nn.Module, processor: Any) -> None:
    """Write a model and its image processor as one folder that `from_pretrained` reads, atomically.

    Args:
        path (`str` or `Path`): The folder.
        model (`PreTrainedModel`): The model, unwrapped.
        processor (`BaseImageProcessor`): Its image processor.
    """
    folder = start_folder(path)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    finish_folder(path)


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | Path,
    model: nn.Module,
    processor: Any,
    progress: Progress,
    keep_last: int,
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
    """
    last = Path(output_dir) / "last"
    if accelerator.is_main_process:
        start_folder(last)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(_partial(last) / STATE_FOLDER))
    if accelerator.is_main_process:
        model.save_pretrained(_partial(last))
        processor.save_pretrained(_partial(last))
        (_partial(last) / STATE_FOLDER / "step").write_text(str(progress.step))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish_folder(last, keep_as=_step_folder(last) if last.exists() else None)
        for folder in _earlier_checkpoints(output_dir)[keep_last - 1 :]:
            shutil.rmtree(folder)
    accelerator.wait_for_everyone()


def find_checkpoint(output_dir: str | Path) -> Path | None:
    """Find the newest whole checkpoint of a run.

    Args:
        output_dir (`str` or `Path`): Folder of the run.

    Returns:
        `Path` or None: `last/`, or the one before if the process was killed while `last/` was being replaced; None if
        the run has saved nothing.
    """
    candidates = [Path(output_dir) / "last", *_earlier_checkpoints(output_dir)]
    return next((folder for folder in candidates if (folder / STATE_FOLDER / "step").is_file()), None)


def load_checkpoint(accelerator: Accelerator, folder: Path) -> None:
    """Restore the training state of a checkpoint into everything that was prepared or registered.

    Args:
        accelerator (`Accelerator`): As it was when the checkpoint was saved.
        folder (`Path`): From `find_checkpoint`.
    """
    accelerator.load_state(str(folder / STATE_FOLDER))


def _partial(path: str | Path) -> Path:
    return Path(path).with_name(Path(path).name + ".partial")


def _step_folder(last: Path) -> Path:
    return last.with_name(f"step-{int((last / STATE_FOLDER / 'step').read_text()):08d}")


def _earlier_checkpoints(output_dir: str | Path) -> list[Path]:
    folders = Path(output_dir).glob("step-*")
    return sorted((folder for folder in folders if folder.is_dir()), key=lambda folder: folder.name, reverse=True)
