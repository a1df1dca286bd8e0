"""`drmm convert`: turn a public checkpoint into a model folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from .document import add_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; every other `--field value` sets a field of the configuration.

    Args:
        parser (`argparse.ArgumentParser`): The command's parser.
    """
    parser.usage = "drmm convert CHECKPOINT OUT [--labels FILE|coco] [--trust-pickle] [--field value ...]"
    parser.add_argument("checkpoint", help="file of the mmdetection or detectron2 family (.pth or .safetensors)")
    parser.add_argument("output", metavar="out", help="folder of the converted model; must not exist yet")
    parser.add_argument(
        "--labels",
        metavar="FILE|coco",
        help="names of the classes: coco, a COCO annotation file, or a text file with one name a line "
        "(default: those in the checkpoint)",
    )
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="unpickle objects other than tensors, which runs code of whoever wrote the file",
    )
    add_json(parser)
    parser.set_defaults(fields=[])


def run(args: argparse.Namespace) -> int:
    """Convert, and print what became of the tensors.

    Args:
        args (`argparse.Namespace`): The parsed arguments.

    Returns:
        `int`: 0.
    """
    from .train import parse_fields

    given = parse_fields(args.fields)

    from transformers.utils import logging

    from ..conversion.convert import convert_checkpoint
    from ..evaluation.files import read_json
    from ..training.arguments import parse_value

    logging.disable_progress_bar()  # of each weight that is written
    fields = {name.replace("-", "_"): parse_value(name, value) for name, value in given.items()}
    print(convert_checkpoint(args.checkpoint, args.output, args.labels, args.trust_pickle, fields))
    if args.json:
        args.document = read_json(Path(args.output) / "conversion.json")
    print(f"{args.output} is the model; conversion.json in it accounts for every tensor")
    return 0
