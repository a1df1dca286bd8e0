"""What a page shows is what its commands print."""

import argparse
import runpy
import sys
from pathlib import Path

import pytest

from drmm_hf.benchmarks.page import commands, rewritten
from drmm_hf.commands import benchmark


ROOT = Path(__file__).parents[2]
PAGE = """# Speed

```bash
drmm benchmark pooling
```

```text
old
lines
```

In words, and a command without output:

```bash
drmm benchmark loader DATA
```

```bash
OMP_NUM_THREADS=1 drmm benchmark pooling --size 64 96 --boxes 3 --repetitions 1
```

```text
older
```
"""
FIRST, SECOND = (
    "drmm benchmark pooling",
    "OMP_NUM_THREADS=1 drmm benchmark pooling --size 64 96 --boxes 3 --repetitions 1",
)


def test_outputs_are_replaced_and_nothing_else_is():
    assert commands(PAGE) == [FIRST, SECOND]
    page = rewritten(PAGE, {FIRST: r"new \1"})
    assert page == PAGE.replace("old\nlines", r"new \1")
    assert rewritten(PAGE, {}) == PAGE


def test_the_script_runs_what_is_asked_for(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    monkeypatch.setattr(sys, "argv", ["measure_page.py", str(page), "--only", "--boxes 3"])
    runpy.run_path(str(ROOT / "scripts" / "measure_page.py"), run_name="__main__")
    before, after = page.read_text().split("older")[0], page.read_text()
    assert "old\nlines" in before and "older" not in after
    assert "3 boxes of each of 1 pictures of 64 x 96" in after and "1 threads, 1 turns each" in after


@pytest.mark.parametrize("command", commands((ROOT / "docs" / "performance.md").read_text()))
def test_every_command_of_the_page_is_one(command):
    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    words = command.split()
    parser.parse_args(words[words.index("benchmark") + 1 :])
