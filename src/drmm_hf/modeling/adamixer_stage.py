"""One refinement stage of AdaMixer's decoder: self-attention with positions, 3-D sampling, adaptive mixing."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import STRIDES
from .boxes import xyxy_to_xyzr
from .query_layers import DrmmSelfAttention, FeedForward, TypedLinear, overlap_bias
from .roi_pooling import as_feature_maps, image_of_row, per_level, weighted_sums


def position_embedding(xyzr: Tensor, num_features: int) -> Tensor:
    """Embed boxes by sines and cosines of x / 1000, y / 1000, z and r.

    Args:
        xyzr (`torch.Tensor` of shape `(..., 4)`): from `xyxy_to_xyzr`.
        num_features (`int`): features of each coordinate, an even number.

    Returns:
        `torch.Tensor` of shape `(..., 4 * num_features)`: coordinate after coordinate, sine and cosine by turns.
    """
    values = xyzr / torch.tensor([1000, 1000, 1, 1], dtype=xyzr.dtype, device=xyzr.device)
    pair = torch.arange(0, num_features, 2, dtype=xyzr.dtype, device=xyzr.device)
    angles = values[..., None] / 10000 ** (pair / num_features)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-3)


def sample_points(xyzr: Tensor, offsets: Tensor) -> Tensor:
    """Place sampling points relative to boxes.

    Args:
        xyzr (`torch.Tensor` of shape `(..., 4)`): from `xyxy_to_xyzr`.
        offsets (`torch.Tensor` of shape `(..., P, 3)`): in units of width and height from the centre, and of z.

    Returns:
        `torch.Tensor` of shape `(..., P, 3)`: x and y in pixels of the model input, z the log2 of a size in pixels.
    """
    z, r = xyzr[..., 2:3], xyzr[..., 3:]
    unit = torch.cat([(z - r / 2).exp2(), (z + r / 2).exp2(), torch.ones_like(z)], dim=-1)
    return xyzr[..., None, :3] + offsets * unit[..., None, :]


def sample_maps(maps: list[Tensor], points: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Sample the maps at points in x, y and scale.

    A sample is one weighted sum over the 4 neighbours on every level, so that nothing of the size of points times
    channels times levels is ever kept. Outside a map is 0.

    Args:
        maps (`list[torch.Tensor]`): maps of shape `(B, C, H_l, W_l)`, finest first; best as `FeatureMaps`.
        points (`torch.Tensor` of shape `(B * G, K, groups, P, 3)`): from `sample_points`, G rows a picture; group g of
            points reads the g-th of as many groups of channels.
        strides (`tuple[int, ...]`): pixels per cell of each map.

    Returns:
        `torch.Tensor` of shape `(B * G, K, groups, P, C / groups)`, in the type of `points`, with gradients to both.

    Source: AdaMixer's 3-D feature sampling. A level of stride s weighs exp(-(z - log2 s)^2 / 2), normalised over the
    levels.
    """
    maps = as_feature_maps(maps, points.dtype)
    batch, channels = maps[0].shape[:2]
    rows, _, groups, _, _ = points.shape
    heights, widths = maps.heights, maps.widths
    stride = per_level(strides, points.device).to(points.dtype)

    x, y, z = points[..., None].unbind(-2)
    level_weight = F.softmax(-((z - stride.log2()) ** 2) / 2, dim=-1)
    column, column_weight = _neighbours(x / stride - 0.5, widths)
    row, row_weight = _neighbours(y / stride - 0.5, heights)
    image = image_of_row(rows, batch, points.device)[:, None, None, None, None] * heights * widths + maps.starts
    group = torch.arange(groups, device=points.device)[:, None, None, None, None]
    cell = image[..., None, None] + row[..., :, None] * widths[:, None, None] + column[..., None, :]
    index = cell * groups + group
    weight = level_weight[..., None, None] * row_weight[..., :, None] * column_weight[..., None, :]

    num_terms = 4 * len(maps)
    table = maps.table.view(-1, channels // groups)
    sampled = weighted_sums(table, index.reshape(-1, num_terms), weight.reshape(-1, num_terms))
    return sampled.view(*points.shape[:-1], channels // groups)


def _neighbours(position: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Return cells (int64) and weights `(..., 2)` of linear interpolation; a cell outside the map weighs 0."""
    limit = length.to(position.dtype)
    position = torch.minimum(position.nan_to_num(nan=-1.0).clamp(min=-1), limit)
    low = position.floor().detach()
    cells, fraction = torch.stack([low, low + 1], dim=-1), position - low
    inside = (cells >= 0) & (cells < limit[:, None])
    weights = torch.stack([1 - fraction, fraction], dim=-1) * inside
    return torch.minimum(cells.clamp(min=0), limit[:, None] - 1).long(), weights


class AdaptiveMixing(nn.Module):
    """Mix each query's samples over channels, then over points, with weights generated from that query.

    Args:
        config (`DrmmConfig`): reads `hidden_size`, `num_sampling_groups`, `num_sampling_points`, `num_mixing_points`.

    Source: AdaMixer's adaptive mixing. The norms have no affine part and span both mixed dimensions.
    """

    def __init__(self, config):
        super().__init__()
        self.groups, self.points_in = config.num_sampling_groups, config.num_sampling_points
        self.points_out, self.channels = config.num_mixing_points, config.hidden_size // config.num_sampling_groups
        num_weights = self.channels**2 + self.points_in * self.points_out
        self.generator = nn.Linear(config.hidden_size, self.groups * num_weights)
        self.projection = nn.Linear(self.points_out * config.hidden_size, config.hidden_size)

    def forward(self, features: Tensor, samples: Tensor) -> Tensor:
        """Mix.

        Args:
            features (`torch.Tensor` of shape `(B, K, hidden_size)`): query features.
            samples (`torch.Tensor` of shape `(B, K, groups, points_in, channels)`): from `sample_maps`.

        Returns:
            `torch.Tensor` of shape `(B, K, hidden_size)`.
        """
        weights = self.generator(features).unflatten(-1, (self.groups, -1))
        over_channels, over_points = weights.split([self.channels**2, self.points_in * self.points_out], dim=-1)
        x = samples.to(weights.dtype) @ over_channels.unflatten(-1, (self.channels, self.channels))
        x = F.relu(F.layer_norm(x, x.shape[-2:]), inplace=True)
        x = over_points.unflatten(-1, (self.points_out, self.points_in)).to(x.dtype) @ x
        x = F.relu(F.layer_norm(x, x.shape[-2:]), inplace=True)
        return self.projection(x.flatten(2))


class AdaMixerStage(nn.Module):
    """Update the query features from samples around their boxes, at every scale.

    Args:
        config (`DrmmConfig`): reads the attention, sampling, mixing and feed-forward sizes.

    Source: AdaMixer; the paper builds D-RMM on it without a change of structure.
    """

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.groups, self.points = config.num_sampling_groups, config.num_sampling_points
        self.iof_scale = nn.Parameter(torch.empty(config.num_attention_heads))
        self.attention = DrmmSelfAttention(config)
        self.attention_norm = nn.LayerNorm(width)
        self.sampling_offset = TypedLinear(width, self.groups * self.points * 3)
        self.mixing = AdaptiveMixing(config)
        self.mixing_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, maps: list[Tensor], boxes: Tensor, features: Tensor) -> Tensor:
        """Refine the features once.

        Args:
            maps (`list[torch.Tensor]`): maps `(B, hidden_size, H_l, W_l)` at strides 4, 8, 16, 32.
            boxes (`torch.Tensor` of shape `(B * G, K, 4)`): xyxy, pixels of the model input, G groups of queries a
                picture; no gradient flows into them.
            features (`torch.Tensor` of shape `(B * G, K, hidden_size)`): query features.

        Returns:
            `torch.Tensor` of shape `(B * G, K, hidden_size)`.
        """
        boxes = boxes.detach()
        xyzr = xyxy_to_xyzr(boxes)
        placed = features + position_embedding(xyzr, features.shape[-1] // 4).to(features.dtype)
        bias = overlap_bias(boxes, self.iof_scale)
        features = self.attention_norm(placed + self.dropout(self.attention(placed, bias)[0]))
        with torch.autocast(boxes.device.type, enabled=False):
            offsets = self.sampling_offset(features, boxes.dtype)
            points = sample_points(xyzr, offsets.unflatten(-1, (-1, 3)))
            samples = sample_maps(maps, points.unflatten(-2, (self.groups, self.points)), STRIDES)
        features = self.mixing_norm(features + self.dropout(self.mixing(features, samples)))
        return self.feed_forward_norm(features + self.dropout(self.feed_forward(features)))


def initial_offset_bias(num_points: int, groups: int) -> Tensor:
    """Place the sampling points before training.

    Args:
        num_points (`int`): points P of a group.
        groups (`int`): groups, each with the same layout if it is regular.

    Returns:
        `torch.Tensor` of shape `(groups, P, 3)`: offsets x and y in (-0.5, 0.5), a regular grid of cell centres (x
        varying slowest) where P is a square number and random otherwise; offset z is -1.
    """
    side = round(num_points**0.5)
    bias = torch.full((groups, num_points, 3), -1.0)
    if side**2 == num_points:
        centres = (torch.arange(side) + 0.5) / side - 0.5
        bias[..., :2] = torch.cartesian_prod(centres, centres).view(num_points, 2)
    else:
        bias[..., :2].uniform_(-0.5, 0.5)
    return bias
