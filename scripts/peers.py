"""Train D-RMM and detectors of transformers and torchvision on the same pictures for the same time, and draw them.

python scripts/peers.py faster_rcnn --data BCCD --backbone-weights LITE0 --output runs/faster_rcnn --max-minutes 15
python scripts/peers.py drmm --data BCCD --backbone-weights LITE0 --output runs/drmm --max-minutes 15
python scripts/peers.py draw runs/faster_rcnn runs/drmm --output runs/time.png

Pictures, augmentation, batches, backbone and its weights, frozen parts, schedule and moving average are those of a
recipe, by default `recipes/bccd_study.yaml`; any field of it can be given as to `drmm train`. Figures are those of
`drmm evaluate`. Peers are built small, like the recipe's model, and start as their published code does; `drmm` is the
recipe's model, step for step as `drmm train` trains it. Minutes are processor time of training, without evaluation, so
that other work on the machine costs a run few of its steps. On the CPU.

OUTPUT gets `log.jsonl` (a line an evaluation on the validation split), `best.pt` (the weights that were best there,
a state dict), `metrics.json` (settings, size, time, memory, figures of both splits) and `test/` (`metrics.json` and
`detections.json` of the test split, as `drmm evaluate` writes them).
"""

import argparse
import copy
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from accelerate.utils import set_seed
from peer_models import BUILDERS, CPU, TOP_K, DrmmPeer
from torch import nn

from drmm_hf import DrmmConfig, DrmmImageProcessor
from drmm_hf.benchmarks.measuring import environment, peak_memory, processor_seconds
from drmm_hf.commands.train import parse_fields
from drmm_hf.conversion.backbone_weights import load_backbone_weights
from drmm_hf.data.coco import categories
from drmm_hf.data.labels import LabelMap
from drmm_hf.evaluation.detections import Detections
from drmm_hf.evaluation.evaluate import measure
from drmm_hf.evaluation.files import write_json
from drmm_hf.evaluation.predict import picture_batches
from drmm_hf.modeling.backbone import DrmmBackbone
from drmm_hf.training.arguments import Recipe, TrainingArguments, load_recipe
from drmm_hf.training.build import build_model, load_split, training_loader
from drmm_hf.training.ema import averaged_model
from drmm_hf.training.optimizer import build_optimizer, schedule_factor, set_learning_rate
from drmm_hf.training.run_log import per_cent, read_log


# Fields of a recipe that a peer has its own of, unless they are given. Rates, the backbone's share and the bound of
# the gradient are those of the published recipes, where these use AdamW. On a CPU bfloat16 makes DETRs no faster, and
# it would round their boxes; torchvision's detectors take half the time.
_DETR = {"backbone_lr_factor": 0.1, "max_grad_norm": 0.1, "mixed_precision": "no"}
FIELDS = {
    "drmm": {},
    "deformable_detr": {"learning_rate": 2e-4, **_DETR},
    "rt_detr_v2": {"learning_rate": 1e-4, **_DETR},
    "faster_rcnn": {"learning_rate": 1e-3},
    "fcos": {"learning_rate": 1e-3},
}
# What the loop below does not do.
_LEFT_OUT = {"accumulation_steps": 1, "find_batch_size": False, "compile": False, "gradient_checkpointing": False}
_LEFT_OUT |= {"resume": False, "init_from": None, "epochs": None, "patience": None}


class Training:
    """Train a peer, a stretch at a time.

    Args:
        peer (`nn.Module`): Its forward is the loss of a batch.
        loader (`DataLoader`): From `training_loader`.
        training (`TrainingArguments`): Of the recipe.
    """

    def __init__(self, peer: nn.Module, loader: Any, training: TrainingArguments):
        self.peer, self.training = peer.train(), training
        self.optimizer = build_optimizer(peer, peer.backbone, training)
        self.average = averaged_model(peer, training.ema_decay)
        self.batches = self.endless(loader)
        self.step, self.images, self.seconds, self.wall_seconds = 0, 0, 0.0, 0.0
        self.losses: list[float] = []

    @staticmethod
    def endless(loader: Any) -> Iterator[Mapping[str, Any]]:
        """Yield the batches of one epoch after another, incomplete ones too, in the order of `drmm train`."""
        for epoch in count():
            loader.sampler.set_epoch(epoch)
            yield from loader

    def done(self) -> float:
        """Return the share of the run that is over."""
        if self.training.max_minutes is not None:
            return self.seconds / 60 / self.training.max_minutes
        return self.step / self.training.max_steps

    def train_until(self, share: float) -> None:
        """Train up to a share of the run.

        Raises:
            FloatingPointError: If a loss or gradient is not finite.
        """
        self.losses.clear()
        while self.done() < share:
            used, began = processor_seconds(), time.perf_counter()
            set_learning_rate(self.optimizer, schedule_factor(self.training, self.step, self.done()))
            self.take_step(next(self.batches))
            self.seconds += processor_seconds() - used
            self.wall_seconds += time.perf_counter() - began

    def take_step(self, batch: Mapping[str, Any]) -> None:
        """Do one optimiser step."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.training.mixed_precision == "bf16"):
            loss = self.peer(batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.peer.parameters(), self.training.max_grad_norm or math.inf)
        if not norm.isfinite():
            ids = [label["image_id"].item() for label in batch["labels"]]
            raise FloatingPointError(f"step {self.step}: gradient {norm.item()}, loss {loss.item()}, image_id {ids}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update_parameters(self.peer)
        self.losses.append(loss.item())
        self.step, self.images = self.step + 1, self.images + len(batch["labels"])


@torch.no_grad()
def detect(peer: nn.Module, processor: DrmmImageProcessor, dataset: Any, batch_size: int) -> Detections:
    """Find the objects of every picture.

    Args:
        peer (`nn.Module`): In evaluation mode.
        processor (`DrmmImageProcessor`): Of the backbone's weights.
        dataset (`Dataset`): Canonical rows.
        batch_size (`int`): Most pictures at once.

    Returns:
        `Detections`: Of all pictures, in their order.
    """
    detections = Detections()
    for batch in picture_batches(processor, dataset, batch_size, progress=False):
        found = peer.detect(batch.inputs, batch.sizes)
        for image_id, result in zip(batch.image_ids, found, strict=True):
            detections.add(image_id, result, TOP_K)
    return detections.select(dataset["image_id"])


def build(name: str, recipe: Recipe, label_map: LabelMap) -> tuple[nn.Module, DrmmImageProcessor]:
    """Build a peer on the backbone of a recipe, and the processor of the backbone's weights."""
    if name == "drmm":
        model, processor = build_model(recipe, label_map)
        return DrmmPeer(model, processor), processor
    processor = DrmmImageProcessor(
        size={"shortest_edge": recipe.data.shortest_edge, "longest_edge": recipe.data.longest_edge}
    )
    peer = BUILDERS[name](DrmmBackbone(DrmmConfig(**recipe.model)), len(label_map))
    weights = recipe.training.backbone_weights
    if weights == "none":
        print("the backbone starts from random weights")
    elif weights is None:
        raise ValueError("backbone_weights is None, must be a file, or none for random weights")
    else:
        print(load_backbone_weights(peer, weights, processor))
    return peer, processor


def run(name: str, recipe: Recipe, evaluations: int) -> dict[str, Any]:
    """Train a peer, evaluate it on the way, and test the best.

    Args:
        name (`str`): One of `FIELDS`.
        recipe (`Recipe`): Data and training.
        evaluations (`int`): How many on the validation split, after equal shares of the run.

    Returns:
        `dict`: What `metrics.json` holds.

    Raises:
        ValueError: If the recipe asks for what is not done here, or the output folder is not empty.
        FloatingPointError: As `Training.train_until`.
    """
    training, output = recipe.training, Path(recipe.training.output_dir)
    for field, only in _LEFT_OUT.items():
        if getattr(training, field) != only:
            raise ValueError(f"{field} is {getattr(training, field)!r}, must be {only!r} for a peer")
    if training.ema_decay is None or training.mixed_precision == "fp16" or recipe.data.streaming:
        raise ValueError("a peer needs ema_decay, mixed_precision no or bf16, and streaming false")
    if evaluations < 1:
        raise ValueError(f"evaluations is {evaluations}, must be at least 1")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"output is {str(output)!r}, must be new or empty")
    output.mkdir(parents=True, exist_ok=True)

    set_seed(training.seed)
    train_set, _ = load_split(recipe.data, "train")
    label_map = LabelMap.from_categories(categories(train_set))
    mapping = dict(enumerate(label_map.category_ids))
    splits = {
        "val": load_split(recipe.data, "val"),
        "test": load_split(dataclasses.replace(recipe.data, val_split="test"), "val"),
    }
    peer, processor = build(name, recipe, label_map)
    if training.channels_last:
        peer.to(memory_format=torch.channels_last)
    parameters = {
        "all": sum(parameter.numel() for parameter in peer.parameters()),
        "trained": sum(parameter.numel() for parameter in peer.train().parameters() if parameter.requires_grad),
    }
    print(f"{name}: {parameters['all']:,} parameters, {parameters['trained']:,} of them trained")
    course = Training(peer, training_loader(train_set, label_map, processor, recipe), training)
    best, weights, peak = {"AP": -1.0}, {}, 0
    for number in range(1, evaluations + 1):
        memory = peak_memory(lambda number=number: course.train_until(number / evaluations), CPU)
        peak = max(peak, memory.peak if memory else 0)
        found = detect(course.average.module, processor, splits["val"][0], training.eval_batch_size)
        metrics = measure(found, splits["val"][1], mapping)
        line = {"step": course.step, "images": course.images, "minutes": course.seconds / 60}
        line |= {"wall_minutes": course.wall_seconds / 60, "loss": mean(course.losses or [math.nan])}
        line |= {key: value for key, value in metrics.items() if isinstance(value, float)}
        with (output / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"[{line['minutes']:.1f} min] step {course.step}  loss {line['loss']:.3f}  {per_cent(line)}", flush=True)
        if line["AP"] > best["AP"]:
            best, weights = line, copy.deepcopy(course.average.module.state_dict())
    torch.save(weights, output / "best.pt")
    course.average.module.load_state_dict(weights)
    found = detect(course.average.module, processor, splits["test"][0], training.eval_batch_size)
    tested = measure(found, splits["test"][1], mapping, output / "test")
    tested = {key: value for key, value in tested.items() if isinstance(value, float)}
    print(f"test, weights of step {best['step']}, {per_cent(tested)}")
    figures = {"peer": name, "parameters": parameters, "settings": peer.settings()}
    figures |= {"steps": course.step, "images": course.images, "minutes": course.seconds / 60}
    figures |= {"wall_minutes": course.wall_seconds / 60, "peak_memory_bytes": peak or None, "best": best}
    figures |= {"test": tested, "environment": environment(CPU, "torchvision", "transformers", "timm")}
    figures |= {"data": dataclasses.asdict(recipe.data), "training": dataclasses.asdict(training)}
    return write_json(figures, output / "metrics.json")


def curve(folder: Path) -> tuple[list[tuple[float, float]], str]:
    """Read minutes of training and AP on the validation split from the log of a peer or of `drmm train`.

    The clock of `drmm train` is the wall's, and runs on while it saves and evaluates. A training line stands right
    before each evaluation, so that this can be taken off.

    Args:
        folder (`Path`): Of the run.

    Returns:
        `tuple[list[tuple[float, float]], str]`: Minutes and AP of each evaluation, and whose minutes they are.
    """
    points, clock, spent, before = [], "processor", 0.0, None
    for line in read_log(folder / "log.jsonl"):
        if "AP" in line and "minutes" in line:
            points.append((line["minutes"], line["AP"]))
        elif "AP" in line:
            points.append(((before["seconds"] - spent) / 60, line["AP"]))
            spent += line["seconds"] - before["seconds"]
            clock = "wall clock"
        before = line
    if not points:
        raise ValueError(f"{str(folder)!r} has no log.jsonl with evaluations")
    return points, clock


def draw(folders: Sequence[Path], path: Path) -> None:
    """Draw AP against minutes of training, those of the wall clock dashed, and print where each run ends.

    Args:
        folders (`Sequence[Path]`): Runs; those of `NAME/seedN` get the colour and the name of `NAME`.
        path (`Path`): Picture to write; its folder is made.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes, colours = figure.subplots(), {}
    for folder in folders:
        name = folder.resolve().parent.name if folder.name.startswith("seed") else folder.resolve().name
        points, clock = curve(folder)
        minutes, values = zip(*points, strict=True)
        print(f"{folder}: {minutes[-1]:.2f} minutes of training ({clock}), best AP {max(values):.4f}")
        name, style = (name, "o-") if clock == "processor" else (f"{name} ({clock})", "o--")
        label = None if name in colours else name
        colour = colours.setdefault(name, f"C{len(colours)}")
        axes.plot(minutes, [100 * value for value in values], style, color=colour, markersize=3.5, label=label)
    axes.set_xlabel("minutes of training, processor time without evaluation")
    axes.set_ylabel("AP on the validation split (%)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="name", required=True)
    for name in FIELDS:
        command = commands.add_parser(name, allow_abbrev=False, help="train it; further options are a recipe's fields")
        command.add_argument("--recipe", type=Path, default=Path(__file__).parent / "recipes" / "bccd_study.yaml")
        command.add_argument("--data", help="folder with the splits train, val and test; the recipe's by default")
        command.add_argument("--backbone-weights", required=True, help="file, or none for random weights")
        command.add_argument("--output", required=True)
        command.add_argument("--evaluations", type=int, default=8, help="on the validation split, in equal steps")
        length = command.add_mutually_exclusive_group()
        length.add_argument("--max-minutes", type=float, help="processor time of training, without evaluation")
        length.add_argument("--max-steps", type=int)
    command = commands.add_parser("draw", help="AP against time, of these runs and of drmm train's")
    command.add_argument("folders", type=Path, nargs="+")
    command.add_argument("--output", type=Path, required=True)
    args, rest = parser.parse_known_args(arguments)
    if args.name == "draw":
        if rest:
            parser.error(f"unknown: {' '.join(rest)}")
        draw(args.folders, args.output)
        return
    fields: dict[str, Any] = {**FIELDS[args.name], "num_workers": 0}  # all work in the process that is timed
    fields |= {"output_dir": args.output, "backbone_weights": args.backbone_weights}
    if args.data is not None:
        fields["source"] = args.data
    if args.max_minutes is not None:
        fields |= {"max_minutes": args.max_minutes, "schedule_by": "time", "max_steps": None, "epochs": None}
    if args.max_steps is not None:
        fields |= {"max_steps": args.max_steps, "schedule_by": "steps", "max_minutes": None, "epochs": None}
    fields |= {name.replace("-", "_"): value for name, value in parse_fields(rest).items()}
    run(args.name, load_recipe(args.recipe, fields), args.evaluations)


if __name__ == "__main__":
    main()
