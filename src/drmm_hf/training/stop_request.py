"""Stopping a run from outside: finish the step, save, leave with the exit code that the signal asks for."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator


SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Remember that SIGINT or SIGTERM came, within `with stop_request:`.

    A second SIGINT ends the process at once. Outside the main thread, where Python has no signal handlers, nothing is
    remembered.

    Args:
        accelerator (`Accelerator`): A signal to one process stops all of them, after the same step.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.number = 0
        self.leaves_at_once = False
        self.replaced = {}

    def __enter__(self) -> StopRequest:
        """Take the signals over."""
        try:
            self.replaced = {number: signal.signal(number, self._remember) for number in SIGNALS}
        except ValueError:  # not the main thread
            self.replaced = {}
        return self

    def __exit__(self, *_) -> None:
        """Give them back, and say what happened."""
        if self.number:
            name = signal.Signals(self.number).name
            self.accelerator.print(f"stopped by {name}; the run is saved in last/ and --resume continues it")
        for number, handler in self.replaced.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
        if self.leaves_at_once:
            raise SystemExit(self.exit_code)

    @property
    def exit_code(self) -> int:
        """The exit code of a process that a signal ended: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number

    def came(self) -> bool:
        """Return whether a signal came to any process by now, the same in every process."""
        if self.accelerator.num_processes > 1:
            number = torch.tensor(self.number, device=self.accelerator.device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            self.number = int(number)
        return self.number > 0

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Leave at once if a signal comes, where nothing would be lost; one of several processes may not.

        Raises:
            SystemExit: With `exit_code`.
        """
        self.leaves_at_once = self.accelerator.num_processes == 1
        try:
            yield
        finally:
            self.leaves_at_once = False


def ignore_signals(*_) -> None:
    """Let a worker that reads pictures live until its training process has saved; to be called in the worker."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_workers_at_exit() -> None:
    """Kill what workers are left when this process ends, as after an error in the middle of an epoch.

    Python ends them with SIGTERM, which they ignore, and would wait for them for ever.
    """
    atexit.unregister(_kill_children)
    atexit.register(_kill_children)


def _kill_children() -> None:
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report their end as an error of its own
    for child in multiprocessing.active_children():
        child.kill()
