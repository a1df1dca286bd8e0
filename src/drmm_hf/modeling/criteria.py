"""The training objectives. Each turns the mixtures of all stages and padded targets into unreduced terms.

A criterion is batched over stages, images and ground truths; it knows nothing of the decoder. Only `pad_targets` sees
lists. Reduction happens once, in `reduce_terms`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .boxes import cxcywh_to_xyxy, frame_scale
from .mixture import MixtureParameters, floor_scales, log_class_probability, log_coordinate_density


class Targets(NamedTuple):
    """Ground truths of a batch, padded to the largest number N of any image.

    Attributes:
        boxes (`torch.Tensor` of shape `(B, N, 4)`): xyxy, pixels of the model input.
        class_labels (`torch.Tensor` of shape `(B, N)`): classes in [0, C), int64.
        mask (`torch.Tensor` of shape `(B, N)`): True on ground truths, False on padding.
    """

    boxes: Tensor
    class_labels: Tensor
    mask: Tensor


def check_labels(labels: Sequence[Mapping[str, Tensor]], num_labels: int):
    """Refuse labels that no detector of `num_labels` classes can learn from.

    Only values on the CPU are looked at: on an accelerator a look would wait for it at every step.

    Args:
        labels (`list[dict]`): per image `class_labels` (`(N,)`, int64) and `boxes` (`(N, 4)`).
        num_labels (`int`): number C of classes.

    Raises:
        ValueError: if a class is not an integer in [0, C) or a box is not finite.
    """
    for index, label in enumerate(labels):
        boxes, classes = label["boxes"], label["class_labels"]
        if not len(classes):
            continue
        if classes.is_floating_point():
            raise ValueError(f"labels[{index}] has class_labels of type {classes.dtype}; they must be integers.")
        if classes.is_cpu and not 0 <= classes.min() <= classes.max() < num_labels:
            raise ValueError(
                f"labels[{index}] has class_labels from {classes.min()} to {classes.max()}; they must lie in "
                f"[0, num_labels={num_labels})."
            )
        if boxes.is_cpu and not boxes.isfinite().all():
            raise ValueError(f"labels[{index}] has boxes {boxes.tolist()}; they must be finite.")


def pad_targets(labels: Sequence[Mapping[str, Tensor]], image_sizes: Tensor, dtype: torch.dtype) -> Targets:
    """Bring the family's list of labels into padded tensors in the frame of the model.

    Args:
        labels (`list[dict]`): per image `class_labels` (`(N,)`) and `boxes` (`(N, 4)`, cxcywh in [0, 1] of the
            unpadded picture).
        image_sizes (`torch.Tensor` of shape `(B, 2)`): (height, width) of the unpadded pictures, in pixels.
        dtype (`torch.dtype`): type of the coordinates, at least float32.

    Returns:
        `Targets`: on the device of `image_sizes`.

    Raises:
        ValueError: if the number of labels is not the number of images, or boxes and class labels disagree in shape.
    """
    if len(labels) != len(image_sizes):
        raise ValueError(
            f"labels holds {len(labels)} entries for {len(image_sizes)} images; it must hold one an image."
        )
    for index, label in enumerate(labels):
        num_boxes, num_classes = label["boxes"].shape, label["class_labels"].shape
        if len(num_classes) != 1 or tuple(num_boxes) != (num_classes[0], 4):
            raise ValueError(
                f"labels[{index}] has boxes of shape {tuple(num_boxes)} and class_labels of shape "
                f"{tuple(num_classes)}; they must be (N, 4) and (N,)."
            )
    device = image_sizes.device
    longest = max((len(label["class_labels"]) for label in labels), default=0)
    boxes = torch.stack(
        [F.pad(label["boxes"].to(device, dtype), (0, 0, 0, longest - len(label["boxes"]))) for label in labels]
    )
    class_labels = torch.stack(
        [F.pad(label["class_labels"].to(device), (0, longest - len(label["class_labels"]))) for label in labels]
    )
    counts = torch.tensor([len(label["class_labels"]) for label in labels]).to(device, non_blocking=True)
    mask = torch.arange(longest, device=device) < counts[:, None]
    return Targets(cxcywh_to_xyxy(boxes) * frame_scale(image_sizes, dtype), class_labels.long(), mask)


def stack_stages(stages: Sequence[MixtureParameters]) -> MixtureParameters:
    """Stack the mixtures of S stages along a new first dimension.

    A stage that kept fewer components (`top_k_ratio`) is filled up with components of mixing coefficient 0, which
    change neither a likelihood nor its gradient.
    """
    most = max(stage.log_mixing.shape[-1] for stage in stages)
    padded = []
    for stage in stages:
        missing = most - stage.log_mixing.shape[-1]
        filled = [F.pad(value, (0, 0, 0, missing)) for value in stage[:3]]
        padded.append((*filled, F.pad(stage[3], (0, missing)), F.pad(stage[4], (0, missing), value=-math.inf)))
    return MixtureParameters(*(torch.stack(values) for values in zip(*padded, strict=True)))


def log_likelihood_factors(mixture: MixtureParameters, targets: Targets, config) -> dict[str, Tensor]:
    """Evaluate the logarithms of pi_k, F(b_i; mu_k, gamma_k) and P(c_i; p_k) for every ground truth and component.

    Args:
        mixture (`MixtureParameters`): of shape `(S, B, K, ...)`.
        targets (`Targets`): of shape `(B, N, ...)`.
        config (`DrmmConfig`): reads `min_scale_ratio`, `coordinate_distribution`, `student_t_freedom`,
            `class_exponent`, `scale_mixing_by_num_objects`, `likelihood_epsilon`.

    Returns:
        `dict[str, torch.Tensor]`: "pi" of shape `(S, B, 1, K)`, "F" and "P" of shape `(S, B, N, K)`; F is measured in
        units of `likelihood_epsilon` unless that is 0. Padded ground truths hold finite numbers without meaning.

    Source: Eq. 2-3; the scale floor, the class exponent and the scaling of pi by the number of ground truths are
    additions of the public code.
    """
    log_mixing = mixture.log_mixing[..., None, :]
    if config.scale_mixing_by_num_objects:
        num_objects = targets.mask.sum(dim=-1).clamp(min=1)
        log_mixing = log_mixing + num_objects.to(log_mixing.dtype).log()[:, None, None]
    scales = floor_scales(mixture.scales, mixture.boxes, config.min_scale_ratio)
    class_labels = targets.class_labels.expand(mixture.boxes.shape[0], -1, -1)
    return {
        "pi": log_mixing,
        "F": log_coordinate_density(
            targets.boxes,
            mixture.boxes,
            scales,
            config.coordinate_distribution,
            config.student_t_freedom,
            unit=config.likelihood_epsilon or 1.0,
        ),
        "P": log_class_probability(mixture.class_logits, class_labels, config.class_exponent),
    }


def log_component_likelihood(factors: Mapping[str, Tensor], stop_gradient: Sequence[str] = ()) -> Tensor:
    """Return log(pi_k F_k P_k), the matrix that every likelihood criterion reduces.

    Args:
        factors (`Mapping[str, torch.Tensor]`): from `log_likelihood_factors`.
        stop_gradient (`Sequence[str]`): factors that pass no gradient, any of "pi", "F", "P" (Table 7).

    Returns:
        `torch.Tensor` of shape `(S, B, N, K)`, in the unit of the factor F.

    Source: each term of Eq. 2 and 8 before the sum or maximum over k.
    """
    pi, density, probability = (
        factors[name].detach() if name in stop_gradient else factors[name] for name in ("pi", "F", "P")
    )
    return pi + density + probability


def negative_log_likelihood(log_likelihood: Tensor, epsilon: float) -> Tensor:
    """Return -log(sum_k pi_k F_k P_k + epsilon).

    Args:
        log_likelihood (`torch.Tensor` of shape `(..., K)`): of the components, in units of `epsilon` unless that is 0.
        epsilon (`float`): 0 is the paper's formula; with the public code's 1e-12 the loss saturates at 27.63.

    Returns:
        `torch.Tensor` of shape `(...)`.

    Source: Eq. 4-5; `epsilon` is an addition of the public code.
    """
    total = log_likelihood.logsumexp(dim=-1)
    return -_log_add_one(total) - math.log(epsilon) if epsilon > 0 else -total


def maximum_component_maximization(log_likelihood: Tensor, epsilon: float) -> Tensor:
    """Return -log(max_k q_k / (sum_k q_k + epsilon) + epsilon), 0 when one component explains a ground truth alone.

    Args:
        log_likelihood (`torch.Tensor` of shape `(..., K)`): of the components, in units of `epsilon` unless that is 0.
        epsilon (`float`): 0 is the paper's formula.

    Returns:
        `torch.Tensor` of shape `(...)`; exp of its negative is the share of the largest component.

    Source: Eq. 6-8; `epsilon` is an addition of the public code.
    """
    largest, total = log_likelihood.max(dim=-1).values, log_likelihood.logsumexp(dim=-1)
    if epsilon == 0:
        return total - largest
    log_share = largest - _log_add_one(total)
    return -torch.logaddexp(log_share, log_share.new_tensor(math.log(epsilon)))


def _log_add_one(log_value: Tensor) -> Tensor:
    """Return log(exp(log_value) + 1)."""
    return torch.logaddexp(log_value, torch.zeros_like(log_value))


def nll_mcm(stages: Sequence[MixtureParameters], targets: Targets, config) -> dict[str, Tensor]:
    """Compute the two terms of D-RMM's loss for every stage and ground truth.

    Args:
        stages (`Sequence[MixtureParameters]`): of S stages, each of shape `(B, K, ...)`, float32 or float64.
        targets (`Targets`): padded ground truths.
        config (`DrmmConfig`): reads `mcm_stop_gradient`, `likelihood_epsilon` and what `log_likelihood_factors` reads.

    Returns:
        `dict[str, torch.Tensor]`: "nll" and "mcm", each of shape `(S, B, N)` and 0 on padding, without weights.

    Source: Eq. 4-8, Sec. 3.3, Table 7.
    """
    factors = log_likelihood_factors(stack_stages(stages), targets, config)
    log_p = log_component_likelihood(factors)
    log_q = log_component_likelihood(factors, config.mcm_stop_gradient)
    terms = {
        "nll": negative_log_likelihood(log_p, config.likelihood_epsilon),
        "mcm": maximum_component_maximization(log_q, config.likelihood_epsilon),
    }
    return {name: torch.where(targets.mask, term, 0.0) for name, term in terms.items()}


CRITERIA = {"nll_mcm": nll_mcm}


def reduce_terms(terms: Mapping[str, Tensor], config) -> tuple[Tensor, dict[str, Tensor]]:
    """Reduce unreduced terms to the scalar that is back-propagated.

    Each term is summed over ground truths and divided by the number of images B, so that the loss of 8 images is the
    mean of the losses of 2 x 4; stages are summed.

    Args:
        terms (`Mapping[str, torch.Tensor]`): "nll" and "mcm" of shape `(S, B, N)`.
        config (`DrmmConfig`): reads `mcm_weight` (beta) and `loss_weight`.

    Returns:
        `tuple`: the loss `loss_weight * sum over stages (nll + mcm_weight * mcm)` and its parts by name, `nll.stage0`,
        `mcm.stage0`, ..., which carry no weights and no gradient.

    Source: Sec. 3.3. The public code sums over the 2 images of a GPU and averages over GPUs: `loss_weight` 2.
    """
    per_stage = {name: term.sum(dim=(1, 2)) / term.shape[1] for name, term in terms.items()}
    loss = config.loss_weight * (per_stage["nll"] + config.mcm_weight * per_stage["mcm"]).sum()
    parts = {
        f"{name}.stage{index}": value
        for name, values in per_stage.items()
        for index, value in enumerate(values.detach().unbind())
    }
    return loss, parts
