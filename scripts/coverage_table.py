"""Print how many lines the tests ran in each room of the package, from the json report of coverage.

python scripts/coverage_table.py build/coverage/report.json
"""

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any


def main() -> None:
    """Parse, read and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="what coverage json wrote")
    print(table(json.loads(parser.parse_args().report.read_text(encoding="utf-8"))))


def table(report: Mapping[str, Any]) -> str:
    """Return the lines that were run as lines of text.

    Args:
        report (`Mapping`): From `coverage json`.

    Returns:
        `str`: A line a room, the least covered first, then their sum; the share in per cent.
    """
    lines, run = Counter(), Counter()
    for file, measured in report["files"].items():
        name = room(PurePath(file))
        lines[name] += measured["summary"]["num_statements"]
        run[name] += measured["summary"]["covered_lines"]
    rows = sorted((run[name] / lines[name], name) for name in lines if lines[name])
    titles = f"{'room':<16}{'lines':>8}{'run':>8}{'%':>7}"
    body = [f"{name:<16}{lines[name]:>8}{run[name]:>8}{100 * share:>7.1f}" for share, name in rows]
    whole, covered = lines.total(), run.total()
    return "\n".join([titles, *body, f"{'all':<16}{whole:>8}{covered:>8}{100 * covered / max(whole, 1):>7.1f}"])


def room(file: PurePath) -> str:
    """Name the room of a file: its folder in the package, or the file itself where it is in none.

    Args:
        file (`PurePath`): Its place.

    Returns:
        `str`: Such as "modeling" or "drmm_cli.py".
    """
    *_, folder, name = file.parts
    return name if folder in ("src", "drmm_hf") else folder


if __name__ == "__main__":
    main()
