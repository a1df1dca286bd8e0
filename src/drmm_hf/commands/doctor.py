"""`drmm doctor`: look through a dataset before training on it."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .counts import at_least
from .document import add_json


if TYPE_CHECKING:
    import datasets

_LISTED = 5  # messages of one kind that are printed; --json has all
_CLASSES = 30  # lines of the class table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments.

    Args:
        parser (`argparse.ArgumentParser`): The command's parser.
    """
    parser.add_argument("data", help="folder of COCO, Roboflow, YOLO or Pascal VOC, image folder, or Hub id")
    parser.add_argument("--split", nargs="+", metavar="NAME", help="only these splits (default: all)")
    parser.add_argument(
        "--num-queries",
        type=at_least(1),
        metavar="K",
        help="most objects that a model can find (default: what drmm train chooses for the first split)",
    )
    parser.add_argument("--bbox-format", choices=["xywh", "xyxy", "cxcywh"], help="of boxes that do not prove theirs")
    parser.add_argument(
        "--threads", type=at_least(1), metavar="N", help="pictures decoded side by side (default: cores)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Examine the data and print what was found.

    Args:
        args (`argparse.Namespace`): The parsed arguments.

    Returns:
        `int`: 0 if nothing is wrong, 1 if there are problems.
    """
    from ..data.doctor import examine

    num_queries = _chosen_queries if args.num_queries is None else args.num_queries
    report = examine(
        args.data, args.split, num_queries=num_queries, bbox_format=args.bbox_format, threads=args.threads
    )
    args.document = report
    print(text(report))
    print(next_step(report, args.split, args.bbox_format))
    return 1 if report["num_problems"] else 0


def next_step(report: Mapping[str, Any], splits: Sequence[str] | None, bbox_format: str | None) -> str:
    """Say which command comes next.

    Args:
        report (`Mapping`): From `drmm_hf.data.doctor.examine`.
        splits (`Sequence[str]`, *optional*): Those that were asked for, if not all.
        bbox_format (`str`, *optional*): Format of the boxes, as given.

    Returns:
        `str`: A line.
    """
    given = [] if bbox_format is None else ["--bbox-format", bbox_format]
    again = shlex.join(["drmm", "doctor", report["source"], *given])
    train = ["drmm", "train", "--data", report["source"], *given]
    if not any(name.lower().startswith("train") for name in report["splits"]):  # as `drmm train` looks for it
        if splits is not None:
            return f"next: {again}, for all splits"
        train += ["--train-split", "NAME"]
    if report["num_problems"]:
        skip = shlex.join([*train, "--invalid-data", "skip", "--output", "runs/mine"])
        return f"next: mend them, then {again}; or leave them out: {skip}"
    return f"next: {shlex.join([*train, '--output', 'runs/mine'])}"


def text(report: Mapping[str, Any]) -> str:
    """Return a report as lines of text.

    Args:
        report (`Mapping`): From `drmm_hf.data.doctor.examine`.

    Returns:
        `str`: Figures of the splits, boxes of each class, notes, problems and what to do.
    """
    parts = {split: part for split, part in report["splits"].items() if "classes" in part}
    lines = [f"{report['source']}: {report['layout']}, splits {', '.join(report['splits'])}", ""]
    lines += _table([("", list(parts)), *_figures(parts, report["num_queries"])])
    lines += ["", *_class_table(parts)]
    if report["notes"]:
        lines += ["", "to know"]
        lines += [f"  {note}" for note in report["notes"]]
    return "\n".join([*lines, "", *_problem_lines(report)])


def _chosen_queries(dataset: datasets.Dataset) -> int:
    """Return the number of queries of the recipe that `drmm train` chooses for these pictures."""
    from ..training.presets import describe, enough_queries

    return enough_queries(describe(dataset))


def _figures(parts: Mapping[str, Mapping[str, Any]], num_queries: int) -> list[tuple[str, list[str]]]:
    """Return the rows of the table: what, and a figure for each split."""

    def counts(key: str) -> list[str]:
        return [str(part[key]) for part in parts.values()]

    def quantiles(key: str, *names: str) -> list[str]:
        return [" / ".join(f"{part[key][name]:g}" for name in names if part[key]) or "-" for part in parts.values()]

    def shares() -> list[str]:
        sizes = [[part[f"{size}_boxes"] for size in ("small", "medium", "large")] for part in parts.values()]
        return [" / ".join(f"{100 * n / sum(row):.0f}" for n in row) if sum(row) else "-" for row in sizes]

    beyond = [f"{len(p['beyond_queries']['pictures'])} / {p['beyond_queries']['boxes']}" for p in parts.values()]
    modes = [" ".join(f"{count} {mode}" for mode, count in part["modes"].items()) or "-" for part in parts.values()]
    return [
        ("pictures", counts("pictures")),
        ("  without boxes", counts("empty_pictures")),
        ("  width, min / median / max", quantiles("widths", "min", "median", "max")),
        ("  height, min / median / max", quantiles("heights", "min", "median", "max")),
        ("  modes", modes),
        ("  turned by EXIF", counts("turned")),
        ("  that repeat another", [str(len(part["duplicates"])) for part in parts.values()]),
        ("boxes", counts("boxes")),
        ("  crowds besides", counts("crowds")),
        ("  a picture, median / 95 % / max", quantiles("boxes_per_picture", "median", "95 %", "max")),
        ("  small / medium / large in %", shares()),
        (f"  pictures / boxes beyond {num_queries} queries", beyond),
    ]


def _class_table(parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return boxes of each class, the most frequent first; of many classes the ends of the list."""
    names = list(dict.fromkeys(name for part in parts.values() for name in part["classes"]))
    rows = [(f"  {name}", [str(part["classes"].get(name, "-")) for part in parts.values()]) for name in names]
    totals = [sum(part["classes"].get(name, 0) for part in parts.values()) for name in names]
    order = sorted(range(len(names)), key=lambda index: -totals[index])
    rows = [rows[index] for index in order]
    if len(rows) > _CLASSES:
        half = _CLASSES // 2
        rows = [*rows[:half], (f"  ... {len(rows) - 2 * half} more, all in --json", [""] * len(parts)), *rows[-half:]]
    return _table([("boxes of a class", list(parts)), *rows])


def _table(rows: list[tuple[str, list[str]]]) -> list[str]:
    first = max(len(name) for name, _ in rows)
    widths = [max(map(len, column)) for column in zip(*(values for _, values in rows), strict=True)]
    return [
        f"{name:<{first}}  {'  '.join(f'{v:>{w}}' for v, w in zip(values, widths, strict=True))}".rstrip()
        for name, values in rows
    ]


def _problem_lines(report: Mapping[str, Any]) -> list[str]:
    from ..data.problems import KINDS

    if not report["num_problems"]:
        return ["no problems"]
    lines = [f"problems: {report['num_problems']}"]
    for split, part in report["splits"].items():
        for kind in sorted(part["problems"], key=list(KINDS).index):
            entry, (what, advice) = part["problems"][kind], KINDS[kind]
            lines.append(f"  {split}, {what} ({kind}): {entry['count']}")
            lines += [f"    {message}" for message in entry["first"][:_LISTED]]
            if entry["count"] > _LISTED:
                lines.append(f"    and {entry['count'] - _LISTED} more, all in --json")
            lines.append(f"    -> {advice}")
    return [*lines, "Training stops at wrong records, boxes and pictures; pictures of two splits it does not notice."]
