"""RoI pooling over all pyramid levels as one sparse linear operator.

Every pooled value is a weighted sum of map cells: 4 neighbours of each sample of a bin. Indices and weights have a
closed form in the boxes, which carry no gradient here, so pooling is a single `embedding_bag` over the table of all
cells: exact to `torchvision.ops.roi_align(aligned=True)`, without data-dependent shapes and without torchvision's
serial CPU backward.
"""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class FeatureMaps(list):
    """Maps of shape `(B, C, H_l, W_l)`, finest first, that carry all their cells as the rows of one table.

    The decoder builds it once for its stages: a table a stage costs time and, where points have gradients, memory.

    Args:
        maps (`list[torch.Tensor]`): the maps.
        dtype (`torch.dtype`, *optional*): type of the table, that of the boxes: bfloat16 would round bilinear weights,
            and the sums of the backward, to 8 bits. By default that of the maps.
        table (`torch.Tensor`, *optional*): the table, where it is there already.

    Attributes:
        table (`torch.Tensor` of shape `(sum of B * H_l * W_l, C)`): level by level, picture by picture, row by row.
        heights (`torch.Tensor` of shape `(L,)`): cells of each map from top to bottom, int64.
        widths (`torch.Tensor` of shape `(L,)`): from left to right.
        starts (`torch.Tensor` of shape `(L,)`): row of the table where each level starts.
    """

    def __init__(self, maps: Iterable[Tensor], dtype: torch.dtype | None = None, table: Tensor | None = None):
        super().__init__(maps)
        if table is None:
            table = torch.cat([level_map.permute(0, 2, 3, 1).flatten(0, 2) for level_map in self]).to(dtype)
        self.table = table
        shapes, device = [level_map.shape for level_map in self], self.table.device
        counts = [batch * height * width for batch, _, height, width in shapes]
        self.heights = per_level([shape[2] for shape in shapes], device)
        self.widths = per_level([shape[3] for shape in shapes], device)
        self.starts = per_level([sum(counts[:level]) for level in range(len(self))], device)


def as_feature_maps(maps: list[Tensor], dtype: torch.dtype) -> FeatureMaps:
    """Return the maps with their table, which a plain list of maps gets here, in `dtype`."""
    return maps if isinstance(maps, FeatureMaps) else FeatureMaps(maps, dtype)


def per_level(values: list[int], device: torch.device) -> Tensor:
    """Return one int64 number a level, `(L,)`: filled on the device, so that it neither waits nor fixes a size."""
    return torch.cat([torch.full((1,), value, dtype=torch.int64, device=device) for value in values])


def roi_levels(boxes: Tensor, num_levels: int, base: float) -> Tensor:
    """Choose the pyramid level of each box by the square root of its area.

    Args:
        boxes (`torch.Tensor` of shape `(..., 4)`): xyxy, pixels of the model input.
        num_levels (`int`): number of levels.
        base (`float`): boxes from `2 * base` pixels on leave the finest level.

    Returns:
        `torch.Tensor` of shape `(...)`: level in [0, num_levels), or -1 (no level) where exactly one side is inverted
        or the box is not a number.

    Source: public code, after Eq. 1 of the feature pyramid paper.
    """
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    level = torch.log2(area.clamp(min=0).sqrt() / base + 1e-6).floor().clamp(0, num_levels - 1).long()
    return level.masked_fill(~(area >= 0), -1)


def pool_regions(
    maps: list[Tensor], boxes: Tensor, strides: tuple[int, ...], size: int, sampling_ratio: int, level_base: float
) -> Tensor:
    """Pool a `size` x `size` grid of features for every box from its level.

    Args:
        maps (`list[torch.Tensor]`): pyramid maps of shape `(B, C, H_l, W_l)`, finest first; best as `FeatureMaps`.
        boxes (`torch.Tensor` of shape `(B * G, K, 4)`): xyxy, pixels of the model input, G rows a picture; detached.
        strides (`tuple[int, ...]`): pixels per cell of each map.
        size (`int`): bins along a side.
        sampling_ratio (`int`): samples along a side of a bin.
        level_base (`float`): see `roi_levels`.

    Returns:
        `torch.Tensor` of shape `(B * G, K, size * size, C)`, in the type of the boxes: 0 for a box without a level.

    Source: RoIAlign, half-pixel aligned, average over the samples.
    """
    boxes = boxes.detach()
    maps = as_feature_maps(maps, boxes.dtype)
    batch, channels = maps[0].shape[:2]
    levels = roi_levels(boxes, len(maps), level_base)
    level_of = levels.clamp(min=0)
    height, width, start, stride = (
        values[level_of][..., None, None]
        for values in (maps.heights, maps.widths, maps.starts, per_level(strides, boxes.device))
    )

    scaled = boxes / stride.squeeze(-1) - 0.5
    column, column_weight = _axis_samples(scaled[..., 0], scaled[..., 2], width, size, sampling_ratio)
    row, row_weight = _axis_samples(scaled[..., 1], scaled[..., 3], height, size, sampling_ratio)

    image = image_of_row(boxes.shape[0], batch, boxes.device)[:, None, None, None] * height * width + start
    row = (row * width + image)[..., :, None, :, None]
    index = row + column[..., None, :, None, :]
    weight = row_weight[..., :, None, :, None] * column_weight[..., None, :, None, :]
    weight = weight * (levels >= 0)[..., None, None, None, None]

    num_terms = index.shape[-1] * index.shape[-2]
    pooled = weighted_sums(maps.table, index.reshape(-1, num_terms), weight.reshape(-1, num_terms))
    return pooled.view(*boxes.shape[:2], size * size, channels)


def weighted_sums(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Sum rows of a table with weights.

    Args:
        table (`torch.Tensor` of shape `(R, D)`): the rows.
        index (`torch.Tensor` of shape `(N, T)`): rows of each sum, int64.
        weight (`torch.Tensor` of shape `(N, T)`): their weights, in the type of the table.

    Returns:
        `torch.Tensor` of shape `(N, D)`, with gradients to table and weights.
    """
    on_cpu = table.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and index.shape[1] <= len(table):  # a sparse matrix has no more entries in a row than columns
        return _WeightedSums.apply(table, index, weight)
    return F.embedding_bag(index, table, mode="sum", per_sample_weights=weight)


class _WeightedSums(torch.autograd.Function):
    """`embedding_bag` with a backward that reads memory in order; on a CPU torch's own takes several times as long."""

    @staticmethod
    def forward(ctx, table, index, weight):
        ctx.save_for_backward(table, index, weight)
        return F.embedding_bag(index, table, mode="sum", per_sample_weights=weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        table, index, weight = ctx.saved_tensors
        num_rows, num_terms, grad = len(table), index.shape[1], grad.contiguous()
        to_table = to_weight = None
        if ctx.needs_input_grad[0]:  # the transposed sum: for each row of the table, over the terms that read it
            rows, terms = index.flatten().sort()
            starts = torch.searchsorted(rows, torch.arange(num_rows))
            to_table = F.embedding_bag(
                terms // num_terms, grad, starts, mode="sum", per_sample_weights=weight.flatten()[terms]
            )
        if ctx.needs_input_grad[2]:  # products of gradients and rows, at the places of the indices only
            ends, shape = torch.arange(0, index.numel() + 1, num_terms), (len(index), num_rows)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
                # Unsorted and repeated columns break an invariant, which this product does not need.
                places = torch.sparse_csr_tensor(
                    ends, index.flatten(), weight.flatten(), shape, check_invariants=False
                )
            to_weight = torch.sparse.sampled_addmm(places, grad, table.t(), beta=0).values().view_as(weight)
        return to_table, None, to_weight


def image_of_row(num_rows: int, num_images: int, device: torch.device) -> Tensor:
    """Return the picture of each row of queries, `(num_rows,)`: groups of one picture follow each other."""
    return torch.arange(num_rows, device=device) // (num_rows // num_images)


def _axis_samples(start: Tensor, end: Tensor, length: Tensor, size: int, ratio: int) -> tuple[Tensor, Tensor]:
    """Return cells and weights of the bilinear samples along one axis, averaged over the samples of a bin.

    Args:
        start (`torch.Tensor` of shape `(B, K)`): left or top sides of the boxes in cells, half-pixel shifted.
        end (`torch.Tensor` of shape `(B, K)`): right or bottom sides.
        length (`torch.Tensor` of shape `(B, K, 1, 1)`): cells of the map along this axis.
        size (`int`): bins.
        ratio (`int`): samples a bin.

    Returns:
        `tuple`: int64 cells and weights of shape `(B, K, size, 2 * ratio)`. Samples that are not numbers or lie more
        than one cell outside the map have weight 0; those within one cell take the border's value.
    """
    steps = (torch.arange(size * ratio, device=start.device, dtype=start.dtype) + 0.5) / ratio
    position = start[..., None] + steps * ((end - start) / size)[..., None]
    position = position.unflatten(-1, (size, ratio))
    inside = (position >= -1) & (position <= length)
    position = torch.minimum(position.clamp(min=0), (length - 1).to(position.dtype)).nan_to_num()
    low = position.floor()
    fraction = position - low
    low = low.long()
    cells = torch.cat([low, torch.minimum(low + 1, length - 1)], dim=-1)
    weights = torch.cat([1 - fraction, fraction], dim=-1) * inside.repeat(1, 1, 1, 2) / ratio
    return cells, weights
