"""The folder that is published: a model with its code, its card, and the files that the card is made of."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from transformers.utils import is_matplotlib_available

from ..conversion.model_card import model_card
from ..evaluation.files import read_json, write_json, write_text
from ..evaluation.origin import weight_files
from ..evaluation.predict import load_detector
from ..modeling.modeling_drmm import DrmmForObjectDetection
from ..modeling.remote_code import requirements
from ..training.arguments import dump_yaml
from ..training.checkpoint import finish_folder, start_folder
from ..visualization.evaluation_pictures import draw_report
from .bundle import save_bundle
from .card import Subject, card_data, is_untouched, write_card
from .check import check_folder
from .places import names_only
from .results import find_evaluations, find_training


# Files that an earlier publication may hold.
_OURS = re.compile(
    r"\w+\.py|README\.md|requirements\.txt|(config|preprocessor_config|conversion)\.json|"
    r"model[\w-]*\.safetensors(\.index\.json)?|training/\w+\.(json|yaml)|results/[^/]+/\w+\.(json|png|jpg)"
)


@dataclass(frozen=True)
class Publication:
    """Hold a folder that is ready for upload.

    Attributes:
        folder (`Path`): It holds what is uploaded and nothing else.
        checks (`list[str]`): What was checked.
        notes (`list[str]`): What the user should know: figures that are missing or were left out, a card that is kept.
    """

    folder: Path
    checks: list[str]
    notes: list[str]

    @property
    def files(self) -> dict[str, int]:
        """Return the size of each file in bytes."""
        found = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in found}


def prepare(
    model: str | Path,
    repo_id: str,
    output: str | Path,
    results: Iterable[str | Path] = (),
    license: str | None = None,
) -> Publication:
    """Assemble the folder of a model and check it, without the Hub.

    Args:
        model (`str` or `Path`): Folder of a D-RMM detector.
        repo_id (`str`): Its name on the Hub, for the card.
        output (`str` or `Path`): Folder to write. An earlier one of the same kind is replaced, but an edited
            `README.md` in it is kept.
        results (`Iterable[str | Path]`): Folders of evaluations; by default those beside the model.
        license (`str`, *optional*): Of the weights, as the Hub writes it.

    Returns:
        `Publication`: The folder.

    Raises:
        ValueError: If model, results or card cannot be published; the message says why. `output` is as it was.
        FileExistsError: If `output` holds something else than a publication.
    """
    model, output = Path(model), Path(os.path.realpath(output))
    if not weight_files(model):
        raise ValueError(
            f"model {str(model)!r} has no weights to publish: the rule is model.safetensors, as `drmm train` and "
            "`drmm convert` write it."
        )
    if output in (model.resolve(), *model.resolve().parents):
        raise ValueError(f"output {str(output)!r} holds the model; name another folder.")
    _check_replaceable(output)
    detector, processor = load_detector(str(model), "cpu")
    if not isinstance(detector, DrmmForObjectDetection):
        kind = detector.config.model_type
        raise ValueError(f"model {str(model)!r} is a {kind!r}; only D-RMM detectors are published.")
    config = detector.config
    evaluations, left_out = find_evaluations(model, config, processor.calibration, results)
    conversion = read_json(model / "conversion.json") if (model / "conversion.json").is_file() else None
    subject = Subject(
        repo_id,
        config,
        processor,
        sum(parameter.numel() for parameter in detector.parameters()),
        requirements(config.to_dict()),
        evaluations,
        find_training(model),
        conversion,
        license,
    )
    notes = [f"{place} is left out: {reason}" for place, reason in left_out.items()]
    notes += _notes(subject)
    folder = start_folder(output)
    try:
        save_bundle(detector, processor, folder)
        _write_records(subject, folder)
        kept = _edited_card(model, output, subject)
        write_text(folder / "README.md", write_card(subject) if kept is None else kept.read_text(encoding="utf-8"))
        expected: list[EvalResult] = card_data(subject).get("eval_results", [])
        checks, more = check_folder(folder, expected, _private_places(model))
        if kept is not None:
            notes.append(f"{kept} was edited and is the card; delete it to have a new one written")
        finish_folder(output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Publication(output, checks, notes + more)


def _write_records(subject: Subject, folder: Path) -> None:
    """Write the files that the card is made of, with names instead of places."""
    settings = _forget_origins(read_json(folder / "config.json"))
    write_text(folder / "config.json", json.dumps(settings, indent=2, sort_keys=True) + "\n")
    if subject.conversion is not None:
        write_json(subject.conversion, folder / "conversion.json")
    if subject.training is not None:
        (folder / "training").mkdir()
        write_text(folder / "training" / "recipe.yaml", dump_yaml(subject.training.recipe))
        for name, content in (("manifest", subject.training.manifest), ("summary", subject.training.summary)):
            if content:
                write_json(content, folder / "training" / f"{name}.json")
    for evaluation in subject.evaluations:
        place = folder / evaluation.place
        place.mkdir(parents=True)
        about = {"evaluation": names_only(evaluation.about)} if evaluation.about else {}
        for name, content in (about | evaluation.reports).items():
            write_json(content, place / f"{name}.json")
        if evaluation not in subject.shown:
            continue
        draw_report("metrics", evaluation.metrics, place)
        if evaluation.has_picture:
            shutil.copyfile(evaluation.folder / "detections.jpg", place / "detections.jpg")


def _forget_origins(settings: Any) -> Any:
    """Reduce the places that parts of a config were loaded from to names; all else may be names already."""
    if isinstance(settings, list):
        return [_forget_origins(value) for value in settings]
    if not isinstance(settings, dict):
        return settings
    return {
        name: names_only(value) if name == "_name_or_path" else _forget_origins(value)
        for name, value in settings.items()
    }


def _edited_card(model: Path, output: Path, subject: Subject) -> Path | None:
    """Find the card that somebody has written or edited; None if there is none."""
    cards = {
        path: path.read_text(encoding="utf-8")
        for path in (output / "README.md", model / "README.md")
        if path.is_file()
    }
    about = subject.conversion
    converted = model_card(subject.config, about["source"], about["family"], about["sha256"]) if about else None
    edited = {path: text for path, text in cards.items() if not is_untouched(text) and text != converted}
    if len({*edited.values()}) > 1:
        raise ValueError(
            f"both {' and '.join(map(str, edited))} were edited; delete the one that is not to be the card"
        )
    return next(iter(edited), None)


def _notes(subject: Subject) -> list[str]:
    """Say what a card lacks, and what it shows to everybody."""
    notes = []
    if not subject.evaluations:
        notes.append("no result file was found, so the card has no figure: drmm evaluate writes some")
    elif all(evaluation.chose for evaluation in subject.evaluations):
        notes.append("the only figures are of the split that chose the checkpoint: drmm evaluate on another")
    if subject.evaluations and not is_matplotlib_available():
        notes.append("reliability diagrams are not drawn: matplotlib is not installed")
    for one in subject.shown:
        if one.has_picture:
            notes.append(f"{one.place}/detections.jpg shows pictures of {one.data}: may everybody see them?")
    if subject.license is None:
        notes.append("the card states no licence: --license")
    return notes


def _check_replaceable(output: Path) -> None:
    """Refuse a folder that holds something else than a publication."""
    if not output.exists():
        return
    files = [path for path in output.rglob("*") if not path.is_dir()] if output.is_dir() else [output]
    strangers = [path for path in files if not _OURS.fullmatch(path.relative_to(output).as_posix())]
    if strangers or (files and not (output / "modeling_drmm.py").is_file()):
        raise FileExistsError(
            f"output {str(output)!r} holds {(strangers or files)[0].name}, which drmm push has not written; name "
            "another folder, or move it"
        )


def _private_places(model: Path) -> list[str]:
    """Return places of this machine that no published file may name."""
    places = {str(Path.home()), os.getcwd(), str(model.resolve().parent)}
    return sorted(place for place in places if len(Path(place).parts) > 1)
