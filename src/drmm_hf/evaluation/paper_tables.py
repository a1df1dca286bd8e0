"""The tables of the paper, and which results belong to which of their rows.

The published rows are data, `paper_tables.yaml`. A result is what training and evaluation leave in a folder; its
recipe says which rows it measures. On COCO the whole method must be the row's; on other data a run counts for every
row whose objective and decoder it has, in a block of its own, and what else differs between runs is named.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from .origin import other_input, weights_digest
from .report_files import read_report


# Fields of the recipes' methods, with which a run must agree on any data.
_METHODS = {
    "sparse_rcnn": {"decoder_type": "sparse_rcnn", "head_type": "box", "criterion": "focal_l1_giou"},
    "drmm_sparse_rcnn": {"decoder_type": "sparse_rcnn", "head_type": "mixture", "criterion": "nll_mcm"},
    "adamixer": {"decoder_type": "adamixer", "head_type": "box", "criterion": "focal_l1_giou"},
    "drmm_adamixer": {"decoder_type": "adamixer", "head_type": "mixture", "criterion": "nll_mcm"},
}
_METHOD = {
    "num_query_groups": 1,
    "num_ground_truth_copies": 1,
    "mcm_stop_gradient": ["F"],
    "coordinate_distribution": "cauchy",
    "top_k_ratio": None,
}
# The paper's numbers that every row has unless it says otherwise; a run on COCO must have them, too.
_SCALE = {
    "num_queries": 300,
    "num_stages": 6,
    "hidden_size": 256,
    "mcm_weight": 0.5,
    "box_delta_unit": "pixels",
    "epochs": 36,
    "shortest_edge": 800,
    "longest_edge": 1333,
    "augmentation": "paper",
}
_BACKBONES: dict[str, dict[str, Any]] = {
    "r50": {"model_type": "resnet", "depths": [3, 4, 6, 3]},
    "r101": {"model_type": "resnet", "depths": [3, 4, 23, 3]},
    "swin_t": {"model_type": "swin", "depths": [2, 2, 6, 2], "embed_dim": 96},
}
# Pictures and annotations of COCO val2017 and of test-dev2017, and the least number of those of train2017 to train on.
_COCO = {"val2017": (5_000, 36_781), "test-dev2017": (20_288, 0)}
_COCO_TRAIN = 117_000
# Fields of a recipe that make no difference between two runs, seeds among them.
_INDIFFERENT = {"seed", "source", "output_dir", "resume", "trackers", "backbone_weights", "num_workers", "compile"}
_INDIFFERENT |= {"gradient_checkpointing", "eval_batch_size", "evaluate_every", "log_every"}
_INDIFFERENT |= {"save_every_steps", "keep_last"}

# Column of a table: file of a result, key in it, factor from the file's unit to the paper's, decimals printed.
_COLUMNS = {
    **{name: ("metrics", name, 100.0, 1) for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")},
    "AR": ("metrics", "AR100", 100.0, 1),
    "NLL": ("likelihood", "nll", 1.0, 3),
    "exp(-MCM)": ("likelihood", "share", 1.0, 3),
    "FPS": ("cost", "pictures_per_second", 1.0, 1),
    "parameters (M)": ("cost", "trainable_parameters", 1e-6, 1),
    "memory (GB)": ("cost", "training_memory", 1e-9, 0),
    "FLOPs (G)": ("cost", "layer_operations", 1e-9, 1),
}
_RATIOS = {f"{name} ratio": name for name in ("NLL", "exp(-MCM)")}


@dataclass(frozen=True)
class Row:
    """Hold a published row.

    Attributes:
        labels (`tuple[str, ...]`): What the row is, one text a label column.
        figures (`dict[str, float | None]`): By column, in the paper's units; None where the paper has a dash.
        recipe (`str`, *optional*): File in `scripts/recipes` and overrides, as on a command line; None for systems
            of others.
        evaluation (`str`, *optional*): "nms" or "wta", applied to the detections.
        stage (`int`, *optional*): Stage that is measured, from 1.
    """

    labels: tuple[str, ...]
    figures: dict[str, float | None]
    recipe: str | None = None
    evaluation: str | None = None
    stage: int | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """Return what a run on any data must have to be this row; {} for systems of others."""
        if self.recipe is None:
            return {}
        method, _, groups = recipe_parts(self.recipe)
        return _METHOD | _METHODS[method] | {"num_query_groups": groups} | recipe_overrides(self.recipe)


@dataclass(frozen=True)
class Table:
    """Hold a published table.

    Attributes:
        number (`int`): Its number in the paper.
        title (`str`): What it compares.
        split (`str`): Split of COCO that it measures.
        labels (`tuple[str, ...]`): Names of the label columns.
        columns (`tuple[str, ...]`): Names of the columns of figures.
        rows (`tuple[Row, ...]`): In the paper's order.
        note (`str`): What the paper says about the figures.
        free (`tuple[str, ...]`): Fields of a recipe whose other values are rows of their own on other data.
    """

    number: int
    title: str
    split: str
    labels: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""
    free: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """Hold what one run leaves on one split.

    Attributes:
        run (`Path`): Folder of the run, which has its `recipe.yaml`.
        recipe (`dict[str, Any]`): Its fields, resolved: those of the sections model, data and training in one.
        data (`str`): Name of the data that were measured.
        split (`str`): Their split.
        ground_truth (`str`, *optional*): Digest of their annotations, if the evaluation says it.
        files (`dict[str, dict]`): Contents of `metrics`, `duplicates`, `likelihood`, `calibration`, `assignments`,
            `cost` and `summary`, those there are; `nms` and `wta` are metrics after these.
        places (`dict[str, Path]`): Folder that each of them is from.
        superseded (`dict[Path, Path]`): Older files of the same, and the file that took the place of each.
        options (`dict`): What the evaluation did otherwise than usual (`top_k`, `dtype`, `annotations`, `calibrated`,
            another `checkpoint` than the best): such figures are no row and in no figure.
    """

    run: Path
    recipe: dict[str, Any]
    data: str
    split: str
    ground_truth: str | None = None
    files: dict[str, dict] = field(default_factory=dict)
    places: dict[str, Path] = field(default_factory=dict)
    superseded: dict[Path, Path] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def options_in_words(self) -> str:
        """Say what `options` hold."""
        return ", ".join(f"{name} {value}" for name, value in self.options.items())

    @property
    def is_coco(self) -> bool:
        """Tell whether it is of COCO as the paper has it: by the counts, since names can be anything."""
        metrics = next((self.files[name] for name in ("metrics", "nms", "wta") if name in self.files), None)
        if metrics is None:  # costs alone do not depend on data
            return self.files.get("cost", {}).get("num_labels") == 80
        counts = metrics.get("num_images"), metrics.get("num_ground_truths", 0) + metrics.get("num_crowds", 0)
        trained_on = self.files.get("summary", {}).get("num_training_images", 0)
        return counts in _COCO.values() and trained_on >= _COCO_TRAIN


@dataclass(frozen=True)
class Measured:
    """Hold the figures of the runs that are one row.

    Attributes:
        row (`Row`): The published row; of a free value, one without figures.
        results (`tuple[Result, ...]`): Runs that differ in their seed at most.
        values (`dict[str, tuple[float, ...]]`): By column, in the paper's units, one a run that has it.
        differs (`dict[str, Any]`): Fields in which these runs differ from most of their block.
    """

    row: Row
    results: tuple[Result, ...] = ()
    values: dict[str, tuple[float, ...]] = field(default_factory=dict)
    differs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Block:
    """Hold what was measured on one split of one data set.

    Attributes:
        data (`str`): Name of the data.
        split (`str`): The split.
        is_coco (`bool`): Whether they are COCO as the paper has it.
        num_images (`int`, *optional*): Its pictures.
        ground_truth (`str`): Start of the digest of their annotations, where a block of the same name has others.
        rows (`tuple[Measured, ...]`): One a published row and kind of run, those that were not run too.
    """

    data: str
    split: str
    is_coco: bool
    num_images: int | None
    rows: tuple[Measured, ...]
    ground_truth: str = ""


@cache
def _published() -> dict[int, Table]:
    text = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
    tables = {}
    for number, table in yaml.safe_load(text).items():
        rows = []
        for row in table.pop("rows"):
            labels = tuple(map(str, row.pop("labels")))
            figures = dict(zip(table["columns"], row.pop("figures"), strict=True))
            rows.append(Row(labels, figures, **row))
        lists = {name: tuple(value) for name, value in table.items() if isinstance(value, list)}
        tables[number] = Table(number, rows=tuple(rows), **(table | lists))
    return tables


def paper_table(number: int) -> Table:
    """Return a published table.

    Args:
        number (`int`): 1 to 11.

    Returns:
        `Table`: Its rows, in the paper's units.

    Raises:
        ValueError: If the paper has no such table.
    """
    tables = _published()
    if number not in tables:
        raise ValueError(f"table is {number}; the paper has tables 1 to {max(tables)}.")
    return tables[number]


def recipe_parts(recipe: str) -> tuple[str, str, int]:
    """Split the name of one of the paper's recipes.

    Args:
        recipe (`str`): File name, with or without overrides behind it.

    Returns:
        `tuple[str, str, int]`: Method, backbone, number of groups of queries.
    """
    found = re.match(r"(\w+?)_(r50|r101|swin_t)(_group)?\.yaml", recipe)
    assert found is not None, recipe
    method, backbone, group = found.groups()
    return method, backbone, 12 if group else 1


def recipe_overrides(recipe: str) -> dict[str, Any]:
    """Read the overrides behind a recipe.

    Args:
        recipe (`str`): As `Row.recipe`.

    Returns:
        `dict[str, Any]`: By field.
    """
    words = shlex.split(recipe)[1:]
    pairs = zip(words[::2], words[1::2], strict=True)
    return {option.removeprefix("--").replace("-", "_"): yaml.safe_load(value) for option, value in pairs}


def find_results(
    folders: Iterable[str | Path], resolve: Callable[[Path], Mapping[str, Any]]
) -> tuple[list[Result], dict[Path, str]]:
    """Look for what training and evaluation have written.

    A folder with `recipe.yaml` is a run; its own figures are those of its validation split. Any other folder with
    results is an evaluation, and its `evaluation.json` says of which weights, data and split. Where it has no figures
    and says nothing, the folder above it is the run and its name the split, as in `runs/nll/top0.7`.

    Args:
        folders (`Iterable[str | Path]`): Looked through with everything below them.
        resolve (`Callable`): From the folder of a run to the fields of its recipe, all sections in one, defaults too.

    Returns:
        `tuple[list[Result], dict[Path, str]]`: One a run and split, files of several evaluations of it joined, the
        newest of each kind; and for each folder whose results are of no known run, the reason.

    Raises:
        FileNotFoundError: If a folder does not exist.
        ValueError: If a recipe or a report cannot be read, or a figure is none.
    """
    found: dict[tuple[Any, ...], Result] = {}
    runs: dict[Path, Mapping[str, Any]] = {}
    digests: dict[Path, str | None] = {}
    strangers = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise FileNotFoundError(f"results folder {str(folder)!r} does not exist")
        for place in sorted({path.parent.resolve() for path in folder.rglob("*.json") if path.stem in _FILES}):
            about = read_report(place / "evaluation.json")
            run = _run_of(place, about, digests)
            if isinstance(run, str):
                strangers[place] = run
                continue
            twin = _twin(run, runs, digests)
            if twin is not None:
                strangers[place] = f"the weights are those of {twin}, a run counts once"
                continue
            if run not in runs:
                try:
                    runs[run] = resolve(run)
                except ValueError as error:
                    raise ValueError(f"{run / 'recipe.yaml'}: {error}") from error
            recipe = dict(runs[run])
            own = run == place
            data = about.get("data", recipe["source"])
            split = about.get("split", recipe["val_split"] if own else place.name)
            selects = about.get("top_k_ratio")
            if selects is not None:
                recipe |= {"top_k_ratio": selects, "top_k_last_stage": False}
            options = _unusual_options(run, about, read_report(place / "metrics.json"))
            key = run, data_name(str(data)), split, about.get("ground_truth"), selects, *sorted(options.items())
            result = found.setdefault(key, Result(run, recipe, key[1], key[2], key[3], options=options))
            suppressed = read_report(place / "metrics.json").get("deduplication")
            for path in (place / f"{name}.json" for name in _FILES):
                content = read_report(path)
                if suppressed and path.stem in ("duplicates", "calibration"):
                    continue  # of what was left, and so of no row and no figure
                if content:
                    applied = path.stem == "metrics" and suppressed
                    name = applied["method"] if applied else path.stem
                    other = result.places.get(name, place)
                    old, new = sorted((other, place), key=lambda one: (one / path.name).stat().st_mtime)
                    if old != new:
                        result.superseded[old / path.name] = new / path.name
                    if new == place:
                        result.files[name], result.places[name] = content, place
            result.files.setdefault("summary", read_report(run / "summary.json"))
            if selects is None:
                result.files.setdefault("cost", read_report(run / "cost.json"))
    return list(found.values()), strangers


NO_RUN = "no recipe.yaml of its run"
_FILES = ("metrics", "duplicates", "likelihood", "cost", "summary", "calibration", "assignments")


def _run_of(place: Path, about: Mapping[str, Any], digests: dict[Path, str | None]) -> Path | str:
    """Return the folder of the run that a folder of results is of, or why none is known.

    It is the nearest one with a recipe, above the model or else above the results, that has the weights they are of.
    Results that were given as a file are of no known run, wherever they lie.
    """
    is_run, model = (place / "recipe.yaml").is_file(), about.get("model")
    if not about and not is_run and any((place / f"{name}.json").is_file() for name in ("metrics", "duplicates")):
        return "no evaluation.json says what it is of"
    if about and model is None and not is_run:
        return NO_RUN
    starts = [place] if model is None else [Path(model), place]
    runs = [run for start in starts for run in _runs_above(start)]
    if about.get("weights") is None:
        return runs[0] if runs else NO_RUN
    stale = []
    for run in dict.fromkeys(runs):
        checkpoint = run / Path(about["model"]).name
        if checkpoint not in digests:
            digests[checkpoint] = weights_digest(checkpoint)
        if digests[checkpoint] == about["weights"]:
            other = other_input(about, checkpoint)
            return run if other is None else f"of another input than {checkpoint} has now: {other}"
        if digests[checkpoint] is not None:
            stale.append(str(checkpoint))
    if stale:
        return f"of other weights than {' and '.join(stale)} has now"
    return runs[0] if runs else NO_RUN


def _twin(run: Path, runs: Iterable[Path], digests: dict[Path, str | None]) -> Path | None:
    """Return another run with the same best weights: a copy is no second seed."""
    for one in (run, *runs):
        if one / "best" not in digests:
            digests[one / "best"] = weights_digest(one / "best")
    mine = digests[run / "best"]
    return next((one for one in runs if one != run and mine is not None and digests[one / "best"] == mine), None)


def _runs_above(start: Path) -> list[Path]:
    """Return the nearest folder with a recipe: this one or one of the two above it; [] if there is none."""
    folders = [one for one in (start, *list(start.parents)[:2]) if (one / "recipe.yaml").is_file()]
    return [folder.resolve() for folder in folders[:1]]


def _unusual_options(run: Path, about: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an evaluation did otherwise than the tables suppose; files of earlier versions do not say."""
    options = {"top_k": about.get("top_k") or 100, "dtype": about.get("dtype"), "checkpoint": "best"}
    options |= {"annotations": about.get("annotations"), "calibrated": bool(metrics.get("calibration")) or None}
    model = Path(about.get("model") or run)
    if model.resolve().parent == run:
        options["checkpoint"] = model.name
    return {name: value for name, value in options.items() if value not in (100, None, "float32", "best")}


def data_name(source: str) -> str:
    """Name data shortly.

    Args:
        source (`str`): Folder, Hub id or annotation file.

    Returns:
        `str`: Name of the folder or Hub id; of an annotation file, that of the folder it usually stands in.
    """
    path = Path(source)
    return path.parent.parent.name or path.stem if path.suffix == ".json" else path.name


def measured_blocks(table: Table, results: Sequence[Result]) -> list[Block]:
    """Sort results into the rows of a table.

    Args:
        table (`Table`): From `paper_table`.
        results (`Sequence[Result]`): From `find_results`.

    Returns:
        `list[Block]`: First COCO's split of the table, whether there are results or not, then one for each split of
        other data with a run that is a row of the table.
    """
    groups: dict[tuple[bool, str, str, str], list[Result]] = {(True, "COCO", table.split, ""): []}
    for result in results:
        if result.is_coco:
            key = True, "COCO", result.split, ""
        else:
            key = False, result.data, result.split, result.ground_truth or ""
        groups.setdefault(key, []).append(result)
    names = [key[:3] for key in groups]
    blocks = []
    for (is_coco, data, split, digest), mine in groups.items():
        rows: list[Measured] = []
        for row in table.rows if is_coco else _rows_elsewhere(table, mine):
            rows += _measure(table, row, mine, is_coco) or [Measured(row)]
        if (is_coco and split == table.split) or any(row.values for row in rows):
            sizes = [result.files["metrics"]["num_images"] for result in mine if "metrics" in result.files]
            rows = _name_differences(table, _add_ratios(rows), by_row=is_coco)
            digest = digest[:8] if names.count((is_coco, data, split)) > 1 else ""
            blocks.append(Block(data, split, is_coco, max(sizes, default=None), tuple(rows), digest))
    return blocks


def _rows_elsewhere(table: Table, results: Sequence[Result]) -> list[Row]:
    """Return the rows that runs on other data can be: those of our methods, whatever the backbone, each once."""
    rows, seen = [], set()
    if table.free:
        base = next(row.recipe for row in table.rows if row.recipe)
        found = {tuple(result.recipe[name] for name in table.free) for result in results}
        for values in sorted(found):
            options = [f"--{name.replace('_', '-')} {value}" for name, value in zip(table.free, values, strict=True)]
            rows.append(Row(tuple(map(str, values)), {}, " ".join([base.split()[0], *options])))
        return rows
    most = max((result.recipe["num_stages"] for result in results), default=0)
    for row in table.rows:
        key = json.dumps([row.fields, row.evaluation, row.stage], sort_keys=True)
        if row.recipe is not None and key not in seen and (row.stage or 0) <= most:
            seen.add(key)
            names = zip(table.labels, row.labels, strict=True)
            labels = tuple("" if name in ("backbone", "epochs") else label for name, label in names)
            rows.append(replace(row, labels=labels))
    return rows


def _measure(table: Table, row: Row, results: Sequence[Result], is_coco: bool) -> list[Measured]:
    """Return the figures of the runs that are a row, one entry for those that differ in their seed at most."""
    kinds = defaultdict(list)
    for result in results:
        if row.recipe is not None and _is_row(row, result, is_coco):
            kinds[json.dumps(_identity(result), sort_keys=True, default=str)].append(result)
    entries = []
    for kind in kinds.values():
        figures = {name: [_figure(name, row, result) for result in kind] for name in table.columns if name in _COLUMNS}
        values = {name: tuple(value for value in figures[name] if value is not None) for name in figures}
        values = {name: found for name, found in values.items() if found}
        if values:
            entries.append(Measured(row, tuple(kind), values))
    return entries


def _is_row(row: Row, result: Result, is_coco: bool) -> bool:
    """Tell whether a run has what a row asks for."""
    if result.options:
        return False
    wanted, recipe = dict(row.fields), result.recipe
    if not is_coco:
        wanted.pop("proposal_grid", None)
        return all(recipe[name] == value for name, value in wanted.items())
    assert row.recipe is not None
    backbone = _BACKBONES[recipe_parts(row.recipe)[1]]
    return all(recipe[name] == value for name, value in (_SCALE | wanted).items()) and all(
        recipe["backbone_config"].get(name) == value for name, value in backbone.items()
    )


def _identity(result: Result) -> dict[str, Any]:
    """Return what two runs must share to be one row's."""
    return {name: value for name, value in result.recipe.items() if name not in _INDIFFERENT}


def _figure(column: str, row: Row, result: Result) -> float | None:
    """Return one figure of a run in the paper's unit; None if it is not there."""
    file, key, factor, _ = _COLUMNS[column]
    content = result.files.get(file, {})
    if file == "likelihood":
        stages = content.get("all", {}).get(key) or []
        assert row.stage is not None
        position = len(stages) if row.stage == -1 else row.stage
        value = stages[position - 1] if 0 < position <= len(stages) else None
    elif file == "metrics":
        value = _after(row.evaluation, result.files).get(key)
    else:
        value = content.get(key)
        if file == "cost" and content.get("size") != [800, 1280]:
            value = None
    return None if value is None else factor * value


def _after(evaluation: str | None, files: Mapping[str, dict]) -> Mapping[str, Any]:
    """Return the figures of the detections as they are, or after NMS or winner-take-all at NMS's best IoU."""
    swept = files.get("duplicates")
    if evaluation is None:
        return files.get("metrics") or (swept["none"] if swept else {})
    if swept:
        best = swept["best_iou_threshold"]
        return next(entry for entry in swept[evaluation] if entry["iou_threshold"] == best)
    return files.get(evaluation, {})


def _add_ratios(rows: Sequence[Measured]) -> list[Measured]:
    """Add the columns that compare a row with the one of its stage that has no such figure."""
    added = []
    for entry in rows:
        values = dict(entry.values)
        for ratio, column in _RATIOS.items():
            if entry.row.figures.get(ratio) is not None and column in values:
                partners = [
                    other.values[column]
                    for other in rows
                    if other.row.stage == entry.row.stage
                    and other.row.figures[ratio] is None
                    and column in other.values
                ]
                if partners:
                    values[ratio] = (mean(values[column]) / mean(partners[0]),)
        added.append(replace(entry, values=values))
    return added


def _name_differences(table: Table, rows: Sequence[Measured], by_row: bool) -> list[Measured]:
    """Name the fields in which runs differ from most of the others, besides those that make the rows.

    On COCO each row has a recipe of its own, so there only runs of the same row are compared.
    """
    keys = {name for row in table.rows for name in row.fields} | {"proposal_grid"}
    flat = [_flat(_identity(entry.results[0])) if entry.results else {} for entry in rows]
    named = []
    for entry, fields in zip(rows, flat, strict=True):
        others = [
            other for other, one in zip(flat, rows, strict=True) if other and (one.row is entry.row or not by_row)
        ]
        differs = {}
        for name in sorted(fields.keys() - keys):
            values = [json.dumps(other[name], default=str) for other in others if name in other]
            if json.dumps(fields[name], default=str) != max(values, key=values.count):
                differs[name] = fields[name]
        named.append(replace(entry, differs=differs))
    return named


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a recipe, those of the backbone among them."""
    backbone = {f"backbone_config.{name}": value for name, value in (recipe.get("backbone_config") or {}).items()}
    # A box head has no other unit, so it is no difference.
    left_out = {"backbone_config", "box_delta_unit"} if recipe["head_type"] == "box" else {"backbone_config"}
    return {name: value for name, value in recipe.items() if name not in left_out} | backbone


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean over runs and its standard error.

    Args:
        values (`Sequence[float]`): One a run, at least one.

    Returns:
        `tuple[float, float | None]`: The error is None for a single run, which says nothing of it.
    """
    return mean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def decimals(column: str) -> int:
    """Return how many decimals the paper prints.

    Args:
        column (`str`): Of a table.

    Returns:
        `int`: For `columns` of any table.
    """
    return 3 if column in _RATIOS else _COLUMNS[column][3]
