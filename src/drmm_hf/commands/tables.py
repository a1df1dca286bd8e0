"""`drmm tables`: the tables of the paper, and beside them what has been measured here."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .document import add_json


if TYPE_CHECKING:
    from ..evaluation.paper_tables import Block, Measured, Row, Table

_NOT_RUN = "not run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; every other `--field value` overrides a field of the recipes that `--run` trains.

    Args:
        parser (`argparse.ArgumentParser`): The command's parser.
    """
    parser.usage = (
        "drmm tables N [--results DIR ...] [--json | --markdown]\n"
        "       drmm tables N --run RECIPE ... [--data DIR] [--seeds S ...] [--output DIR] [--field value ...]"
    )
    parser.description = (
        "Print a table of the paper beside what has been measured here. Results are found by the recipe.yaml that "
        "training writes; data other than COCO have blocks of their own."
    )
    parser.add_argument("number", type=int, metavar="N", help="number of the table, 1 to 11")
    parser.add_argument("--results", nargs="+", default=[], metavar="DIR", help="folders to look for results in")
    parser.add_argument(
        "--run", nargs="+", default=[], metavar="RECIPE", help="train the rows that are missing, on these recipes"
    )
    parser.add_argument("--data", metavar="DIR", help="data to train on (data.source)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="S", help="one run each (default: 0)")
    parser.add_argument("--output", default="runs/tables", metavar="DIR", help="where --run trains (runs/tables)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands that --run would start, and leave")
    form = parser.add_mutually_exclusive_group()
    add_json(form)
    form.add_argument("--markdown", action="store_true", help="print markdown")
    parser.set_defaults(fields=[])


def run(args: argparse.Namespace) -> int:
    """Train what is missing if asked to, then print the table.

    Args:
        args (`argparse.Namespace`): The parsed arguments.

    Returns:
        `int`: 0.
    """
    from ..evaluation.paper_tables import find_results, measured_blocks, paper_table

    table = paper_table(args.number)
    if args.fields and not args.run:
        raise ValueError(f"{' '.join(args.fields)}: fields of a recipe need --run.")
    folders = list(args.results)
    if args.run:
        from .train import parse_fields

        fields = parse_fields(args.fields) | ({} if args.data is None else {"data": args.data})
        commands = training_commands(table, args.run, args.seeds, args.output, fields)
        for folder, words in commands.items():
            print("drmm", *words, file=sys.stderr, flush=True)
            if not args.dry_run:
                check_finished(folder, words)
                if not (folder / "summary.json").is_file():
                    subprocess.run([sys.executable, "-m", "drmm_hf", *words], check=True, stdout=sys.stderr)
                measure_rest(table, folder)
        if args.dry_run:
            return 0
        folders.append(args.output)
    results, strangers = find_results(folders, resolved_recipe)
    for place, reason in strangers.items():
        print(f"left out, {reason}: {place}", file=sys.stderr)
    blocks = measured_blocks(table, results)
    shown = [result for block in blocks for row in block.rows for result in row.results]
    for result in results:
        if result not in shown:
            about = f"{result.data} {result.split}{', ' if result.options else ''}{result.options_in_words()}"
            print(f"left out, no row of table {args.number} is of it ({about}): {result.run}", file=sys.stderr)
        for old, new in result.superseded.items():
            print(f"left out, older than {new}, of the same model and split: {old}", file=sys.stderr)
    args.document = as_json(table, blocks)
    print("\n".join(lines_of(table, blocks, markdown_lines if args.markdown else text_lines)))
    return 0


def check_finished(folder: Path, words: Sequence[str]) -> None:
    """Refuse to take a finished run for one with other fields.

    Args:
        folder (`Path`): Of the run, which may not be there yet.
        words (`Sequence[str]`): Behind `drmm`, as `training_commands` returns them.

    Raises:
        ValueError: If the run was made with others; the message names the first.
    """
    from ..training.arguments import changed_fields, load_recipe
    from .train import parse_fields

    if not (folder / "summary.json").is_file():
        return
    _, recipe, *options = words
    fields = parse_fields([word for word in options if word != "--resume"])
    for option, field in (("data", "source"), ("output", "output_dir")):
        if option in fields:
            fields[field] = fields.pop(option)
    wanted, stored = load_recipe(recipe, fields), load_recipe(folder / "recipe.yaml")
    for section in ("model", "data", "training"):
        parts = (getattr(one, section) for one in (stored, wanted))
        before, now = (part if isinstance(part, dict) else vars(part) for part in parts)
        for name, was, is_now in changed_fields(before, now):
            if name not in ("resume", "output_dir"):
                raise ValueError(
                    f"{folder} is a finished run with {name} {was!r}, and {is_now!r} is asked for; name another "
                    "--output, or take the run away."
                )


def resolved_recipe(folder: Path) -> dict[str, Any]:
    """Read the recipe of a run with every default filled in.

    Args:
        folder (`Path`): Folder of the run.

    Returns:
        `dict[str, Any]`: The fields of its three sections in one.
    """
    import dataclasses

    from ..modeling.configuration_drmm import DrmmConfig
    from ..training.arguments import load_recipe

    recipe = load_recipe(folder / "recipe.yaml")
    if recipe.training.init_from is not None and (folder / "best" / "config.json").is_file():
        config = DrmmConfig.from_pretrained(folder / "best")
    else:
        config = DrmmConfig(**recipe.model)
    names = {one.name for one in dataclasses.fields(config)} & DrmmConfig.__annotations__.keys() - {"category_ids"}
    model = {name: getattr(config, name) for name in sorted(names)}
    backbone = config.backbone_config.to_dict()
    model["backbone_config"] = {name: backbone[name] for name in sorted(backbone) if "label" not in name}
    return model | vars(recipe.data) | vars(recipe.training)


def training_commands(
    table: Table, recipes: Sequence[str], seeds: Sequence[int], output: str | Path, fields: Mapping[str, str]
) -> dict[Path, list[str]]:
    """List the runs that measure a table.

    One of the paper's recipes gives the rows that name it, with their overrides. Any other recipe, such as one for
    less data, gives every row of the table: it is trained with the decoder, head and objective of each.

    Args:
        table (`Table`): The table.
        recipes (`Sequence[str]`): Recipe files.
        seeds (`Sequence[int]`): One run each.
        output (`str` or `Path`): Folder of the runs.
        fields (`Mapping[str, str]`): Overrides of all of them, as on a command line.

    Returns:
        `dict[Path, list[str]]`: By the folder of the run, the words behind `drmm`; all can be resumed.

    Raises:
        ValueError: If the table is of test-dev, whose annotations are not public.
    """
    if table.split == "test-dev2017":
        raise ValueError(f"table {table.number} is of test-dev2017, whose annotations only COCO's server has.")
    rows = [row for row in table.rows if row.recipe is not None]
    papers = {row.recipe.split()[0] for row in rows}
    commands = {}
    for path in map(Path, recipes):
        for row in rows:
            if path.name in papers and row.recipe.split()[0] != path.name:
                continue
            name, overrides = _overrides(row, path.name in papers)
            for seed in seeds:
                folder = Path(output) / path.stem / name / f"seed{seed}"
                given = overrides | dict(fields) | {"seed": str(seed), "output": str(folder)}
                options = [word for field, value in given.items() for word in (f"--{field}", value)]
                commands[folder] = ["train", str(path), *options, "--resume"]
    return commands


def _overrides(row: Row, is_papers: bool) -> tuple[str, dict[str, str]]:
    """Return the name of a row's runs and what makes them that row, as options of the command line."""
    from ..evaluation.paper_tables import recipe_overrides, recipe_parts

    own = recipe_overrides(row.recipe)
    if is_papers:
        changed = own
    else:
        names = ("decoder_type", "head_type", "criterion", "num_query_groups")
        changed = {name: row.fields[name] for name in names} | own
        if row.fields["head_type"] == "box":
            changed["box_delta_unit"] = "pixels"  # that of its decoder, the only one that a box head has
        else:
            changed.pop("num_query_groups")
    method = recipe_parts(row.recipe)[0]
    words = [value for name, value in own.items() if name != "proposal_grid"]
    if row.fields["num_query_groups"] > 1:
        words.append("group")
    name = "_".join([method, *(re.sub(r"\W+", "", str(word)) or "none" for word in words)])
    return name, {name.replace("_", "-"): json.dumps(value).strip('"') for name, value in changed.items()}


def measure_rest(table: Table, folder: Path) -> None:
    """Measure on the validation split of a finished run what a table needs and training does not measure.

    Args:
        table (`Table`): The table.
        folder (`Path`): The run; `duplicates.json`, `likelihood.json` or `cost.json` go there, unless they are there.
    """
    from ..data.labels import LabelMap
    from ..evaluation.deduplication import sweep
    from ..evaluation.detections import Detections
    from ..evaluation.files import write_json
    from ..evaluation.likelihood import likelihoods, summarize
    from ..evaluation.origin import annotations_digest
    from ..evaluation.predict import load_detector
    from ..evaluation.report_files import read_report
    from ..training.arguments import load_recipe
    from ..training.build import load_split

    kinds = {
        "duplicates": any(row.evaluation for row in table.rows),
        "likelihood": any(row.stage for row in table.rows),
        "cost": any(name in table.columns for name in ("FPS", "FLOPs (G)")),
    }
    missing = [name for name, needed in kinds.items() if needed and not (folder / f"{name}.json").is_file()]
    if not missing:
        return
    recipe = load_recipe(folder / "recipe.yaml")
    dataset, annotations = load_split(recipe.data, "val")
    about = read_report(folder / "evaluation.json")
    if about and (about.get("step") is None or about["ground_truth"] != annotations_digest(annotations)):
        raise ValueError(
            f"{folder}: its figures are of other annotations than {recipe.data.source!r} has now, or not its own; "
            f"{', '.join(missing)} would not be of the same. Measure it with drmm evaluate {folder / 'best'}."
        )
    for name in missing:
        if name == "duplicates":
            label_map = LabelMap.from_categories(annotations["categories"])
            detections = Detections.load(folder / "detections.json", label_map, dataset["image_id"])
            content = sweep(detections, annotations)
        elif name == "likelihood":
            model, processor = load_detector(str(folder / "best"))
            content = summarize(likelihoods(model, processor, dataset, annotations), annotations)
        else:
            from ..benchmarks.cost import model_cost

            model, _ = load_detector(str(folder / "best"))
            content = model_cost(model, 800, 1280)
        write_json(content, folder / f"{name}.json")


def lines_of(table: Table, blocks: Sequence[Block], form: Any) -> Iterator[str]:
    """Write a table and its blocks as lines.

    Args:
        table (`Table`): The published rows.
        blocks (`Sequence[Block]`): From `drmm_hf.evaluation.paper_tables.measured_blocks`.
        form (`Callable`): `text_lines` or `markdown_lines`.

    Yields:
        `str`: A line.
    """
    for block in blocks:
        is_papers = block.is_coco
        if is_papers:
            yield f"Table {table.number}: {table.title}; COCO {block.split}, published and measured here"
            if table.note:
                yield table.note
        else:
            yield ""
            count = "" if block.num_images is None else f", {block.num_images} pictures"
            count += f", annotations {block.ground_truth}" if block.ground_truth else ""
            yield f"Measured on {block.data}, split {block.split}{count}; not to be compared with the paper's figures"
        yield ""
        titles = [*table.columns, *(f"{name} here" for name in table.columns)] if is_papers else list(table.columns)
        rows = []
        for entry in block.rows:
            published = [_number(name, entry.row.figures[name]) for name in table.columns] if is_papers else []
            here = [_measured(name, entry) for name in table.columns]
            rows.append([*entry.row.labels, *published, *here, *_about(entry)])
        extra = ["runs", "steps", "minutes", "differs in"]
        shown = [index for index in range(len(extra)) if any(row[len(row) - len(extra) + index] for row in rows)]
        rows = [[*row[: -len(extra)], *(row[index - len(extra)] for index in shown)] for row in rows]
        yield from form([*table.labels, *titles, *(extra[index] for index in shown)], rows, len(table.labels))


def _about(entry: Measured) -> list[str]:
    """Return number, length and peculiarities of the runs of a row."""
    summaries = [result.files["summary"] for result in entry.results if result.files.get("summary")]
    steps, minutes = "", ""
    if summaries:
        steps = f"{sum(one['steps'] for one in summaries) / len(summaries):.0f}"
        minutes = f"{sum(one['training_seconds'] for one in summaries) / len(summaries) / 60:.1f}"
    differs = ", ".join(f"{name} {value}" for name, value in entry.differs.items())
    return [str(len(summaries) or ""), steps, minutes, differs]


def _number(column: str, value: float | None) -> str:
    """Return a figure as the paper prints it."""
    from ..evaluation.paper_tables import decimals

    return "-" if value is None else f"{value:.{decimals(column)}f}"


def _measured(column: str, entry: Measured) -> str:
    """Return the mean over runs, and its standard error where there are several."""
    from ..evaluation.paper_tables import spread

    values = entry.values.get(column)
    if values is None:
        return "-" if column.endswith("ratio") and entry.row.figures[column] is None else _NOT_RUN
    middle, error = spread(values)
    return _number(column, middle) + ("" if error is None else f" ± {_number(column, error)}")


def text_lines(titles: Sequence[str], rows: Sequence[Sequence[str]], num_labels: int) -> Iterator[str]:
    """Lay cells out in columns, labels to the left and figures to the right.

    Args:
        titles (`Sequence[str]`): Of the columns.
        rows (`Sequence[Sequence[str]]`): Their cells.
        num_labels (`int`): How many columns are labels.

    Yields:
        `str`: A line a row, titles first.
    """
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    left = [index < num_labels or title == "differs in" for index, title in enumerate(titles)]
    for row in (titles, *rows):
        cells = zip(row, widths, left, strict=True)
        yield "  ".join(
            f"{cell:<{width}}" if to_left else f"{cell:>{width}}" for cell, width, to_left in cells
        ).rstrip()


def markdown_lines(titles: Sequence[str], rows: Sequence[Sequence[str]], num_labels: int) -> Iterator[str]:
    """Write cells as a table of markdown.

    Args:
        titles (`Sequence[str]`): Of the columns.
        rows (`Sequence[Sequence[str]]`): Their cells.
        num_labels (`int`): How many columns are labels.

    Yields:
        `str`: A line a row, titles first.
    """
    yield f"| {' | '.join(titles)} |"
    yield "|" + "---|" * num_labels + "---:|" * (len(titles) - num_labels)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def as_json(table: Table, blocks: Sequence[Block]) -> dict[str, Any]:
    """Return a table and its blocks for json.

    Args:
        table (`Table`): The published rows.
        blocks (`Sequence[Block]`): What was measured.

    Returns:
        `dict`: `published`, a list of rows, and `measured`, a list of blocks; figures in the paper's units.
    """
    return {
        "table": table.number,
        "title": table.title,
        "split": table.split,
        "note": table.note,
        "published": [
            {
                **dict(zip(table.labels, row.labels, strict=True)),
                "figures": row.figures,
                "recipe": row.recipe,
                "evaluation": row.evaluation,
            }
            for row in table.rows
        ],
        "measured": [
            {
                "data": block.data,
                "split": block.split,
                "num_images": block.num_images,
                "ground_truth": block.ground_truth or None,
                "rows": [_row_as_json(table, entry) for entry in block.rows],
            }
            for block in blocks
        ],
    }


def _row_as_json(table: Table, entry: Measured) -> dict[str, Any]:
    from ..evaluation.paper_tables import spread

    figures = {}
    for name, values in entry.values.items():
        middle, error = spread(values)
        figures[name] = {"mean": middle, "standard_error": error, "values": list(values)}
    return {
        **dict(zip(table.labels, entry.row.labels, strict=True)),
        "runs": [str(result.run) for result in entry.results],
        "figures": figures,
        "differs": entry.differs,
    }
