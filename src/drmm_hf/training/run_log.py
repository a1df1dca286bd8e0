"""A run's clock and its figures: stdout, `log.jsonl`, `results.csv` and the trackers."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm import tqdm

from ..evaluation.files import write_text
from .arguments import TrainingArguments
from .checkpoint import Progress


class Clock:
    """Tell how much of a run's time is used, the same in every process.

    Args:
        accelerator (`Accelerator`): With several processes and a bound in minutes, the first one's clock counts.
        progress (`Progress`): `seconds` used by earlier parts of the run; `read` updates it.
        training (`TrainingArguments`): `max_minutes`.
    """

    def __init__(self, accelerator: Accelerator, progress: Progress, training: TrainingArguments):
        self.accelerator = accelerator
        self.progress = progress
        self.limit = None if training.max_minutes is None else 60 * training.max_minutes
        self.earlier, self.first_step = progress.seconds, progress.step
        self.started = self.stopped = time.perf_counter()

    def read(self) -> None:
        """Set `progress.seconds` to the time used by now."""
        self.stopped = time.perf_counter()
        seconds = self.earlier + self.stopped - self.started
        if self.limit is not None and self.accelerator.num_processes > 1:
            seconds = broadcast_object_list([seconds])[0]
        self.progress.seconds = seconds

    def fraction(self) -> float:
        """Return the share of `max_minutes` that was used when the clock was last read."""
        return self.progress.seconds / self.limit

    def expected_steps(self) -> float:
        """Return how many steps fit into `max_minutes`, at the pace of this part of the run.

        Returns:
            `float`: Infinite without such a bound, and before 3 steps and a twentieth of the time, a minute at most,
                have given a pace.
        """
        steps, seconds = self.progress.step - self.first_step, self.progress.seconds - self.earlier
        if self.limit is None or steps < 3 or seconds < min(0.05 * self.limit, 60):
            return math.inf
        return self.progress.step + (self.limit - self.progress.seconds) / seconds * steps

    def is_over(self) -> bool:
        """Return whether `max_minutes` were used up when the clock was last read."""
        return self.limit is not None and self.progress.seconds >= self.limit


def per_cent(metrics: Mapping[str, Any]) -> str:
    """Return the main figures of an evaluation for a printed line.

    Args:
        metrics (`Mapping`): Fractions by name; those that are not defined are left out.

    Returns:
        `str`: AP and ECE in per cent, in the form of `drmm evaluate`.
    """
    figures = {name: metrics.get(name) for name in ("AP", "AP50", "AP75", "ECE")}
    words = [f"{name} {100 * value:.2f}" for name, value in figures.items() if value is not None]
    return f"in per cent: {'  '.join(words)}"


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's log.

    Args:
        path (`Path`): `log.jsonl`.

    Returns:
        `list[dict]`: Each line; a last one that a kill cut short is left out. Empty if there is no file.

    Raises:
        ValueError: If a line is not what a run writes; the message has file and number.
    """
    lines = []
    content = path.read_bytes() if path.is_file() else b""
    for number, text in enumerate(content.splitlines(keepends=True), start=1):
        if not text.endswith(b"\n"):
            break
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise ValueError(
                f"{path}, line {number}, is no line of a log, a json object with a whole number as step: "
                f"{text[:60].decode(errors='replace').strip()!r}; mend it, or move the file away to go on without it"
            )
        lines.append(line)
    return lines


class Log:
    """Write a run's figures to stdout, `log.jsonl`, `results.csv` and the trackers, without waiting at each step.

    A training line of `log.jsonl` holds, over the steps since the line before: `loss` (mean over pictures), the
    criterion's terms (`nll.stage0`, `mcm.stage0`, ...: mean over ground truths), `leading_share.stage0`, ...
    (exp(-L_MCM): the share of a ground truth's likelihood that its best component takes), `grad_norm` before clipping,
    learning rates and pictures per second. An evaluation line holds the figures of `measure`. `results.csv` has a line
    an evaluation, with the training line before it. Files have fractions and count stages from 0; what is printed has
    per cent, the last stage, and the minutes left at the pace so far: in each line, and once after 10 seconds if there
    was none and no bar.

    A step whose loss or gradient is not finite is left out of the figures; the loop has left the weights as they were.
    What it was made of is written to `skipped_steps/`.

    Args:
        accelerator (`Accelerator`): Its trackers are started here.
        output_dir (`Path`): Folder of the run. Lines of later steps, from a run that was killed, are removed.
        progress (`Progress`): Where the run stands.
        total_steps (`float`): Steps of the whole run; infinite if time ends it.
        max_skipped_steps (`int`): Skipped steps in a row at which the run is stopped.
        max_minutes (`float`, *optional*): Bound of the run by the clock.

    Raises:
        ValueError: If the log of the folder is damaged; see `read_log`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        progress: Progress,
        total_steps: float,
        max_skipped_steps: int = 3,
        max_minutes: float | None = None,
    ):
        self.accelerator = accelerator
        self.progress = progress
        self.max_skipped_steps = max_skipped_steps
        self.total_steps, self.max_seconds = total_steps, 60 * (max_minutes or math.inf)
        self.began_at, self.has_said = (progress.step, progress.seconds), False
        self.path = output_dir / "log.jsonl"
        if accelerator.is_main_process:
            kept = [line for line in read_log(self.path) if line["step"] <= progress.step]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        accelerator.init_trackers("drmm")
        self.bar = tqdm(
            total=None if math.isinf(total_steps) else total_steps,
            initial=progress.step,
            unit="step",
            disable=None if accelerator.is_main_process else True,  # None: only on a terminal
        )
        self._start_window()

    def _start_window(self) -> None:
        self.steps = []
        self.window_started = time.perf_counter()

    def add(self, batches: list[Mapping[str, Any]], terms: list[dict[str, Tensor]], norm: Tensor) -> None:
        """Take in one optimiser step.

        Args:
            batches (`list[Mapping]`): Its batches.
            terms (`list[dict[str, Tensor]]`): The loss and its terms of each, means over pictures.
            norm (`Tensor`): Norm of the gradient before clipping.
        """
        self.names = list(terms[0])
        values = [torch.stack([batch[name].detach().float() for name in self.names]) for batch in terms]
        labels = [batch["labels"] for batch in batches]
        self.steps.append(LoggedStep(self.progress.step, labels, values, norm.detach()))
        self.bar.update()
        if self.bar.disable and not self.has_said and self.progress.seconds - self.began_at[1] > 10:
            self._say(())

    def write_training(self, optimizer: torch.optim.Optimizer) -> None:
        """Write the figures of the steps since the last training line.

        Args:
            optimizer (`Optimizer`): Gives the learning rates.

        Raises:
            FloatingPointError: If `max_skipped_steps` in a row had a loss or gradient that is not finite.
        """
        if not self.steps:
            return
        device, seconds = self.accelerator.device, time.perf_counter() - self.window_started
        norms, sums = torch.stack([step.norm for step in self.steps]), torch.stack([s.sums() for s in self.steps])
        counts = torch.tensor([[step.num_images, step.num_objects] for step in self.steps], device=device).double()
        skipped = ~sums.isfinite().all(1)
        if self.accelerator.scaler is None:  # a scaler of fp16 looks for the largest scale that overflows
            skipped |= ~norms.isfinite()
        table = torch.cat((skipped[:, None].double(), counts, sums.double().nan_to_num(0, 0, 0)), 1)
        table = self.accelerator.reduce(table, "sum")
        used = table[:, 0] == 0
        images = float(table[:, 1].sum())
        self._report_skipped((~used).tolist())
        if used.any():
            _, used_images, objects, *totals = table[used].sum(0).tolist()
            values = {}
            for name, value in zip(self.names, totals, strict=True):
                per_object = name.startswith(("nll.", "mcm."))
                values[name] = value / max(objects, 1) if per_object else value / used_images
                if name.startswith("mcm."):
                    values[name.replace("mcm", "leading_share")] = math.exp(-values[name])
            finite = norms[used & norms.isfinite()]
            values["grad_norm"] = finite.mean().item() if len(finite) else math.inf
            for group in optimizer.param_groups:
                part = group["name"].removesuffix("_no_decay")
                values["learning_rate" if part == "head" else f"learning_rate_{part}"] = group["lr"]
            values["images_per_second"] = images / seconds
            if device.type == "cuda":
                values["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            if self.progress.skipped_steps:
                values["skipped_steps"] = float(self.progress.skipped_steps)
            words = [f"{name} {value:.4g}" for name, value in values.items() if ".stage" not in name]
            last = max((int(name.rpartition(".stage")[2]) for name in values if ".stage" in name), default=None)
            of_last = [name.partition(".stage") for name in values if name.endswith(f".stage{last}")]
            if of_last:
                terms = "  ".join(f"{name[0]} {values[''.join(name)]:.4g}" for name in of_last)
                words.append(f"last stage: {terms}")
            self._write(values, words)
        self._start_window()

    def write_evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Write the figures of an evaluation.

        Args:
            metrics (`Mapping`): From `evaluate_model`.
        """
        values = {name: value for name, value in metrics.items() if isinstance(value, float)}
        self._write(values, [f"validation {per_cent(values)}"])
        self.write_table()
        self.window_started = time.perf_counter()

    def evaluation_at(self, step: int) -> dict[str, float] | None:
        """Look up an evaluation that an earlier part of the run completed.

        Args:
            step (`int`): The step.

        Returns:
            `dict` or None: What `write_evaluation` wrote there, in every process.
        """
        found = [None]
        if self.accelerator.is_main_process:
            lines = read_log(self.path)
            found = [next((line for line in lines if line["step"] == step and "AP" in line), None)]
        return broadcast_object_list(found)[0]

    def close(self) -> None:
        """Take the bar away."""
        self.bar.close()

    def _write(self, values: Mapping[str, float], words: Sequence[str]) -> None:
        progress = self.progress
        head = {"step": progress.step, "epoch": progress.epoch, "images": progress.images, "seconds": progress.seconds}
        self.accelerator.log(dict(values), step=progress.step)
        if not self.accelerator.is_main_process:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({**head, **values}) + "\n")
        self._say(words)

    def _say(self, words: Sequence[str]) -> None:
        """Print a line with where the run stands, if this is the main process."""
        progress, self.has_said = self.progress, True
        if not self.accelerator.is_main_process:
            return
        steps, seconds = progress.step - self.began_at[0], progress.seconds - self.began_at[1]
        left = seconds / steps * (self.total_steps - progress.step) if steps else math.inf
        left = min(left, self.max_seconds - progress.seconds)
        time_left = f", about {max(left, 0) / 60:.1f} left" if math.isfinite(left) else ""
        where = f"[{progress.seconds / 60:.1f} min{time_left}] epoch {progress.epoch} step {progress.step}"
        tqdm.write("  ".join((where, *words)))

    def write_table(self) -> None:
        """Write `results.csv` from `log.jsonl`."""
        if not self.accelerator.is_main_process:
            return
        lines, training = [], {}
        for line in read_log(self.path):
            if "AP" in line:
                lines.append({**training, **line})
            else:
                training = line
        columns = dict.fromkeys(name for line in lines for name in line)
        text = io.StringIO()
        table = csv.DictWriter(text, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(lines)
        write_text(self.path.with_name("results.csv"), text.getvalue())

    def _report_skipped(self, skipped: list[bool]) -> None:
        progress = self.progress
        for step, is_skipped in zip(self.steps, skipped, strict=True):
            progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if is_skipped else 0
            if not is_skipped:
                continue
            progress.skipped_steps += 1
            folder = self.path.parent / "skipped_steps"
            folder.mkdir(exist_ok=True)
            file = folder / f"step-{step.number:08d}-process-{self.accelerator.process_index}.json"
            file.write_text(json.dumps(step.contents(self.names), indent=1) + "\n")
            image_ids = gather_object([image["image_id"] for image in step.contents(self.names)["images"]])
            message = (
                f"step {step.number}: loss or gradient is not finite; pictures with image_id {image_ids}, "
                f"their boxes and loss terms in {file}"
            )
            if progress.skipped_in_a_row >= self.max_skipped_steps:
                raise FloatingPointError(
                    f"{message}. This was number {progress.skipped_in_a_row} in a row (max_skipped_steps): look at "
                    "the boxes, or lower the learning rate"
                )
            if self.accelerator.is_main_process:
                tqdm.write(f"skipped {message}")


@dataclass
class LoggedStep:
    """Hold one optimiser step of this process until its log line is written.

    Args:
        number (`int`): Number of the step.
        labels (`list[list[dict]]`): For each batch the labels of its pictures.
        terms (`list[Tensor]`): For each batch the loss and its terms, means over its pictures.
        norm (`Tensor`): Norm of the gradient before clipping.
    """

    number: int
    labels: list[list[Mapping[str, Any]]]
    terms: list[Tensor]
    norm: Tensor

    @property
    def num_images(self) -> int:
        """Pictures of the step."""
        return sum(map(len, self.labels))

    @property
    def num_objects(self) -> int:
        """Ground truths of the step."""
        return sum(len(label["boxes"]) for labels in self.labels for label in labels)

    def sums(self) -> Tensor:
        """Return the loss and its terms, summed over pictures."""
        return torch.stack([t * len(labels) for t, labels in zip(self.terms, self.labels, strict=True)]).sum(0)

    def contents(self, names: list[str]) -> dict[str, Any]:
        """Return everything that made the step, for a json file; numbers that are not finite as words.

        Args:
            names (`list[str]`): Names of the terms.
        """
        terms = [dict(zip(names, map(_word, values.tolist()), strict=True)) for values in self.terms]
        images = [
            {
                "image_id": int(label["image_id"]),
                "boxes": [[_word(side) for side in box] for box in label["boxes"].tolist()],
                "class_labels": label["class_labels"].tolist() if "class_labels" in label else None,
                "size": label["size"].tolist() if "size" in label else None,
            }
            for labels in self.labels
            for label in labels
        ]
        return {"step": self.number, "grad_norm": _word(float(self.norm)), "terms": terms, "images": images}


def _word(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
