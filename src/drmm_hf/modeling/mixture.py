"""The mixture density of D-RMM in log space: Eq. 2-3 and 8, and the confidence. Pure functions of tensors.

Nothing here knows of images, training or configs. `(..., K, 4)` boxes are xyxy in pixels of the model input; sums of
logarithms replace products of densities, so that nothing underflows.
"""

import math
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .boxes import side_lengths


# A scale below this many pixels is treated as this many, so that a softplus that underflows to 0 stays differentiable.
SMALLEST_SCALE = 1e-9


class MixtureParameters(NamedTuple):
    """The parameters M = {pi, mu, gamma, p, o} of one stage's mixture, K components.

    Attributes:
        boxes (`torch.Tensor` of shape `(..., K, 4)`): locations mu, xyxy, pixels of the model input.
        scales (`torch.Tensor` of shape `(..., K, 4)`): scales gamma of left, top, right, bottom, pixels,
            before the floor.
        class_logits (`torch.Tensor` of shape `(..., K, C)`): softmax over the last dimension gives p.
        objectness_logits (`torch.Tensor` of shape `(..., K)`): the sigmoid gives o.
        log_mixing (`torch.Tensor` of shape `(..., K)`): log pi. Kept beside o because a selection of components
            (`top_k_ratio`) keeps the normalisation over all of them.
    """

    boxes: Tensor
    scales: Tensor
    class_logits: Tensor
    objectness_logits: Tensor
    log_mixing: Tensor

    def select(self, index: Tensor) -> "MixtureParameters":
        """Keep the components at `index` (`torch.Tensor` of shape `(..., k)`, int64), in that order."""
        return MixtureParameters(*(take_components(value, index) for value in self))


def take_components(values: Tensor, index: Tensor) -> Tensor:
    """Gather `values` of shape `(..., K)` or `(..., K, D)` at `index` `(..., k)` along the component dimension."""
    if values.dim() == index.dim():
        return values.gather(-1, index)
    return values.gather(-2, index[..., None].expand(*index.shape, values.shape[-1]))


def log_mixing_coefficients(objectness_logits: Tensor) -> Tensor:
    """Normalise the objectness over the components: log pi_k = log(o_k / sum_k' o_k').

    Args:
        objectness_logits (`torch.Tensor` of shape `(..., K)`): before the sigmoid.

    Returns:
        `torch.Tensor` of shape `(..., K)`: log pi; its exponentials sum to 1.

    Source: Sec. 3.2, Figure 4.
    """
    log_objectness = F.logsigmoid(objectness_logits)
    return log_objectness - log_objectness.logsumexp(dim=-1, keepdim=True)


def log_confidence(objectness_logits: Tensor, class_logits: Tensor) -> Tensor:
    """Return log(p_kc o_k), the logarithm of the score of component k for class c.

    Args:
        objectness_logits (`torch.Tensor` of shape `(..., K)`): before the sigmoid.
        class_logits (`torch.Tensor` of shape `(..., K, C)`): before the softmax.

    Returns:
        `torch.Tensor` of shape `(..., K, C)`.

    Source: Sec. 3.4.
    """
    return F.logsigmoid(objectness_logits)[..., None] + F.log_softmax(class_logits, dim=-1)


def log_odds(log_probability: Tensor) -> Tensor:
    """Return log(P / (1 - P)) from log P, so that a sigmoid gives P back.

    Args:
        log_probability (`torch.Tensor`): log P, at most 0. P is taken as at most 1 - eps of the dtype, so that the
            result stays finite.

    Returns:
        `torch.Tensor` of the same shape.
    """
    log_probability = log_probability.clamp(max=-torch.finfo(log_probability.dtype).eps)
    return log_probability - torch.log(-torch.expm1(log_probability))


def floor_scales(scales: Tensor, boxes: Tensor, min_scale_ratio: float) -> Tensor:
    """Hold each scale at or above `min_scale_ratio` times the predicted box's own width or height.

    Args:
        scales (`torch.Tensor` of shape `(..., K, 4)`): gamma of left, top, right, bottom, in pixels.
        boxes (`torch.Tensor` of shape `(..., K, 4)`): mu, xyxy, pixels. Where the floor holds, the gradient goes to
            the box instead of the scale. An inverted box has a negative floor, which never holds.
        min_scale_ratio (`float`): ratio of the floor to the side length; 0 switches it off.

    Returns:
        `torch.Tensor` of shape `(..., K, 4)`, in pixels.

    Source: public code adds.
    """
    if min_scale_ratio == 0:
        return scales
    return torch.maximum(scales, min_scale_ratio * side_lengths(boxes))


def cauchy_density(distance: Tensor, scale: Tensor, freedom: float) -> Tensor:
    """1 / (pi s (1 + (d/s)^2)), written so that a tiny s loses nothing. `freedom` is not used."""
    return scale / (math.pi * (scale.square() + distance.square()))


def gaussian_log_density(distance: Tensor, scale: Tensor, freedom: float) -> Tensor:
    """Logarithm of the normal density with standard deviation s. `freedom` is not used."""
    return -0.5 * (distance / scale).square() - scale.log() - 0.5 * math.log(2 * math.pi)


def student_t_log_density(distance: Tensor, scale: Tensor, freedom: float) -> Tensor:
    """Logarithm of Student's t density with scale s; with 1 degree of `freedom` it is the Cauchy density."""
    constant = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    return constant - scale.log() - (freedom + 1) / 2 * torch.log1p((distance / scale).square() / freedom)


LOG_DENSITIES = {"gaussian": gaussian_log_density, "student_t": student_t_log_density}


def log_coordinate_density(
    coordinates: Tensor,
    boxes: Tensor,
    scales: Tensor,
    distribution: str = "cauchy",
    freedom: float = 1.0,
    unit: float = 1.0,
) -> Tensor:
    """Evaluate log(F(b_i; mu_k, gamma_k) / unit), F a product of four independent one-dimensional densities.

    Args:
        coordinates (`torch.Tensor` of shape `(..., N, 4)`): ground-truth boxes b, xyxy, pixels of the model input.
        boxes (`torch.Tensor` of shape `(..., K, 4)`): locations mu, xyxy, pixels.
        scales (`torch.Tensor` of shape `(..., K, 4)`): scales gamma, pixels, floor already applied.
        distribution (`str`): "cauchy", "gaussian" or "student_t".
        freedom (`float`): degrees of freedom, read by "student_t" only.
        unit (`float`): density, in 1 / pixel^4, in which F is measured. A small one keeps the logarithms of small
            densities near 0, where float32 is fine enough for their exponentials.

    Returns:
        `torch.Tensor` of shape `(..., N, K)`.

    Source: Eq. 3.
    """
    sides = [
        (coordinate[..., :, None] - location[..., None, :], scale.clamp(min=SMALLEST_SCALE)[..., None, :])
        for coordinate, location, scale in zip(
            coordinates.unbind(-1), boxes.unbind(-1), scales.unbind(-1), strict=True
        )
    ]
    if distribution == "cauchy":
        # Two logarithms cost half of four. A product of two densities underflows only beyond any picture (a scale of
        # 1 pixel at 1e9 pixels); there it is held, and passes no gradient.
        left, top, right, bottom = (cauchy_density(distance, scale, freedom) for distance, scale in sides)
        tiny = torch.finfo(left.dtype).tiny
        return (left * right / unit).clamp(min=tiny).log() + (top * bottom).clamp(min=tiny).log()
    log_density = LOG_DENSITIES[distribution]
    return sum(log_density(distance, scale, freedom) for distance, scale in sides) - math.log(unit)


def log_class_probability(class_logits: Tensor, class_labels: Tensor, exponent: float = 1.0) -> Tensor:
    """Evaluate log P(c_i; p_k), the categorical log probability of each ground truth's class.

    Args:
        class_logits (`torch.Tensor` of shape `(..., K, C)`): before the softmax.
        class_labels (`torch.Tensor` of shape `(..., N)`): classes in [0, C), int64.
        exponent (`float`): power applied to the probability; 1 is the paper's.

    Returns:
        `torch.Tensor` of shape `(..., N, K)`.

    Source: Eq. 2; the exponent is an addition of the public code.
    """
    log_probability = exponent * F.log_softmax(class_logits, dim=-1).transpose(-1, -2)
    return take_components(log_probability, class_labels)


def tail_freedom(distribution: str, freedom: float) -> float:
    """Return the degrees of freedom of the Student's t density that a distribution is: one number names all three.

    Args:
        distribution (`str`): "cauchy", "gaussian" or "student_t".
        freedom (`float`): degrees of freedom, read by "student_t" only.

    Returns:
        `float`: 1 for Cauchy, infinity for Gaussian.
    """
    return {"cauchy": 1.0, "gaussian": math.inf, "student_t": float(freedom)}[distribution]


@lru_cache
def central_quantile(level: float, freedom: float = 1.0) -> float:
    """Return how many scales an interval about the location reaches to each side to hold a share of the probability.

    Args:
        level (`float`): the share, in (0, 1).
        freedom (`float`): degrees of freedom, see `tail_freedom`.

    Returns:
        `float`: t with `P(|T| < t) = level`. tan(pi level / 2) for Cauchy, whose 90 % interval is 6.3 scales wide to
            each side; Gaussian's is 1.6.

    Raises:
        ValueError: if `level` is not inside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"interval={level}: must lie between 0 and 1")
    if freedom == 1:
        return math.tan(math.pi * level / 2)
    if freedom > 1e7:  # apart by less than the series' own rounding
        return NormalDist().inv_cdf((1 + level) / 2)
    low, high = 0.0, 1.0
    while _central_probability(high, freedom) < level:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _central_probability(middle, freedom) < level else (low, middle)
    return high


def _central_probability(t: float, freedom: float) -> float:
    """Return P(|T| < t) of Student's t by the series of the incomplete beta function that converges fast at t."""
    if math.isinf(t * t):
        return 1.0
    near, far = t * t / (freedom + t * t), freedom / (freedom + t * t)
    x, y, a, b = (near, far, 0.5, freedom / 2) if near <= 0.5 else (far, near, freedom / 2, 0.5)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    total, term, n = 0.0, math.exp(a * math.log(x) + b * math.log(y) - log_beta) / a if x else 0.0, 0
    while term > 1e-17 * total:  # every term is positive
        total += term
        term *= x * (a + b + n) / (a + 1 + n)
        n += 1
    return total if near <= 0.5 else 1 - total


def log_component_density(
    mixture: MixtureParameters,
    boxes: Tensor,
    class_labels: Tensor,
    distribution: str = "cauchy",
    freedom: float = 1.0,
    min_scale_ratio: float = 0.0,
) -> Tensor:
    """Evaluate log(pi_k F_k P_k), whose exponentials sum to the density that the mixture has at each ground truth.

    Args:
        mixture (`MixtureParameters`): of shape `(..., K, ...)`.
        boxes (`torch.Tensor` of shape `(..., N, 4)`): ground-truth boxes, xyxy, pixels of the model input.
        class_labels (`torch.Tensor` of shape `(..., N)`): their classes in [0, C), int64.
        distribution (`str`): "cauchy", "gaussian" or "student_t".
        freedom (`float`): degrees of freedom, read by "student_t" only.
        min_scale_ratio (`float`): see `floor_scales`.

    Returns:
        `torch.Tensor` of shape `(..., N, K)`, in 1 / pixel^4.

    Source: Eq. 2; pi sums to 1 and nothing is added under a logarithm.
    """
    scales = floor_scales(mixture.scales, mixture.boxes, min_scale_ratio)
    log_density = log_coordinate_density(boxes, mixture.boxes, scales, distribution, freedom)
    log_class = log_class_probability(mixture.class_logits, class_labels)
    return mixture.log_mixing[..., None, :] + log_density + log_class


def responsibilities(log_likelihood: Tensor) -> Tensor:
    """Return the share of each component in a ground truth's likelihood, r_k = p_k / sum_k' p_k'.

    It is also how strongly the ground truth trains the component: -dL_NLL / dlog p_k = r_k (without epsilon).

    Args:
        log_likelihood (`torch.Tensor` of shape `(..., K)`): log p_k = log(pi_k F_k P_k), in any unit.

    Returns:
        `torch.Tensor` of shape `(..., K)`: in [0, 1], sum 1.

    Source: Appendix F.2, Eq. 11.
    """
    return log_likelihood.softmax(dim=-1)


def effective_number_of_positives(log_likelihood: Tensor) -> Tensor:
    """Count the components that share a ground truth: 1 / sum_k r_k^2, r the `responsibilities`.

    n components of equal shares count as n, one that explains the ground truth alone as 1. Of the usual counts (this
    and the exponential of the entropy) this one is tied to the regulariser: exp(MCM) <= count <= exp(2 MCM), since
    the largest share is exp(-MCM); and hundreds of components with next to no share do not add up in it.

    Args:
        log_likelihood (`torch.Tensor` of shape `(..., K)`): log p_k = log(pi_k F_k P_k), in any unit.

    Returns:
        `torch.Tensor` of shape `(...)`: in [1, K].

    Source: Appendix F; the paper counts positives without a formula for a mixture.
    """
    return torch.exp(2 * log_likelihood.logsumexp(dim=-1) - (2 * log_likelihood).logsumexp(dim=-1))
