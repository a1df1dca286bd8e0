"""The one route of pretrained weights into a detector's backbone."""

import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..modeling.image_processing_drmm import DrmmImageProcessor
from ..modeling.modeling_drmm import DrmmForObjectDetection, DrmmModel
from .model_source import find_source
from .public_checkpoint import read_checkpoint
from .public_names import RESNET_NAMES, convert_state_dict


logger = logging.getLogger(__name__)

# Norms of the four maps, which transformers' Swin and ConvNeXt backbones add to a network trained to classify. They
# start with weight 1 and bias 0.
NEW_NORMS = "hidden_states_norms."


class BackboneReport(NamedTuple):
    """What `load_backbone_weights` did.

    Attributes:
        source (`str`): the file or id.
        loaded (`list[str]`): names of the backbone's tensors that were set: all of them but `new`.
        new (`list[str]`): norms of the maps that the source, trained to classify, does not have; left as they were.
        left_over (`list[str]`): names in the source that the backbone does not have, such as a classifier's.
        mean (`list[float]` or `None`): the backbone's own pixel mean on 0..1 values, where the source tells.
        std (`list[float]` or `None`): likewise the standard deviation.
    """

    source: str
    loaded: list[str]
    new: list[str]
    left_over: list[str]
    mean: list[float] | None
    std: list[float] | None

    def __str__(self):
        normalization = "not told" if self.mean is None else f"mean {self.mean}, std {self.std}"
        return (
            f"backbone weights from {self.source}: {len(self.loaded)} tensors loaded, "
            f"{f'{len(self.new)} norms of maps are new, ' if self.new else ''}{len(self.left_over)} left over"
            f"{' (' + ', '.join(self.left_over[:6]) + ')' if self.left_over else ''}; pixel {normalization}"
        )


def load_backbone_weights(
    model: DrmmModel | DrmmForObjectDetection, source: str | Path, processor: DrmmImageProcessor | None = None
) -> BackboneReport:
    """Load pretrained weights into the backbone of a detector.

    `TimmBackbone.from_pretrained` keeps convolutions but resets batch-norm statistics, and configurations can no
    longer ask for weights at all; this loads every tensor of the backbone, statistics included, or fails.

    Args:
        model (`DrmmModel` or `DrmmForObjectDetection`): its backbone is changed in place.
        source (`str` or `Path`): a file of safetensors or `torch.save` (names of timm, of transformers or of
            torchvision's ResNets), the id of a timm model ("timm/resnet50.a1_in1k", or a timm name for a timm
            backbone), or the folder or id of a transformers model.
        processor (`DrmmImageProcessor`, *optional*): gets the backbone's own mean and std, where the source tells.

    Returns:
        `BackboneReport`: what was loaded and what was left over.

    Raises:
        FileNotFoundError: if `source` looks like a path and does not exist.
        ValueError: if the source cannot be read, nothing fits, a tensor of the backbone stays without weights, a shape
            differs, or the statistics of all batch norms are 0 and 1, which no trained network has.
    """
    backbone = (model.model if isinstance(model, DrmmForObjectDetection) else model).backbone.network
    network = getattr(backbone, "_backbone", backbone)
    weights, mean, std = _read(source, backbone)
    own = network.state_dict()
    matched = _match(weights, own, source)
    wrong = [name for name, value in matched.items() if value.shape != own[name].shape]
    if wrong:
        shapes = f"{tuple(matched[wrong[0]].shape)} instead of {tuple(own[wrong[0]].shape)}"
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(f"{source}: tensors of a wrong shape: {wrong[0]!r} {shapes}{more}.")
    _check_statistics(matched, network, source)
    network.load_state_dict(matched, strict=False)
    used = {id(value) for value in matched.values()}  # under whatever name
    left_over = sorted(name for name, value in weights.items() if id(value) not in used)
    new = sorted(name for name in own if name.startswith(NEW_NORMS) and name not in matched)
    report = BackboneReport(str(source), sorted(matched), new, left_over, mean, std)
    if processor is not None and mean is not None and std is not None:
        processor.image_mean, processor.image_std = list(mean), list(std)
    logger.info(str(report))
    return report


def _read(source: str | Path, backbone: nn.Module) -> tuple[dict[str, Tensor], list[float] | None, list[float] | None]:
    """Return the tensors of a file or Hub model and its pixel normalisation."""
    path = Path(os.path.expanduser(source))
    name = getattr(backbone.config, "backbone", None)
    if path.is_file():
        return read_checkpoint(path).weights, *_timm_normalization(name)
    source = find_source(source, "backbone_weights")
    try:
        if name is not None or source.startswith("timm/"):
            import timm

            network = timm.create_model(f"hf-hub:{source}" if source.startswith("timm/") else source, pretrained=True)
            settings: Any = network.pretrained_cfg  # timm's dict; a module's attributes are typed as tensors
            return network.state_dict(), list(settings["mean"]), list(settings["std"])
        from transformers import AutoImageProcessor, AutoModel

        processor = AutoImageProcessor.from_pretrained(source)
        weights = AutoModel.from_pretrained(source, dtype=torch.float32).state_dict()
        return weights, list(processor.image_mean), list(processor.image_std)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"backbone_weights is {source!r}, which is no file or folder here and no model on the Hub that can be "
            f"read: {error}"
        ) from error


def _timm_normalization(name: str | None) -> tuple[list[float] | None, list[float] | None]:
    """Return the mean and std that timm states for a model's default weights."""
    if name is None:
        return None, None
    import timm

    settings = timm.get_pretrained_cfg(name)
    return (list(settings.mean), list(settings.std)) if settings is not None else (None, None)


def _match(weights: dict[str, Tensor], own: dict[str, Tensor], source) -> dict[str, Tensor]:
    """Pick the tensors of the backbone out of `weights`, by equal names or by those of torchvision's ResNets."""
    prefixes = {"", "backbone.", "model."} | {f"{name.split('.')[0]}." for name in weights}
    candidates = [{k.removeprefix(p): v for k, v in weights.items() if k.startswith(p)} for p in sorted(prefixes)]
    # transformers' Swin backbone holds the whole network under one more name, "swin."
    candidates += [{f"{first}.{k}": v for k, v in weights.items()} for first in {name.split(".")[0] for name in own}]
    if "conv1.weight" in weights:
        resnet = {name: value for name, value in weights.items() if not name.startswith("fc.")}
        candidates.append(convert_state_dict(resnet, RESNET_NAMES))
    matched = max(({k: v for k, v in names.items() if k in own} for names in candidates), key=len)
    missing = [
        name
        for name in own
        if name not in matched and not name.endswith("num_batches_tracked") and not name.startswith(NEW_NORMS)
    ]
    if missing:
        raise ValueError(
            f"{source} lacks weights for {len(missing)} of the backbone's {len(own)} tensors, the first "
            f"{missing[0]!r}; the source's first name is {next(iter(weights), None)!r}. Is it of another architecture?"
        )
    return matched


def _check_statistics(weights: dict[str, Tensor], network: nn.Module, source):
    """Refuse weights whose batch norms were never trained."""
    norms = [name for name, module in network.named_modules() if isinstance(module, _BatchNorm)]
    untouched = [
        bool((weights[f"{name}.running_mean"] == 0).all() and (weights[f"{name}.running_var"] == 1).all())
        for name in norms
    ]
    if norms and all(untouched):
        raise ValueError(
            f"{source}: the statistics of all {len(norms)} batch norms are 0 and 1, as freshly initialised ones are; "
            "a pretrained network has others."
        )
