"""`drmm train`: train a detector from a recipe."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .document import add_json


if TYPE_CHECKING:
    from ..training.arguments import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; every other `--field value` overrides a field of the recipe.

    Args:
        parser (`argparse.ArgumentParser`): The command's parser.
    """
    parser.usage = (
        "drmm train [RECIPE] [--data DIR] [--backbone-weights FILE] [--output DIR] [--resume] [--field value ...]"
    )
    parser.description = (
        "Train a detector. RECIPE is a yaml file with the sections model, data and training;\n"
        "without it, one is chosen from the data. --field value overrides a field of it."
    )
    parser.add_argument("--data", metavar="DIR", help="COCO folder, Hub id or image folder (data.source)")
    parser.add_argument("--output", metavar="DIR", help="folder of the run (training.output_dir)")
    parser.add_argument(
        "--backbone-weights", metavar="FILE", help="safetensors or .pth file, or model id, of a trained backbone"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint of the run, or start if there is none"
    )
    parser.add_argument(
        "--fields",
        action=_PrintFields,
        nargs=0,
        dest="_",
        default=argparse.SUPPRESS,
        help="list all fields and leave",
    )
    add_json(parser)
    parser.set_defaults(fields=[])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"{_usual_fields()}\n{parser.epilog}"


# Fields that are set most often.
_USUAL = ("shortest_edge", "longest_edge", "augmentation", "invalid_data", "num_workers", "overfit", "init_from",
          "batch_size", "learning_rate", "warmup_steps", "epochs", "max_minutes")  # fmt: skip
# Those of them that `choose_recipe` chooses where there is no recipe, which takes seconds to import.
_CHOSEN = {"shortest_edge", "longest_edge", "augmentation", "batch_size", "learning_rate", "warmup_steps", "epochs"}


def _usual_fields() -> str:
    """Return the part of the help that explains them, from their own documentation."""
    from ..training.fields import argument_fields

    fields = {field.name: field for field in argument_fields()}
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
    group = parser.add_argument_group("fields that are set most often (--fields lists all)")
    for field in map(fields.__getitem__, _USUAL):
        defaults = [] if field.default == "null" else [f"default of recipes: {field.default}"]
        defaults += ["without a recipe: as chosen from the data and printed"] * (field.name in _CHOSEN)
        default = f" ({'; '.join(defaults)})" if defaults else ""
        metavar = field.type.replace(" | null", "").replace(" ", "")
        group.add_argument(field.option, metavar=metavar, help=f"{field.meaning}{default}".replace("%", "%%"))
    return parser.format_help()


class _PrintFields(argparse.Action):
    """Print the fields of a recipe and leave, as `--help` does."""

    def __call__(self, parser, *_):
        """Print them."""
        from ..training.fields import recipe_fields

        print(*recipe_fields(), sep="\n")
        parser.exit()


def run(args: argparse.Namespace) -> int:
    """Train, then print the summary and draw the curves.

    Args:
        args (`argparse.Namespace`): The parsed arguments.

    Returns:
        `int`: 0.
    """
    recipe_file, overrides = read_rest(args.fields)
    named = {"source": args.data, "output_dir": args.output, "backbone_weights": args.backbone_weights}
    overrides |= {name: value for name, value in named.items() if value is not None}
    if args.resume:
        overrides["resume"] = True

    from ..training.arguments import load_recipe

    recipe = _chosen_recipe(overrides) if recipe_file is None else load_recipe(recipe_file, overrides)
    args.output = recipe.training.output_dir  # where the traceback of a defect goes

    from accelerate import PartialState
    from transformers.utils import logging

    from ..evaluation.report import examples
    from ..training.build import load_split
    from ..training.loop import train
    from ..training.run_log import per_cent
    from ..visualization.evaluation_pictures import draw_detections

    logging.disable_progress_bar()  # of each model file written or read
    summary = train(recipe)
    if PartialState().is_main_process:
        output_dir = Path(recipe.training.output_dir)
        args.document = summary
        print(f"best checkpoint (step {summary['best_step']}) on the validation split, {per_cent(summary)}")
        print(f"{summary['steps']} steps, {summary['images']} images, {summary['seconds'] / 60:.1f} minutes")
        _draw_curves(output_dir)
        val_set, annotations = load_split(recipe.data, "val")
        entries = json.loads((output_dir / "detections.json").read_text())
        draw_detections(entries, annotations, examples(val_set), output_dir / "detections.jpg")
        print(f"{output_dir / 'best'} is the model; curves, pictures, log and summary lie beside it")
    return 0


def _chosen_recipe(overrides: dict[str, Any]) -> Recipe:
    """Choose a recipe from the data; a run that is resumed keeps the one that it was started with."""
    from ..training.arguments import DataArguments, TrainingArguments, load_recipe
    from ..training.presets import choose_recipe

    output_dir = Path(overrides.get("output_dir", TrainingArguments.output_dir))
    if "resume" in overrides and (output_dir / "recipe.yaml").is_file():
        print(f"no recipe is given: going on with {output_dir / 'recipe.yaml'}")
        return load_recipe(output_dir / "recipe.yaml", overrides)
    if overrides.get("source", DataArguments.source) is None:
        raise ValueError("recipe is missing: name a yaml file, or give --data to have one chosen")
    recipe, notes = choose_recipe(overrides["source"], overrides)
    print(notes[0], *(f"  {note}" for note in notes[1:]), sep="\n")
    return recipe


def read_rest(arguments: list[str]) -> tuple[str | None, dict[str, str]]:
    """Tell the recipe from the fields.

    Args:
        arguments (`list[str]`): What the parser did not know.

    Returns:
        `tuple`: The recipe if the first of them is one, and the fields as in `parse_fields`.
    """
    has_recipe = bool(arguments) and not arguments[0].startswith("--")
    return arguments[0] if has_recipe else None, parse_fields(arguments[has_recipe:])


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
