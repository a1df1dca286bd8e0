"""What must agree before a run goes on: its folder with the recipe, its model, and its best checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..evaluation.files import read_json
from ..evaluation.origin import weights_digest
from ..evaluation.report_files import read_report
from ..modeling.configuration_drmm import DrmmConfig
from .arguments import Recipe, changed_fields, load_recipe
from .checkpoint import Progress


def check_run(output_dir: Path, recipe: Recipe, checkpoint: Path | None) -> list[str]:
    """Check that an output folder is free, or holds the run that is to be resumed.

    Args:
        output_dir (`Path`): The folder.
        recipe (`Recipe`): Of the run that is to start.
        checkpoint (`Path`, *optional*): The newest checkpoint in the folder.

    Returns:
        `list[str]`: A line for each field of data and training that is no longer what it was.

    Raises:
        ValueError: If there is a run and `resume` is not set, or if it is one of another model.
    """
    if checkpoint is None:
        return []
    if not recipe.training.resume:
        raise ValueError(
            f"output_dir {str(output_dir)!r} holds a run: continue it with --resume or name another folder"
        )
    if not (output_dir / "recipe.yaml").is_file():
        return []
    stored = load_recipe(output_dir / "recipe.yaml")
    for name, before, now in changed_fields(stored.model, recipe.model):
        raise _other_model(output_dir, name, before, now)
    lines = []
    for section in ("data", "training"):
        for name, before, now in changed_fields(vars(getattr(stored, section)), vars(getattr(recipe, section))):
            if name not in ("resume", "output_dir"):
                stretches = name in ("epochs", "max_steps") and recipe.training.schedule_by == "steps"
                lines.append(
                    f"{section}.{name} was {before!r} and is now {now!r}"
                    + (": the learning rate follows the new length" if stretches else "")
                )
    return lines


def check_model(output_dir: Path, before: DrmmConfig, now: DrmmConfig) -> None:
    """Check that a model is the one whose weights are to be loaded; names of classes may differ.

    Args:
        output_dir (`Path`): Folder of the run.
        before (`DrmmConfig`): Of the checkpoint.
        now (`DrmmConfig`): Of the model.

    Raises:
        ValueError: If any other field differs.
    """
    names = ("id2label", "label2id", "transformers_version", "architectures", "dtype")
    fields = [{name: value for name, value in one.to_dict().items() if name not in names} for one in (before, now)]
    for name, was, is_now in changed_fields(*fields):
        raise _other_model(output_dir, name, was, is_now)


def _other_model(output_dir: Path, name: str, before: Any, now: Any) -> ValueError:
    return ValueError(
        f"output_dir {str(output_dir)!r} holds a run of another model: {name} was {before!r} and is {now!r}; "
        "name another folder"
    )


def settle_best(
    accelerator: Accelerator, output_dir: Path, progress: Progress, metric: str, other_data: bool = False
) -> list[str]:
    """Let progress and the best checkpoint agree when a run goes on.

    A best checkpoint of a later step, which the run had reached before, stays until an evaluation is better. In the
    place of one that no longer counts, the checkpoint that the run goes on from is evaluated.

    Args:
        accelerator (`Accelerator`): With several processes, all call this; the first one looks.
        output_dir (`Path`): Folder of the run.
        progress (`Progress`): Where the run stands; changed if it does not agree.
        metric (`str`): What decides which checkpoint is the best.
        other_data (`bool`): Whether it was measured on other data than the run has now.

    Returns:
        `list[str]`: Why it no longer counts; empty if it does.
    """
    lost, later = [], None
    if accelerator.is_main_process:
        lost, later = _look_at_best(output_dir, progress, metric)
    if other_data:
        lost = [f"the best checkpoint (step {progress.best_step}) was measured on other validation data"]
    lost, later = broadcast_object_list([lost, later])
    if later is not None and not lost:
        progress.best_step, progress.best_value = later
        progress.evaluations_since_best = 0
        accelerator.print(f"best/ is of step {progress.best_step}; it stays until an evaluation is better")
    elif lost and (progress.best_step is not None or progress.evaluation_due):
        if progress.best_step is not None or (output_dir / "best").exists():
            accelerator.print(f"{lost[0]}; that of step {progress.step} is evaluated in its place")
        progress.best_value, progress.best_step, progress.evaluation_due = None, None, True
        return lost
    return []


def _look_at_best(output_dir: Path, progress: Progress, metric: str) -> tuple[list[str], tuple[int, float] | None]:
    """Say what is wrong with the best checkpoint, or its step and value if it is of a later step."""
    name = f"the best checkpoint (step {progress.best_step or progress.step})"
    missing = [one for one in ("best", "metrics.json", "detections.json") if not (output_dir / one).exists()]
    if missing:
        return [f"missing of {name}: {', '.join(missing)}"], None
    try:
        about, metrics = (read_report(output_dir / f"{name}.json") for name in ("evaluation", "metrics"))
        config = read_json(output_dir / "best" / "config.json")
    except (OSError, ValueError) as error:
        return [f"damaged of {name}: {error}"], None
    if not isinstance(config, dict):
        return [f"damaged of {name}: config.json"], None
    if about and (
        about.get("step") is None
        or about.get("weights") != weights_digest(output_dir / "best")
        or metrics.get("deduplication") is not None
    ):
        return [f"the figures in {output_dir} are not those of {name}"], None
    later = about.get("step") or 0
    return [], (later, metrics[metric] or 0.0) if later > progress.step else None
