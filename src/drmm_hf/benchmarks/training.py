"""The training step, part by part, and beside the steps of transformers' detectors on the same pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..data.coco import categories
from ..data.labels import LabelMap
from ..training.arguments import Recipe, TrainingArguments
from ..training.build import build_model, load_split, training_loader
from ..training.ema import averaged_model
from ..training.optimizer import build_optimizer, schedule_factor, set_learning_rate
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
from .paths import training_paths_of, without
from .peers import PEERS, build_peer


PARTS = ("data", "backbone", "neck", "decoder", "loss", "backward", "optimizer")
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NUM_CLASSES = 80  # of the model where pictures are drawn, as in COCO
# What is measured where no recipe is named: the default `DrmmConfig`, ResNet-50 on Sparse R-CNN.
DEFAULT_RECIPE = {"training": {"batch_size": 1, "max_steps": 1}}


def drawn_pictures(height: int, width: int, num_pictures: int) -> dict[str, Any]:
    """Return the fields of a recipe that trains on drawn pictures of one size, which flips leave as it is.

    Args:
        height (`int`): Of the pictures and of the model's input, pixels.
        width (`int`): The same.
        num_pictures (`int`): How many.

    Returns:
        `dict`: Overrides for `load_recipe` and `make_recipe`.
    """
    return {
        "source": "generated",
        "image_size": [height, width],
        "num_train_images": num_pictures,
        "shortest_edge": min(height, width),
        "longest_edge": max(height, width),
        "augmentation": "flip",
        "overfit": None,
        "holdout": None,
    }


class Trainee:
    """A model in training: one step of it is what the training loop does in one, on one process.

    Args:
        accelerator (`Accelerator`): Prepares the model and runs the backward pass.
        model (`nn.Module`): The model, which computes its own loss from labels.
        backbone (`nn.Module`): Its backbone, for the parameter groups.
        training (`TrainingArguments`): Optimiser, clipping, moving average, memory order, checkpointing.
        **inputs (`Any`): What the model is given besides pictures and labels.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        backbone: nn.Module,
        training: TrainingArguments,
        **inputs: Any,
    ):
        self.accelerator, self.training, self.inputs = accelerator, training, inputs
        self.device = accelerator.device
        if training.channels_last:
            model.to(memory_format=torch.channels_last)
        if training.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        self.bare_model = model.to(self.device).train()
        optimizer = build_optimizer(model, backbone, training)
        set_learning_rate(optimizer, schedule_factor(training, 0, 0.0))
        self.average = averaged_model(model, training.ema_decay) if training.ema_decay is not None else None
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.stopwatch = None

    def mark(self, name: str) -> None:
        """End a part of a step, if it is being timed."""
        if self.stopwatch is not None:
            self.stopwatch.mark(name)

    def time_modules(self, modules: Mapping[str, nn.Module]) -> None:
        """Make parts of the forward pass that end with a module's.

        Args:
            modules (`Mapping[str, nn.Module]`): By the part's name, in the order of the forward pass.
        """
        for name, module in modules.items():
            module.register_forward_hook(lambda *_, name=name: self.mark(name))

    def step(self, batch: Mapping[str, Any]) -> None:
        """Take one step.

        Args:
            batch (`Mapping`): `pixel_values`, `pixel_mask` and `labels`, on the device.
        """
        pixel_values = batch["pixel_values"]
        if self.training.channels_last:
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        outputs = self.model(
            pixel_values=pixel_values, pixel_mask=batch["pixel_mask"], labels=batch["labels"], **self.inputs
        )
        self.mark("loss")
        self.accelerator.backward(outputs.loss)
        self.mark("backward")
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.training.max_grad_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.bare_model)
        self.mark("optimizer")

    def timed_step(self, batch: Mapping[str, Any]) -> Seconds:
        """Take one step and return what it took."""
        self.stopwatch = Stopwatch(self.device)
        self.step(batch)
        return self.stopwatch.total()

    def state_bytes(self) -> int:
        """Return the bytes that stay between steps: weights, the optimiser's states, the moving average."""
        models = [self.bare_model] if self.average is None else [self.bare_model, self.average]
        tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
        states = self.optimizer.state_dict()["state"].values()
        tensors += [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        return sum(tensor.nbytes for tensor in tensors)


def benchmark_training(
    recipe: Recipe, *, repetitions: int = 5, peers: Sequence[str] = (), paths: bool = False
) -> dict[str, Any]:
    """Measure the training step of a recipe.

    First steps with the recipe's loader, one after another as in training, timed part by part. Then, on one batch, the
    model, its peers and the machine's matrix rate take turns. Peers train with the same optimiser and precision.

    Args:
        recipe (`Recipe`): Model, data and training; `accumulation_steps` does not count.
        repetitions (`int`): Steps of either kind that count, after one that does not.
        peers (`Sequence[str]`): Names in `drmm_hf.benchmarks.peers.PEERS`.
        paths (`bool`): Also take steps with the plain way in the place of each fast path, which a compiled model does
            not have.

    Returns:
        `dict`: The settings and the environment; `pictures_per_second`, of wall clock with the loader; `parts`: by
        the names in `PARTS` (a compiled model has `forward_and_loss` in place of four of them) `seconds`,
        `processor_seconds`, and the `share` and `processor_share` of the step that they are; `matmul`: the machine's
        floating-point operations a second (on a CPU, of one core); `models`: for `drmm` and each peer `seconds`,
        `processor_seconds`, `flops`, `roofline_share`, `ratio` to `drmm` of the clock that counts, `num_parameters`,
        `state_bytes`, and `step_bytes`, what a step needs on top at its peak (None where the system does not tell);
        `without`: by the path that is left out `seconds`, `processor_seconds` and `ratio`.
        Figures over steps are dicts of `median`, `min` and `max`.

    Raises:
        ValueError: If a number is out of range, a peer is not known, or recipe and data do not fit.
    """
    check_least({"repetitions": (repetitions, 1)})
    for name in peers:
        if name not in PEERS:
            raise ValueError(f"peer is {name!r}, must be one of {', '.join(PEERS)}")
    training = recipe.training
    if paths and training.compile:
        raise ValueError("paths and compile are both set: a compiled model has none of the paths")
    accelerator = Accelerator(mixed_precision=training.mixed_precision)
    device = accelerator.device
    dataset, _ = load_split(recipe.data, "train")
    if recipe.data.source == "generated":
        label_map = LabelMap.from_categories([{"id": n, "name": str(n)} for n in range(1, NUM_CLASSES + 1)])
    else:
        label_map = LabelMap.from_categories(categories(dataset))
    torch.manual_seed(training.seed)
    model, processor = build_model(recipe, label_map)
    loader = accelerator.prepare(training_loader(dataset, label_map, processor, recipe))
    batches = _batches(loader)
    drmm = Trainee(accelerator, model, model.model.backbone, training, output_auxiliary=False)
    trainees = {"drmm": drmm}
    batch = next(batches)
    for name in peers:
        peer = build_peer(name, len(label_map))
        trainees[name] = Trainee(accelerator, peer, _backbone(peer), training)
    figures = {}
    for name, trainee in trainees.items():
        flops = count_flops(partial(trainee.step, batch))  # the first step, which makes the optimiser's states
        if training.compile:
            trainee.bare_model.compile()
            trainee.step(batch)
        memory = peak_memory(partial(trainee.step, batch), device)
        figures[name] = {
            "num_parameters": sum(parameter.numel() for parameter in trainee.bare_model.parameters()),
            "flops": flops,
            "state_bytes": trainee.state_bytes(),
            "step_bytes": None if memory is None else memory.added,
        }

    parts, pictures = _parts(drmm, batches, repetitions)

    contestants = {"matmul": partial(matmul_rate, DTYPES[training.mixed_precision], device)}
    contestants |= {name: partial(trainee.timed_step, batch) for name, trainee in trainees.items()}
    left_out = training_paths_of(model, training.mixed_precision) if paths else {}
    contestants |= {f"without {name}": partial(_step_without, drmm, batch, lost) for name, lost in left_out.items()}
    taken = take_turns(contestants, repetitions, title="side by side")
    rates = [rate.cost(device) for rate in taken.pop("matmul")]
    costs = {name: [seconds.cost(device) for seconds in values] for name, values in taken.items()}
    for name, one in figures.items():
        one["seconds"] = summary([seconds.wall for seconds in taken[name]])
        one["processor_seconds"] = summary([seconds.processor for seconds in taken[name]])
        pairs = zip(costs[name], rates, strict=True)
        one["roofline_share"] = summary([one["flops"] / cost / rate for cost, rate in pairs])
        one["ratio"] = summary([cost / ours for cost, ours in zip(costs[name], costs["drmm"], strict=True)])
    plain = {
        name: {
            "seconds": summary([seconds.wall for seconds in taken[f"without {name}"]]),
            "processor_seconds": summary([seconds.processor for seconds in taken[f"without {name}"]]),
            "ratio": summary([a / b for a, b in zip(costs[f"without {name}"], costs["drmm"], strict=True)]),
        }
        for name in left_out
    }
    return {
        **environment(device, "torchvision", "transformers", "accelerate"),
        "dtype": training.mixed_precision,
        "compile": training.compile,
        "batch_size": len(batch["labels"]),
        "padded_size": list(batch["pixel_values"].shape[-2:]),
        "objects": sum(len(label["boxes"]) for label in batch["labels"]),
        "num_workers": recipe.data.num_workers,
        "repetitions": repetitions,
        "pictures_per_second": pictures,
        "parts": parts,
        "matmul": summary(rates),
        "models": figures,
        "without": plain,
    }


def _step_without(drmm: Trainee, batch: Mapping[str, Any], paths: tuple[str, ...]) -> Seconds:
    with without(drmm.bare_model, paths):
        return drmm.timed_step(batch)


def _parts(drmm: Trainee, batches: Iterator[Mapping[str, Any]], repetitions: int) -> tuple[dict, dict[str, float]]:
    """Time steps in a row, part by part; return the figures of the parts, and pictures a second."""
    if not drmm.training.compile:
        model = drmm.bare_model.model
        drmm.time_modules({"backbone": model.backbone, "neck": model.neck, "decoder": model.decoder})

    def step() -> tuple[dict[str, Seconds], int]:
        drmm.stopwatch = Stopwatch(drmm.device)
        batch = next(batches)
        drmm.mark("data")
        drmm.step(batch)
        return drmm.stopwatch.parts(), len(batch["labels"])

    steps, counts = zip(*take_turns({"step": step}, repetitions, title="step by step")["step"], strict=True)
    walls, used = ([sum(seconds[clock] for seconds in step.values()) for step in steps] for clock in (0, 1))
    named = {"loss": "forward_and_loss"} if drmm.training.compile else {}
    parts = {
        named.get(name, name): {
            "seconds": summary([step[name].wall for step in steps]),
            "processor_seconds": summary([step[name].processor for step in steps]),
            "share": summary([step[name].wall / whole for step, whole in zip(steps, walls, strict=True)]),
            "processor_share": summary(
                [step[name].processor / whole for step, whole in zip(steps, used, strict=True)]
            ),
        }
        for name in PARTS
        if name in steps[0]
    }
    return parts, summary([count / wall for count, wall in zip(counts, walls, strict=True)])


def _batches(loader: Any) -> Iterator[Mapping[str, Any]]:
    """Yield batches, epoch after epoch."""
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        yield from loader
        epoch += 1


def _backbone(model: nn.Module) -> nn.Module:
    """Return the backbone of a peer: the first module that is called so."""
    return next(module for name, module in model.named_modules() if name.split(".")[-1] == "backbone")
