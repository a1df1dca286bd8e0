"""Prediction heads: from query features and input boxes to the parameters of the stage's prediction."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .boxes import BoxPredictions, move_cxcywh, move_xyzr, side_lengths
from .mixture import MixtureParameters, log_mixing_coefficients
from .query_layers import TypedLinear


class PredictionBranches(nn.Module):
    """The layers before the predictions, one branch for classes and one for boxes: linear, layer norm, ReLU.

    Args:
        config (`DrmmConfig`): reads `hidden_size`, `num_class_layers`, `num_box_layers`, `decoder_type`: AdaMixer's
            linear layers have a bias, Sparse R-CNN's have none.
    """

    def __init__(self, config):
        super().__init__()
        width, bias = config.hidden_size, config.decoder_type == "adamixer"

        def branch(num_layers: int) -> nn.Sequential:
            layers = [(nn.Linear(width, width, bias=bias), nn.LayerNorm(width), nn.ReLU()) for _ in range(num_layers)]
            return nn.Sequential(*(module for layer in layers for module in layer))

        self.class_branch = branch(config.num_class_layers)
        self.box_branch = branch(config.num_box_layers)


class BoxHead(PredictionBranches):
    """Predict a box and independent class scores from each query, as the baselines do.

    Args:
        config (`DrmmConfig`): reads `hidden_size`, `num_labels`, `num_class_layers`, `num_box_layers`,
            `decoder_type`, which decides what a delta means, and `max_log_size_delta`.

    Source: Sparse R-CNN; AdaMixer.
    """

    def __init__(self, config):
        super().__init__(config)
        self.classifier = TypedLinear(config.hidden_size, config.num_labels)
        self.box_delta = TypedLinear(config.hidden_size, 4)
        self.decoder_type = config.decoder_type
        self.config = config

    def forward(self, features: Tensor, boxes: Tensor) -> BoxPredictions:
        """Predict.

        Args:
            features (`torch.Tensor` of shape `(B, K, hidden_size)`): query features, any floating type.
            boxes (`torch.Tensor` of shape `(B, K, 4)`): input boxes of the stage, xyxy, pixels, at least float32.

        Returns:
            `BoxPredictions`: in the type of `boxes`, under autocast too.
        """
        class_features, box_features = self.class_branch(features), self.box_branch(features)
        with torch.autocast(features.device.type, enabled=False):
            delta = self.box_delta(box_features, boxes.dtype)
            if self.decoder_type == "adamixer":
                moved = move_xyzr(boxes, delta)
            else:
                moved = move_cxcywh(boxes, delta, self.config.max_log_size_delta)
            return BoxPredictions(moved, self.classifier(class_features, boxes.dtype))


class MixtureHead(PredictionBranches):
    """Predict one mixture component from each query.

    Objectness and classes, deltas and scales are separate layers, so that a new set of classes keeps the objectness.

    Args:
        config (`DrmmConfig`): reads `hidden_size`, `num_labels`, `num_class_layers`, `num_box_layers`, `decoder_type`,
            `box_delta_unit`, `box_delta_factor`, `box_scale_factor`. With AdaMixer's decoder mu is the box that its
            own refinement gives.

    Source: Figure 4; depths and bias-free branches are the public code's.
    """

    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        self.objectness = TypedLinear(width, 1)
        self.classifier = TypedLinear(width, config.num_labels)
        self.box_delta = TypedLinear(width, 4)
        self.box_scale = TypedLinear(width, 4)
        self.decoder_type = config.decoder_type
        self.config = config

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
            raw_scale = self.box_scale(box_features, boxes.dtype)
            delta = self.box_delta(box_features, boxes.dtype)
            objectness_logits = self.objectness(class_features, boxes.dtype).squeeze(-1)
            scales = F.softplus(raw_scale)
            if self.config.box_delta_unit == "box":
                sides = side_lengths(boxes).detach().abs().clamp(min=1)
                scales = scales * self.config.box_scale_factor * sides
            if self.decoder_type == "adamixer":
                locations = move_xyzr(boxes, delta)
            elif self.config.box_delta_unit == "box":
                locations = boxes + delta * self.config.box_delta_factor * sides
            else:
                locations = boxes + delta
            return MixtureParameters(
                boxes=locations,
                scales=scales,
                class_logits=self.classifier(class_features, boxes.dtype),
                objectness_logits=objectness_logits,
                log_mixing=log_mixing_coefficients(objectness_logits),
            )


HEADS = {"mixture": MixtureHead, "box": BoxHead}
PREDICTIONS = {"mixture": MixtureParameters, "box": BoxPredictions}
