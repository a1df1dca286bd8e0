"""`drmm train`: train a detector from a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; every other `--field value` overrides a field of the recipe.

    Args:
        parser (`argparse.ArgumentParser`): The command's parser.
    """
    parser.usage = (
        "drmm train RECIPE [--data DIR] [--backbone-weights FILE] [--output DIR] [--resume] [--field value ...]"
    )
    parser.add_argument("recipe", help="yaml file with the sections model, data and training")
    parser.add_argument("--data", metavar="DIR", help="COCO folder, Hub id or image folder (data.source)")
    parser.add_argument("--output", metavar="DIR", help="folder of the run (training.output_dir)")
    parser.add_argument(
        "--backbone-weights", metavar="FILE", help="safetensors file or model id of a trained backbone"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of the run")
    parser.set_defaults(fields=[])


def run(args: argparse.Namespace) -> int:
    """Train, then print the summary and draw the curves.

    Args:
        args (`argparse.Namespace`): The parsed arguments.

    Returns:
        `int`: 0.
    """
    overrides = parse_fields(args.fields)
    named = {"source": args.data, "output_dir": args.output, "backbone_weights": args.backbone_weights}
    overrides |= {name: value for name, value in named.items() if value is not None}
    if args.resume:
        overrides["resume"] = True

    from ..training.arguments import load_recipe

    recipe = load_recipe(args.recipe, overrides)

    from accelerate import PartialState
    from transformers.utils import logging

    from ..training.build import load_split
    from ..training.loop import train
    from .evaluate import draw_pictures

    logging.disable_progress_bar()  # of each model file written or read
    summary = train(recipe)
    if PartialState().is_main_process:
        output_dir = Path(recipe.training.output_dir)
        figures = {name: summary[name] for name in ("AP", "AP50", "AP75", "ECE")}
        words = [f"{name} {value:.3f}" for name, value in figures.items() if value is not None]
        print(f"best checkpoint (step {summary['best_step']}) on the validation split:", *words, sep="  ")
        print(f"{summary['steps']} steps, {summary['images']} images, {summary['seconds'] / 60:.1f} minutes")
        _draw_curves(output_dir)
        draw_pictures(*load_split(recipe.data, "val"), output_dir)
        print(f"{output_dir / 'best'} is the model; curves, pictures, log and summary lie beside it")
    return 0


def parse_fields(arguments: list[str]) -> dict[str, str]:
    """Read `--field value`, `--field=value` and `--flag` (true).

    Args:
        arguments (`list[str]`): What the parser did not know.

    Returns:
        `dict[str, str]`: Field name -> yaml text.

    Raises:
        ValueError: If a value has no field or a field is given twice.
    """
    fields = {}
    for position, argument in enumerate(arguments):
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            if position == 0 or not arguments[position - 1].startswith("--") or "=" in arguments[position - 1]:
                raise ValueError(f"{argument!r} belongs to no --field")
            continue
        if not equals:
            following = arguments[position + 1 : position + 2]
            value = following[0] if following and not following[0].startswith("--") else "true"
        if name in fields:
            raise ValueError(f"--{name} is given twice")
        fields[name] = value
    return fields


def _draw_curves(output_dir: Path) -> None:
    from transformers.utils import is_matplotlib_available

    if is_matplotlib_available():
        from ..visualization.plots import training_curves

        training_curves(output_dir / "log.jsonl", output_dir / "curves.png")
