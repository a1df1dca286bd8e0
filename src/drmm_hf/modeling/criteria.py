"""The training objectives. Each turns the predictions of all stages and padded targets into unreduced terms.

A criterion is batched over stages, images and ground truths; it knows nothing of the decoder. Only `pad_targets` sees
lists. Reduction happens once, in `reduce_terms`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .boxes import BoxPredictions, cxcywh_to_xyxy, frame_scale
from .component_sums import ComponentSums, component_sums
from .matching import match
from .mixture import MixtureParameters, floor_scales, log_class_probability, log_coordinate_density, take_components


# Added under the logarithms of the focal cost.
FOCAL_COST_EPSILON = 1e-12
# A union or hull of two boxes below this many square pixels is treated as this many.
SMALLEST_AREA = 1e-6

# Terms that are divided by the number of matched predictions; all others by the number of images.
MATCHED_TERMS = {"class", "bbox", "giou"}
# Field of the config that weighs each term; any other term, as "nll", has weight 1.
TERM_WEIGHTS = {
    "mcm": "mcm_weight",
    "class": "class_loss_coefficient",
    "bbox": "bbox_loss_coefficient",
    "giou": "giou_loss_coefficient",
}


class Targets(NamedTuple):
    """Ground truths of a batch, padded to the largest number N of any image.

    Attributes:
        boxes (`torch.Tensor` of shape `(B, N, 4)`): xyxy, pixels of the model input.
        class_labels (`torch.Tensor` of shape `(B, N)`): classes in [0, C), int64.
        mask (`torch.Tensor` of shape `(B, N)`): True on ground truths, False on padding.
        image_sizes (`torch.Tensor` of shape `(B, 2)`): (height, width) of the unpadded pictures, in pixels.
    """

    boxes: Tensor
    class_labels: Tensor
    mask: Tensor
    image_sizes: Tensor


def check_labels(labels: Sequence[Mapping[str, Tensor]], num_labels: int):
    """Refuse labels that no detector of `num_labels` classes can learn from.

    Only values on the CPU are looked at: on an accelerator a look would wait for it at every step.

    Args:
        labels (`list[dict]`): per image `class_labels` (`(N,)`, int64) and `boxes` (`(N, 4)`).
        num_labels (`int`): number C of classes.

    Raises:
        ValueError: if a class is not an integer in [0, C), or a box is not finite or has a negative side.
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
        if boxes.is_cpu and boxes.shape[-1] == 4 and (boxes[..., 2:] < 0).any():
            raise ValueError(f"labels[{index}] has boxes {boxes.tolist()}; widths and heights must not be negative.")


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
    return Targets(cxcywh_to_xyxy(boxes) * frame_scale(image_sizes, dtype), class_labels.long(), mask, image_sizes)


def stack_stages(stages: Sequence[MixtureParameters]) -> MixtureParameters:
    """Stack the mixtures of S stages along a new first dimension.

    A stage that kept fewer components (`top_k_ratio`) is filled up with components of mixing coefficient 0, which
    change neither a likelihood nor its gradient.
    """
    most = max(stage.log_mixing.shape[-1] for stage in stages)
    padded = []
    for stage in stages:
        missing = most - stage.log_mixing.shape[-1]
        if not missing:
            padded.append(stage)
            continue
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
    scales = floor_scales(mixture.scales, mixture.boxes, config.min_scale_ratio)
    class_labels = targets.class_labels.expand(mixture.boxes.shape[0], -1, -1)
    return {
        "pi": _scaled_log_mixing(mixture, targets, config)[..., None, :],
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


def _scaled_log_mixing(mixture: MixtureParameters, targets: Targets, config) -> Tensor:
    """Return log pi, times the number of ground truths where the config says so: `(S, B, K)`."""
    if not config.scale_mixing_by_num_objects:
        return mixture.log_mixing
    num_objects = targets.mask.sum(dim=-1).clamp(min=1)
    return mixture.log_mixing + num_objects.to(mixture.log_mixing.dtype).log()[:, None]


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


def sum_components(
    stages: Sequence[MixtureParameters], targets: Targets, config, stop_gradient: Sequence[str] = ()
) -> ComponentSums:
    """Sum pi_k F_k P_k over the components and take the largest, for every stage and ground truth.

    Args:
        stages (`Sequence[MixtureParameters]`): of S stages, each of shape `(B, K, ...)`.
        targets (`Targets`): padded ground truths.
        config (`DrmmConfig`): reads what `log_likelihood_factors` reads.
        stop_gradient (`Sequence[str]`): factors that the MCM term passes no gradient, see `log_component_likelihood`.

    Returns:
        `ComponentSums`: in the unit of the factor F. Cauchy mixtures are summed by `component_sums`, others and
        compiled graphs, which need no help, from the whole matrix.
    """
    if config.coordinate_distribution != "cauchy" or torch.compiler.is_compiling():
        return sum_matrix(stages, targets, config, stop_gradient)
    mixture = stack_stages(stages)
    return component_sums(
        targets.boxes,
        targets.class_labels,
        mixture.boxes,
        floor_scales(mixture.scales, mixture.boxes, config.min_scale_ratio),
        _scaled_log_mixing(mixture, targets, config),
        mixture.class_logits,
        unit=config.likelihood_epsilon or 1.0,
        class_exponent=config.class_exponent,
        stop_gradient=stop_gradient,
    )


def sum_matrix(
    stages: Sequence[MixtureParameters], targets: Targets, config, stop_gradient: Sequence[str] = ()
) -> ComponentSums:
    """Do what `sum_components` does, as the paper writes it: with the matrix of all ground truths and components."""
    factors = log_likelihood_factors(stack_stages(stages), targets, config)
    log_p = log_component_likelihood(factors)
    log_q = log_component_likelihood(factors, stop_gradient)
    return ComponentSums(log_p.logsumexp(dim=-1), log_q.logsumexp(dim=-1), log_q.max(dim=-1).values)


def negative_log_likelihood(log_likelihood: Tensor, epsilon: float) -> Tensor:
    """Return -log(sum_k pi_k F_k P_k + epsilon).

    Args:
        log_likelihood (`torch.Tensor` of shape `(..., K)`): of the components, in units of `epsilon` unless that is 0.
        epsilon (`float`): 0 is the paper's formula; with the public code's 1e-12 the loss saturates at 27.63.

    Returns:
        `torch.Tensor` of shape `(...)`.

    Source: Eq. 4-5; `epsilon` is an addition of the public code.
    """
    return _saturated(log_likelihood.logsumexp(dim=-1), epsilon)


def _saturated(log_sum: Tensor, epsilon: float) -> Tensor:
    """Return -log(sum + epsilon) of log(sum / epsilon), or of log(sum) if epsilon is 0."""
    return -_log_add_one(log_sum) - math.log(epsilon) if epsilon > 0 else -log_sum


def maximum_component_maximization(log_likelihood: Tensor, epsilon: float, chosen: Tensor | None = None) -> Tensor:
    """Return -log(max_k q_k / (sum_k q_k + epsilon) + epsilon), 0 when one component explains a ground truth alone.

    Args:
        log_likelihood (`torch.Tensor` of shape `(..., K)`): of the components, in units of `epsilon` unless that is 0.
        epsilon (`float`): 0 is the paper's formula.
        chosen (`torch.Tensor` of shape `(...)`, *optional*): int64, component that takes the place of the largest.

    Returns:
        `torch.Tensor` of shape `(...)`; exp of its negative is the share of the largest, or chosen, component.

    Source: Eq. 6-8; `epsilon` is an addition of the public code.
    """
    total = log_likelihood.logsumexp(dim=-1)
    if chosen is None:
        largest = log_likelihood.max(dim=-1).values
    else:
        largest = take_components(log_likelihood, chosen[..., None]).squeeze(-1)
    return _surplus(total, largest, epsilon)


def _surplus(log_sum: Tensor, log_largest: Tensor, epsilon: float) -> Tensor:
    """Return -log(largest / (sum + epsilon) + epsilon) of both logarithms, in units of `epsilon` unless that is 0."""
    if epsilon == 0:
        return log_sum - log_largest
    log_share = log_largest - _log_add_one(log_sum)
    return -torch.logaddexp(log_share, log_share.new_full((), math.log(epsilon)))


def _log_add_one(log_value: Tensor) -> Tensor:
    """Return log(exp(log_value) + 1)."""
    return torch.logaddexp(log_value, torch.zeros_like(log_value))


def nll(stages: Sequence[MixtureParameters], targets: Targets, config) -> dict[str, Tensor]:
    """Compute the likelihood term of D-RMM's loss alone, which leaves duplicates.

    Args:
        stages (`Sequence[MixtureParameters]`): of S stages, each of shape `(B, K, ...)`, float32 or float64.
        targets (`Targets`): padded ground truths.
        config (`DrmmConfig`): reads `likelihood_epsilon` and what `log_likelihood_factors` reads.

    Returns:
        `dict[str, torch.Tensor]`: "nll" of shape `(S, B, N)`, 0 on padding.

    Source: Eq. 4-5; Table 2, third row.
    """
    sums = sum_components(stages, targets, config)
    return {"nll": torch.where(targets.mask, _saturated(sums.log_sum, config.likelihood_epsilon), 0.0)}


def max_nll(stages: Sequence[MixtureParameters], targets: Targets, config) -> dict[str, Tensor]:
    """Compute -log max_k(pi_k F_k P_k): only the largest component learns the ground truth.

    Args:
        stages (`Sequence[MixtureParameters]`): of S stages, each of shape `(B, K, ...)`, float32 or float64.
        targets (`Targets`): padded ground truths.
        config (`DrmmConfig`): reads `likelihood_epsilon`, added to the largest product as it is to the sum of Eq. 5,
            and what `log_likelihood_factors` reads.

    Returns:
        `dict[str, torch.Tensor]`: "nll" of shape `(S, B, N)`, 0 on padding.

    Source: Table 3, row IV.
    """
    sums = sum_components(stages, targets, config)
    return {"nll": torch.where(targets.mask, _saturated(sums.log_largest, config.likelihood_epsilon), 0.0)}


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
    sums = sum_components(stages, targets, config, config.mcm_stop_gradient)
    terms = {
        "nll": _saturated(sums.log_sum, config.likelihood_epsilon),
        "mcm": _surplus(sums.log_share_sum, sums.log_largest, config.likelihood_epsilon),
    }
    return {name: torch.where(targets.mask, term, 0.0) for name, term in terms.items()}


def nll_mcm_bipartite(stages: Sequence[MixtureParameters], targets: Targets, config) -> dict[str, Tensor]:
    """Compute `nll_mcm` with the largest component of Eq. 8 replaced by the one that bipartite matching assigns.

    Two ground truths never claim the same component. Where a picture has more than K of them, those left over have no
    MCM term.

    Args:
        stages (`Sequence[MixtureParameters]`): of S stages, each of shape `(B, K, ...)`, float32 or float64.
        targets (`Targets`): padded ground truths.
        config (`DrmmConfig`): reads `mcm_stop_gradient`, which holds for both parts of the share,
            `likelihood_epsilon`, which the matching cost -log(pi F P) does without, and what `log_likelihood_factors`
            reads.

    Returns:
        `dict[str, torch.Tensor]`: "nll" and "mcm", each of shape `(S, B, N)` and 0 on padding, without weights.

    Source: Table 2, fourth row.
    """
    mixture = stack_stages(stages)
    factors = log_likelihood_factors(mixture, targets, config)
    log_p = log_component_likelihood(factors)
    log_q = log_component_likelihood(factors, config.mcm_stop_gradient)
    assigned = _match_components(log_p, mixture, targets)
    mcm = maximum_component_maximization(log_q, config.likelihood_epsilon, assigned.clamp(min=0))
    return {
        "nll": torch.where(targets.mask, negative_log_likelihood(log_p, config.likelihood_epsilon), 0.0),
        "mcm": torch.where(assigned >= 0, mcm, 0.0),
    }


def bipartite_nll(stages: Sequence[MixtureParameters], targets: Targets, config) -> dict[str, Tensor]:
    """Compute -log(pi_k F_k P_k) of matched pairs only; the matching cost is the same quantity.

    Nothing is a mixture here but pi: a component without a ground truth has no term of its own, and its objectness o
    trains only through the normaliser of pi = o / sum o, which lowers it. The paper does not say what trains the
    objectness in this row of its table; this is the reading that adds nothing.

    Args:
        stages (`Sequence[MixtureParameters]`): of S stages, each of shape `(B, K, ...)`, float32 or float64.
        targets (`Targets`): padded ground truths.
        config (`DrmmConfig`): reads `likelihood_epsilon`, added to the matched product as it is to the sum of Eq. 5
            (the loss of a hopeless pair saturates, its cost in the matching does not), and what
            `log_likelihood_factors` reads.

    Returns:
        `dict[str, torch.Tensor]`: "nll" of shape `(S, B, N)`, 0 on padding and on ground truths beyond K.

    Source: Table 2, second row.
    """
    mixture = stack_stages(stages)
    log_p = log_component_likelihood(log_likelihood_factors(mixture, targets, config))
    assigned = _match_components(log_p, mixture, targets)
    log_matched = take_components(log_p, assigned.clamp(min=0)[..., None])
    return {"nll": torch.where(assigned >= 0, negative_log_likelihood(log_matched, config.likelihood_epsilon), 0.0)}


def _match_components(log_likelihood: Tensor, mixture: MixtureParameters, targets: Targets) -> Tensor:
    """Match at the cost -log(pi F P), leaving out what `pad_targets` and `stack_stages` filled up: `(S, B, N)`."""
    filled = mixture.log_mixing == -math.inf
    return match(-log_likelihood, targets.mask[..., None] & ~filled[..., None, :])


def generalized_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the generalised IoU, in (-1, 1] for boxes of positive width and height.

    torchvision's loss adds an epsilon to both divisors, which shows on small boxes; here they have a floor. The area
    of a box that is inverted along one axis is negative.

    Args:
        boxes (`torch.Tensor` of shape `(..., 4)`): xyxy, pixels.
        others (`torch.Tensor` of shape `(..., 4)`): xyxy, pixels; the shapes broadcast.

    Returns:
        `torch.Tensor` of shape `(...)`.

    Source: Eq. 1; the floor `SMALLEST_AREA` of union and hull is the public code's.
    """
    (start, end), (other_start, other_end) = boxes.split(2, dim=-1), others.split(2, dim=-1)
    overlap = _area((torch.minimum(end, other_end) - torch.maximum(start, other_start)).clamp(min=0))
    hull = _area((torch.maximum(end, other_end) - torch.minimum(start, other_start)).clamp(min=0))
    union = _area(end - start) + _area(other_end - other_start) - overlap
    union, hull = union.clamp(min=SMALLEST_AREA), hull.clamp(min=SMALLEST_AREA)
    return overlap / union - (hull - union) / hull


def _area(size: Tensor) -> Tensor:
    """Multiply width and height, `(..., 2)`."""
    return size[..., 0] * size[..., 1]


def focal_loss(logits: Tensor, positive: Tensor, alpha: float, gamma: float) -> Tensor:
    """Return -alpha (1 - s)^gamma log s on positives, -(1 - alpha) s^gamma log(1 - s) elsewhere, s = sigmoid(logit).

    Powers are taken in log space: torchvision's function has no gradient at s = 0 or 1 with `gamma` below 1.

    Args:
        logits (`torch.Tensor` of shape `(...)`): before the sigmoid.
        positive (`torch.Tensor` of shape `(...)`): bool.
        alpha (`float`): weight of positives.
        gamma (`float`): exponent that fades what is already right.

    Returns:
        `torch.Tensor` of shape `(...)`.

    Source: focal loss, as Sparse R-CNN uses it.
    """
    log_score, log_rest = F.logsigmoid(logits), F.logsigmoid(-logits)
    right = -alpha * torch.exp(gamma * log_rest) * log_score
    wrong = -(1 - alpha) * torch.exp(gamma * log_score) * log_rest
    return torch.where(positive, right, wrong)


@torch.no_grad()
def matching_costs(predictions: BoxPredictions, targets: Targets, config) -> dict[str, Tensor]:
    """Evaluate what it costs to give each prediction to each ground truth.

    Args:
        predictions (`BoxPredictions`): of shape `(S, B, K, ...)`.
        targets (`Targets`): of shape `(B, N, ...)`.
        config (`DrmmConfig`): reads `class_cost`, `bbox_cost`, `giou_cost`, `focal_alpha`, `focal_gamma`.

    Returns:
        `dict[str, torch.Tensor]`: weighted and of shape `(S, B, N, K)`, "class", the focal loss of the ground truth's
        class as a positive less that as a negative; "bbox", the L1 distance of the corners in fractions of the
        unpadded picture; "giou", the negative generalised IoU. The matching minimises their sum.

    Source: Sparse R-CNN; Eq. 1 with the focal loss.
    """
    class_labels = targets.class_labels.expand(len(predictions.boxes), -1, -1)
    logits = take_components(predictions.class_logits.transpose(-1, -2), class_labels)
    score, rest = logits.sigmoid(), torch.sigmoid(-logits)
    positive = -config.focal_alpha * rest**config.focal_gamma * torch.log(score + FOCAL_COST_EPSILON)
    negative = -(1 - config.focal_alpha) * score**config.focal_gamma * torch.log(rest + FOCAL_COST_EPSILON)
    frame = frame_scale(targets.image_sizes, predictions.boxes.dtype)
    distance = torch.cdist(targets.boxes / frame, predictions.boxes / frame, p=1)
    overlap = generalized_iou(targets.boxes[..., :, None, :], predictions.boxes[..., None, :, :])
    return {
        "class": config.class_cost * (positive - negative),
        "bbox": config.bbox_cost * distance,
        "giou": -config.giou_cost * overlap,
    }


def stack_predictions(stages: Sequence[BoxPredictions]) -> BoxPredictions:
    """Stack the predictions of S stages along a new first dimension."""
    return BoxPredictions(*(torch.stack(values) for values in zip(*stages, strict=True)))


def copy_targets(targets: Targets, copies: int) -> Targets:
    """Repeat the ground truths of every picture, all of them once and then again: `(B, copies * N, ...)`."""
    return targets._replace(
        boxes=targets.boxes.repeat(1, copies, 1),
        class_labels=targets.class_labels.repeat(1, copies),
        mask=targets.mask.repeat(1, copies),
    )


def assign(predictions: BoxPredictions, targets: Targets, config) -> Tensor:
    """Give each ground truth the prediction that learns it, at the least total cost.

    Args:
        predictions (`BoxPredictions`): of shape `(S, B, K, ...)`.
        targets (`Targets`): of shape `(B, N, ...)`.
        config (`DrmmConfig`): reads what `matching_costs` reads.

    Returns:
        `torch.Tensor` of shape `(S, B, N)`: int64, as `match`.

    Source: Table 2, first row.
    """
    return match(sum(matching_costs(predictions, targets, config).values()), targets.mask[..., None])


def focal_l1_giou(stages: Sequence[BoxPredictions], targets: Targets, config) -> dict[str, Tensor]:
    """Compute the three terms of Sparse R-CNN's and AdaMixer's loss.

    Each ground truth is matched `num_ground_truth_copies` times, to as many predictions, while there are any left.
    Matched predictions learn its class and its box; all others learn that they show no class.

    Args:
        stages (`Sequence[BoxPredictions]`): of S stages, each of shape `(B, K, ...)`, float32 or float64.
        targets (`Targets`): padded ground truths.
        config (`DrmmConfig`): reads `num_ground_truth_copies`, `focal_alpha`, `focal_gamma` and what `matching_costs`
            reads.

    Returns:
        `dict[str, torch.Tensor]`: without weights, "class" of shape `(S, B, K)`, the focal loss summed over classes;
        "bbox" and "giou" of shape `(S, B, copies * N)`, the L1 distance of the corners in fractions of the unpadded
        picture and 1 - generalised IoU, 0 where nothing is matched.

    Source: Table 2, first row; Table 10 for the copies.
    """
    predictions, targets = stack_predictions(stages), copy_targets(targets, config.num_ground_truth_copies)
    assigned = assign(predictions, targets, config)
    matched, index = assigned >= 0, assigned.clamp(min=0)

    num_labels = predictions.class_logits.shape[-1]
    num_entries = predictions.class_logits.shape[-2] * num_labels
    # One entry more takes the marks of ground truths without a prediction.
    marks = index.new_zeros(*index.shape[:2], num_entries + 1, dtype=torch.bool)
    places = torch.where(matched, index * num_labels + targets.class_labels, num_entries)
    positive = marks.scatter(-1, places, True)[..., :-1].view_as(predictions.class_logits)

    boxes = take_components(predictions.boxes, index)
    distance = (boxes - targets.boxes) / frame_scale(targets.image_sizes, boxes.dtype)
    return {
        "class": focal_loss(predictions.class_logits, positive, config.focal_alpha, config.focal_gamma).sum(dim=-1),
        "bbox": torch.where(matched, distance.abs().sum(dim=-1), 0.0),
        "giou": torch.where(matched, 1 - generalized_iou(boxes, targets.boxes), 0.0),
    }


CRITERIA = {
    "nll_mcm": nll_mcm,
    "nll": nll,
    "max_nll": max_nll,
    "nll_mcm_bipartite": nll_mcm_bipartite,
    "bipartite_nll": bipartite_nll,
    "focal_l1_giou": focal_l1_giou,
}


def reduce_terms(terms: Mapping[str, Tensor], targets: Targets, config) -> tuple[Tensor, dict[str, Tensor]]:
    """Reduce unreduced terms to the scalar that is back-propagated.

    Likelihood terms are summed over ground truths and divided by the number of images B, so that the loss of 8 images
    is the mean of the losses of 2 x 4. The terms of "focal_l1_giou" are summed over predictions and divided by the
    number of matched predictions of the batch, averaged over processes where there are several: all of them must call
    this. Stages are summed.

    Args:
        terms (`Mapping[str, torch.Tensor]`): by name, of shape `(S, B, ...)`, without weights. The names of the
            criteria here have their weights and divisors; one of another name weighs 1 and is divided by B.
        targets (`Targets`): ground truths that the criterion was given.
        config (`DrmmConfig`): reads `loss_weight`, the fields of `TERM_WEIGHTS`, `mcm_stages` and, with a "class"
            term, `num_ground_truth_copies`.

    Returns:
        `tuple`: the loss, `loss_weight` times the weighted sum over terms and stages, and its parts by name,
        `nll.stage0`, ..., `mcm.stage0`, ..., which carry no weights and no gradient.

    Source: Sec. 3.3. The public code sums likelihood terms over the 2 images of a GPU and averages over GPUs:
    `loss_weight` 2. With "focal_l1_giou" it divides the background of a batch without ground truth by 0; here at
    least 1 match is counted, so that the loss is finite.
    """
    num_matched = _count_matched(terms["class"], targets, config) if "class" in terms else None
    loss, parts = 0.0, {}
    for name, term in terms.items():
        per_stage = term.flatten(1).sum(dim=1) / (num_matched if name in MATCHED_TERMS else term.shape[1])
        weight = getattr(config, TERM_WEIGHTS[name]) if name in TERM_WEIGHTS else 1.0
        counted = per_stage[-1:] if name == "mcm" and config.mcm_stages == "last" else per_stage
        loss = loss + weight * counted.sum()
        parts |= {f"{name}.stage{index}": value for index, value in enumerate(per_stage.detach().unbind())}
    return config.loss_weight * loss, parts


def _count_matched(class_term: Tensor, targets: Targets, config) -> Tensor:
    """Count the matched predictions of the batch, averaged over processes: at least 1."""
    num_predictions = class_term.shape[2]
    per_image = (targets.mask.sum(dim=-1) * config.num_ground_truth_copies).clamp(max=num_predictions)
    count = per_image.sum().to(class_term.dtype)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
        return count.clamp(min=1) / torch.distributed.get_world_size()
    return count.clamp(min=1)
