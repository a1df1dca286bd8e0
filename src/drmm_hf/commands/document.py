"""`--json`: standard output holds one json document and nothing else; what is for people goes to standard error."""

from __future__ import annotations

import argparse


def add_json(parser: argparse._ActionsContainer) -> None:
    """Declare `--json`. A command puts what it found into `args.document`, and prints for people as ever.

    Args:
        parser (`argparse.ArgumentParser`, or a group of one): The command's parser.
    """
    parser.add_argument(
        "--json", action="store_true", help="print the figures as one json document, and all else on standard error"
    )
    parser.set_defaults(document=None)
