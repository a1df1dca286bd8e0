"""Prediction heads: from query features and input boxes to the parameters of the stage's prediction."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .boxes import side_lengths
from .mixture import MixtureParameters, log_mixing_coefficients


def _branch(width: int, num_layers: int) -> nn.Sequential:
    """Stack `num_layers` of linear without bias, layer norm, ReLU."""
    layers = [(nn.Linear(width, width, bias=False), nn.LayerNorm(width), nn.ReLU()) for _ in range(num_layers)]
    return nn.Sequential(*(module for layer in layers for module in layer))


class MixtureHead(nn.Module):
    """Predict one mixture component from each query.

    Objectness and classes, deltas and scales are separate layers, so that a new set of classes keeps the objectness.

    Args:
        config (`DrmmConfig`): reads `hidden_size`, `num_labels`, `num_class_layers`, `num_box_layers`,
            `box_delta_unit`, `box_delta_factor`, `box_scale_factor`.

    Source: Figure 4; depths and bias-free branches are the public code's.
    """

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.class_branch = _branch(width, config.num_class_layers)
        self.box_branch = _branch(width, config.num_box_layers)
        self.objectness = nn.Linear(width, 1)
        self.classifier = nn.Linear(width, config.num_labels)
        self.box_delta = nn.Linear(width, 4)
        self.box_scale = nn.Linear(width, 4)
        self.box_delta_unit = config.box_delta_unit
        self.box_delta_factor = config.box_delta_factor
        self.box_scale_factor = config.box_scale_factor

    def forward(self, features: Tensor, boxes: Tensor) -> MixtureParameters:
        """Predict the mixture.

        Args:
            features (`torch.Tensor` of shape `(B, K, hidden_size)`): query features, any floating type.
            boxes (`torch.Tensor` of shape `(B, K, 4)`): input boxes of the stage, xyxy, pixels, at least float32.

        Returns:
            `MixtureParameters`: in the type of `boxes`, under autocast too: bfloat16 would lose whole pixels.
        """
        class_features, box_features = self.class_branch(features), self.box_branch(features)
        with torch.autocast(features.device.type, enabled=False):
            raw_scale = _linear(self.box_scale, box_features, boxes.dtype)
            delta = _linear(self.box_delta, box_features, boxes.dtype)
            objectness_logits = _linear(self.objectness, class_features, boxes.dtype).squeeze(-1)
            scales = F.softplus(raw_scale)
            if self.box_delta_unit == "box":
                sides = side_lengths(boxes).detach().abs().clamp(min=1)
                delta, scales = delta * self.box_delta_factor * sides, scales * self.box_scale_factor * sides
            return MixtureParameters(
                boxes=boxes + delta,
                scales=scales,
                class_logits=_linear(self.classifier, class_features, boxes.dtype),
                objectness_logits=objectness_logits,
                log_mixing=log_mixing_coefficients(objectness_logits),
            )


def _linear(layer: nn.Linear, features: Tensor, dtype: torch.dtype) -> Tensor:
    """Apply a linear layer in `dtype`, whatever the type of its weights."""
    return F.linear(features.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))


HEADS = {"mixture": MixtureHead}
