"""Recipes: one flat yaml file with the sections `model`, `data` and `training`, checked in words.

A recipe says everything about a run. `load_recipe` reads it, applies overrides by field name (whatever their section)
and returns typed, validated arguments; `Recipe.save` writes the resolved form back, so that a run can be repeated from
its own folder.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from huggingface_hub.errors import StrictDataclassError

from ..evaluation.files import write_text


def loader_workers() -> int:
    """Choose how many processes load pictures: two, or one where this process may run on one core alone.

    Returns:
        `int`: 1 or 2.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(2, cores)


@dataclass(kw_only=True)
class DataArguments:
    """Say which pictures to train and evaluate on, and how to prepare them.

    Args:
        source (`str`, *optional*): COCO, Roboflow, YOLO, Pascal VOC or image folder, or Hub id; `generated` draws
            pictures of shapes instead.
        train_split (`str`): Name of the split to train on.
        val_split (`str`): Name of the split that chooses the best checkpoint.
        train_images (`str`, *optional*): Image folder of a json + folder pair, instead of `source` and `train_split`.
        train_annotations (`str`, *optional*): COCO json of that pair.
        val_images (`str`, *optional*): Image folder of the validation pair.
        val_annotations (`str`, *optional*): COCO json of the validation pair.
        holdout (`float`, *optional*): Share of the training pictures to validate on instead of `val_split`, chosen by
            their ids.
        overfit (`int`, *optional*): Train and evaluate on the first so many training pictures by id with at
            least 5 boxes, to see that a model can learn them by heart.
        num_train_images (`int`): Number of generated training pictures; read with `source: generated` only.
        num_val_images (`int`): Number of generated validation pictures; read with `source: generated` only.
        image_size (`list[int]`): (height, width) of generated pictures; read with `source: generated` only.
        shortest_edge (`int`): Shorter side of the model input, pixels.
        longest_edge (`int`): Upper bound of its longer side, pixels.
        augmentation (`str`): `none`, `flip`, `flip_multiscale`, `paper`, `small_data`, or a function of yours as
            `package.module:function`.
        horizontal_flip (`float`): Probability of a left-right flip, in presets with flips.
        vertical_flip (`float`): Probability of an upside-down flip, in presets with flips.
        short_edges (`list[int]`, *optional*): Shorter sides that multi-scale presets choose from, pixels (the
            paper: 480 to 800 by 32); by default `shortest_edge` alone.
        crop_short_edges (`list[int]`): Shorter sides of a picture before its crop in the preset `paper`, pixels.
        crop_sizes (`list[int]`): Shortest and longest side of that crop, pixels.
        colour_distortion (`float`): Probability of random brightness, contrast, saturation and hue.
        group_by_aspect_ratio (`bool`): Whether to put pictures of like shape into a batch, which needs less padding.
        bbox_format (`str`, *optional*): `xywh`, `xyxy` or `cxcywh`, for Hub data whose boxes do not prove theirs.
        invalid_data (`str`): What to do about bad pictures and annotations: `error`, or `skip` to leave them out and
            say how many.
        num_workers (`int`): Processes that load and augment pictures, for each training process. By default two, or
            one where a process may run on one core alone.
        streaming (`bool`): Read training pictures one after another, from the Hub as they are needed, instead of at
            random; where an epoch ends is then not known beforehand.
        shuffle_buffer (`int`): Pictures of a stream that each worker holds, undecoded, and shuffles.
    """

    source: str | None = None
    train_split: str = "train"
    val_split: str = "val"
    train_images: str | None = None
    train_annotations: str | None = None
    val_images: str | None = None
    val_annotations: str | None = None
    holdout: float | None = None
    overfit: int | None = None
    num_train_images: int = 2000
    num_val_images: int = 200
    image_size: list[int] = field(default_factory=lambda: [128, 128])
    shortest_edge: int = 800
    longest_edge: int = 1333
    augmentation: str = "flip"
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.0
    short_edges: list[int] | None = None
    crop_short_edges: list[int] = field(default_factory=lambda: [400, 500, 600])
    crop_sizes: list[int] = field(default_factory=lambda: [384, 600])
    colour_distortion: float = 0.0
    group_by_aspect_ratio: bool = True
    bbox_format: Literal["xywh", "xyxy", "cxcywh"] | None = None
    invalid_data: Literal["error", "skip"] = "error"
    num_workers: int = field(default_factory=loader_workers)
    streaming: bool = False
    shuffle_buffer: int = 1000

    def __post_init__(self):
        """Check every field."""
        check_types(self, "data")
        for name in ("num_train_images", "num_val_images", "overfit", "shuffle_buffer"):
            value = getattr(self, name)
            check(self, "data", name, value is None or value >= 1, "must be at least 1")
        check(self, "data", "holdout", self.holdout is None or 0 < self.holdout < 1, "must lie between 0 and 1")
        check(self, "data", "num_workers", 0 <= self.num_workers <= 1024, "must lie between 0 and 1024")
        check(
            self,
            "data",
            "shortest_edge",
            self.shortest_edge >= 32,
            "must be at least 32, one cell of the coarsest map",
        )
        check(self, "data", "longest_edge", self.longest_edge >= self.shortest_edge, "must be at least shortest_edge")
        check(
            self,
            "data",
            "image_size",
            len(self.image_size) == 2 and min(self.image_size) >= 1,
            "must be [height, width], both at least 1",
        )
        for name in ("holdout", "overfit"):
            rule = "must not be set with data.streaming, since it chooses among all pictures"
            check(self, "data", name, not self.streaming or getattr(self, name) is None, rule)
        for split in ("train", "val"):
            images, annotations = f"{split}_images", f"{split}_annotations"
            if (getattr(self, images) is None) != (getattr(self, annotations) is None):
                raise ValueError(f"data.{images} and data.{annotations} go together: give both or none of them")


@dataclass(kw_only=True)
class TrainingArguments:
    """Say how to train.

    Args:
        output_dir (`str`): Folder of the run: `best/`, `last/`, `recipe.yaml`, `log.jsonl`, `summary.json`.
        init_from (`str`, *optional*): Checkpoint to start from; heads of another number of classes start afresh.
        backbone_weights (`str`, *optional*): Safetensors or .pth file, or model id, with pretrained backbone
            weights; `none` if the backbone is to start from random weights.
        resume (`bool`): Continue from the newest whole checkpoint in `output_dir`.
        seed (`int`): Seed of initialisation, order and augmentation.
        batch_size (`int`): Pictures in one forward pass of one process.
        accumulation_steps (`int`): Forward passes in one optimiser step.
        find_batch_size (`bool`): Split the pictures of a step, `batch_size` times `accumulation_steps`, into as few
            forward passes as fit into memory, which is tried at the start.
        epochs (`int`, *optional*): Passes over the training split. The first of the three bounds ends the run.
        max_steps (`int`, *optional*): Bound in optimiser steps.
        max_minutes (`float`, *optional*): Bound in minutes of wall clock since the first step, evaluations in between
            and earlier parts of a resumed run included. Loading comes before it, the evaluation at the end on top.
        schedule (`str`): `multi_step`, `cosine` or `constant` learning rate after the warm-up.
        schedule_by (`str`): Progress of the schedule is the fraction of `steps` done or of `time` used.
        milestones (`list[float]`): Progress at which `multi_step` multiplies the learning rate by `decay_factor`.
        decay_factor (`float`): Factor of one `multi_step` decay.
        final_factor (`float`): Fraction of the learning rate at which `cosine` ends.
        warmup_steps (`int`): Optimiser steps of linear warm-up. With `schedule_by: time` it is over after a tenth of
            `max_minutes` at the latest.
        warmup_start_factor (`float`): Fraction of the learning rate at which the warm-up starts.
        learning_rate (`float`): Peak learning rate of AdamW.
        learning_rate_batch_size (`int`, *optional*): Effective batch that the learning rate was chosen for; a run
            with another one prints advice.
        backbone_lr_factor (`float`): Learning rate of the backbone as a fraction of it.
        weight_decay (`float`): Decoupled weight decay of weight matrices and kernels.
        betas (`list[float]`): AdamW's two decay rates.
        max_grad_norm (`float`, *optional*): L2 norm to which the gradient is clipped; None clips nothing.
        ema_decay (`float`, *optional*): Decay of the moving average of the weights, which is then what is evaluated
            and saved; None keeps no average.
        mixed_precision (`str`): Autocast type: `no`, `bf16` or `fp16`.
        channels_last (`bool`): Keep pictures and convolutions in channels-last memory order.
        gradient_checkpointing (`bool`): Compute activations of the decoder, and of backbones that transformers can do
            so (Swin, not ResNet), twice to save memory.
        compile (`bool`): Compile the model with `torch.compile`; each new size of picture compiles again.
        max_skipped_steps (`int`): Steps in a row whose loss or gradient is not finite at which the run is stopped.
            Each leaves the weights alone, and its pictures, boxes and terms in `skipped_steps/`.
        evaluate_every (`int`): Epochs between evaluations; 0 evaluates only at the end.
        eval_batch_size (`int`): Most pictures of equal padded size evaluated together.
        best_metric (`str`): Metric that chooses the best checkpoint, measured on the validation split.
        patience (`int`, *optional*): Evaluations without a better one after which the run ends.
        save_every_steps (`int`, *optional*): Optimiser steps between checkpoints within an epoch; None saves at the
            end of each epoch only.
        keep_last (`int`): Newest checkpoints to keep, the one in `last/` included.
        log_every (`int`): Optimiser steps between log lines.
        trackers (`list[str]`): Accelerate's trackers to log to (`tensorboard`, `wandb`, `mlflow`, `trackio`, ...); one
            whose package is missing is left out, which is said.
    """

    output_dir: str = "runs/train"
    init_from: str | None = None
    backbone_weights: str | None = None
    resume: bool = False
    seed: int = 0
    batch_size: int = 2
    accumulation_steps: int = 1
    find_batch_size: bool = False
    epochs: int | None = None
    max_steps: int | None = None
    max_minutes: float | None = None
    schedule: Literal["multi_step", "cosine", "constant"] = "multi_step"
    schedule_by: Literal["steps", "time"] = "steps"
    milestones: list[float] = field(default_factory=lambda: [27 / 36, 33 / 36])
    decay_factor: float = 0.1
    final_factor: float = 0.0
    warmup_steps: int = 1000
    warmup_start_factor: float = 0.001
    learning_rate: float = 5e-5
    learning_rate_batch_size: int | None = None
    backbone_lr_factor: float = 1.0
    weight_decay: float = 5e-5
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    max_grad_norm: float | None = 1.0
    ema_decay: float | None = None
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    channels_last: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    max_skipped_steps: int = 3
    evaluate_every: int = 1
    eval_batch_size: int = 1
    best_metric: Literal["AP", "AP50", "AP75", "AR100"] = "AP"
    patience: int | None = None
    save_every_steps: int | None = None
    keep_last: int = 2
    log_every: int = 50
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])

    def __post_init__(self):
        """Check every field."""
        check_types(self, "training")
        counts = ("batch_size", "accumulation_steps", "epochs", "max_steps", "save_every_steps", "keep_last")
        counts += ("log_every", "eval_batch_size", "patience", "max_skipped_steps", "learning_rate_batch_size")
        for name in counts:
            value = getattr(self, name)
            check(self, "training", name, value is None or value >= 1, "must be at least 1")
        for name in ("max_minutes", "learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            check(self, "training", name, value is None or value > 0, "must be greater than 0")
        for name in ("weight_decay", "backbone_lr_factor", "warmup_steps", "evaluate_every"):
            check(self, "training", name, getattr(self, name) >= 0, "must not be negative")
        for name in ("decay_factor", "final_factor", "warmup_start_factor"):
            check(self, "training", name, 0 <= getattr(self, name) <= 1, "must lie in [0, 1]")
        check(
            self, "training", "ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1, "must lie between 0 and 1"
        )
        check(
            self,
            "training",
            "betas",
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "must be two numbers in [0, 1)",
        )
        check(
            self,
            "training",
            "milestones",
            sorted(self.milestones) == self.milestones and all(0 < value < 1 for value in self.milestones),
            "must be increasing fractions of the run, between 0 and 1",
        )
        if self.trackers:
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS
        for name in self.trackers:
            if name not in (known := {"all", *LOGGER_TYPE_TO_CLASS}):
                raise ValueError(f"training.trackers has {name!r}, unknown to accelerate{_nearest(name, known)}")
        if self.epochs is None and self.max_steps is None and self.max_minutes is None:
            raise ValueError("training needs an end: set at least one of epochs, max_steps and max_minutes")
        if self.schedule_by == "time" and self.max_minutes is None:
            raise ValueError("training.schedule_by is 'time': it needs max_minutes")
        if self.schedule_by == "steps" and self.epochs is None and self.max_steps is None:
            raise ValueError("training.schedule_by is 'steps': it needs epochs or max_steps (or use 'time')")


@dataclass(kw_only=True)
class Recipe:
    """Hold the three sections of a recipe.

    Args:
        model (`dict`): Fields of `DrmmConfig`; the config checks their values.
        data (`DataArguments`): The pictures.
        training (`TrainingArguments`): The run.
    """

    model: dict[str, Any]
    data: DataArguments
    training: TrainingArguments

    def __post_init__(self):
        """Check what depends on two sections."""
        by_steps = self.training.schedule_by == "steps" and self.training.schedule != "constant"
        if self.data.streaming and by_steps and self.training.max_steps is None:
            raise ValueError(
                f"data.streaming is true, so that the number of steps in {self.training.epochs} epochs is not known: "
                f"the schedule {self.training.schedule!r} needs training.max_steps, or schedule_by 'time'"
            )
        if self.data.streaming and self.training.find_batch_size:
            raise ValueError(
                "training.find_batch_size is true: it must be false with data.streaming, since how many objects the "
                "fullest picture has is not known"
            )

    def save(self, path: str | Path) -> None:
        """Write the resolved recipe as yaml.

        Args:
            path (`str` or `Path`): File to write.
        """
        sections = {
            "model": self.model,
            "data": dataclasses.asdict(self.data),
            "training": dataclasses.asdict(self.training),
        }
        write_text(path, dump_yaml(sections))


def load_recipe(path: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe and override single fields.

    Args:
        path (`str` or `Path`): The yaml file.
        overrides (`dict`, *optional*): Field name in kebab or snake case -> value. A string is read as yaml, as if it
            stood in the file. The field may be of any section, since no name occurs in two of them.

    Returns:
        `Recipe`: The validated recipe.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a section or field is unknown (the nearest is named), given twice, or has an invalid value.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"recipe {str(path)!r} does not exist")
    sections = load_yaml(Path(path).read_text(), str(path))
    if not isinstance(sections, dict):
        raise ValueError(f"recipe {str(path)!r} must be a mapping with the sections model, data and training")
    return make_recipe(sections, overrides or {}, f"recipe {str(path)!r}")


def make_recipe(sections: Mapping[str, Any], overrides: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Check the sections of a recipe, with some of their fields overridden.

    Args:
        sections (`Mapping`): `model`, `data` and `training`, each name -> value.
        overrides (`Mapping`): As in `load_recipe`.
        where (`str`): What errors call the recipe.

    Returns:
        `Recipe`: The validated recipe.

    Raises:
        ValueError: As `load_recipe`.
    """
    from ..modeling.configuration_drmm import DrmmConfig

    known = {"model": _names(DrmmConfig), "data": _names(DataArguments), "training": _names(TrainingArguments)}
    for section, fields in sections.items():
        if section not in known:
            raise ValueError(f"{where} has an unknown section {section!r}{_nearest(section, known)}")
        if not isinstance(fields or {}, dict):
            raise ValueError(f"section {section!r} of {where} must be a mapping, got {fields!r}")
        for name in fields or {}:
            if name not in known[section]:
                raise ValueError(f"{section} has no field {name!r}{_nearest(name, known[section])}")
    values = {section: dict(sections.get(section) or {}) for section in known}
    for option, value in overrides.items():
        name = option.replace("-", "_")
        owners = [section for section, names in known.items() if name in names]
        if not owners:
            raise ValueError(f"no field {option!r} in a recipe{_nearest(name, set().union(*known.values()))}")
        values[owners[0]][name] = parse_value(option, value)
    try:
        DrmmConfig(**values["model"])
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"model: {error}") from error
    return Recipe(
        model=values["model"],
        data=DataArguments(**values["data"]),
        training=TrainingArguments(**values["training"]),
    )


def parse_value(option: str, value: Any) -> Any:
    """Read the value of an override.

    Args:
        option (`str`): Its name, for errors.
        value (`Any`): Yaml text, or the value itself.

    Returns:
        `Any`: The value.

    Raises:
        ValueError: If it is not yaml.
    """
    return load_yaml(value, f"--{option}") if isinstance(value, str) else value


def changed_fields(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Compare two sets of fields.

    Args:
        before (`Mapping`): Name -> value.
        now (`Mapping`): Name -> value.

    Returns:
        `list[tuple]`: Name, value before and value now of those that differ, by name; None where a field is not set.
    """
    names = sorted(before.keys() | now.keys())
    return [(name, before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)]


def check(owner: object, section: str, name: str, valid: bool, rule: str) -> None:
    """Raise an error that names the field, its value and the rule.

    Args:
        owner (`object`): The arguments.
        section (`str`): Their section in the recipe.
        name (`str`): The field.
        valid (`bool`): Whether the rule holds.
        rule (`str`): The rule in words, as in "must be at least 1".

    Raises:
        ValueError: If the rule does not hold.
    """
    if not valid:
        raise ValueError(f"{section}.{name} is {getattr(owner, name)!r}: it {rule}")


def check_types(owner: object, section: str) -> None:
    """Check each field of a dataclass against its annotation, turning ints into floats where a float is asked for.

    Args:
        owner (`object`): The arguments, changed in place.
        section (`str`): Their section in the recipe.

    Raises:
        ValueError: If a value is not of its field's type.
    """
    for name, hint in get_type_hints(type(owner)).items():
        value, valid = _converted(getattr(owner, name), hint)
        check(owner, section, name, valid, f"must be {_words(hint)}")
        setattr(owner, name, value)


def _converted(value: Any, hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) in (Union, types.UnionType):
        results = [_converted(value, part) for part in get_args(hint)]
        return next((result for result in results if result[1]), (value, False))
    if get_origin(hint) is Literal:
        return value, value in get_args(hint)
    if get_origin(hint) is list:
        if not isinstance(value, (list, tuple)):
            return value, False
        results = [_converted(item, get_args(hint)[0]) for item in value]
        return [item for item, _ in results], all(valid for _, valid in results)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value), True
    if hint is float:
        return value, isinstance(value, float) and math.isfinite(value)
    if hint is int and isinstance(value, bool):
        return value, False
    return value, isinstance(value, hint)


def _words(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_words(part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(hint))
    if get_origin(hint) is list:
        return f"a list with each entry {_words(get_args(hint)[0])}"
    words = {int: "an integer", float: "a finite number", str: "a text", bool: "true or false", type(None): "null"}
    return words[hint]


def _names(arguments: type) -> set[str]:
    return {entry.name for entry in dataclasses.fields(arguments)}


def _nearest(name: str, known) -> str:
    matches = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


class _RecipeLoader(yaml.SafeLoader):
    """Yaml with the scalars of version 1.2: `no` is a text, `5e-5` is a number, and a key may stand only once."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _RecipeDumper(yaml.SafeDumper):
    """The writing half: quotes exactly what `_RecipeLoader` would not read as a text."""


_SCALARS = {
    "bool": (r"true|false", "tf"),
    "null": (r"null|~|", ["n", "~", ""]),
    "int": (r"[-+]?[0-9]+", "-+0123456789"),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
}
for _class in (_RecipeLoader, _RecipeDumper):
    _class.yaml_implicit_resolvers = {}
    for _name, (_pattern, _first) in _SCALARS.items():
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))


def dump_yaml(content: Any) -> str:
    """Write yaml that `load_yaml` reads as it was.

    Args:
        content (`Any`): Sections of a recipe, with names or plain values.

    Returns:
        `str`: The text.
    """
    return yaml.dump(content, Dumper=_RecipeDumper, sort_keys=False)


def load_yaml(text: str, where: str) -> Any:
    """Read yaml as recipes are written, see `_RecipeLoader`.

    Args:
        text (`str`): The yaml.
        where (`str`): What it is called in the message.

    Returns:
        `Any`: Its content.

    Raises:
        ValueError: If it is not yaml.
    """
    try:
        return yaml.load(text, Loader=_RecipeLoader)  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not valid yaml: {' '.join(str(error).split())}") from error
