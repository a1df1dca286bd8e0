"""Run the benchmarks of a page and rewrite what they print on it.

The page changes after each command, so that a stop costs the one that runs.

    python scripts/measure_page.py docs/performance.md --only loss
"""

import argparse
from pathlib import Path

from tqdm import tqdm

from drmm_hf.benchmarks.page import commands, rewritten, run


def main() -> None:
    """Parse, run and rewrite."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path, help="Markdown file")
    parser.add_argument("--only", default="", metavar="WORDS", help="run only commands in which these words are")
    args = parser.parse_args()
    chosen = [command for command in commands(args.page.read_text(encoding="utf-8")) if args.only in command]
    for command in tqdm(chosen, desc=args.page.name):
        tqdm.write(command)
        printed = {command: run(command)}
        args.page.write_text(rewritten(args.page.read_text(encoding="utf-8"), printed), encoding="utf-8")


if __name__ == "__main__":
    main()
