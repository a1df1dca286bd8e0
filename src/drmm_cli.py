"""The `drmm` command: find the command and its arguments, run it, turn its errors into one line.

A module beside the package, because importing anything from the package imports transformers, and `drmm --help` must
not wait for that.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from pathlib import Path


COMMANDS = {
    "train": (
        "train a detector on your data, with a recipe or without",
        "drmm train scripts/recipes/quickstart_generated.yaml --output runs/quickstart",
    ),
    "evaluate": (
        "measure AP, calibration, duplicates and likelihoods of a detector",
        "drmm evaluate runs/quickstart/best DATA --split val --output OUT",
    ),
    "calibrate": (
        "correct confidences, box scales and the score threshold of a model folder, once for all its users",
        "drmm calibrate runs/quickstart/best DATA --split val",
    ),
    "predict": ("find the objects in pictures", "drmm predict runs/quickstart/best picture.jpg"),
    "convert": ("turn a public checkpoint into a model folder", "drmm convert drmm_r50.pth runs/drmm_r50"),
    "export": ("turn a model into a graph that runs elsewhere", "drmm export runs/quickstart/best --output runs/onnx"),
    "demo": ("show in the browser what a detector sees", "drmm demo runs/quickstart/best"),
    "push": (
        "publish a model on the Hub, with its code and a card of its figures",
        "drmm push runs/quickstart/best --repo-id me/shapes --dry-run",
    ),
    "benchmark": ("measure speed beside that of others", "drmm benchmark loader DATA --split val"),
    "tables": (
        "print a table of the paper beside what has been measured here",
        "drmm tables 2 --results runs",
    ),
    "figures": (
        "draw a figure of the paper from what has been measured here",
        "drmm figures 7 --results runs/bccd --output figure7.pdf",
    ),
    "audit": ("look for errors in annotations with a model's density", "drmm audit runs/bccd/best DATA --split train"),
    "compare": ("set detectors side by side on the same data", "drmm compare runs/a/best runs/b/best DATA"),
    "doctor": ("look for what is wrong with data before training on them", "drmm doctor DATA"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv (`list[str]`, *optional*): Arguments after `drmm`; by default those of the process.

    Returns:
        `int`: 0, 2 if an argument, a file or a value is wrong, 1 if anything else went wrong (each is said in one line
            on stderr), or 130 if interrupted. `drmm doctor` returns 1 if it finds problems.
    """
    if not sys.stderr.isatty():  # before libraries are imported, which read this then
        for library in ("HF_HUB", "HF_DATASETS"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    with _Unread(sys.stdout) as out, _Unread(sys.stderr) as err, redirect_stdout(out), redirect_stderr(err):
        return _main(sys.argv[1:] if argv is None else argv)


_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class _Unread:
    """A stream that stays quiet when its reader has left, as in `drmm ... | head`: the work goes on to its end.

    Colours, which transformers' warnings have whoever reads them, go to terminals alone.
    """

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.flush()

    def write(self, text):
        try:
            return self._stream.write(text if self._stream.isatty() else _COLOUR.sub("", text))
        except BrokenPipeError:
            self._give_up()
            return len(text)

    def flush(self):
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._give_up()

    def _give_up(self):
        """Let what is buffered, and all that follows, go nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def _main(argv: list[str]) -> int:
    with _hollow_package():
        args = _parse(argv)
    as_json = getattr(args, "json", False)
    try:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            code = import_module(f"drmm_hf.commands.{args.command}").run(args)
        if as_json and args.document is not None:  # the main process of several has it
            print(json.dumps(args.document, indent=1, allow_nan=False))
        return code
    except KeyboardInterrupt:
        print(f"drmm {args.command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        print(f"drmm {args.command}: {_in_one_line(error, getattr(args, 'output', None))}", file=sys.stderr)
        return 2 if isinstance(error, _errors_of_input()) else 1


@contextmanager
def _hollow_package() -> Iterator[None]:
    """Let modules of the package be imported without the package's own import, which waits for transformers.

    They are forgotten in the end, so that whoever imports them next gets them with the whole package.
    """
    if "drmm_hf" in sys.modules:
        yield
        return
    if (spec := find_spec("drmm_hf")) is not None:
        sys.modules["drmm_hf"] = module_from_spec(spec)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "drmm_hf"]:
            del sys.modules[name]


def _parse(argv: list[str]) -> argparse.Namespace:
    first = next(iter(COMMANDS.values()))[1]
    parser = argparse.ArgumentParser(
        prog="drmm", description="End-to-end object detection with D-RMM.", epilog=f"example: {first}"
    )
    parser.add_argument("--version", action="version", version=f"drmm-hf {_version()}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (summary, example) in COMMANDS.items():
        command = subparsers.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example: {example}",
            allow_abbrev=False,
        )
        command.add_argument("--debug", action="store_true", help="show where an error comes from")
        if name in argv[:1]:
            import_module(f"drmm_hf.commands.{name}").add_arguments(command)
    args, rest = parser.parse_known_args(argv)
    if rest and not hasattr(args, "fields"):
        words = f"{args.command} {args.kind}" if hasattr(args, "kind") else args.command
        parser.error(f"{words} does not know {' '.join(rest)}; drmm {words} --help lists what it takes")
    if rest:
        args.fields = rest
    return args


def _in_one_line(error: Exception, output: str | None) -> str:
    """Say what went wrong, and of a defect also its kind and where it comes from, since its words may say nothing.

    Where it comes from is written to the output folder, if there is one by now: after hours of training nobody repeats
    them with `--debug`.
    """
    text = " ".join(str(error).split())
    if isinstance(error, (*_errors_of_input(), FloatingPointError)):  # the latter: a loss that is not finite
        return text
    shows = "--debug shows"
    if output is not None and Path(output).is_dir():
        rank = os.environ.get("RANK")  # of several processes, each has its own
        file = Path(output) / f"traceback{'' if rank is None else f'-{rank}'}.txt"
        with suppress(OSError):
            file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            shows = f"{file} has"
    return f"{type(error).__name__}: {text} ({shows} where it comes from)"


def _errors_of_input() -> tuple[type[Exception], ...]:
    """Return the errors of wrong arguments, files and values; a configuration's are imported only when needed."""
    from huggingface_hub.errors import StrictDataclassError

    return ValueError, OSError, StrictDataclassError


def _version() -> str:
    """Read the version of the package without importing it."""
    text = (Path(__file__).with_name("drmm_hf") / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'__version__ = "(.+)"', text)
    assert found is not None
    return found[1]
