"""The refinement loop: stage, head, detached boxes, S times."""

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .heads import HEADS
from .mixture import MixtureParameters, take_components
from .sparse_rcnn_stage import STAGES


class DrmmDecoderLayer(GradientCheckpointingLayer):
    """A stage and its head.

    Args:
        config (`DrmmConfig`): `decoder_type` chooses the stage, `head_type` the head.
    """

    def __init__(self, config):
        super().__init__()
        self.stage = STAGES[config.decoder_type](config)
        self.head = HEADS[config.head_type](config)

    def forward(self, features: Tensor, maps: list[Tensor], boxes: Tensor) -> tuple[Tensor, MixtureParameters]:
        """Return the new features `(B, K, hidden_size)` and the stage's mixture, from boxes xyxy in pixels."""
        features = self.stage(maps, boxes, features)
        return features, self.head(features, boxes)


class DrmmDecoder(nn.Module):
    """Refine boxes and features over `num_stages` stages.

    Args:
        config (`DrmmConfig`): reads `num_stages`, `queries_per_stage`.

    Source: Figure 3; the selection after each stage is Appendix C.2.
    """

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(DrmmDecoderLayer(config) for _ in range(config.num_stages))
        self.queries_per_stage = config.queries_per_stage

    def forward(self, maps: list[Tensor], boxes: Tensor, features: Tensor) -> tuple[Tensor, list[MixtureParameters]]:
        """Run all stages.

        Args:
            maps (`list[torch.Tensor]`): pyramid maps `(B, hidden_size, H_l, W_l)`.
            boxes (`torch.Tensor` of shape `(B, K, 4)`): initial query boxes, xyxy, pixels of the model input.
            features (`torch.Tensor` of shape `(B, K, hidden_size)`): initial query features.

        Returns:
            `tuple[torch.Tensor, list[MixtureParameters]]`: last features and the mixture of every stage. Boxes are
            detached between stages, features are not; the initial boxes learn through the first stage's locations.
        """
        mixtures = []
        for layer, num_kept in zip(self.layers, self.queries_per_stage, strict=True):
            features, mixture = layer(features, maps, boxes)
            if num_kept < mixture.boxes.shape[1]:
                kept = torch.topk(mixture.objectness_logits, num_kept, dim=-1).indices
                features, mixture = take_components(features, kept), mixture.select(kept)
            mixtures.append(mixture)
            boxes = mixture.boxes.detach()
        return features, mixtures
