"""Eq. 5 and Eq. 8 without the matrix of all ground truths and components: the default loss, fast, in bounded memory.

`component_sums` gives what `criteria` gets from `log_likelihood_factors` and two reductions over components. Its
gradient is in closed form, and both directions take the ground truths in blocks that stay in a processor's cache.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .mixture import SMALLEST_SCALE


# Entries of the largest matrix held at once: what a processor's cache holds; on a GPU, enough to keep it busy.
BLOCK_ENTRIES = {"cpu": 2**18, "cuda": 2**26}
# Ground truths in a block at least: what is done once a block and component is spread over them.
BLOCK_OBJECTS = 16


class ComponentSums(NamedTuple):
    """What the likelihood criteria need of q_k = pi_k F_k P_k, each of shape `(S, B, N)`.

    Attributes:
        log_sum (`torch.Tensor`): log sum_k q_k, the likelihood of Eq. 5.
        log_share_sum (`torch.Tensor`): the same number, of which the stopped factors see no gradient: Eq. 8's divisor.
        log_largest (`torch.Tensor`): log max_k q_k, likewise: Eq. 8's dividend.
    """

    log_sum: Tensor
    log_share_sum: Tensor
    log_largest: Tensor


def component_sums(
    coordinates: Tensor,
    class_labels: Tensor,
    boxes: Tensor,
    scales: Tensor,
    log_mixing: Tensor,
    class_logits: Tensor,
    *,
    unit: float = 1.0,
    class_exponent: float = 1.0,
    stop_gradient: Sequence[str] = (),
) -> ComponentSums:
    """Sum the Cauchy mixture's components at each ground truth, and find the largest.

    Args:
        coordinates (`torch.Tensor` of shape `(B, N, 4)`): ground-truth boxes, xyxy, pixels of the model input.
        class_labels (`torch.Tensor` of shape `(B, N)`): their classes in [0, C), int64.
        boxes (`torch.Tensor` of shape `(S, B, K, 4)`): locations mu, xyxy, pixels.
        scales (`torch.Tensor` of shape `(S, B, K, 4)`): scales gamma, pixels, floor already applied.
        log_mixing (`torch.Tensor` of shape `(S, B, K)`): log pi.
        class_logits (`torch.Tensor` of shape `(S, B, K, C)`): before the softmax.
        unit (`float`): density in which F is measured, see `mixture.log_coordinate_density`.
        class_exponent (`float`): power applied to the class probability.
        stop_gradient (`Sequence[str]`): factors, any of "pi", "F", "P", that Eq. 8 passes no gradient.

    Returns:
        `ComponentSums`: equal to the reductions of `criteria.log_component_likelihood`, with gradients to the last
        four tensors.

    Source: Eq. 2, 3, 5 and 8, Table 7.
    """
    sums = _ComponentSums.apply(
        coordinates.movedim(-1, 0).contiguous(),  # a stride of 4 would cost several times the arithmetic
        class_labels,
        boxes.movedim(-1, 0).contiguous(),
        scales.clamp(min=SMALLEST_SCALE).movedim(-1, 0).contiguous(),
        log_mixing,
        class_logits,
        unit,
        class_exponent,
        tuple(stop_gradient),
    )
    if {"pi", "F", "P"} <= set(stop_gradient):
        sums = (sums[0], sums[1].detach(), sums[2].detach())
    return ComponentSums(*sums)


class _ComponentSums(torch.autograd.Function):
    """`component_sums` of sides that stand first: `(4, B, N)` and `(4, S, B, K)`.

    Let r_ik = q_ik / sum_k q_ik and h_i the gradients of a ground truth's three results. Then g_ik, the gradient of
    log q_ik, is (h_sum + h_share_sum) r_ik, and h_largest more where q_ik is the largest; a stopped factor sees only
    h_sum r_ik. With d = b_i - mu_k and v = d^2 + s_k^2 of one side, log F has the derivatives 2 d / v by mu and
    1 / s - 2 s / v by s.
    """

    @staticmethod
    def forward(ctx, coordinates, class_labels, boxes, scales, log_mixing, class_logits, unit, exponent, stopped):
        probability, log_total = _softmax(class_logits)
        inputs = (coordinates, class_labels, boxes, scales, log_mixing - exponent * log_total, class_logits)
        shape = (*log_mixing.shape[:2], class_labels.shape[1])
        log_sum, log_largest = log_mixing.new_empty(shape), log_mixing.new_empty(shape)
        largest = torch.empty(shape, dtype=torch.int64, device=log_mixing.device)
        share, blocks = None, _blocks(log_mixing, class_labels.shape[1])
        for block in blocks:
            log_likelihood = _log_likelihood(*inputs, block, unit, exponent)
            most, largest[..., block] = log_likelihood.max(dim=-1)
            share = log_likelihood.sub_(most[..., None]).exp_()
            sums = share.sum(dim=-1)
            log_sum[..., block], log_largest[..., block] = most + sums.log(), most
        # Of one block they are small enough to keep.
        share = share.div_(sums[..., None]) if len(blocks) == 1 and ctx.needs_input_grad[2] else None
        ctx.save_for_backward(*inputs, probability, log_sum, largest, share)
        ctx.settings = unit, exponent, stopped
        return log_sum, log_sum.clone(), log_largest

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sum, grad_share_sum, grad_largest):
        *inputs, probability, log_sum, largest, kept = ctx.saved_tensors
        coordinates, class_labels, boxes, scales, log_mixing, _ = inputs
        unit, exponent, stopped = ctx.settings
        to_mixing, of_class = torch.zeros_like(log_mixing), torch.zeros_like(log_mixing)
        to_boxes, to_scales = torch.zeros_like(boxes), torch.zeros_like(scales)
        to_logits = torch.zeros_like(probability)
        for block in _blocks(log_mixing, class_labels.shape[1]):
            if kept is None:
                share = _log_likelihood(*inputs, block, unit, exponent).sub_(log_sum[..., block, None]).exp_()
            else:
                share = kept
            grad = share * (grad_sum + grad_share_sum)[..., block, None]
            grad.scatter_add_(-1, largest[..., block, None], grad_largest[..., block, None])
            of_stopped = share * grad_sum[..., block, None] if stopped else grad
            of = {factor: of_stopped if factor in stopped else grad for factor in ("pi", "F", "P")}

            to_mixing += of["pi"].sum(dim=-2)
            of_class += of["P"].sum(dim=-2)
            to_logits.scatter_add_(-1, _index_of_class(class_labels[:, block], log_mixing), of["P"].transpose(-1, -2))
            total = of["F"].sum(dim=-2)
            for side in range(4):
                distance, spread = _distance_and_spread(coordinates[side, :, block], boxes[side], scales[side])
                weight = torch.div(of["F"], spread, out=spread)
                to_scales[side] += total / scales[side] - 2 * scales[side] * weight.sum(dim=-2)
                to_boxes[side] += 2 * weight.mul_(distance).sum(dim=-2)
        to_logits.addcmul_(probability, of_class[..., None], value=-1)
        if exponent != 1:
            to_logits *= exponent
        return None, None, to_boxes, to_scales, to_mixing, to_logits, None, None, None


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the softmax, and the logarithm of its divisor: it is that of the largest entry, whose share is no 0."""
    probability = logits.softmax(dim=-1)
    return probability, logits.amax(dim=-1) - probability.amax(dim=-1).log()


def _blocks(log_mixing: Tensor, num_objects: int) -> list[slice]:
    """Cut the ground truths into blocks of `BLOCK_ENTRIES`, or of `BLOCK_OBJECTS` where those are more."""
    budget = BLOCK_ENTRIES.get(log_mixing.device.type, BLOCK_ENTRIES["cuda"])
    step = max(BLOCK_OBJECTS, budget // max(1, log_mixing.numel()))
    return [slice(start, start + step) for start in range(0, num_objects, step)]


def _log_likelihood(coordinates, class_labels, boxes, scales, log_rest, class_logits, block, unit, exponent):
    """Return log(pi_k F_k P_k / unit) of a block of n ground truths, `(S, B, n, K)`; log_rest is what all share."""
    logits = class_logits.gather(-1, _index_of_class(class_labels[:, block], log_rest)).transpose(-1, -2)
    result = torch.add(log_rest[..., None, :], logits, alpha=exponent)
    # Two sides a logarithm: half the cost of one each, and what no picture makes underflow. There it is held.
    for pair, unit_of_pair in (((0, 1), unit), ((2, 3), 1.0)):
        densities = []
        for side in pair:
            spread = _distance_and_spread(coordinates[side, :, block], boxes[side], scales[side])[1]
            densities.append(torch.div((scales[side] / math.pi)[..., None, :], spread, out=spread))
        density = densities[0].mul_(densities[1]).div_(unit_of_pair)
        result += density.clamp_(min=torch.finfo(density.dtype).tiny).log_()
    return result


def _distance_and_spread(coordinate: Tensor, location: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance d of each coordinate from each location, and d^2 + s^2, both `(S, B, n, K)`."""
    distance = coordinate[..., :, None] - location[..., None, :]
    return distance, torch.addcmul(scale.square()[..., None, :], distance, distance)


def _index_of_class(class_labels: Tensor, log_mixing: Tensor) -> Tensor:
    """Expand labels `(B, n)` to `(S, B, K, n)`, the index of each ground truth's class in the class logits."""
    return class_labels[:, None].expand(*log_mixing.shape, class_labels.shape[-1])
