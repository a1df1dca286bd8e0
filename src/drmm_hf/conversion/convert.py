"""Turn a public checkpoint into a model folder, and account for every tensor."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from ..modeling.configuration_drmm import DrmmConfig
from ..modeling.image_processing_drmm import DrmmImageProcessor
from ..modeling.modeling_drmm import DrmmForObjectDetection
from .architecture import infer_fields
from .class_names import class_fields
from .model_card import model_card, title
from .new_folder import check_new, new_folder
from .public_checkpoint import read_checkpoint
from .public_names import DETECTRON2_NAMES, convert_state_dict, detector_names, list_some, our_names


# Settings of the public code that shapes do not show but outputs depend on, and their fields.
_SETTINGS = {
    "num_heads": "num_attention_heads",
    "top_k_ratio": "top_k_ratio",
    "min_sc_ratio": "min_scale_ratio",
    "coord_dist": "coordinate_distribution",
    "t_freedom": "student_t_freedom",
}
_DETECTRON2_FIELDS = {"max_log_size_delta": math.log(100000 / 16)}
_DETECTRON2_PIXELS = {"pixel_mean": [123.675, 116.28, 103.53], "pixel_std": [58.395, 57.12, 57.375]}


@dataclass(frozen=True)
class ConversionReport:
    """What became of every tensor of a checkpoint.

    Args:
        source (`str`): name of the checkpoint file.
        sha256 (`str`): its hash.
        family (`str`): "mmdetection" or "detectron2".
        title (`str`): method and backbone.
        class_names (`str`): where the names of the classes come from: "checkpoint", "option" or "none".
        settings (`dict[str, Any]`): fields of the configuration that the training configuration in the file states, or
            that were given.
        assumed (`dict[str, Any]`): fields that nothing tells.
        mapped (`dict[str, list[str]]`): our names by theirs.
        dropped (`dict[str, str]`): reason by name of what is left out.
        added (`dict[str, str]`): reason by our name of what the checkpoint does not have.
    """

    source: str
    sha256: str
    family: str
    title: str
    class_names: str
    settings: dict[str, Any]
    assumed: dict[str, Any]
    mapped: dict[str, list[str]]
    dropped: dict[str, str]
    added: dict[str, str]

    def __str__(self):
        lines = [f"{self.source}: {self.title}, names of the {self.family} family"]
        lines.append(f"  {len(self.mapped)} tensors mapped to {sum(map(len, self.mapped.values()))} of the model")
        for verb, names in (("dropped", self.dropped), ("added", self.added)):
            lines += [f"  {count} {verb}: {reason}" for reason, count in Counter(names.values()).items()]
        for name, value in self.assumed.items():
            lines.append(
                f"  {name}={value} assumed, as published: shapes do not tell; --{name.replace('_', '-')} sets it"
            )
        if self.class_names == "none":
            lines.append("  no names of classes in the file: give them with --labels, such as --labels coco")
        return "\n".join(lines)


def convert_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    labels: str | Path | None = None,
    trust_pickle: bool = False,
    fields: Mapping[str, Any] | None = None,
) -> ConversionReport:
    """Convert a checkpoint of D-RMM, Sparse R-CNN or AdaMixer into a folder for `from_pretrained`.

    The architecture is read from names and shapes, and what they do not tell from the training configuration in the
    file. The folder appears when it is complete, with model, processor, `conversion.json` and a card.

    Args:
        checkpoint (`str` or `Path`): file of the mmdetection or the detectron2 family, or safetensors.
        output (`str` or `Path`): the folder; it must not exist, or be empty.
        labels (`str` or `Path`, *optional*): names of the classes: "coco", a COCO annotation file or a text file with
            one name a line; by default those in the checkpoint.
        trust_pickle (`bool`): unpickle objects other than tensors, which runs code of whoever wrote the file.
        fields (`Mapping[str, Any]`, *optional*): fields of `DrmmConfig` to set, over what was read.

    Returns:
        `ConversionReport`: also in the folder, as `conversion.json`.

    Raises:
        FileNotFoundError: if a file does not exist.
        FileExistsError: if `output` exists and is not empty.
        ValueError: if the checkpoint cannot be read or holds another network, or a tensor of either side is left
            without a counterpart or a reason.
    """
    output = check_new(output)
    for name in fields or {}:
        if name in ("num_labels", "id2label", "label2id"):
            raise ValueError(f"field {name!r} is the checkpoint's: name its classes with --labels (labels=...).")
    public = read_checkpoint(checkpoint, trust_pickle)
    try:
        names = detector_names(public.weights)
        family = "detectron2" if names is DETECTRON2_NAMES else "mmdetection"
        dropped = public.dropped | _drop_pixel_statistics(public.weights)
        mapped = {name: our_names(name, names) for name in public.weights}
        weights = convert_state_dict(public.weights, names)

        settings = _stated_fields(public.settings) | dict(fields or {})
        inferred = infer_fields(weights) | (_DETECTRON2_FIELDS if family == "detectron2" else {})
        inferred |= class_fields(labels or public.class_names, inferred.pop("num_labels"))
        inferred["freeze_backbone_stages"] = int(inferred["backbone_config"].model_type == "resnet")
        config = DrmmConfig(**(inferred | settings))
        model = DrmmForObjectDetection(config)
        recomputed, added = load_strictly(model.model, weights)
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"{checkpoint}: {error}") from error
    for name in [name for name, ours in mapped.items() if set(ours) & recomputed]:
        dropped[name] = "the model computes it anew"
        del mapped[name]

    report = ConversionReport(
        source=Path(checkpoint).name,
        sha256=_sha256(checkpoint),
        family=family,
        title=title(config),
        class_names="option" if labels else "checkpoint" if public.class_names else "none",
        settings=settings,
        assumed={name: getattr(config, name) for name in {"num_attention_heads"} - {*inferred, *settings}},
        mapped=mapped,
        dropped=dropped,
        added=added,
    )
    with new_folder(output) as folder:
        model.save_pretrained(folder)
        _processor(public.settings).save_pretrained(folder)
        text = json.dumps(asdict(report), indent=1)
        (folder / "conversion.json").write_text(text + "\n", encoding="utf-8")
        card = model_card(config, report.source, family, report.sha256)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return report


def load_strictly(model: nn.Module, weights: Mapping[str, Tensor]) -> tuple[set[str], dict[str, str]]:
    """Load converted weights, with a reason for every tensor that only one side has.

    Args:
        model (`DrmmModel`): its tensors are set in place.
        weights (`Mapping[str, torch.Tensor]`): by our names.

    Returns:
        `tuple[set[str], dict[str, str]]`: names in `weights` that the model computes anew, found equal; reason by name
        of the model's tensors that `weights` lacks, which keep their initial values.

    Raises:
        ValueError: if a tensor is missing, left over, of another shape, not finite, or another than what the model
            computes.
    """
    own = model.state_dict()
    buffers = dict(model.named_buffers())
    recomputed = weights.keys() & buffers.keys() - own.keys()
    changed = [name for name in recomputed if not torch.equal(weights[name].flatten(), buffers[name].flatten())]
    added = {name: reason for name in own.keys() - weights.keys() if (reason := _why_absent(name))}
    wrong = {
        "missing": own.keys() - weights.keys() - added.keys(),
        "left over": weights.keys() - own.keys() - recomputed,
        "of another shape or type than the rest implies": {
            name
            for name in own.keys() & weights.keys()
            if own[name].shape != weights[name].shape
            or (own[name].is_floating_point() and not weights[name].is_floating_point())
        },
        "not finite": [name for name, value in weights.items() if not value.isfinite().all()],
        "other than what the model computes": changed,
    }
    problems = [f"tensors {what}: {list_some(found)}" for what, found in wrong.items() if found]
    if problems:
        raise ValueError("the checkpoint is damaged or of another network: " + "; ".join(problems) + ".")
    kept = {name: value for name, value in weights.items() if name not in recomputed}
    model.load_state_dict(kept | {name: own[name] for name in added}, strict=True)
    return set(recomputed), dict(sorted(added.items()))


def _why_absent(name: str) -> str | None:
    if name.endswith(".num_batches_tracked"):
        return "counter of a batch norm that the checkpoint's framework does not keep; 0"
    if name.startswith("backbone.network.swin.layernorm."):
        return "norm of transformers' Swin that no map passes through; identity"
    return None


def _drop_pixel_statistics(weights: dict[str, Tensor]) -> dict[str, str]:
    """Take the pixel mean and std out of the weights, if they are the processor's."""
    dropped = {}
    for name, expected in _DETECTRON2_PIXELS.items():
        if name in weights:
            found = weights.pop(name).flatten().tolist()
            if found != torch.tensor(expected).tolist():
                raise ValueError(f"{name} is {found}; only RGB pictures normalised by {expected} are supported.")
            dropped[name] = "in the image processor"
    return dropped


def _stated_fields(settings: Mapping[str, list]) -> dict[str, Any]:
    """Return the fields that the training configuration states, and refuse what cannot be converted.

    Weights of a backbone in Caffe's style and of one on BGR pictures look like those that this package has.
    """
    for name, refused in (("style", "caffe"), ("to_rgb", False), ("bgr_to_rgb", False)):
        if refused in settings.get(name, ()):
            raise ValueError(
                f"the checkpoint was trained with {name}={refused!r}; only backbones in PyTorch's style on RGB "
                "pictures can be converted."
            )
    stated = {}
    for name, field in _SETTINGS.items():
        values = [value for value in settings.get(name, ()) if not isinstance(value, list | tuple | dict)]
        if len(values) == 1:
            stated[field] = values[0]
    return stated


def _processor(settings: Mapping[str, list]) -> DrmmImageProcessor:
    """Build the processor with the mean and std of 0..255 pixels that the file states, by default ImageNet's."""
    stated = {}
    for name, field in (("mean", "image_mean"), ("std", "image_std")):
        values = [value for value in settings.get(name, ()) if isinstance(value, list | tuple) and len(value) == 3]
        values = [value for value in values if all(isinstance(channel, int | float) for channel in value)]
        if len(values) == 1:
            stated[field] = [round(value / 255, 6) for value in values[0]]
    return DrmmImageProcessor(**stated)


def _sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
