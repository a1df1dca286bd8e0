"""Where a run stands in its data: the batches of one optimiser step after another, to the end of the epoch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import gather_object, send_to_device

from ..data.problems import Problems
from ..data.stream import StreamLoader
from .checkpoint import Progress


class Epochs:
    """Hand out the batches of the epoch in progress, from a data set or from a stream.

    Args:
        accelerator (`Accelerator`): With several processes, all of them ask for batches together.
        loader (`DataLoader` or `StreamLoader`): What `training_loader` returns, prepared.
        progress (`Progress`): Where the run stands.
        accumulation_steps (`int`): Batches of an optimiser step; the last one of an epoch may have fewer.
    """

    def __init__(self, accelerator: Accelerator, loader: Any, progress: Progress, accumulation_steps: int):
        self.accelerator, self.loader, self.progress, self.size = accelerator, loader, progress, accumulation_steps
        self.streams = isinstance(loader, StreamLoader)
        self.steps = math.inf if self.streams else math.ceil(len(loader) / accumulation_steps)
        self.position = None

    def rest(self) -> Iterator[tuple[list[Any], bool]]:
        """Yield the batches of each optimiser step that is left in the epoch, and whether the epoch ends with it.

        Raises:
            ValueError: If a stream has no pictures for one of the processes.
        """
        self.loader.set_epoch(self.progress.epoch)
        if self.streams:
            yield from self._rest_of_stream()
            return
        seen = self.progress.step_in_epoch * self.size
        batches = skip_first_batches(self.loader, seen) if seen else self.loader
        for step, group in enumerate(groups(batches, self.size), self.progress.step_in_epoch + 1):
            yield group, step == self.steps

    def positions(self) -> list[Any] | None:
        """Return where each process stands in its stream after the last step; None at the start of an epoch.

        To be called by every process.
        """
        return None if self.position is None else gather_object([self.position])

    def _rest_of_stream(self) -> Iterator[tuple[list[Any], bool]]:
        """Read one step ahead to know the last one; an epoch ends for all processes when one has no more pictures."""
        positions = self.progress.positions
        if positions is not None and len(positions) == self.accelerator.num_processes:
            self.loader.load_state_dict(positions[self.accelerator.process_index])
        batches = iter(self.loader)
        group, position = self._next_step(batches)
        if not group:
            left_out = self._left_out()
            raise ValueError(
                f"the stream of training pictures ended where the run stands, in epoch {self.progress.epoch}: each of "
                "the processes needs one more picture at least"
                + f"; {len(left_out)} were left out of it, {'; '.join(left_out.lines())}"
                * bool(left_out.found)
            )
        while group:
            following, later = self._next_step(batches)
            self.position = position if following else None
            if not following:
                self._report()
            yield group, not following
            group, position = following, later

    def _next_step(self, batches: Iterator[Any]) -> tuple[list[Any], Any]:
        """Return as many batches as all processes have, and the position after them."""
        device = self.accelerator.device
        group = [send_to_device(batch, device) for batch in islice(batches, self.size)]
        if self.accelerator.num_processes > 1:
            count = torch.tensor(len(group), device=device)
            torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MIN)
            group = group[: int(count)]
        return group, self.loader.state_dict()

    def _left_out(self) -> Problems:
        """Gather what the policy `skip` left out of the epoch in all processes."""
        total = Problems()
        for found in gather_object([self.loader.left_out]):
            total.merge(found)
        return total

    def _report(self) -> None:
        """Print what was left out."""
        total = self._left_out()
        if total.found:
            lines = "\n  ".join(total.lines())
            self.accelerator.print(f"epoch {self.progress.epoch}, left out of the stream: {len(total)}\n  {lines}")


def groups(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Group batches into the lists of one optimiser step; the last may be shorter.

    Args:
        batches (`Iterable`): Batches of an epoch.
        size (`int`): Batches in a group.

    Yields:
        `list`: Up to `size` batches.
    """
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group
