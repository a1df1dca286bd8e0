"""`drmm push`: publish a model on the Hub, with its code and a card of its figures."""

from __future__ import annotations

import argparse
from pathlib import Path

from .document import add_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments.

    Args:
        parser (`argparse.ArgumentParser`): The command's parser.
    """
    parser.add_argument("model", metavar="MODEL", help="folder of a D-RMM detector, such as runs/mine/best")
    parser.add_argument("--repo-id", required=True, metavar="NAME", help="repository on the Hub: owner/name")
    parser.add_argument("--dry-run", action="store_true", help="assemble and check the folder, and upload nothing")
    parser.add_argument(
        "--output", metavar="FOLDER", help="where to assemble what is uploaded (default: runs/push/NAME)"
    )
    parser.add_argument(
        "--results",
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders of drmm evaluate for the card (default: those beside the model)",
    )
    parser.add_argument("--license", metavar="ID", help="licence of the weights, as the Hub writes it: mit, cc-by-4.0")
    parser.add_argument("--private", action="store_true", help="let nobody else see the repository")
    parser.add_argument("--create-pr", action="store_true", help="propose the files in a pull request")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to upload to (default: main)")
    parser.add_argument("--message", metavar="TEXT", help="message of the commit")
    parser.add_argument(
        "--replace-card", action="store_true", help="replace the card on the Hub even if somebody has edited it"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Assemble, check, and upload.

    Args:
        args (`argparse.Namespace`): The parsed arguments.

    Returns:
        `int`: 0.
    """
    from transformers.utils import logging

    from ..conversion.model_source import find_source
    from ..evaluation.files import run_lock
    from ..hub.upload import check_access, check_name

    check_name(args.repo_id)
    model = find_source(args.model)
    if not Path(model).is_dir():
        raise FileNotFoundError(f"model {args.model!r} does not exist; the rule is a folder of a model.")
    if not args.dry_run:
        check_access()
    logging.disable_progress_bar()  # of each weight that is loaded
    output = Path("runs/push") / args.repo_id if args.output is None else Path(args.output)
    with run_lock(None, output.with_name(f"{output.name}.lock")):
        return push(args, model, output)


def push(args: argparse.Namespace, model: str, output: Path) -> int:
    """Do what `run` says, in a folder that no other run uses.

    Args:
        args (`argparse.Namespace`): The parsed arguments.
        model (`str`): Folder of the model.
        output (`Path`): Folder to assemble.

    Returns:
        `int`: 0.
    """
    from ..hub.publication import prepare
    from ..hub.upload import upload

    publication = prepare(model, args.repo_id, output, args.results, args.license)
    about = {"folder": str(publication.folder), "files": publication.files}
    args.document = about | {"checks": publication.checks, "notes": publication.notes, "address": None}
    print(table(publication.files), flush=True)
    print("\n" + "\n".join(f"checked  {line}" for line in publication.checks))
    if publication.notes:
        print("\n" + "\n".join(f"note  {line}" for line in publication.notes))
    if args.dry_run:
        print(
            f"\nnothing was uploaded; {publication.folder} is what would be. Read its README.md; an edited one is kept"
        )
        return 0
    options = {"private": args.private, "create_pr": args.create_pr, "revision": args.revision}
    options |= {"replace_card": args.replace_card} | ({"message": args.message} if args.message else {})
    address = upload(publication.folder, args.repo_id, **options)
    args.document["address"] = address
    print(f"\n{'proposed in' if args.create_pr else 'published:'} {address}")
    return 0


def table(files: dict[str, int]) -> str:
    """Return the files as lines of text.

    Args:
        files (`dict[str, int]`): Size of each in bytes.

    Returns:
        `str`: A line a file, then their sum.
    """
    lines = [f"{size / 1000:>12,.1f} kB  {name}" for name, size in files.items()]
    return "\n".join([*lines, f"{sum(files.values()) / 1000:>12,.1f} kB  in {len(files)} files"])
