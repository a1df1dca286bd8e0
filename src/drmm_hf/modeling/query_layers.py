"""What both decoders share: self-attention among the queries, its overlap bias, and the linear parts of a stage."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attend in plain torch operations and return the weights too; `(B, heads, K, D)` tensors."""
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.dropout(F.softmax(weights, dim=-1), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class DrmmSelfAttention(nn.Module):
    """Multi-head attention among the queries of a picture.

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

    def forward(self, features: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            features (`torch.Tensor` of shape `(B, K, hidden_size)`): query, key and value.
            bias (`torch.Tensor` of shape `(B, heads, K, K)`, *optional*): added to the logits of query i and key j.

        Returns:
            `tuple`: attended features `(B, K, hidden_size)` and, with eager attention, the weights `(B, heads, K, K)`.
        """
        query, key, value = self.in_proj(features).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, weights = attention(
            self,
            query,
            key,
            value,
            None if bias is None else bias.to(query.dtype),
            scaling=self.scaling,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.out_proj(attended.flatten(2)), weights


def log_overlap(boxes: Tensor) -> Tensor:
    """Return log(IoF + 1e-7): how much of box i lies in box j.

    Args:
        boxes (`torch.Tensor` of shape `(..., K, 4)`): xyxy, pixels.

    Returns:
        `torch.Tensor` of shape `(..., K, K)`: IoF_ij is the intersection over the area of box i, at least 1e-6.
    """
    left, top, right, bottom = boxes.unbind(-1)

    def common(start: Tensor, end: Tensor) -> Tensor:
        start = torch.maximum(start[..., :, None], start[..., None, :])
        return (torch.minimum(end[..., :, None], end[..., None, :]) - start).clamp(min=0)

    area = ((right - left) * (bottom - top)).clamp(min=1e-6)
    return (common(left, right) * common(top, bottom) / area[..., None] + 1e-7).log()


def overlap_bias(boxes: Tensor, scales: Tensor) -> Tensor:
    """Return what AdaMixer adds to the attention between queries: scale * log(IoF + 1e-7) in each head.

    Args:
        boxes (`torch.Tensor` of shape `(B, K, 4)`): xyxy, pixels.
        scales (`torch.Tensor` of shape `(heads,)`): learnt.

    Returns:
        `torch.Tensor` of shape `(B, heads, K, K)`.
    """
    return scales[:, None, None] * log_overlap(boxes)[:, None].to(scales.dtype)


class TypedLinear(nn.Linear):
    """A linear layer that computes in the type asked for, whatever the type of its weights."""

    def forward(self, features: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the outputs in `dtype`, by default that of the features."""
        dtype = dtype or features.dtype
        return F.linear(features.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class FeedForward(nn.Sequential):
    """Linear, ReLU, dropout, linear.

    Args:
        config (`DrmmConfig`): reads `hidden_size`, `intermediate_size`, `dropout`.
    """

    def __init__(self, config):
        super().__init__(
            nn.Linear(config.hidden_size, config.intermediate_size),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.intermediate_size, config.hidden_size),
        )
