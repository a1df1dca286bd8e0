"""D-RMM as transformers models: `DrmmModel` gives mixtures, `DrmmForObjectDetection` scores, boxes and the loss."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .backbone import DrmmBackbone
from .boxes import frame_scale, image_sizes_from_mask, xyxy_to_cxcywh
from .configuration_drmm import DrmmConfig
from .criteria import CRITERIA, check_labels, pad_targets, reduce_terms
from .decoder import DrmmDecoder
from .heads import MixtureHead
from .mixture import MixtureParameters, floor_scales, log_confidence, log_odds
from .necks import NECKS
from .queries import DrmmQueries, initial_query_boxes
from .sparse_rcnn_stage import DrmmSelfAttention, DynamicConv, SparseRcnnStage


@dataclass
class DrmmModelOutput(ModelOutput):
    """Output of `DrmmModel`.

    Attributes:
        last_hidden_state (`torch.Tensor` of shape `(B, K, hidden_size)`): query features after the last stage.
        mixtures (`list[MixtureParameters]`): mixture of every stage, boxes xyxy in pixels of the model input.
        image_sizes (`torch.Tensor` of shape `(B, 2)`): (height, width) of the unpadded pictures, in pixels.
    """

    last_hidden_state: torch.FloatTensor | None = None
    mixtures: list[MixtureParameters] | None = None
    image_sizes: torch.LongTensor | None = None


@dataclass
class DrmmObjectDetectionOutput(ModelOutput):
    """Output of `DrmmForObjectDetection`. Everything but the features is float32 (float64 for a float64 model).

    Attributes:
        loss (`torch.Tensor` of shape `()`): total, with labels only.
        loss_dict (`dict[str, torch.Tensor]`): `nll.stage0`, `mcm.stage0`, ...: sums over ground truths divided by the
            number of images, before weights; detached.
        logits (`torch.Tensor` of shape `(B, K, C)`): log-odds of the confidence p * o; their sigmoid is the score.
        pred_boxes (`torch.Tensor` of shape `(B, K, 4)`): cxcywh in [0, 1] of the unpadded picture.
        box_scales (`torch.Tensor` of shape `(B, K, 4)`): gamma of left, top, right, bottom in the same unit, floor
            applied.
        objectness_logits (`torch.Tensor` of shape `(B, K)`): before the sigmoid.
        class_logits (`torch.Tensor` of shape `(B, K, C)`): before the softmax.
        auxiliary_outputs (`list[dict]`): the five tensors above for each earlier stage; with labels or on request.
        last_hidden_state (`torch.Tensor` of shape `(B, K, hidden_size)`): query features after the last stage.
    """

    loss: torch.FloatTensor | None = None
    loss_dict: dict | None = None
    logits: torch.FloatTensor | None = None
    pred_boxes: torch.FloatTensor | None = None
    box_scales: torch.FloatTensor | None = None
    objectness_logits: torch.FloatTensor | None = None
    class_logits: torch.FloatTensor | None = None
    auxiliary_outputs: list[dict] | None = None
    last_hidden_state: torch.FloatTensor | None = None


class DrmmPreTrainedModel(PreTrainedModel):
    """Weight initialisation and library switches shared by the D-RMM models."""

    config: DrmmConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["DrmmDecoderLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = {"queries.boxes"}

    def _initialize_weights(self, module, *args, **kwargs):
        """Initialise containers too: transformers skips those of classes outside itself, and our rules live there.

        It does so for the sake of code that overwrites loaded tensors; `transformers.initialization` never does.
        """
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module):
        """Initialise what no checkpoint gave: Xavier uniform matrices, as the public code does."""
        super()._init_weights(module)
        if isinstance(module, FeaturePyramidNetwork):
            for convolution in module.modules():
                if isinstance(convolution, nn.Conv2d):
                    init.xavier_uniform_(convolution.weight)
                    init.zeros_(convolution.bias)
        elif isinstance(module, DrmmQueries):
            init.copy_(module.boxes, initial_query_boxes(len(module.boxes), module.grid, module.size))
            init.normal_(module.features)
        elif isinstance(module, MixtureHead):
            self._init_linears(module.class_branch, module.box_branch)
            # Each pair of output layers is one matrix in the public code: its bound follows from both.
            for pair in ((module.objectness, module.classifier), (module.box_delta, module.box_scale)):
                bound = math.sqrt(6 / (pair[0].in_features + sum(layer.out_features for layer in pair)))
                for layer in pair:
                    init.uniform_(layer.weight, -bound, bound)
                    init.zeros_(layer.bias)
        elif isinstance(module, SparseRcnnStage):
            self._init_linears(module.feed_forward)
        elif isinstance(module, DynamicConv):
            self._init_linears(module)
        elif isinstance(module, DrmmSelfAttention):
            for layer in (module.in_proj, module.out_proj):
                init.xavier_uniform_(layer.weight)
                init.zeros_(layer.bias)

    @staticmethod
    def _init_linears(*modules: nn.Module):
        """Give every linear layer Xavier weights and torch's default bias, uniform in +-1 / sqrt(in_features)."""
        for module in modules:
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    init.xavier_uniform_(layer.weight)
                    if layer.bias is not None:
                        bound = 1 / math.sqrt(layer.in_features)
                        init.uniform_(layer.bias, -bound, bound)


class DrmmModel(DrmmPreTrainedModel):
    """Predict a mixture for every picture and stage: backbone, neck, queries and decoder.

    Args:
        config (`DrmmConfig`): every number of the architecture. Weights start random; `from_pretrained` loads some.
    """

    def __init__(self, config: DrmmConfig):
        super().__init__(config)
        self.backbone = DrmmBackbone(config)
        self.neck = NECKS[config.neck_type](self.backbone.channels, config.hidden_size)
        self.queries = DrmmQueries(config)
        self.decoder = DrmmDecoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.FloatTensor, pixel_mask: torch.LongTensor | None = None, **kwargs
    ) -> DrmmModelOutput:
        """Predict the mixtures.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): normalised pictures, as the image processor makes
                them.
            pixel_mask (`torch.Tensor` of shape `(B, H, W)`, *optional*): 1 on the picture, which sits in the top-left
                corner, 0 on padding. `None`: no padding.
            **kwargs: accepted for the library's sake, not used; `return_dict=False` returns a tuple.

        Returns:
            `DrmmModelOutput`: features, the mixture of every stage and the sizes of the unpadded pictures.
        """
        maps = self.neck(self.backbone(pixel_values))
        if pixel_mask is None:
            image_sizes = torch.tensor([pixel_values.shape[-2:]], device=pixel_values.device)
            image_sizes = image_sizes.expand(len(pixel_values), -1)
        elif pixel_mask.shape != pixel_values[:, 0].shape:
            raise ValueError(
                f"pixel_mask has shape {tuple(pixel_mask.shape)} for pixel_values of shape "
                f"{tuple(pixel_values.shape)}; it must be (B, H, W)."
            )
        else:
            image_sizes = image_sizes_from_mask(pixel_mask)
        boxes, features = self.queries(image_sizes)
        features, mixtures = self.decoder(maps, boxes, features)
        return DrmmModelOutput(last_hidden_state=features, mixtures=mixtures, image_sizes=image_sizes)


class DrmmForObjectDetection(DrmmPreTrainedModel):
    """Detect objects: confidences, boxes and their scales; with labels, the loss.

    Args:
        config (`DrmmConfig`): every number of architecture and objective.
    """

    def __init__(self, config: DrmmConfig):
        super().__init__(config)
        self.model = DrmmModel(config)
        self.post_init()

    @property
    def loss_function(self):
        """The criterion `(stages, targets, config) -> terms` that the config names; assign another to replace it."""
        # An assigned module does not reach the setter: torch registers it as a child.
        assigned = self.__dict__.get("_criterion") or self._modules.get("loss_function")
        return assigned or CRITERIA[self.config.criterion]

    @loss_function.setter
    def loss_function(self, criterion):
        self.__dict__["_criterion"] = criterion

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        pixel_mask: torch.LongTensor | None = None,
        labels: list[dict] | None = None,
        output_auxiliary: bool | None = None,
        **kwargs,
    ) -> DrmmObjectDetectionOutput:
        """Detect, and with labels compute the loss.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): normalised pictures, as the image processor makes
                them.
            pixel_mask (`torch.Tensor` of shape `(B, H, W)`, *optional*): 1 on the picture, which sits in the top-left
                corner, 0 on padding. `None`: no padding.
            labels (`list[dict]`, *optional*): per image `class_labels` (`(N,)`, int64) and `boxes` (`(N, 4)`, cxcywh
                in [0, 1] of the unpadded picture).
            output_auxiliary (`bool`, *optional*): return the earlier stages in `auxiliary_outputs`; by default when
                labels are given.
            **kwargs: accepted for the library's sake, not used; `return_dict=False` returns a tuple.

        Returns:
            `DrmmObjectDetectionOutput`: predictions of the last stage and, with labels, the loss.

        Raises:
            ValueError: if labels or mask do not fit the pictures; the message names the entry and the rule.
        """
        outputs = self.model(pixel_values, pixel_mask, return_dict=True, **kwargs)
        predictions = [self._predictions(mixture, outputs.image_sizes) for mixture in outputs.mixtures[-1:]]
        if output_auxiliary or (output_auxiliary is None and labels is not None):
            predictions = [self._predictions(mixture, outputs.image_sizes) for mixture in outputs.mixtures]
        loss, loss_dict = None, None
        if labels is not None:
            if not torch.compiler.is_compiling():
                check_labels(labels, self.config.num_labels)
            targets = pad_targets(labels, outputs.image_sizes, outputs.mixtures[0].boxes.dtype)
            loss, loss_dict = reduce_terms(self.loss_function(outputs.mixtures, targets, self.config), self.config)
        return DrmmObjectDetectionOutput(
            loss=loss,
            loss_dict=loss_dict,
            **predictions[-1],
            auxiliary_outputs=predictions[:-1] or None,
            last_hidden_state=outputs.last_hidden_state,
        )

    def _predictions(self, mixture: MixtureParameters, image_sizes: Tensor) -> dict[str, Tensor]:
        """Bring a stage's mixture into the outside frame."""
        frame = frame_scale(image_sizes, mixture.boxes.dtype)
        scales = floor_scales(mixture.scales, mixture.boxes, self.config.min_scale_ratio)
        return {
            "logits": log_odds(log_confidence(mixture.objectness_logits, mixture.class_logits)),
            "pred_boxes": xyxy_to_cxcywh(mixture.boxes) / frame,
            "box_scales": scales / frame,
            "objectness_logits": mixture.objectness_logits,
            "class_logits": mixture.class_logits,
        }


__all__ = [
    "DrmmForObjectDetection",
    "DrmmModel",
    "DrmmModelOutput",
    "DrmmObjectDetectionOutput",
    "DrmmPreTrainedModel",
]
