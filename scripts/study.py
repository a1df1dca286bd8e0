"""Collect the runs of a study into one small file, and say which of the paper's claims they bear out.

drmm tables 2 --run scripts/recipes/bccd_study.yaml --data BCCD \
        --backbone-weights LITE0 --seeds 0 1 2 --output runs/study
drmm tables 3 --run ...                       # and 7, 8, 10, 11; a command that was cut goes on where it was
python scripts/study.py collect runs/study docs/study/bccd.json   # adds to those that the file has
python scripts/study.py report docs/study/bccd.json docs/results.md
"""

import argparse
import contextlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from drmm_hf.evaluation.files import write_json
from drmm_hf.evaluation.report_files import read_report


Figures = Mapping[str, Any]


def collect(folder: Path) -> dict[str, dict[str, Figures]]:
    """Take the figures of every finished run below a folder.

    Args:
        folder (`Path`): With runs in `NAME/seedN`.

    Returns:
        `dict[str, dict[str, dict]]`: By name of the method and seed: `AP`, `AP50`, `AP75`, `AR`, `ECE`, `ECE_0.1`;
        `NMS` and `WTA`, the AP after these at NMS's best IoU; `shares` and `nll` of each stage; `steps` and `minutes`.
        Without those that have not been measured.
    """
    runs: dict[str, dict[str, Figures]] = {}
    for path in sorted(folder.rglob("summary.json")):
        run = path.parent
        metrics, summary = read_report(run / "metrics.json"), read_report(path)
        figures = {key: metrics[key] for key in ("AP", "AP50", "AP75", "ECE", "ECE_0.1")} | {"AR": metrics["AR100"]}
        swept = read_report(run / "duplicates.json")
        for method in ("nms", "wta") if swept else ():
            best = swept["best_iou_threshold"]
            figures[method.upper()] = next(one["AP"] for one in swept[method] if one["iou_threshold"] == best)
        if stages := read_report(run / "likelihood.json").get("all"):
            figures |= {"nll": stages["nll"], "shares": stages["share"]}
        figures |= {"steps": summary["steps"], "minutes": summary["training_seconds"] / 60}
        runs.setdefault(run.parent.name, {})[run.name] = figures
    return runs


def add(folder: Path, file: Path) -> dict[str, dict[str, Figures]]:
    """Write the figures of a folder's runs to a file, which keeps those of runs that the folder does not have.

    Args:
        folder (`Path`): See `collect`.
        file (`Path`): With the figures of all runs.

    Returns:
        `dict[str, dict[str, dict]]`: What the file has then, as from `collect`.
    """
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    new = collect(folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    return write_json({name: kept.get(name, {}) | new.get(name, {}) for name in sorted(kept | new)}, file)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper as a difference that should be positive.

    Attributes:
        text (`str`): The claim.
        paper (`str`): The paper's figures.
        needs (`tuple[str, ...]`): Names of the methods.
        difference (`Callable`): From their figures with one seed to the difference.
        unit (`float`): What it is multiplied by in the table.
    """

    text: str
    paper: str
    needs: tuple[str, ...]
    difference: Callable[..., float]
    unit: float = 100


MCM, NLL, BOX = "drmm_sparse_rcnn", "drmm_sparse_rcnn_nll", "sparse_rcnn"
CLAIMS = [
    Claim("MCM raises AP", "47.0 - 35.6 = 11.4", (MCM, NLL), lambda mcm, nll: mcm["AP"] - nll["AP"]),
    Claim(
        "and AR hardly: the AP it gains is more than the AR",
        "11.4 - 0.2 = 11.2",
        (MCM, NLL),
        lambda mcm, nll: (mcm["AP"] - nll["AP"]) - abs(mcm["AR"] - nll["AR"]),
    ),
    Claim("NMS raises AP without MCM", "42.7 - 35.6 = 7.1", (NLL,), lambda nll: nll["NMS"] - nll["AP"]),
    Claim(
        "and more than it does with MCM",
        "7.1 - 0 (Fig. 7)",
        (MCM, NLL),
        lambda mcm, nll: (nll["NMS"] - nll["AP"]) - (mcm["NMS"] - mcm["AP"]),
    ),
    Claim("winner-take-all does better than NMS", "45.8 - 42.7 = 3.1", (NLL,), lambda nll: nll["WTA"] - nll["NMS"]),
    Claim(
        "and MCM better than winner-take-all", "47.0 - 45.8 = 1.2", (MCM, NLL), lambda mcm, nll: mcm["AP"] - nll["WTA"]
    ),
    Claim(
        "the likelihood of the best component alone does better than that of all",
        "45.7 - 35.6 = 10.1",
        ("drmm_sparse_rcnn_max_nll", NLL),
        lambda largest, nll: largest["AP"] - nll["AP"],
    ),
    Claim(
        "and MCM better than it",
        "47.0 - 45.7 = 1.3",
        (MCM, "drmm_sparse_rcnn_max_nll"),
        lambda mcm, largest: mcm["AP"] - largest["AP"],
    ),
    Claim(
        "exp(-MCM) rises from the first stage to the last with MCM",
        "Tables 4, 9",
        (MCM,),
        lambda mcm: mcm["shares"][-1] - mcm["shares"][0],
    ),
    Claim("and falls without", "Tables 4, 9", (NLL,), lambda nll: nll["shares"][0] - nll["shares"][-1]),
    Claim("MCM lowers ECE", "Fig. 8", (MCM, NLL), lambda mcm, nll: nll["ECE"] - mcm["ECE"]),
    Claim("MCM lowers ECE_0.1", "Fig. 8", (MCM, NLL), lambda mcm, nll: nll["ECE_0.1"] - mcm["ECE_0.1"]),
    Claim(
        "bipartite matching does no better than the maximum",
        "47.0 - 46.9 = 0.1",
        (MCM, "drmm_sparse_rcnn_nll_mcm_bipartite"),
        lambda mcm, bipartite: mcm["AP"] - bipartite["AP"],
    ),
    Claim(
        "the mixture's AP is above that of focal loss with boxes",
        "47.0 - 45.0 = 2.0",
        (MCM, BOX),
        lambda mcm, box: mcm["AP"] - box["AP"],
    ),
    Claim("and its ECE below", "Fig. 2", (MCM, BOX), lambda mcm, box: box["ECE"] - mcm["ECE"]),
]


def differences(claim: Claim, runs: Mapping[str, Mapping[str, Figures]]) -> list[float]:
    """Return what a claim is about, once a seed.

    Args:
        claim (`Claim`): The claim.
        runs (`Mapping`): From `collect`.

    Returns:
        `list[float]`: Of the seeds that all its methods have, with the figures that it is about.
    """
    methods = [runs.get(name, {}) for name in claim.needs]
    seeds = sorted(set.intersection(*(set(method) for method in methods)))
    values = []
    for seed in seeds:
        with contextlib.suppress(KeyError):  # a figure that has not been measured
            values.append(claim.difference(*(method[seed] for method in methods)))
    return values


def verdict(values: list[float]) -> str:
    """Judge a difference that should be positive.

    Args:
        values (`list[float]`): One a seed.

    Returns:
        `str`: "holds" if the mean is above twice its standard error, "does not hold" if it is below minus that, else
        "cannot be told", as with less than two seeds.
    """
    if len(values) < 2:
        return f"cannot be told: {len(values)} seed{'s' * (len(values) != 1)}"
    bound = 2 * stdev(values) / math.sqrt(len(values))
    if abs(mean(values)) <= bound:
        return "cannot be told: within twice the standard error"
    return "holds" if mean(values) > 0 else "does not hold"


def report(runs: Mapping[str, Mapping[str, Figures]]) -> list[str]:
    """Write the claims and the runs as tables.

    Args:
        runs (`Mapping`): From `collect`.

    Returns:
        `list[str]`: Lines of Markdown.
    """
    lines = ["| claim | the paper | here | verdict |", "|---|---|---:|---|"]
    for claim in CLAIMS:
        values = [claim.unit * value for value in differences(claim, runs)]
        lines.append(f"| {claim.text} | {claim.paper} | {_spread(values, signed=True)} | {verdict(values)} |")
    names = ("AP", "AR", "NMS", "WTA", "ECE", "ECE_0.1")
    lines += ["", f"| run | seeds | {' | '.join(names)} | shares of the stages | steps | minutes |"]
    lines.append("|---|---:" + "|---:" * len(names) + "|---|---:|---:|")
    for name, seeds in runs.items():
        figures = [[100 * one[key] for one in seeds.values() if key in one] for key in names]
        stages = [one["shares"] for one in seeds.values() if "shares" in one]
        shares = " ".join(f"{mean(values):.3f}" for values in zip(*stages, strict=True))
        steps, minutes = (mean(one[key] for one in seeds.values()) for key in ("steps", "minutes"))
        cells = " | ".join(map(_spread, figures))
        lines.append(f"| {name} | {len(seeds)} | {cells} | {shares} | {steps:.0f} | {minutes:.0f} |")
    return lines


def _spread(values: list[float], signed: bool = False) -> str:
    """Return the mean and its standard error."""
    if not values:
        return ""
    text = f"{mean(values):+.2f}" if signed else f"{mean(values):.2f}"
    return text if len(values) < 2 else f"{text} ± {stdev(values) / math.sqrt(len(values)):.2f}"


def rewrite(page: Path, name: str, lines: list[str]) -> None:
    """Put lines between the marks of a page.

    Args:
        page (`Path`): Markdown file with `<!-- study NAME -->` and `<!-- end of study NAME -->`.
        name (`str`): Which of them.
        lines (`list[str]`): What comes between.
    """
    begin, end = f"<!-- study {name} -->", f"<!-- end of study {name} -->"
    before, mark, rest = page.read_text(encoding="utf-8").partition(begin)
    if not mark or end not in rest:
        raise ValueError(f"{page} has no lines {begin!r} and {end!r}.")
    page.write_text("\n".join([before + begin, "", *lines, "", end + rest.partition(end)[2]]), encoding="utf-8")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["collect", "report"])
    parser.add_argument("source", type=Path, help="folder of the runs, or the file that was collected")
    parser.add_argument("target", type=Path, help="that file, or the page with the marks")
    args = parser.parse_args()
    if args.what == "collect":
        runs = add(args.source, args.target)
        print(f"{sum(map(len, runs.values()))} runs of {len(runs)} methods in {args.target}")
    else:
        rewrite(args.target, args.source.stem, report(json.loads(args.source.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
