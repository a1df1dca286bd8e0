"""What the benchmarks share: turns, clocks, summaries, the machine's matrix rate, floating-point operations, memory.

Machines are shared and their clocks move. So contestants take turns, each turn gives one ratio, and on a CPU what
counts is processor time: what other work does to the wall clock, it does not do to that. On a GPU the wall clock
counts, read from events in its stream.
"""

from __future__ import annotations

import ctypes
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm


T = TypeVar("T")


class Seconds(NamedTuple):
    """What a piece of work took.

    Attributes:
        wall (`float`): seconds of wall clock; on a GPU, of its stream.
        processor (`float`): seconds of all threads of this process and of those that it has waited for.
    """

    wall: float
    processor: float

    def cost(self, device: torch.device) -> float:
        """Return the clock that counts on a device."""
        return self.processor if device.type == "cpu" else self.wall


class Stopwatch:
    """Time a piece of work part by part.

    On a GPU a mark is an event in the stream, so that nothing waits before the end; a part that waits for the host, as
    for data, is the stream's idle time.

    Args:
        device (`torch.device`): Where the work is done.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.names, self.times = [], []
        self.mark("")

    def mark(self, name: str) -> None:
        """End a part, which began at the mark before.

        Args:
            name (`str`): Its name.
        """
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self.names.append(name)
        self.times.append((event, time.perf_counter(), processor_seconds()))

    def parts(self) -> dict[str, Seconds]:
        """Return what each part took, once all work is done; parts of one name are added up."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        parts = {}
        pairs = zip(self.names[1:], self.times, self.times[1:], strict=False)
        for name, (first, start, used), (last, end, used_by_end) in pairs:
            wall = end - start if first is None else first.elapsed_time(last) / 1000
            before = parts.get(name, Seconds(0, 0))
            parts[name] = Seconds(before.wall + wall, before.processor + used_by_end - used)
        return parts

    def total(self) -> Seconds:
        """Return what all parts took together."""
        return Seconds(*map(sum, zip(*self.parts().values(), strict=True)))


def processor_seconds() -> float:
    """Return the processor time that this process and those that it has waited for have used."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def timed(work: Callable[[], Any], device: torch.device) -> Seconds:
    """Do something once.

    Args:
        work (`Callable`): What to do.
        device (`torch.device`): Where it is done.

    Returns:
        `Seconds`: What it took.
    """
    stopwatch = Stopwatch(device)
    work()
    stopwatch.mark("work")
    return stopwatch.total()


def take_turns(
    contestants: Mapping[str, Callable[[], T]], repetitions: int, warm_up: int = 1, title: str = ""
) -> dict[str, list[T]]:
    """Let contestants take turns, so that what the machine does meanwhile meets all of them.

    Args:
        contestants (`Mapping[str, Callable]`): By name, a piece of work that returns its own measurement.
        repetitions (`int`): Turns of each that count.
        warm_up (`int`): Turns of each before them.
        title (`str`): Beside the progress bar.

    Returns:
        `dict[str, list]`: What each returned, turn by turn.
    """
    returned = {name: [] for name in contestants}
    with tqdm(total=(warm_up + repetitions) * len(contestants), desc=title, leave=False, disable=None) as bar:
        for _ in range(warm_up + repetitions):
            for name, work in contestants.items():
                bar.set_postfix_str(name)
                returned[name].append(work())
                bar.update()
    return {name: values[warm_up:] for name, values in returned.items()}


def summary(values: list[float]) -> dict[str, float]:
    """Return median, least and most of some numbers."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def check_least(least: Mapping[str, tuple[int, int]]) -> None:
    """Check numbers against their lower bounds.

    Args:
        least (`Mapping[str, tuple[int, int]]`): By name, the number and the least that it may be.

    Raises:
        ValueError: If one is less.
    """
    for name, (value, bound) in least.items():
        if value < bound:
            raise ValueError(f"{name} is {value}, must be at least {bound}")


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Let torch use so many threads within."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def matmul_rate(dtype: torch.dtype, device: torch.device, least_seconds: float = 0.2) -> Seconds:
    """Measure how fast the machine multiplies matrices: the roof of all that is made of products.

    Args:
        dtype (`torch.dtype`): Of the matrices, 1024 x 1024 on a CPU and 8192 x 8192 on a GPU.
        device (`torch.device`): Where.
        least_seconds (`float`): Repeats until so much wall time is used.

    Returns:
        `Seconds`: Floating-point operations in a second of either clock.
    """
    size = 1024 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = left @ right
    repetitions = 4

    def multiply() -> None:
        for _ in range(repetitions):
            torch.mm(left, right, out=out)

    while (taken := timed(multiply, device)).wall < least_seconds:
        repetitions *= 2
    return Seconds(*(repetitions * 2 * size**3 / seconds for seconds in taken))


def count_flops(work: Callable[[], Any]) -> int:
    """Count the floating-point operations of a piece of work, forward and backward, by torch's own counter.

    It counts products of matrices, convolutions and attention, a multiplication and an addition as two. What reads and
    adds without a matrix (pooling by `embedding_bag`, scatter, `grid_sample`), norms, activations and the optimiser
    count nothing.

    Args:
        work (`Callable`): What to do, once.

    Returns:
        `int`: Operations.
    """
    # Attention as two products: torch has no formula for the fused kernel of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


class PeakMemory(NamedTuple):
    """Memory of a piece of work, bytes.

    Attributes:
        before (`int`): held when it began.
        peak (`int`): most held while it was done.
    """

    before: int
    peak: int

    @property
    def added(self) -> int:
        """What the work needed beyond what was held."""
        return self.peak - self.before


def peak_memory(work: Callable[[], Any], device: torch.device) -> PeakMemory | None:
    """Do something once and measure its memory: tensors on a GPU, the resident set of the process on a CPU.

    Args:
        work (`Callable`): What to do.
        device (`torch.device`): Where it is done.

    Returns:
        `PeakMemory`, or None on systems other than Linux, which do not let the high-water mark be reset.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return PeakMemory(before, torch.cuda.max_memory_allocated())
    mark = Path("/proc/self/clear_refs")
    if not mark.exists():
        work()
        return None
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
    mark.write_text("5")  # the high-water mark becomes what is resident now
    before = _resident("VmRSS")
    work()
    return PeakMemory(before, _resident("VmHWM"))


def _resident(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{entry}:"))
    return 1024 * int(line.split()[1])


def environment(device: torch.device, *packages: str) -> dict[str, Any]:
    """Describe where a benchmark runs.

    Args:
        device (`torch.device`): The device.
        *packages (`str`): Packages to name with their versions, besides torch.

    Returns:
        `dict`: `device`, `threads`, `cpu_capability` and `versions`.
    """
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {name: version(name) for name in ("torch", *packages)},
    }
