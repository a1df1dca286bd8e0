"""`--help` of every command, each in a process of its own: what it shows, and what it does not wait for."""

import subprocess
import sys
from pathlib import Path

import pytest

import drmm_cli as cli


# What takes seconds to import, and is needed by no parser.
HEAVY = {"torch", "torchvision", "transformers", "datasets", "matplotlib", "accelerate", "numpy", "scipy", "gradio"}
PROGRAM = f"""
import atexit, sys
import drmm_cli
atexit.register(lambda: print("imported", *sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr))
sys.exit(drmm_cli.main(sys.argv[1:]))
"""


def run(*arguments):
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, cwd=Path(cli.__file__).parent, capture_output=True, text=True)


KINDS = ["loader", "cost", "eval", "infer", "train", "loss", "pooling", "paths"]


@pytest.mark.parametrize("command", ["", *cli.COMMANDS, *(f"benchmark {kind}" for kind in KINDS)])
def test_help_has_an_example_and_waits_for_no_library(command):
    done = run(*command.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "imported\n")
    shown = " ".join(done.stdout.split())
    assert f"example: drmm {command or 'train'} " in shown
    if command == "benchmark":
        assert all(f" {kind} " in shown for kind in KINDS)


def test_usage_errors_wait_for_no_library():
    done = run("evaluate", "MODEL", "DATA", "--batch-size", "0")
    assert done.returncode == 2 and done.stdout == ""
    assert "'0' is given; the rule is a whole number of at least 1" in done.stderr
    assert done.stderr.endswith("\nimported\n")


def test_the_package_is_whole_once_the_arguments_are_read():
    """The parser of a command is built before the package has registered with transformers."""
    program = (
        "import sys, drmm_cli\n"
        "try: drmm_cli.main(['doctor', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not [name for name in sys.modules if name.startswith('drmm_hf')]\n"
        "assert drmm_cli.main(['doctor', 'nowhere']) == 2\n"
        "import drmm_hf, drmm_hf.commands.doctor\n"
        "from transformers import AutoConfig\n"
        "assert type(AutoConfig.for_model('drmm')) is drmm_hf.DrmmConfig\n"
    )
    folder = Path(cli.__file__).parent
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
