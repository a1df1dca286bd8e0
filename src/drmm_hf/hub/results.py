"""What is known of a model: the files that training, evaluation and conversion have left of it."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..conversion.class_names import class_names
from ..evaluation.files import read_json
from ..evaluation.origin import other_input, weight_files, weights_digest
from ..evaluation.paper_tables import data_name
from ..evaluation.report_files import read_report
from ..modeling.configuration_drmm import DrmmConfig
from ..training.arguments import load_yaml
from .places import command_names_only, may_be_repo_id, names_only


# What an evaluation may write that a card shows.
REPORTS = ("metrics", "calibration", "coverage", "likelihood")
# Reports of `drmm evaluate` and the options that ask for them.
_OPTIONS = {"calibration": "--calibration", "coverage": "--coverage", "likelihood": "--losses"}
_OPTIONS |= {"thresholds": "--thresholds", "breakdown": "--breakdown", "duplicates": "--sweep"}


@dataclass(frozen=True)
class Evaluation:
    """Hold what was measured of a model on one split.

    Attributes:
        folder (`Path`): Where the files are.
        data (`str`): Name of the data, or their id on the Hub.
        split (`str`): Their split.
        chose (`bool`): Whether these pictures chose the checkpoint: they are those of the training run's own figures.
        about (`dict`): Content of `evaluation.json`; empty if there is none.
        reports (`dict[str, dict]`): Contents of `metrics.json` and the others of `REPORTS`, those there are.
    """

    folder: Path
    data: str
    split: str
    chose: bool
    about: dict[str, Any]
    reports: dict[str, dict[str, Any]]

    @property
    def metrics(self) -> dict[str, Any]:
        """Return the content of `metrics.json`."""
        return self.reports["metrics"]

    @property
    def is_fitted(self) -> bool:
        """Tell whether the calibration was fitted on these very pictures."""
        fitted_on = (self.metrics.get("calibration") or {}).get("fitted_on") or {}
        pictures = fitted_on.get("pictures")
        return pictures is not None and pictures == self.about.get("ground_truth")

    @property
    def place(self) -> str:
        """Return the folder that it is published in."""
        return "results/" + re.sub(r"[^\w.-]+", "_", f"{self.data}_{self.split}")

    @property
    def has_picture(self) -> bool:
        """Tell whether there is a picture of detections."""
        return (self.folder / "detections.jpg").is_file()


@dataclass(frozen=True)
class TrainingRecord:
    """Hold what a training run says of itself, with names instead of places.

    Attributes:
        recipe (`dict`): Content of `recipe.yaml`.
        manifest (`list[dict]`): Content of `manifest.json`, without working directories; empty if there is none.
        summary (`dict`): Content of `summary.json`; empty if there is none.
    """

    recipe: dict[str, Any]
    manifest: list[dict[str, Any]]
    summary: dict[str, Any]


def find_evaluations(
    folder: str | Path,
    config: DrmmConfig,
    calibration: Mapping[str, Any] | None = None,
    given: Iterable[str | Path] = (),
) -> tuple[list[Evaluation], dict[Path, str]]:
    """Look for what was measured of a model, and leave out what is not of it as it is published.

    Args:
        folder (`str` or `Path`): Of the model. Looked through are its folders and those of its training run, and the
            run's own figures where the model is its `best`.
        config (`DrmmConfig`): Of the model.
        calibration (`Mapping`, *optional*): Of its processor.
        given (`Iterable[str | Path]`): Folders of evaluations to take instead.

    Returns:
        `tuple[list[Evaluation], dict[Path, str]]`: One a split, those that chose the checkpoint last; and the reason
            for each folder that was left out.

    Raises:
        ValueError: If a file cannot be read, or a folder that was given would be left out.
        FileNotFoundError: If a folder that was given holds no `metrics.json`.
    """
    folder, named = Path(folder).resolve(), list(map(Path, given))
    digest, written = weights_digest(folder), max((path.stat().st_mtime for path in weight_files(folder)), default=0.0)
    found: dict[tuple[str, str], Evaluation] = {}
    left_out: dict[Path, str] = {}
    for place in named or _places(folder):
        if not (place / "metrics.json").is_file():
            raise FileNotFoundError(
                f"results {str(place)!r} holds no metrics.json, as a folder of `drmm evaluate` does"
            )
        evaluation = _read(place)
        reason = _reason_against(evaluation, folder, config)
        known, other = evaluation.about.get("weights"), other_input(evaluation.about, folder)
        if reason is None and known is not None and known != digest:
            reason = f"it is of other weights than the model has now; {_again(evaluation, folder)}"
        if reason is None and other is not None:
            reason = f"it was measured with another input than the processor gives, {other}; "
            reason += _again(evaluation, folder)
        if reason is None and (evaluation.metrics.get("calibration") or None) != (calibration or None):
            reason = f"it was measured with another calibration than the processor has; {_again(evaluation, folder)}"
        unknown = known is None and not named and not evaluation.chose
        if reason is None and unknown and _written(evaluation) < written:
            reason = f"it is older than the weights; name it with --results, or {_again(evaluation, folder)}"
        if reason is not None:
            if named:
                raise ValueError(f"results {str(place)!r}: {reason}")
            left_out[place] = reason
            continue
        key = evaluation.data, evaluation.split
        twin = found.get(key)
        if twin is not None:
            old, new = sorted((twin, evaluation), key=lambda one: (not one.chose, _written(one)))
            left_out[old.folder] = f"{new.folder} has newer figures of the same split"
            evaluation = new
        found[key] = evaluation
    choosing = _choosing_pictures(folder)
    marked = [
        replace(one, chose=True) if choosing is not None and one.about.get("ground_truth") == choosing else one
        for one in found.values()
    ]
    return sorted(marked, key=lambda one: one.chose), left_out


def find_training(folder: str | Path) -> TrainingRecord | None:
    """Read what the run that a checkpoint belongs to says of itself.

    Args:
        folder (`str` or `Path`): Of the model.

    Returns:
        `TrainingRecord` or None: None where the folder above it has no `recipe.yaml`.

    Raises:
        ValueError: If a file cannot be read.
    """
    run = Path(folder).resolve().parent
    if not (run / "recipe.yaml").is_file():
        return None
    manifest = []
    for record in read_json(run / "manifest.json") if (run / "manifest.json").is_file() else []:
        record = {name: value for name, value in record.items() if name != "working_directory"}
        manifest.append(names_only(record) | {"command": command_names_only(record.get("command", ""))})
    summary = read_json(run / "summary.json") if (run / "summary.json").is_file() else {}
    recipe = {name: names_only(part) if name != "model" else part for name, part in _read_recipe(run).items()}
    return TrainingRecord(recipe, manifest, summary)


def data_title(source: str) -> str:
    """Name data without their place.

    Args:
        source (`str`): Folder, annotation file, or id on the Hub.

    Returns:
        `str`: Name, or id on the Hub where nothing here has that name.
    """
    if may_be_repo_id(source) and not Path(source).exists():
        return source
    return data_name(source) if source.endswith(".json") else names_only(source.rstrip("/"))


def _places(folder: Path) -> list[Path]:
    """List folders that may hold figures of a model."""
    run = folder.parent
    parents = [folder, run] if (run / "recipe.yaml").is_file() else [folder]
    places = sorted(path.parent for parent in parents for path in parent.glob("*/metrics.json"))
    return places + [run] * (len(parents) == 2 and folder.name == "best" and (run / "metrics.json").is_file())


def _choosing_pictures(folder: Path) -> str | None:
    """Return the digest of the annotations by which a run has chosen its best checkpoint, if this is it."""
    run = folder.parent
    is_best = folder.name == "best" and (run / "recipe.yaml").is_file()
    return read_report(run / "evaluation.json").get("ground_truth") if is_best else None


def _read(place: Path) -> Evaluation:
    reports = {name: read_report(place / f"{name}.json") for name in REPORTS}
    reports = {name: report for name, report in reports.items() if report}
    about = read_report(place / "evaluation.json")
    chose = about.get("step") is not None or (not about and (place / "recipe.yaml").is_file())
    if chose and not about:
        data = _read_recipe(place).get("data", {})
        name = str(data.get("source") or "")
        split = "holdout" if data.get("holdout") else data.get("val_split") or "val"
    else:
        name, split = str(about.get("data") or ""), about.get("split") or place.name
    return Evaluation(place, data_title(name) or "unnamed data", str(split), chose, about, reports)


def _read_recipe(run: Path) -> dict[str, Any]:
    path = run / "recipe.yaml"
    try:
        recipe = load_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid yaml: {error}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{run / 'recipe.yaml'} is no recipe: the rule is sections with fields.")
    return recipe


def _again(evaluation: Evaluation, folder: Path) -> str:
    """Say which command measures the same anew, with the reports that there are."""
    about, place = evaluation.about, evaluation.folder
    if evaluation.split == "holdout":
        return "pictures that the training held out cannot be measured again"
    data = about.get("data")
    if evaluation.chose and not about:
        data = _read_recipe(place).get("data", {}).get("source")
    words = ["drmm", "evaluate", _short(folder), str(data or "DATA"), "--split", evaluation.split]
    words += ["--annotations", about["annotations"]] if about.get("annotations") else []
    # The figures of a training run are its own, and stay where they are.
    words += ["--output", _short(place / evaluation.split if evaluation.chose else place)]
    words += [option for name, option in _OPTIONS.items() if (place / f"{name}.json").is_file()]
    return f"measure again: {shlex.join(words)}"


def _short(path: Path) -> str:
    """Return a path from the working directory, if it is below."""
    return str(path.relative_to(os.getcwd()) if path.is_relative_to(os.getcwd()) else path)


def _reason_against(evaluation: Evaluation, folder: Path, config: DrmmConfig) -> str | None:
    """Say why figures are not those of a model as it is published; None if they are."""
    about, metrics = evaluation.about, evaluation.metrics
    if not evaluation.chose:
        model = about.get("model")
        if model is None:
            return "it does not say of which model it is"
        mine, others = folder.parts[-2:], Path(model).parts[-2:]
        if Path(model).resolve() != folder and mine[-len(others) :] != others:
            return f"it is of the model {model!r}"
    elif _read_recipe(evaluation.folder).get("data", {}).get("overfit"):
        return "the run was evaluated on the pictures that it learnt by heart (overfit)"
    options = {"top_k": about.get("top_k") or 100, "top_k_ratio": about.get("top_k_ratio")}
    options |= {"dtype": about.get("dtype")}
    unusual = [f"{name} {value}" for name, value in options.items() if value not in (100, None, "float32")]
    if metrics.get("deduplication"):
        unusual.append(str(metrics["deduplication"]["method"]).upper())
    if unusual:
        return f"it was measured with {', '.join(unusual)}, which a user of the model would not have"
    if not {*metrics["AP_per_class"]} & {*class_names(config)}:
        return f"its classes ({', '.join(list(metrics['AP_per_class'])[:3])}, ...) are not the model's"
    return None


def _written(evaluation: Evaluation) -> float:
    return (evaluation.folder / "metrics.json").stat().st_mtime
