"""The card of a published model, from the files that say what is known of it, and no figure from elsewhere."""

from __future__ import annotations

import hashlib
import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.utils import is_matplotlib_available

from ..conversion.architecture import backbone_name
from ..conversion.class_names import class_names
from ..conversion.model_card import METHODS, expected_result
from ..modeling.configuration_drmm import DrmmConfig
from ..modeling.image_processing_drmm import DrmmImageProcessor
from .results import Evaluation, TrainingRecord


CITATION = """\
@inproceedings{yoo2023drmm,
  author    = {Yoo, Jaeyoung and Lee, Hojun and Seo, Seunghyeon and Chung, Inseop and Kwak, Nojun},
  title     = {End-to-End Multi-Object Detection with a Regularized Mixture Model},
  booktitle = {International Conference on Machine Learning},
  year      = {2023}
}"""
# Figures of `metrics.json` that go into the model-index, as they are.
INDEXED = ("AP", "AP50", "AP75", "ECE", "ECE_0.1")

# Type of data that are not on the Hub, where a bare name would be that of somebody's data set.
_LOCAL = "local"

_SEAL = "\n<!-- drmm push wrote this card; sha256 {}. An edited card is kept as it is. -->\n"
_SEALED = re.compile(r"\n<!-- drmm push wrote this card; sha256 ([0-9a-f]{64})\. .* -->\n*\Z")


@dataclass(frozen=True)
class Subject:
    """Hold what a card is about.

    Attributes:
        repo_id (`str`): Name on the Hub.
        config (`DrmmConfig`): Of the model.
        processor (`DrmmImageProcessor`): Of the model.
        num_parameters (`int`): Of the model.
        requirements (`Mapping[str, str]`): Range of versions of each package that the code needs.
        evaluations (`Sequence[Evaluation]`): What was measured.
        training (`TrainingRecord`, *optional*): What the training run says.
        conversion (`Mapping`, *optional*): Content of `conversion.json`, of a converted checkpoint.
        license (`str`, *optional*): Of the weights.
    """

    repo_id: str
    config: DrmmConfig
    processor: DrmmImageProcessor
    num_parameters: int
    requirements: Mapping[str, str]
    evaluations: Sequence[Evaluation] = ()
    training: TrainingRecord | None = None
    conversion: Mapping[str, Any] | None = None
    license: str | None = None

    @property
    def shown(self) -> Sequence[Evaluation]:
        """Return the evaluations that are shown in detail: those that did not choose the checkpoint, if there are."""
        return [one for one in self.evaluations if not one.chose] or self.evaluations


def write_card(subject: Subject) -> str:
    """Write the card of a model.

    Args:
        subject (`Subject`): What is known of it.

    Returns:
        `str`: Markdown with the Hub's header. Its last line tells an edited card from one that is not.
    """
    sections = [
        f"---\n{card_data(subject).to_yaml()}\n---",
        f"# {subject.repo_id.rpartition('/')[2]}",
        _introduction(subject),
        "## Use",
        _use(subject),
        "## Results",
        *_results(subject),
        *_origin(subject),
        *_training(subject),
        "## Intended use",
        _intended_use(subject),
        "## Limits",
        "\n".join(f"- {limit}" for limit in _limits(subject)),
        "## Licence",
        _licence(subject),
        "## Citation",
        f"```bibtex\n{CITATION}\n```",
    ]
    text = "\n\n".join(sections) + "\n"
    return text + _SEAL.format(_sha256(text))


def is_untouched(text: str) -> bool:
    """Tell whether a card is as `write_card` wrote it.

    Args:
        text (`str`): Any card.

    Returns:
        `bool`: False if it was edited, or written by someone else.
    """
    text = text.replace("\r\n", "\n")
    seal = _SEALED.search(text)
    return seal is not None and _sha256(text[: seal.start()]) == seal[1]


def card_data(subject: Subject) -> ModelCardData:
    """Return the header of a card.

    Args:
        subject (`Subject`): What is known of the model.

    Returns:
        `ModelCardData`: With a model-index of the figures, fractions as in `metrics.json`.
    """
    results = [
        EvalResult(
            task_type="object-detection",
            dataset_type=evaluation.data if "/" in evaluation.data else _LOCAL,
            dataset_name=evaluation.data,
            dataset_split=evaluation.split,
            metric_type=name,
            metric_name=name,
            metric_value=evaluation.metrics[name],
        )
        for evaluation in subject.evaluations
        for name in INDEXED
        if evaluation.metrics[name] is not None
    ]
    fields: dict[str, Any] = (
        {"model_name": subject.repo_id.rpartition("/")[2], "eval_results": results} if results else {}
    )
    on_hub = sorted({evaluation.data for evaluation in subject.evaluations if "/" in evaluation.data})
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="object-detection",
        tags=["object-detection", "drmm", "custom_code"],
        license=subject.license,
        datasets=on_hub or None,
        **fields,
    )


def check_card(text: str, expected: Sequence[EvalResult] | None = None) -> list[str]:
    """Check a card with huggingface_hub's own rules, without the Hub.

    Args:
        text (`str`): The card.
        expected (`Sequence[EvalResult]`, *optional*): What its model-index should hold.

    Returns:
        `list[str]`: What a reader should know; empty if all is well.

    Raises:
        ValueError: If the header is none that the Hub takes.
    """
    try:
        data = ModelCard(text).data
        data.to_yaml()
    except Exception as error:  # of the yaml parser, or of a model-index that lacks something
        raise ValueError(f"the header of README.md is not one that the Hub takes: {error}") from error
    notes = [
        f"README.md does not say {name}: {value}"
        for name, value in (("library_name", "transformers"), ("pipeline_tag", "object-detection"))
        if data.get(name) != value
    ]
    if expected is not None and list(data.get("eval_results") or []) != list(expected):
        notes.append("the model-index of README.md is not what the result files say")
    return notes


def _introduction(subject: Subject) -> str:
    config, processor = subject.config, subject.processor
    names = class_names(config)
    method = METHODS[config.decoder_type, config.head_type]
    meant = ""
    if config.criterion in ("nll_mcm", "nll", "max_nll"):
        meant = (
            " It is trained by the likelihood of a mixture density over boxes and classes: no matching, no background "
            "class, no NMS. Its scores are meant to be read as probabilities."
        )
    rows = {
        "method": f"{method}, criterion `{config.criterion}`",
        "backbone": backbone_name(config.backbone_config),
        "queries, stages, width": f"{config.num_queries}, {config.num_stages}, {config.hidden_size}",
        "parameters": f"{subject.num_parameters:,}",
        "classes": f"{len(names)}: {_listed(names, 100)}",
        "input": _input_size(processor),
    }
    if processor.calibration:
        rows["calibration"] = "confidences or box scales are corrected by the processor (`drmm calibrate`)"
    if processor.score_threshold is not None:
        rows["score threshold"] = _threshold(processor)
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return f"An object detector: {method}, for {_listed(names, 5)}.{meant}\n\n" + "\n".join(lines)


def _results(subject: Subject) -> list[str]:
    """Return a table of all figures, then what is known of each split."""
    if not subject.evaluations:
        return [
            "No result file was found with the model, so no figure is given here. To measure some:\n\n"
            f"```bash\ndrmm evaluate {subject.repo_id} DATA --split test --output OUT --calibration\n```"
        ]
    columns = ("AP", "AP50", "AP75", "APs", "APm", "APl", "ECE", "ECE_0.1")
    lines = [f"| data, split | pictures | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
    for one in subject.evaluations:
        cells = [_per_cent(one.metrics[name]) for name in columns]
        marks = " (1)" * one.chose + " (2)" * one.is_fitted
        split = f"[{_title(one)}]({one.place}/metrics.json){marks}"
        lines.append(f"| {split} | {one.metrics['num_images']} | {' | '.join(cells)} |")
    note = (
        "Per cent; COCO's AP, and the expected calibration error of the 100 best predictions of each picture, "
        "ECE_0.1 of those scoring above 0.1."
    )
    if any(one.chose for one in subject.evaluations):
        note += " (1) This split chose the checkpoint, so its figures are a little too good."
    if any(one.is_fitted for one in subject.evaluations):
        note += " (2) The calibration was fitted on this split, so its calibration errors are too small."
    sections = ["\n".join(lines), note]
    for one in subject.shown:
        sections += [f"### {_title(one)}", *_details(one, subject.config.head_type == "mixture")]
    return sections


def _details(one: Evaluation, has_density: bool) -> list[str]:
    """Return what is known of a split, and what no file says of it."""
    metrics, place = one.metrics, one.place
    counts = f"{metrics['num_images']} pictures, {metrics['num_ground_truths']} objects"
    files = ", ".join(f"[{name}.json]({place}/{name}.json)" for name in one.reports)
    per_class = [f"| {_cell(name)} | {_per_cent(value)} |" for name, value in metrics["AP_per_class"].items()]
    sections = [f"{counts}. Files: {files}.", "\n".join(["| class | AP |", "|---|---|", *per_class])]
    try:
        facts = _facts(one.reports)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{one.folder} holds a report that is not as `drmm evaluate` writes it: {error!r}") from error
    known = [fact for fact in facts.values() if fact is not None]
    missing = [name for name, fact in facts.items() if fact is None and (has_density or "calibration" in name)]
    if known:
        sections.append("\n".join(f"- {fact}" for fact in known))
    if is_matplotlib_available():
        alt = f"Reliability diagram: {one.data}, {one.split}"
        sections.append(f'<img src="{place}/reliability.png" width="460" alt="{html.escape(" ".join(alt.split()))}">')
    else:
        missing.append("reliability diagram")
    if one.has_picture:
        sections.append(f"![Annotations beside what is found: {_title(one)}]({place}/detections.jpg)")
    else:
        missing.append("picture of detections")
    return sections + ([f"No file was found of: {', '.join(missing)}."] if missing else [])


def _facts(reports: Mapping[str, Any]) -> dict[str, str | None]:
    """Say what reports beyond the metrics hold; None for what is not there."""
    calibration = likelihood = coverage = None
    if "calibration" in reports:
        kind = reports["calibration"]["kinds"]["confidence"]
        calibration = ", ".join(
            f"{name} {_per_cent(kind[name])} (95 % interval {' to '.join(map(_per_cent, kind[f'{name}_interval']))})"
            for name in ("ECE", "ECE_0.1")
        )
    if (reports.get("likelihood") or {}).get("all"):
        likelihood = (
            f"negative log-likelihood of an annotation {reports['likelihood']['all']['nll'][-1]:.3f} (last stage)"
        )
    for level, held in zip(*_coverage(reports), strict=True):
        if math.isclose(level, 0.9):
            coverage = f"intervals of 90 % hold {_per_cent(held)} % of the annotated sides of correct predictions"
    return {
        "intervals of the calibration error (`--calibration`)": calibration,
        "likelihood (`--losses`)": likelihood,
        "coverage of intervals (`--coverage`)": coverage,
    }


def _coverage(reports: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    report = reports.get("coverage") or {}
    return (report["levels"], report["predicted"]["all"]) if "levels" in report else ([], [])


def _use(subject: Subject) -> str:
    name = subject.repo_id
    needs = " ".join(f'"{package}{versions}"' for package, versions in subject.requirements.items())
    return f"""\
With transformers alone. `trust_remote_code=True` runs the `.py` files of this repository: read them, and name the
`revision` that you have read.

```bash
pip install {needs} pillow
```

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection

model = AutoModelForObjectDetection.from_pretrained("{name}", trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained("{name}", trust_remote_code=True)
image = Image.open("picture.jpg").convert("RGB")
with torch.no_grad():
    outputs = model(**processor(images=image, return_tensors="pt"))
sizes = [(image.height, image.width)]
result = processor.post_process_object_detection(outputs, target_sizes=sizes)[0]
for score, label, box in zip(result["scores"], result["labels"], result["boxes"]):
    print(model.config.id2label[label.item()], round(score.item(), 3), box.tolist())
```

```python
from transformers import pipeline

detector = pipeline("object-detection", model="{name}", trust_remote_code=True, threshold=None)
print(detector("picture.jpg"))
```

`threshold=None` is {_threshold(subject.processor)};
without it the pipeline has its own, 0.5. A number overrules both.

With drmm-hf, which brings the same classes and runs no code of this repository:

```python
from drmm_hf import DrmmForObjectDetection, DrmmImageProcessor

model = DrmmForObjectDetection.from_pretrained("{name}").eval()
processor = DrmmImageProcessor.from_pretrained("{name}")
```

```bash
drmm predict {name} picture.jpg
```"""


def _threshold(processor: DrmmImageProcessor) -> str:
    if processor.score_threshold is None:
        return "0.5, the processor's default: no other was saved"
    each = " of each class" if isinstance(processor.score_threshold, list) else ""
    return f"the one{each} that `drmm calibrate` saved with the processor"


def _origin(subject: Subject) -> list[str]:
    if subject.conversion is None:
        return []
    about = subject.conversion
    return [
        "## Origin",
        f"Converted by `drmm convert` from `{about['source']}` (sha256 `{about['sha256']}`), a checkpoint of the "
        f"{about['family']} family. What became of every tensor is in [conversion.json](conversion.json). The "
        "weights, and their licence, are their authors'.",
        *([] if subject.evaluations else [expected_result(subject.config, subject.repo_id)]),
    ]


def _training(subject: Subject) -> list[str]:
    record = subject.training
    if record is None:
        return [] if subject.conversion else ["## Training", "No record of the training was found with the model."]
    data, options, summary = (record.recipe.get("data") or {}, record.recipe.get("training") or {}, record.summary)
    rows = {"data": _cell(str(data.get("source")))}
    counts = record.manifest[-1].get("data", {}).get("train", {}) if record.manifest else {}
    if "num_images" in counts:
        rows["training pictures, objects"] = f"{counts['num_images']:,}, {counts.get('num_objects', 0):,}"
    for title, name in (("steps", "steps"), ("epochs", "epochs"), ("best step", "best_step")):
        if summary.get(name) is not None:
            rows[title] = f"{summary[name]:,}"
    if summary.get("training_seconds"):
        rows["time"] = f"{summary['training_seconds'] / 60:.0f} minutes on {summary.get('device')}"
    for name in ("batch_size", "learning_rate", "mixed_precision", "init_from", "backbone_weights", "seed"):
        if options.get(name) is not None:
            rows[name.replace("_", " ")] = _cell(str(options[name]))
    if options.get("mixed_precision") == "no":
        rows["mixed precision"] = "none: float32 throughout"
    if record.manifest:
        versions = record.manifest[-1].get("versions", {})
        rows["versions"] = ", ".join(
            f"{name} {versions[name]}" for name in ("drmm-hf", "torch", "transformers") if name in versions
        )
    files = "Every field is in [training/recipe.yaml](training/recipe.yaml)"
    if record.manifest:
        files += (
            "; versions, machine, and checksums of the data are in [training/manifest.json](training/manifest.json)"
        )
    return [
        "## Training",
        "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]),
        f"{files}. Places are reduced to names in both.",
    ]


def _intended_use(subject: Subject) -> str:
    names = _listed(class_names(subject.config), 20)
    text = (
        f"To find {names} in pictures like those that it was trained on"
        f"{_like(subject)}, and as a start for training on others (`drmm train --init-from {subject.repo_id}`)."
    )
    return text + " Measure it on pictures of your own before you rely on it: `drmm evaluate`."


def _like(subject: Subject) -> str:
    source = ((subject.training.recipe.get("data") or {}) if subject.training else {}).get("source")
    return f" ({_cell(str(source))})" if source else ""


def _limits(subject: Subject) -> list[str]:
    config, processor = subject.config, subject.processor
    most = min(100, config.num_queries * len(class_names(config)))
    limits = [
        f"It knows its classes and no others, and returns at most {most} detections a picture unless `top_k` says "
        "otherwise.",
        f"Pictures are resized ({_input_size(processor)}); what is a few pixels large after that is hard to find.",
    ]
    for one in subject.evaluations[:1]:
        known = {name: value for name, value in one.metrics["AP_per_class"].items() if value is not None}
        if len(known) > 1:
            worst = min(known, key=known.__getitem__)
            limits.append(
                f"The class with the lowest AP on {_title(one)} is {_cell(worst)}: {_per_cent(known[worst])}."
            )
    if subject.evaluations:
        measured = ", ".join(f"{_cell(one.data)} ({_cell(one.split)})" for one in subject.evaluations)
        limits.append(f"Figures were measured on {measured} only; other pictures give others.")
    else:
        limits.append("Nothing says how good its detections, or how well calibrated its scores, are.")
    if processor.calibration:
        limits.append(_fitted_on(subject))
    if all(one.chose for one in subject.evaluations) and subject.evaluations:
        limits.append("There is no figure of pictures that had no part in choosing the checkpoint.")
    limits.append(
        "Errors of its training data are its own. Nothing here examines it for bias, or on pictures made to fool it. "
        "It is not made for decisions about people or their health."
    )
    return limits


def _fitted_on(subject: Subject) -> str:
    """Say which pictures the calibration was fitted on, as far as files tell."""
    calibration: dict[str, Any] = subject.processor.calibration or {}
    fitted_on = calibration.get("fitted_on") or {}
    splits = [_title(one) for one in subject.evaluations if one.is_fitted]
    count = f"{fitted_on['num_images']} pictures" if "num_images" in fitted_on else "pictures that no file names"
    known = all(one.about.get("ground_truth") for one in subject.evaluations)
    if splits:
        where = f"the pictures of {', '.join(splits)}"
    elif subject.evaluations and fitted_on and known:
        where = f"{count} of another split than the figures"
    else:
        where = count
    return f"Its calibration was fitted on {where}; it holds for pictures like those."


def _licence(subject: Subject) -> str:
    weights = (
        f"The weights are under `{subject.license}`, as stated by those who published them."
        if subject.license
        else "No licence of the weights was stated."
    )
    return (
        f"{weights} The code in this repository is that of drmm-hf, Apache-2.0. Data and pretrained weights that "
        "went into the training have licences of their own."
    )


def _title(one: Evaluation) -> str:
    return f"{_cell(one.data)}, {_cell(one.split)}"


def _input_size(processor: DrmmImageProcessor) -> str:
    size = dict(processor.size)
    sides = ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in sorted(size.items(), reverse=True) if value is not None
    )
    return f"{sides} pixels"


def _listed(names: Sequence[str], limit: int) -> str:
    shown = ", ".join(_cell(str(name)) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _cell(text: str) -> str:
    """Return a text that breaks no table and is no tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[").replace("]", "\\]")


def _per_cent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
