"""A pass of a detector beside those of transformers and the rate of the machine; what more of anything costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..modeling.configuration_drmm import DrmmConfig
from ..modeling.modeling_drmm import DrmmForObjectDetection
from .measuring import (
    Seconds,
    Stopwatch,
    check_least,
    count_flops,
    environment,
    matmul_rate,
    peak_memory,
    summary,
    take_turns,
)
from .peers import PEERS, build_peer


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PARTS = ("backbone", "neck", "decoder")
# What may grow, by the name of its setting.
AXES = ("height", "batch_size", "num_queries", "num_stages")


def benchmark_inference(
    configs: Mapping[str, DrmmConfig],
    *,
    height: int = 800,
    width: int = 1344,
    batch_size: int = 1,
    dtypes: Sequence[str] = ("float32",),
    peers: Sequence[str] = (),
    compile: bool = False,
    repetitions: int = 5,
    growing: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Measure how long detectors take from pixels to boxes and logits.

    Weights are random: nothing that takes time depends on them. All contestants and the machine's matrix rate take
    turns, so each turn gives a ratio and a share of the roofline of its own. Then, for the first detector alone, one
    setting grows at a time.

    Args:
        configs (`Mapping[str, DrmmConfig]`): Detectors of this package by a name; ratios are to the first.
        height (`int`): Of the model input, pixels.
        width (`int`): The same.
        batch_size (`int`): Pictures.
        dtypes (`Sequence[str]`): Types of weights and pictures: "float32", "bfloat16", "float16"; each contestant runs
            in each, and each is held against the matrix rate of its own.
        peers (`Sequence[str]`): Names in `drmm_hf.benchmarks.peers.PEERS`.
        compile (`bool`): Also run each contestant compiled, which takes minutes to begin with.
        repetitions (`int`): Turns that count, after one that does not.
        growing (`Mapping[str, Sequence[int]]`, *optional*): By a name in `AXES`, the values to run; the width grows
            with the height.

    Returns:
        `dict`: The settings and the environment; `matmul`: by dtype, floating-point operations a second (on a CPU, of
        one core); `contestants`: a list with `name`, `dtype`, `compiled`, `num_parameters`, `flops`, `seconds`,
        `processor_seconds`, `roofline_share`, `ratio`, `bytes` (what a pass needs beyond weights and pictures, None
        where the system does not tell) and, for those of this package, `parts`: shares of the time; `curves`: by axis
        a list with `value`, `seconds`, `processor_seconds`, `flops` and `bytes`.

    Raises:
        ValueError: If a number is out of range, or a name is not known.
    """
    numbers = {"height": height, "width": width, "batch_size": batch_size, "repetitions": repetitions}
    growing = dict(growing or {})
    numbers |= {f"growing {axis}": min(values, default=1) for axis, values in growing.items()}
    check_least({name: (value, 1) for name, value in numbers.items()})
    for what, names, known in (("peer", peers, PEERS), ("dtype", dtypes, DTYPES), ("axis", growing, AXES)):
        for name in names:
            if name not in known:
                raise ValueError(f"{what} is {name!r}, must be one of {', '.join(known)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (first, config), *_ = configs.items()
    num_labels = config.num_labels

    builders: dict[str, Callable[[], nn.Module]] = {}
    builders |= {name: partial(DrmmForObjectDetection, config) for name, config in configs.items()}
    builders |= {PEERS[name]: partial(build_peer, name, num_labels) for name in peers}
    passes, figures, turns = {}, [], {}
    for dtype in dtypes:
        turns[f"matmul {dtype}"] = partial(matmul_rate, DTYPES[dtype], device)
        for name, build in builders.items():
            forward = Pass(build(), dtype, device, batch_size, height, width)
            for compiled in (False, True) if compile else (False,):
                if compiled:
                    forward = forward.compiled()
                key = f"{name} {dtype}{' compiled' if compiled else ''}"
                figures.append({"key": key, "name": name, "dtype": dtype, "compiled": compiled, **forward.costs()})
                passes[key], turns[key] = forward, forward.timed
    taken = take_turns(turns, repetitions, title="side by side")
    costs = {key: [seconds.cost(device) for seconds in values] for key, values in taken.items()}
    reference = costs[figures[0]["key"]]
    for one in figures:
        key = one.pop("key")
        rates = costs[f"matmul {one['dtype']}"]
        one["seconds"] = summary([seconds.wall for seconds in taken[key]])
        one["processor_seconds"] = summary([seconds.processor for seconds in taken[key]])
        one["roofline_share"] = summary([one["flops"] / s / rate for s, rate in zip(costs[key], rates, strict=True)])
        one["ratio"] = summary([s / ours for s, ours in zip(costs[key], reference, strict=True)])
        one["parts"] = passes[key].parts(repetitions)
    passes.clear()

    base = {"height": height, "batch_size": batch_size, "num_queries": config.num_queries}
    base["num_stages"] = config.num_stages
    curves = {
        axis: _curve(config, dtypes[0], device, width / height, base, axis, values, repetitions)
        for axis, values in growing.items()
    }
    return {
        **environment(device, "torchvision", "transformers"),
        "size": [height, width],
        "batch_size": batch_size,
        "num_labels": num_labels,
        "repetitions": repetitions,
        "matmul": {dtype: summary(costs[f"matmul {dtype}"]) for dtype in dtypes},
        "contestants": figures,
        "curves_of": {"name": first, "dtype": dtypes[0], **base},
        "curves": curves,
    }


class Pass:
    """A detector and a batch of random pictures.

    Args:
        model (`nn.Module`): The detector; it is put into evaluation mode and the dtype.
        dtype (`str`): One of `DTYPES`.
        device (`torch.device`): Where it runs.
        batch_size (`int`): Pictures.
        height (`int`): Pixels.
        width (`int`): Pixels.
    """

    def __init__(self, model: nn.Module, dtype: str, device: torch.device, batch_size: int, height: int, width: int):
        self.device, self.model = device, model.to(device, DTYPES[dtype]).eval().requires_grad_(False)
        self.pixel_values = torch.rand(batch_size, 3, height, width, device=device).to(DTYPES[dtype])
        self.run = self.model
        self.flops = None

    def compiled(self) -> Pass:
        """Return the same, compiled."""
        other = object.__new__(Pass)
        other.__dict__ |= self.__dict__ | {"run": torch.compile(self.model)}
        other()
        return other

    @torch.inference_mode()
    def __call__(self) -> None:
        """Detect once."""
        self.run(pixel_values=self.pixel_values)

    def timed(self) -> Seconds:
        """Detect once and return what it took."""
        stopwatch = Stopwatch(self.device)
        self()
        stopwatch.mark("pass")
        return stopwatch.total()

    def costs(self) -> dict[str, Any]:
        """Return the number of parameters, the operations and the memory of a pass."""
        if self.flops is None:
            self.flops = count_flops(self)
        memory = peak_memory(self, self.device)
        return {
            "num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "flops": self.flops,
            "bytes": None if memory is None else memory.added,
        }

    def timed_parts(self) -> dict[str, Seconds]:
        """Detect once and return what each part took, of a detector of this package that is not compiled."""
        stopwatch = Stopwatch(self.device)
        hooks = [
            getattr(self.model.model, name).register_forward_hook(lambda *_, n=name: stopwatch.mark(n))
            for name in PARTS
        ]
        self()
        stopwatch.mark("rest")
        for hook in hooks:
            hook.remove()
        return stopwatch.parts()

    def parts(self, repetitions: int) -> dict[str, dict[str, float]] | None:
        """Return the share of each part in the time; None for a compiled model and for peers."""
        if self.run is not self.model or not isinstance(self.model, DrmmForObjectDetection):
            return None
        turns = []
        for _ in range(repetitions):
            costs = {name: seconds.cost(self.device) for name, seconds in self.timed_parts().items()}
            turns.append({name: cost / sum(costs.values()) for name, cost in costs.items()})
        return {name: summary([turn[name] for turn in turns]) for name in turns[0]}


def _curve(
    config: DrmmConfig,
    dtype: str,
    device: torch.device,
    aspect: float,
    base: Mapping[str, int],
    axis: str,
    values: Sequence[int],
    repetitions: int,
) -> list[dict[str, Any]]:
    """Let one setting grow."""
    passes = {}
    for value in values:
        settings = {**base, axis: value}
        changes = {name: settings[name] for name in ("num_queries", "num_stages")}
        if config.proposal_grid is not None:
            changes["proposal_grid"] = most_square_grid(settings["num_queries"])
        model = DrmmForObjectDetection(DrmmConfig.from_dict({**config.to_dict(), **changes}))
        width = round(settings["height"] * aspect)
        passes[value] = Pass(model, dtype, device, settings["batch_size"], settings["height"], width)
    costs = {value: one.costs() for value, one in passes.items()}
    taken = take_turns({value: one.timed for value, one in passes.items()}, repetitions, title=axis)
    return [
        {
            "value": value,
            "seconds": summary([seconds.wall for seconds in taken[value]]),
            "processor_seconds": summary([seconds.processor for seconds in taken[value]]),
            **costs[value],
        }
        for value in values
    ]


def most_square_grid(number: int) -> list[int]:
    """Return rows and columns, in whole numbers, whose product is a number and whose ratio is nearest to 1."""
    rows = next(rows for rows in range(math.isqrt(number), 0, -1) if number % rows == 0)
    return [rows, number // rows]


def slope(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Fit a straight line by least squares.

    Args:
        points (`Sequence[tuple[float, float]]`): At least two different positions and their values.

    Returns:
        `tuple[float, float]`: Its value at 0, and what one more adds.
    """
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    rise = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return mean_y - rise * mean_x, rise
