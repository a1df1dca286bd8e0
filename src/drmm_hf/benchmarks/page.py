"""Rewrite on a page what its commands print: each command line there is followed by a block of its output."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from .tables import TABLES


_COMMAND_AND_OUTPUT = re.compile(
    r"(?P<before>```bash\n(?P<command>(?:\w+=\S+ )*drmm benchmark [^\n]+)\n```\n\n```text\n).*?(?=\n```\n)", re.DOTALL
)


def commands(text: str) -> list[str]:
    """Return the command lines of a page whose output stands below them.

    Args:
        text (`str`): The page, Markdown.

    Returns:
        `list[str]`: `drmm benchmark ...`, perhaps with variables before it, in their order.
    """
    return [match["command"] for match in _COMMAND_AND_OUTPUT.finditer(text)]


def rewritten(text: str, printed: Mapping[str, str]) -> str:
    """Replace the output below command lines of a page.

    Args:
        text (`str`): The page, Markdown.
        printed (`Mapping[str, str]`): By command line, what it prints; the output of others stays.

    Returns:
        `str`: The page.
    """
    return _COMMAND_AND_OUTPUT.sub(
        lambda match: match["before"] + printed[match["command"]] if match["command"] in printed else match[0], text
    )


def run(command: str) -> str:
    """Run a command line in a process of its own and return the table that it prints.

    Args:
        command (`str`): One of `commands`.

    Returns:
        `str`: The table.

    Raises:
        subprocess.CalledProcessError: If it fails.
    """
    words = command.split()
    start = words.index("drmm")
    variables = dict(word.split("=", 1) for word in words[:start])
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "figures.json"
        line = [sys.executable, "-m", "drmm_hf", *words[start + 1 :], "--output", str(output)]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL, env=os.environ | variables)
        return TABLES[words[start + 2]](json.loads(output.read_text(encoding="utf-8")))
