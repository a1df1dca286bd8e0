"""The refinement loop: stage, head, detached boxes, S times."""

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .adamixer_stage import AdaMixerStage
from .boxes import BoxPredictions
from .heads import HEADS, PREDICTIONS
from .mixture import MixtureParameters, take_components
from .roi_pooling import FeatureMaps
from .sparse_rcnn_stage import SparseRcnnStage


STAGES = {"sparse_rcnn": SparseRcnnStage, "adamixer": AdaMixerStage}


class DrmmDecoderLayer(GradientCheckpointingLayer):
    """A stage and its head.

    Args:
        config (`DrmmConfig`): `decoder_type` chooses the stage, `head_type` the head.
    """

    def __init__(self, config):
        super().__init__()
        self.stage = STAGES[config.decoder_type](config)
        self.head = HEADS[config.head_type](config)

    def forward(self, features: Tensor, table: Tensor, boxes: Tensor, maps: list[Tensor]) -> tuple[Tensor, ...]:
        """Return the new features `(B, K, hidden_size)`, then each tensor of the stage's predictions.

        `table` is that of `maps`, boxes are xyxy in pixels. All is flat because reentrant checkpointing gives
        gradients to the tensors among a layer's arguments and outputs, not to those within other objects.
        """
        if getattr(maps, "table", None) is not table:  # what wraps layers copies arguments, and makes a list of a list
            maps = FeatureMaps(maps, table=table)
        features = self.stage(maps, boxes, features)
        return features, *self.head(features, boxes)


class DrmmDecoder(nn.Module):
    """Refine boxes and features over `num_stages` stages.

    Args:
        config (`DrmmConfig`): reads `num_stages`, and at each call `queries_per_stage`, so that `top_k_ratio` may be
            set on a loaded model's config.

    Source: Figure 3; the selection after each stage is Appendix C.2.
    """

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(DrmmDecoderLayer(config) for _ in range(config.num_stages))
        self.config = config

    def forward(
        self, maps: list[Tensor], boxes: Tensor, features: Tensor
    ) -> tuple[Tensor, list[MixtureParameters | BoxPredictions]]:
        """Run all stages.

        Args:
            maps (`list[torch.Tensor]`): the neck's maps `(B, hidden_size, H_l, W_l)`.
            boxes (`torch.Tensor` of shape `(B * G, K, 4)`): initial query boxes, xyxy, pixels of the model input.
            features (`torch.Tensor` of shape `(B * G, K, hidden_size)`): initial query features.

        Returns:
            `tuple`: last features and the predictions of every stage. Boxes are detached between stages, features are
            not; the initial boxes learn through the first stage's predictions.
        """
        maps, stages = FeatureMaps(maps, boxes.dtype), []
        for layer, num_kept in zip(self.layers, self.config.queries_per_stage, strict=True):
            features, *predictions = layer(features, maps.table, boxes, maps)
            if predictions[0].device != boxes.device:  # the layers of one model on several devices
                predictions = (value.to(boxes.device) for value in predictions)
            predictions = PREDICTIONS[self.config.head_type](*predictions)
            if num_kept < predictions.boxes.shape[1]:
                kept = torch.topk(predictions.objectness_logits, num_kept, dim=-1).indices
                features, predictions = take_components(features, kept), predictions.select(kept)
            stages.append(predictions)
            boxes = predictions.boxes.detach()
        return features, stages
