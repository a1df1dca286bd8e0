"""How likely the annotations are under a model's mixture density, stage by stage: Tables 4 and 9.

Everything here needs the density that D-RMM predicts; a detector with box heads, ours or another's, has none. The
density is that of Eq. 2: mixing coefficients that sum to 1, in units of 1 / pixel^4 of the model input. The public
code measures another quantity, with pi times the number n of ground truths of the picture and 1e-12 under each
logarithm; it stands beside every figure.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from drmm_hf.modeling.mixture import (
    MixtureParameters,
    effective_number_of_positives,
    floor_scales,
    log_class_probability,
    log_component_density,
    log_coordinate_density,
    responsibilities,
)

from .coco_metrics import annotation_area, load_annotations
from .evaluate import category_of_label, check_images
from .predict import picture_batches, to_model


if TYPE_CHECKING:
    import datasets

# What the public code adds under each logarithm.
PUBLIC_EPSILON = 1e-12
# Ranges of COCO's object sizes, in square pixels of the original picture; as there, a boundary belongs to both sides.
SIZE_RANGES = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, math.inf)}

# Columns of the terms of a ground truth; the responsibilities of the most responsible components follow them.
_TERMS = ("nll", "share", "effective_positives", "public_nll", "public_share")
_NUM_RANKS = 5
# Columns of the evidence about an annotation; the box of its most responsible component follows them.
_EVIDENCE = ("nll", "log_plausibility", "log_box", "log_class", "log_object", "scores", "category_ids", "queries")


@dataclass(frozen=True)
class Likelihoods:
    """Hold the likelihood of every ground truth after every stage: S stages, n ground truths.

    Attributes:
        annotation_indices (`np.ndarray` of shape `(n,)`): Position of each ground truth among the annotations that
            `load_annotations` returns.
        log_scales (`np.ndarray` of shape `(n,)`): log(sx^2 sy^2), sx and sy the size of the model input over that of
            the original picture. `nll - log_scales` is the loss in pixels of the original picture.
        nll (`np.ndarray` of shape `(S, n)`): -log p(g), Eq. 4-5.
        share (`np.ndarray` of shape `(S, n)`): exp(-L_MCM) = max(g) / p(g), Eq. 6-8, in (0, 1].
        effective_positives (`np.ndarray` of shape `(S, n)`): How many components share the ground truth, in [1, K].
        public_nll (`np.ndarray` of shape `(S, n)`): -log(n p(g) + 1e-12), p with the class exponent of the config.
        public_share (`np.ndarray` of shape `(S, n)`): n max(g) / (n p(g) + 1e-12) + 1e-12, likewise.
        responsibilities (`np.ndarray` of shape `(S, n, 5)`): Shares of the five most responsible components, falling;
            0 where there are fewer.
    """

    annotation_indices: np.ndarray
    log_scales: np.ndarray
    nll: np.ndarray
    share: np.ndarray
    effective_positives: np.ndarray
    public_nll: np.ndarray
    public_share: np.ndarray
    responsibilities: np.ndarray


def has_density(config: Any) -> bool:
    """Tell whether a model predicts a density over boxes.

    Args:
        config (`PreTrainedConfig`): Config of the model.

    Returns:
        `bool`: Whether it has a mixture head.
    """
    return getattr(config, "head_type", None) == "mixture"


def check_density(config: Any) -> None:
    """Refuse models that predict no density.

    Args:
        config (`PreTrainedConfig`): Config of the model.

    Raises:
        ValueError: If it has no mixture head.
    """
    if not has_density(config):
        kind = getattr(config, "model_type", type(config).__name__)
        head = f" with head_type {config.head_type!r}" if hasattr(config, "head_type") else ""
        raise ValueError(
            f"model is a {kind!r}{head}, which predicts boxes and scores but no density over boxes; likelihoods need "
            "a D-RMM model with head_type 'mixture'."
        )


@dataclass(frozen=True)
class Evidence:
    """Hold what the density of the last stage says of every annotation: n annotations.

    The most responsible component of an annotation is the one with the largest share in its likelihood.

    Attributes:
        annotation_indices (`np.ndarray` of shape `(n,)`): Position of each among the annotations that
            `load_annotations` returns.
        nll (`np.ndarray` of shape `(n,)`): -log p(g), Eq. 4-5.
        log_plausibility (`np.ndarray` of shape `(n,)`): log sum_k p_k(c) sqrt(o_k F_k(b) / F_k(mu_k)), at most 0.
        log_box (`np.ndarray` of shape `(n,)`): log sqrt(F(b) / F(mu)) of the most responsible component.
        log_class (`np.ndarray` of shape `(n,)`): Its log of p(c) over its largest class probability.
        log_object (`np.ndarray` of shape `(n,)`): Its log sqrt(o).
        boxes (`np.ndarray` of shape `(n, 4)`): Its location mu, xyxy, pixels of the original picture.
        category_ids (`np.ndarray` of shape `(n,)`): Category of its most probable class.
        scores (`np.ndarray` of shape `(n,)`): Its confidence in that class.
        queries (`np.ndarray` of shape `(n,)`): Its index.
    """

    annotation_indices: np.ndarray
    nll: np.ndarray
    log_plausibility: np.ndarray
    log_box: np.ndarray
    log_class: np.ndarray
    log_object: np.ndarray
    boxes: np.ndarray
    category_ids: np.ndarray
    scores: np.ndarray
    queries: np.ndarray


class AnnotatedMixtures(NamedTuple):
    """The annotations of one picture and the mixtures that every stage predicts for it, in pixels of the model input.

    Attributes:
        indices (`list[int]`): Positions of the n annotations among all.
        boxes (`torch.Tensor` of shape `(n, 4)`): Their boxes, xyxy, as annotated: those over the border too.
        class_labels (`torch.Tensor` of shape `(n,)`): Their classes.
        stages (`list[MixtureParameters]`): K components each.
        scale (`torch.Tensor` of shape `(2,)`): Width and height of the model input over those of the picture.
    """

    indices: list[int]
    boxes: Tensor
    class_labels: Tensor
    stages: list[MixtureParameters]
    scale: Tensor


@torch.no_grad()
def annotated_mixtures(
    model: Any,
    processor: Any,
    dataset: datasets.Dataset,
    annotations: Mapping[str, Any],
    batch_size: int = 1,
    progress: bool = True,
) -> Iterator[AnnotatedMixtures]:
    """Predict the mixtures of every picture that has annotations other than crowds.

    The network runs in its own precision; what comes out is float64 (float32 where the device has no other).

    Args:
        model (`torch.nn.Module`): A D-RMM model with mixture heads.
        processor (`Any`): Its image processor.
        dataset (`datasets.Dataset`): Pictures in the canonical schema of `drmm_hf.data.coco`.
        annotations (`Mapping`): Content of their COCO file.
        batch_size (`int`): Largest number of pictures in a batch.
        progress (`bool`): Whether to show a progress bar.

    Yields:
        `AnnotatedMixtures`: Of each such picture once, not in the order of the dataset.

    Raises:
        ValueError: If the classes of the model or the pictures are not those of the annotations, or these hold no
            object.
    """
    check_images(annotations, dataset)
    mapping = category_of_label(model.config, annotations["categories"])
    labels = {category_id: label for label, category_id in mapping.items()}
    records = annotations["annotations"]
    objects: dict[Any, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        if not record.get("iscrowd"):
            objects[record["image_id"]].append(index)
    if not objects:
        raise ValueError("the annotations hold no object but crowds; there is nothing to measure.")

    device = next(model.parameters()).device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    was_training = model.training
    model.eval()
    try:
        for batch in picture_batches(processor, dataset, batch_size, progress, "evaluating likelihoods"):
            outputs = model.base_model(**to_model(batch.inputs, model))
            for row, (image_id, (height, width)) in enumerate(zip(batch.image_ids, batch.sizes, strict=True)):
                mine = objects[image_id]
                if not mine:
                    continue
                boxes = torch.tensor([_corners(records[index]["bbox"]) for index in mine], dtype=dtype, device=device)
                classes = torch.tensor([labels[records[index]["category_id"]] for index in mine], device=device)
                frame = torch.tensor([width, height], dtype=dtype).to(device)
                scale = outputs.image_sizes[row].flip(-1).to(dtype) / frame
                mixtures = [MixtureParameters(*(part[row].to(dtype) for part in stage)) for stage in outputs.stages]
                yield AnnotatedMixtures(mine, boxes * scale.repeat(2), classes, mixtures, scale)
    finally:
        model.train(was_training)


@torch.no_grad()
def likelihoods(
    model: torch.nn.Module,
    processor: Any,
    dataset: datasets.Dataset,
    annotations: str | Path | Mapping[str, Any],
    *,
    batch_size: int = 1,
    progress: bool = True,
) -> Likelihoods:
    """Evaluate the density that a model predicts for each picture at the picture's annotations.

    Crowd annotations are left out. Boxes are those of the untouched annotations, those over the border too, which
    training clips. The network runs in its own precision, everything after it in float64 (float32 where the device
    has no other).

    Args:
        model (`torch.nn.Module`): A D-RMM model with mixture heads, trained with any of its criteria.
        processor (`Any`): Its image processor.
        dataset (`datasets.Dataset`): Pictures in the canonical schema of `drmm_hf.data.coco`.
        annotations (`str`, `Path` or `Mapping`): Their COCO json file, or what it holds.
        batch_size (`int`): Largest number of pictures in a batch; changes no figure beyond rounding.
        progress (`bool`): Whether to show a progress bar. It shows after two seconds only.

    Returns:
        `Likelihoods`: The ground truths in the order of the annotations.

    Raises:
        ValueError: If the model has no density, if its classes or the pictures are not those of the annotations, if
            these hold no object, or if a likelihood is not finite.

    Source: Tables 4 and 9, Appendix F. There the loss is a mean over ground truths and exp(-L_MCM) "for each
        instance"; whether it has the factor n and the 1e-12 of the public code is not said.
    """
    check_density(model.config)
    annotations = load_annotations(annotations)
    indices: list[int] = []
    terms, log_scales = [], []
    for picture in annotated_mixtures(model, processor, dataset, annotations, batch_size, progress):
        arguments = picture.boxes, picture.class_labels, model.config
        terms.append(torch.stack([_terms(mixture, *arguments) for mixture in picture.stages]))
        log_scales.append(2 * picture.scale.log().sum().expand(len(picture.indices)))
        indices += picture.indices

    order = np.argsort(indices)
    values = _finite(torch.cat(terms, dim=1))[:, order]
    columns = dict(zip(_TERMS, np.moveaxis(values[..., : len(_TERMS)], -1, 0), strict=True))
    return Likelihoods(
        annotation_indices=np.array(indices)[order],
        log_scales=torch.cat(log_scales).cpu().numpy().astype(np.float64)[order],
        responsibilities=values[..., len(_TERMS) :],
        **columns,
    )


def gather_evidence(
    model: torch.nn.Module,
    processor: Any,
    dataset: datasets.Dataset,
    annotations: str | Path | Mapping[str, Any],
    *,
    batch_size: int = 1,
    progress: bool = True,
) -> Evidence:
    """Ask the density that a model predicts for each picture how well each annotation agrees with it.

    The likelihood itself depends on how large an object and how sharp its edges are, since a density has a unit. The
    plausibility sets each component's density beside its own peak instead. It has the objectness in place of the
    mixing coefficient, which depends on how many other objects there are. The square root of the density is how the
    probability of a deviation at least as large falls, for Cauchy densities; that of the objectness keeps objects that
    are hard to see from coming before wrong ones, and is no more than what found planted errors best.

    Args:
        model (`torch.nn.Module`): A D-RMM model with mixture heads.
        processor (`Any`): Its image processor.
        dataset (`datasets.Dataset`): Pictures in the canonical schema of `drmm_hf.data.coco`.
        annotations (`str`, `Path` or `Mapping`): Their COCO json file, or what it holds. Crowds are left out.
        batch_size (`int`): Largest number of pictures in a batch.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        `Evidence`: In the order of the annotations.

    Raises:
        ValueError: As `likelihoods` does.
    """
    check_density(model.config)
    annotations = load_annotations(annotations)
    mapping = category_of_label(model.config, annotations["categories"])
    indices: list[int] = []
    columns, boxes = [], []
    for picture in annotated_mixtures(model, processor, dataset, annotations, batch_size, progress):
        columns.append(_evidence(picture, mapping, model.config))
        boxes.append(columns[-1][:, len(_EVIDENCE) :] / picture.scale.repeat(2))
        indices += picture.indices
    order = np.argsort(indices)
    values = dict(zip(_EVIDENCE, _finite(torch.cat(columns)[:, : len(_EVIDENCE)])[order].T, strict=True))
    integers = {name: values.pop(name).astype(int) for name in ("category_ids", "queries")}
    return Evidence(
        annotation_indices=np.array(indices)[order], boxes=_finite(torch.cat(boxes))[order], **values, **integers
    )


def summarize(result: Likelihoods, annotations: Mapping[str, Any]) -> dict[str, Any]:
    """Average likelihoods over all ground truths, those of each size and those of each class.

    Args:
        result (`Likelihoods`): From `likelihoods`.
        annotations (`Mapping`): The content of the COCO file that it was computed from.

    Returns:
        `dict`: `num_images`, `num_ground_truths`, `num_crowds` (left out), `mean_log_scale` (mean of `log_scales`),
        and three groups: `all`, `sizes` (small, medium, large by the area of the annotation, as COCO has them) and
        `classes` (name to group). A group holds `num_ground_truths` and, as lists of one mean a stage, `nll`, `share`,
        `effective_positives`, `public_nll`, `public_share` and `responsibilities`; None without ground truths.
    """
    annotations = load_annotations(annotations)
    records = [annotations["annotations"][index] for index in result.annotation_indices.tolist()]
    areas = np.array([annotation_area(record) for record in records], dtype=float)
    category_ids = np.array([record["category_id"] for record in records])
    return {
        "num_images": len(annotations["images"]),
        "num_ground_truths": len(records),
        "num_crowds": sum(bool(record.get("iscrowd")) for record in annotations["annotations"]),
        "mean_log_scale": float(result.log_scales.mean()),
        "all": _group(result, np.ones(len(records), dtype=bool)),
        "sizes": {name: _group(result, (areas >= low) & (areas <= high)) for name, (low, high) in SIZE_RANGES.items()},
        "classes": {
            record["name"]: _group(result, category_ids == record["id"]) for record in annotations["categories"]
        },
    }


def _terms(mixture: MixtureParameters, boxes: Tensor, class_labels: Tensor, config: Any) -> Tensor:
    """Return the terms of `n` ground truths of one picture and stage, then the largest responsibilities: `(n, 10)`.

    A class exponent other than 1 leaves no density, so only the public form has it.
    """
    log_p = log_component_density(
        mixture, boxes, class_labels, config.coordinate_distribution, config.student_t_freedom, config.min_scale_ratio
    )
    total, largest = log_p.logsumexp(dim=-1), log_p.max(dim=-1).values

    log_class = log_class_probability(mixture.class_logits, class_labels)
    public_log_p = log_p + (config.class_exponent - 1) * log_class + math.log(len(boxes))
    epsilon = public_log_p.new_full((), math.log(PUBLIC_EPSILON))
    public_total = torch.logaddexp(public_log_p.logsumexp(dim=-1), epsilon)
    public_share = torch.exp(public_log_p.max(dim=-1).values - public_total) + PUBLIC_EPSILON
    columns = (-total, torch.exp(largest - total), effective_number_of_positives(log_p), -public_total, public_share)
    ranked = F.pad(responsibilities(log_p), (0, _NUM_RANKS)).topk(_NUM_RANKS, dim=-1).values
    return torch.cat([torch.stack(columns, dim=-1), ranked], dim=-1)


def _evidence(picture: AnnotatedMixtures, mapping: Mapping[int, int], config: Any) -> Tensor:
    """Return the evidence about the `n` annotations of one picture: `(n, len(_EVIDENCE) + 4)`."""
    mixture = picture.stages[-1]
    scales = floor_scales(mixture.scales, mixture.boxes, config.min_scale_ratio)
    kind = config.coordinate_distribution, config.student_t_freedom
    log_density = log_coordinate_density(picture.boxes, mixture.boxes, scales, *kind)
    log_peak = log_coordinate_density(mixture.boxes[:, None], mixture.boxes[:, None], scales[:, None], *kind)
    log_agreement = (log_density - log_peak.flatten()) / 2
    log_class = log_class_probability(mixture.class_logits, picture.class_labels)
    log_object = F.logsigmoid(mixture.objectness_logits) / 2
    log_p = mixture.log_mixing + log_density + log_class
    plausibility = (log_object + log_class + log_agreement).logsumexp(dim=-1).clamp(max=0)

    query = log_p.argmax(dim=-1)
    known = torch.tensor(list(mapping), device=query.device)  # labels that the data has
    log_best, label = mixture.class_logits.log_softmax(dim=-1)[query][:, known].max(dim=-1)
    category_ids = torch.tensor(list(mapping.values()), device=query.device)[label]
    log_box, log_own_class = (part.gather(-1, query[:, None])[:, 0] for part in (log_agreement, log_class))
    score = (2 * log_object[query] + log_best).exp()
    columns = -log_p.logsumexp(dim=-1), plausibility, log_box, log_own_class - log_best, log_object[query], score
    return torch.cat([torch.stack([*columns, category_ids, query], dim=-1), mixture.boxes[query]], dim=-1)


def _finite(values: Tensor) -> np.ndarray:
    """Return checked figures on the CPU."""
    array = values.cpu().numpy().astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError("the likelihoods are not finite; look at the model's weights, or run it in float32.")
    return array


def _group(result: Likelihoods, members: np.ndarray) -> dict[str, Any]:
    """Return the means of some ground truths, stage by stage."""
    means: dict[str, Any] = {"num_ground_truths": int(members.sum())}
    for name in (*_TERMS, "responsibilities"):
        means[name] = getattr(result, name)[:, members].mean(axis=1).tolist() if members.any() else None
    return means


def _corners(bbox: Iterable[float]) -> list[float]:
    """Return an xywh box as its corners."""
    left, top, width, height = bbox
    return [left, top, left + width, top + height]
