"""One refinement stage of Sparse R-CNN's decoder: RoI pooling, self-attention, dynamic convolution, feed-forward."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .backbone import STRIDES
from .roi_pooling import pool_regions


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attend in plain torch operations and return the weights too; `(B, heads, K, D)` tensors."""
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.dropout(F.softmax(weights, dim=-1), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class DrmmSelfAttention(nn.Module):
    """Multi-head attention among the queries of a picture, without positions.

    Args:
        config (`DrmmConfig`): reads `hidden_size`, `num_attention_heads`, `attention_dropout`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_dropout
        self.is_causal = False
        self.in_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return attended features `(B, K, hidden_size)` and, with eager attention, the weights `(B, heads, K, K)`."""
        query, key, value = self.in_proj(features).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, weights = attention(
            self, query, key, value, None, scaling=self.scaling, dropout=self.dropout if self.training else 0.0
        )
        return self.out_proj(attended.flatten(2)), weights


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
        self.roi_sampling_ratio = config.roi_sampling_ratio
        self.roi_level_base = config.roi_level_base
        self.attention = DrmmSelfAttention(config)
        self.attention_norm = nn.LayerNorm(width)
        self.dynamic_conv = DynamicConv(config)
        self.dynamic_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, config.intermediate_size),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.intermediate_size, width),
        )
        self.feed_forward_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, maps: list[Tensor], boxes: Tensor, features: Tensor) -> Tensor:
        """Refine the features once.

        Args:
            maps (`list[torch.Tensor]`): pyramid maps `(B, hidden_size, H_l, W_l)` at strides 4, 8, 16, 32.
            boxes (`torch.Tensor` of shape `(B, K, 4)`): xyxy, pixels of the model input; no gradient flows into them.
            features (`torch.Tensor` of shape `(B, K, hidden_size)`): query features.

        Returns:
            `torch.Tensor` of shape `(B, K, hidden_size)`.
        """
        with torch.autocast(boxes.device.type, enabled=False):
            regions = pool_regions(maps, boxes, STRIDES, self.roi_size, self.roi_sampling_ratio, self.roi_level_base)
        features = self.attention_norm(features + self.dropout(self.attention(features)[0]))
        features = self.dynamic_norm(features + self.dropout(self.dynamic_conv(features, regions)))
        return self.feed_forward_norm(features + self.dropout(self.feed_forward(features)))


STAGES = {"sparse_rcnn": SparseRcnnStage}
