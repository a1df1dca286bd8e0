"""One refinement stage of Sparse R-CNN's decoder: RoI pooling, self-attention, dynamic convolution, feed-forward."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import STRIDES
from .query_layers import DrmmSelfAttention, FeedForward, overlap_bias
from .roi_pooling import pool_regions


class DynamicConv(nn.Module):
    """Filter each query's region with weights generated from that query.

    Args:
        config (`DrmmConfig`): reads `hidden_size`, `dynamic_size`, `roi_size`.

    Source: Sparse R-CNN's dynamic instance interaction.
    """

    def __init__(self, config):
        super().__init__()
        self.width, self.inner = config.hidden_size, config.dynamic_size
        self.generator = nn.Linear(self.width, 2 * self.width * self.inner)
        self.norm_inner = nn.LayerNorm(self.inner)
        self.norm_outer = nn.LayerNorm(self.width)
        self.projection = nn.Linear(self.width * config.roi_size**2, self.width)
        self.norm_projection = nn.LayerNorm(self.width)

    def forward(self, features: Tensor, regions: Tensor) -> Tensor:
        """Interact.

        Args:
            features (`torch.Tensor` of shape `(B, K, hidden_size)`): query features.
            regions (`torch.Tensor` of shape `(B, K, roi_size ** 2, hidden_size)`): pooled regions.

        Returns:
            `torch.Tensor` of shape `(B, K, hidden_size)`.
        """
        first, second = self.generator(features).chunk(2, dim=-1)
        x = regions.to(first.dtype) @ first.unflatten(-1, (self.width, self.inner))
        x = F.relu(self.norm_inner(x))
        x = x @ second.unflatten(-1, (self.inner, self.width)).to(x.dtype)
        x = F.relu(self.norm_outer(x))
        return F.relu(self.norm_projection(self.projection(x.flatten(2))))


class SparseRcnnStage(nn.Module):
    """Update the query features from the regions that their boxes cover.

    Args:
        config (`DrmmConfig`): reads the RoI, attention, dynamic convolution and feed-forward sizes.

    Source: Sec. 3.2; Sparse R-CNN.
    """

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.roi_size = config.roi_size
        self.config = config
        self.iof_scale = nn.Parameter(torch.empty(config.num_attention_heads)) if config.overlap_attention else None
        self.attention = DrmmSelfAttention(config)
        self.attention_norm = nn.LayerNorm(width)
        self.dynamic_conv = DynamicConv(config)
        self.dynamic_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, maps: list[Tensor], boxes: Tensor, features: Tensor) -> Tensor:
        """Refine the features once.

        Args:
            maps (`list[torch.Tensor]`): pyramid maps `(B, hidden_size, H_l, W_l)` at strides 4, 8, 16, 32.
            boxes (`torch.Tensor` of shape `(B * G, K, 4)`): xyxy, pixels of the model input, G groups of queries a
                picture; no gradient flows into them.
            features (`torch.Tensor` of shape `(B * G, K, hidden_size)`): query features.

        Returns:
            `torch.Tensor` of shape `(B * G, K, hidden_size)`.
        """
        with torch.autocast(boxes.device.type, enabled=False):
            config = self.config
            regions = pool_regions(
                maps, boxes, STRIDES, self.roi_size, config.roi_sampling_ratio, config.roi_level_base
            )
        bias = overlap_bias(boxes.detach(), self.iof_scale) if self.iof_scale is not None else None
        features = self.attention_norm(features + self.dropout(self.attention(features, bias)[0]))
        features = self.dynamic_norm(features + self.dropout(self.dynamic_conv(features, regions)))
        return self.feed_forward_norm(features + self.dropout(self.feed_forward(features)))
