"""D-RMM as transformers models: `DrmmModel` predicts, `DrmmForObjectDetection` gives scores, boxes and the loss."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, logging
from transformers.utils.output_capturing import capture_outputs

from .adamixer_stage import AdaMixerStage, AdaptiveMixing, initial_offset_bias
from .backbone import DrmmBackbone
from .boxes import BoxPredictions, frame_scale, image_sizes_from_mask, xyxy_to_cxcywh
from .configuration_drmm import DrmmConfig
from .criteria import (
    CRITERIA,
    Targets,
    assign,
    check_labels,
    copy_targets,
    pad_targets,
    reduce_terms,
    stack_predictions,
)
from .decoder import DrmmDecoder, DrmmDecoderLayer
from .heads import BoxHead, MixtureHead
from .mixture import (
    MixtureParameters,
    floor_scales,
    log_component_density,
    log_confidence,
    log_odds,
    tail_freedom,
)
from .necks import NECKS, ChannelMapping
from .queries import DrmmQueries, initial_query_boxes
from .query_layers import DrmmSelfAttention, FeedForward
from .remote_code import PublishedWithCode
from .sparse_rcnn_stage import DynamicConv, SparseRcnnStage


# The object-detection pipeline checks this table of names; without the entry it logs that the model is not supported.
MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES["drmm"] = "DrmmForObjectDetection"


@dataclass
class DrmmModelOutput(ModelOutput):
    """Output of `DrmmModel`.

    Attributes:
        last_hidden_state (`torch.Tensor` of shape `(B, K, hidden_size)`): query features after the last stage.
        stages (`list[MixtureParameters]` or `list[BoxPredictions]`): what the head predicts after every stage, boxes
            xyxy in pixels of the model input. In training, each picture has `num_query_groups` rows.
        image_sizes (`torch.Tensor` of shape `(B, 2)`): (height, width) of the unpadded pictures, in pixels.
        hidden_states (`tuple[torch.Tensor]`): with `output_hidden_states`, the query features `(B, K, hidden_size)`
            before the first stage and after each; in training, each picture has `num_query_groups` rows.
        attentions (`tuple[torch.Tensor]`): with `output_attentions` and eager attention, the weights
            `(B, heads, K, K)` of the queries' self-attention in each stage.
    """

    last_hidden_state: torch.FloatTensor | None = None
    stages: list[MixtureParameters] | list[BoxPredictions] | None = None
    image_sizes: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class DrmmObjectDetectionOutput(ModelOutput):
    """Output of `DrmmForObjectDetection`. Everything but the features is float32 (float64 for a float64 model).

    Attributes:
        loss (`torch.Tensor` of shape `()`): total, with labels only.
        loss_dict (`dict[str, torch.Tensor]`): `nll.stage0`, `mcm.stage0`, ...: sums over ground truths divided by the
            number of images, before weights; detached. With a box head `class.stage0`, `bbox.stage0`, `giou.stage0`,
            divided by the number of matches.
        logits (`torch.Tensor` of shape `(B, K, C)`): log-odds of the confidence p * o, or the box head's logits; their
            sigmoid is the score.
        pred_boxes (`torch.Tensor` of shape `(B, K, 4)`): cxcywh in [0, 1] of the unpadded picture.
        box_scales (`torch.Tensor` of shape `(B, K, 4)`): gamma of left, top, right, bottom in the same unit, floor
            applied; None with a box head, as are the next two.
        objectness_logits (`torch.Tensor` of shape `(B, K)`): before the sigmoid.
        class_logits (`torch.Tensor` of shape `(B, K, C)`): before the softmax.
        auxiliary_outputs (`list[dict]`): the five tensors above for each earlier stage; with labels or on request.
        last_hidden_state (`torch.Tensor` of shape `(B, K, hidden_size)`): query features after the last stage.
        scale_freedom (`torch.Tensor` of shape `(B,)`): degrees of freedom of the Student's t density that `box_scales`
            are scales of: 1 is Cauchy, infinity Gaussian; None with a box head. Intervals are made from it.
        hidden_states (`tuple[torch.Tensor]`): as `DrmmModelOutput`, on request.
        attentions (`tuple[torch.Tensor]`): as `DrmmModelOutput`, on request.
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
    scale_freedom: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@contextmanager
def bars_on_terminals() -> Iterator[None]:
    """Let transformers draw its bars of weights only where standard error is a terminal."""
    before = logging.set_tqdm_hook(lambda factory, args, kwargs: factory(*args, **({"disable": None} | kwargs)))
    if before is not None:  # somebody else's
        logging.set_tqdm_hook(before)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


class DrmmPreTrainedModel(PublishedWithCode, PreTrainedModel):
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
    _can_record_outputs = {"hidden_states": DrmmDecoderLayer, "attentions": DrmmSelfAttention}

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load a model as transformers does, without bars where standard error is no terminal."""
        with bars_on_terminals():
            return super().from_pretrained(*args, **kwargs)

    def save_pretrained(self, *args, **kwargs):
        """Save the model as transformers does, without bars where standard error is no terminal."""
        with bars_on_terminals():
            return super().save_pretrained(*args, **kwargs)

    def get_input_embeddings(self) -> None:
        """Return None: a picture is no sequence of tokens. Accelerate asks before it shards a model."""

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
        elif isinstance(module, ChannelMapping):
            for convolution in module.projections:
                init.xavier_uniform_(convolution.weight)
                init.zeros_(convolution.bias)
        elif isinstance(module, DrmmQueries):
            boxes = initial_query_boxes(module.num_queries, module.grid, module.size)
            init.copy_(module.boxes, boxes.repeat(module.num_groups, 1))
            if self.config.shared_query_features:
                shared = module.features.new_empty(module.num_groups, self.config.hidden_size).normal_()
                init.copy_(module.features, shared.repeat_interleave(module.num_queries, dim=0))
            else:
                init.normal_(module.features)
        elif isinstance(module, BoxHead):
            self._init_linears(module.class_branch, module.box_branch)
            init.xavier_uniform_(module.classifier.weight)
            init.constant_(module.classifier.bias, -math.log(99))  # every score starts at 0.01
            if self.config.decoder_type == "adamixer":
                init.zeros_(module.box_delta.weight)
            else:
                init.xavier_uniform_(module.box_delta.weight)
            init.zeros_(module.box_delta.bias)
        elif isinstance(module, MixtureHead):
            self._init_linears(module.class_branch, module.box_branch)
            # Each pair of output layers is one matrix in the public code: its bound follows from both.
            for pair in ((module.objectness, module.classifier), (module.box_delta, module.box_scale)):
                bound = math.sqrt(6 / (pair[0].in_features + sum(layer.out_features for layer in pair)))
                for layer in pair:
                    init.uniform_(layer.weight, -bound, bound)
                    init.zeros_(layer.bias)
            if self.config.decoder_type == "adamixer" or self.config.box_delta_unit == "box":
                init.zeros_(module.box_delta.weight)  # refinement starts at the input box
        elif isinstance(module, (FeedForward, DynamicConv)):
            self._init_linears(module)
        elif isinstance(module, DrmmSelfAttention):
            for layer in (module.in_proj, module.out_proj):
                init.xavier_uniform_(layer.weight)
                init.zeros_(layer.bias)
        elif isinstance(module, AdaptiveMixing):
            self._init_linears(module)
            init.zeros_(module.generator.weight)
        elif isinstance(module, SparseRcnnStage):
            if module.iof_scale is not None:
                init.uniform_(module.iof_scale, 0, 4)
        elif isinstance(module, AdaMixerStage):
            init.uniform_(module.iof_scale, 0, 4)
            init.zeros_(module.sampling_offset.weight)
            init.copy_(module.sampling_offset.bias, initial_offset_bias(module.points, module.groups).flatten())
            # Here the public code treats attention's output as any other linear layer.
            self._init_linears(module.attention.out_proj)

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
    """Predict boxes for every picture and stage: backbone, neck, queries and decoder with its heads.

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

    @capture_outputs
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        pixel_mask: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DrmmModelOutput:
        """Predict.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): normalised pictures, as the image processor makes
                them.
            pixel_mask (`torch.Tensor` of shape `(B, H, W)`, *optional*): 1 on the picture, which sits in the top-left
                corner, 0 on padding. `None`: no padding.
            **kwargs: `output_hidden_states`, `output_attentions`; `return_dict=False` returns a tuple. Others are
                accepted for the library's sake, not used.

        Returns:
            `DrmmModelOutput`: features, the predictions of every stage and the sizes of the unpadded pictures.
        """
        if not pixel_values.shape[0]:
            raise ValueError(f"pixel_values has shape {tuple(pixel_values.shape)}; it must hold a picture.")
        maps = self.neck(self.backbone(pixel_values))
        if pixel_mask is None:
            image_sizes = torch.tensor([pixel_values.shape[-2:]], device=pixel_values.device)
            image_sizes = image_sizes.expand(pixel_values.shape[0], -1)
        elif pixel_mask.shape != pixel_values[:, 0].shape:
            raise ValueError(
                f"pixel_mask has shape {tuple(pixel_mask.shape)} for pixel_values of shape "
                f"{tuple(pixel_values.shape)}; it must be (B, H, W)."
            )
        else:
            image_sizes = image_sizes_from_mask(pixel_mask)
        boxes, features = self.queries(image_sizes)
        features, stages = self.decoder(maps, boxes, features)
        return DrmmModelOutput(
            last_hidden_state=features[:: boxes.shape[0] // image_sizes.shape[0]],
            stages=stages,
            image_sizes=image_sizes,
        )


class DrmmForObjectDetection(DrmmPreTrainedModel):
    """Detect objects: confidences, boxes and their scales; with labels, the loss.

    Args:
        config (`DrmmConfig`): every number of architecture and objective.
    """

    accepts_loss_kwargs = False  # transformers' Trainer: the loss is a mean over pictures, whatever else it counts

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
        **kwargs: Unpack[TransformersKwargs],
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
            **kwargs: `output_hidden_states`, `output_attentions`; `return_dict=False` returns a tuple. Others are
                accepted for the library's sake, not used.

        Returns:
            `DrmmObjectDetectionOutput`: predictions of the last stage and, with labels, the loss.

        Raises:
            ValueError: if labels or mask do not fit the pictures; the message names the entry and the rule.
        """
        outputs = self.model(pixel_values, pixel_mask, return_dict=True, **kwargs)
        wanted = outputs.stages if output_auxiliary or (output_auxiliary is None and labels is not None) else ()
        predictions = [self._predictions(stage, outputs.image_sizes) for stage in wanted or outputs.stages[-1:]]
        loss, loss_dict = None, None
        if labels is not None:
            if not torch.compiler.is_compiling():
                check_labels(labels, self.config.num_labels)
            targets = pad_targets(labels, outputs.image_sizes, outputs.stages[0].boxes.dtype)
            groups = len(outputs.stages[0].boxes) // len(labels)
            targets = Targets(*(values.repeat_interleave(groups, dim=0) for values in targets))
            terms = self.loss_function(outputs.stages, targets, self.config)
            loss, loss_dict = reduce_terms(terms, targets, self.config)
        scales, freedom = predictions[-1].get("box_scales"), None
        if scales is not None:
            freedom = tail_freedom(self.config.coordinate_distribution, self.config.student_t_freedom)
            freedom = scales.new_full(scales.shape[:1], freedom)
        return DrmmObjectDetectionOutput(
            loss=loss,
            loss_dict=loss_dict,
            **predictions[-1],
            auxiliary_outputs=predictions[:-1] or None,
            last_hidden_state=outputs.last_hidden_state,
            scale_freedom=freedom,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @torch.no_grad()
    def assignments(
        self, pixel_values: torch.FloatTensor, labels: list[dict], pixel_mask: torch.LongTensor | None = None
    ) -> tuple[Tensor, DrmmObjectDetectionOutput]:
        """Tell which predictions the criterion of a box head would match to each ground truth.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): as `forward`.
            labels (`list[dict]`): as `forward`.
            pixel_mask (`torch.Tensor` of shape `(B, H, W)`, *optional*): as `forward`.

        Returns:
            `tuple[torch.Tensor, DrmmObjectDetectionOutput]`: the queries `(S, B, N, num_ground_truth_copies)`, int64,
            -1 where none is left or on padding; and the predictions of all stages, those of the first group of
            queries.

        Raises:
            ValueError: with a mixture head, which needs no matching.

        Source: Figures 13 and 14.
        """
        if self.config.head_type != "box":
            raise ValueError(f"head_type={self.config.head_type!r} matches nothing; assignments need a box head.")
        outputs = self.model(pixel_values, pixel_mask, return_dict=True)
        check_labels(labels, self.config.num_labels)
        targets = pad_targets(labels, outputs.image_sizes, outputs.stages[0].boxes.dtype)
        groups, copies = len(outputs.stages[0].boxes) // len(labels), self.config.num_ground_truth_copies
        first = [BoxPredictions(*(values[::groups] for values in stage)) for stage in outputs.stages]
        assigned = assign(stack_predictions(first), copy_targets(targets, copies), self.config)
        *earlier, last = [self._predictions(stage, outputs.image_sizes) for stage in first]
        return assigned.unflatten(-1, (copies, -1)).transpose(-1, -2), DrmmObjectDetectionOutput(
            **last, auxiliary_outputs=earlier or None
        )

    @torch.no_grad()
    def log_likelihood(
        self,
        pixel_values: torch.FloatTensor,
        labels: list[dict],
        pixel_mask: torch.LongTensor | None = None,
    ) -> list[Tensor]:
        """Evaluate the density that the last stage predicts for each picture at given boxes and classes.

        It is the density of inference: mixing coefficients that sum to 1 over all queries (those that `top_k_ratio`
        dropped included), scales at or above their floor, and none of what a criterion may add (the number of ground
        truths, an epsilon, a class exponent). Boxes over the border are taken as they are.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): normalised pictures, as the image processor makes
                them.
            labels (`list[dict]`): as `forward` takes them: `class_labels` and `boxes`, cxcywh in fractions of the
                unpadded picture, not pixels. Labels in float64 keep the boxes exact.
            pixel_mask (`torch.Tensor` of shape `(B, H, W)`, *optional*): as `forward` takes it.

        Returns:
            `list[torch.Tensor]`: for each picture log p of its ground truths, of shape `(N,)`, in units of 1 / pixel^4
            of the model input; float64 where the device has it. No gradient.

        Raises:
            ValueError: if the model has box heads, labels or mask do not fit the pictures, or a box lies more than a
                picture's side away from it, as those in pixels do.

        Source: Eq. 2.
        """
        if self.config.head_type != "mixture":
            raise ValueError(f"head_type is {self.config.head_type!r}, which has no density; it must be 'mixture'.")
        if not torch.compiler.is_compiling():
            _check_given_boxes(labels, self.config.num_labels)
        outputs = self.model(pixel_values, pixel_mask, return_dict=True)
        dtype = torch.float32 if pixel_values.device.type == "mps" else torch.float64
        targets = pad_targets(labels, outputs.image_sizes, dtype)
        log_p = log_component_density(
            MixtureParameters(*(values.to(dtype) for values in outputs.stages[-1])),
            targets.boxes,
            targets.class_labels,
            self.config.coordinate_distribution,
            self.config.student_t_freedom,
            self.config.min_scale_ratio,
        ).logsumexp(dim=-1)
        return [row[: len(label["class_labels"])] for row, label in zip(log_p, labels, strict=True)]

    def _predictions(self, stage: MixtureParameters | BoxPredictions, image_sizes: Tensor) -> dict[str, Tensor]:
        """Bring a stage's predictions, of the first group of queries, into the outside frame."""
        stage = type(stage)(*(values[:: stage.boxes.shape[0] // image_sizes.shape[0]] for values in stage))
        frame = frame_scale(image_sizes, stage.boxes.dtype)
        pred_boxes = xyxy_to_cxcywh(stage.boxes) / frame
        if isinstance(stage, BoxPredictions):
            return {"logits": stage.class_logits, "pred_boxes": pred_boxes}
        scales = floor_scales(stage.scales, stage.boxes, self.config.min_scale_ratio)
        return {
            "logits": log_odds(log_confidence(stage.objectness_logits, stage.class_logits)),
            "pred_boxes": pred_boxes,
            "box_scales": scales / frame,
            "objectness_logits": stage.objectness_logits,
            "class_logits": stage.class_logits,
        }


def _check_given_boxes(labels: list[dict], num_labels: int):
    """Refuse what `log_likelihood` cannot read: boxes in pixels would give figures that look like any other."""
    if not isinstance(labels, (list, tuple)) or any(not {"class_labels", "boxes"} <= set(one) for one in labels):
        raise ValueError(
            f"labels is of type {type(labels).__name__}; it must be a list with a dict of class_labels and boxes for "
            "each picture."
        )
    labels = [{name: label[name].cpu() for name in ("class_labels", "boxes")} for label in labels]
    check_labels(labels, num_labels)
    for index, boxes in enumerate(label["boxes"] for label in labels):
        if boxes.numel() and not (boxes.min() >= -1 and boxes.max() <= 2):
            raise ValueError(
                f"labels[{index}] has boxes from {boxes.min():g} to {boxes.max():g}; they must be cx, cy, width and "
                "height as fractions of the unpadded picture, between -1 and 2."
            )


__all__ = [
    "DrmmForObjectDetection",
    "DrmmModel",
    "DrmmModelOutput",
    "DrmmObjectDetectionOutput",
    "DrmmPreTrainedModel",
]
