"""Configuration of D-RMM: every number of the architecture and the objective, typed, validated and documented."""

import difflib
import math
import types
from dataclasses import fields
from functools import wraps
from typing import Literal, Union, get_args, get_origin

from huggingface_hub.dataclasses import (
    StrictDataclassClassValidationError,
    StrictDataclassFieldValidationError,
    strict,
)
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import logging


logger = logging.get_logger(__name__)

# What a saved config.json or the library itself may pass besides the fields below.
_LIBRARY_KEYWORDS = {
    "num_labels",
    "name_or_path",
    "_name_or_path",
    "torch_dtype",
    "model_type",
    "auto_map",
    "attn_implementation",
    "experts_implementation",
    "output_attentions",
    "quantization_config",
    "tie_word_embeddings",
    "use_cache",
    "_commit_hash",
    "_attn_implementation_internal",
    "_experts_implementation_internal",
}


@strict
class DrmmConfig(PreTrainedConfig):
    """Hold every number of a D-RMM detector; the defaults are the public code's R50 model with 300 queries on COCO.

    Args:
        backbone_config (`dict` or `PreTrainedConfig`, *optional*, defaults to a ResNet-50):
            Any transformers backbone with four maps at strides 4, 8, 16, 32.
        decoder_type (`str`, *optional*, defaults to `"sparse_rcnn"`):
            Structure of a decoder stage. `"sparse_rcnn"`: RoI pooling, self-attention, dynamic convolution;
            `"adamixer"`: self-attention, adaptive 3-D sampling, adaptive mixing.
        neck_type (`str`, *optional*, defaults to that of the decoder):
            What turns the backbone's four maps into maps of `hidden_size` channels. `"fpn"`, the default of
            "sparse_rcnn": feature pyramid network; `"channel_mapping"`, of "adamixer": 1x1 convolutions, no pyramid.
        head_type (`str`, *optional*, defaults to `"mixture"`):
            What a stage predicts. `"mixture"`: box, scale, objectness and class of a mixture component (Figure 4);
            `"box"`: box and independent class scores, as the baselines do.
        criterion (`str`, *optional*, defaults to that of the head):
            Training objective (Tables 2 and 3). With "mixture": `"nll_mcm"` (the default; Eq. 4-8), `"nll"`,
            `"max_nll"`, `"nll_mcm_bipartite"` or `"bipartite_nll"`; with "box": `"focal_l1_giou"`.
        num_queries (`int`, *optional*, defaults to 300):
            Number K of mixture components, one a query.
        num_stages (`int`, *optional*, defaults to 6):
            Number of refinement stages of the decoder.
        hidden_size (`int`, *optional*, defaults to 256):
            Channels of the pyramid maps and of the query features.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Heads of the self-attention between queries.
        intermediate_size (`int`, *optional*, defaults to 2048):
            Inner channels of the feed-forward network.
        attention_dropout (`float`, *optional*, defaults to 0):
            Dropout of attention weights.
        dropout (`float`, *optional*, defaults to 0):
            Dropout of the three residual branches of a stage and within the feed-forward network.
        dynamic_size (`int`, *optional*, defaults to 64):
            Inner channels of the dynamic convolution (Sparse R-CNN's `dynamic_feat_channels`).
        overlap_attention (`bool`, *optional*, defaults to that of the decoder):
            Bias the self-attention by how much the queries' boxes overlap: `True` with "adamixer", which cannot do
            without, `False` with "sparse_rcnn". Meant for little data, where queries that find the same object are
            hard to tell from queries that find its like.
        num_sampling_groups (`int`, *optional*, defaults to 4):
            Groups of channels that AdaMixer samples and mixes apart.
        num_sampling_points (`int`, *optional*, defaults to 32):
            Points that AdaMixer samples for each query and group (its `in_points`).
        num_mixing_points (`int`, *optional*, defaults to 128):
            Points that AdaMixer's spatial mixing gives out for each query and group (its `out_points`).
        proposal_grid (`list[int]` or `None`, *optional*, defaults to `[15, 20]`):
            Rows and columns of the initial query boxes; their product must be `num_queries`. `None` starts every query
            from the whole picture, as Sparse R-CNN does.
            AdaMixer's query boxes are fixed.
        proposal_size (`float`, *optional*, defaults to 0.5):
            Width and height of the initial grid boxes, as a fraction of the picture.
        shared_query_features (`bool`, *optional*, defaults to `False`):
            Start all queries from one feature vector, so that they differ by the place of their box alone and learn
            from each other's objects from the first step on; they part as they are trained. `False` draws a vector
            for each, as the public code does. Meant for little data; needs `proposal_grid`.
        roi_size (`int`, *optional*, defaults to 7):
            Bins along each side of a pooled region.
        roi_sampling_ratio (`int`, *optional*, defaults to 2):
            Samples along each side of a bin.
        roi_level_base (`float`, *optional*, defaults to 56):
            A region of area s * s is pooled from level floor(log2(s / base)), within 0 to 3; finest is 0.
        num_class_layers (`int`, *optional*, defaults to 1):
            Linear layers of the branch before class and objectness.
        num_box_layers (`int`, *optional*, defaults to that of the decoder):
            Linear layers of the branch before box and scale: 3 with "sparse_rcnn", 1 with "adamixer".
        box_delta_unit (`str`, *optional*, defaults to `"pixels"`):
            Unit of the head's raw box deltas and scales. `"pixels"` is the paper's and the public code's; `"box"`
            measures them in sides of the stage's input box, meant for little data, and starts with deltas of 0. With
            "adamixer" it says so of the scales only: its deltas are always relative to the size of the box.
        box_delta_factor (`float`, *optional*, defaults to 0.5):
            With `box_delta_unit="box"`: mu = box + delta * factor * side.
        box_scale_factor (`float`, *optional*, defaults to 0.1):
            With `box_delta_unit="box"`: gamma = softplus(raw) * factor * side.
        max_log_size_delta (`float`, *optional*, defaults to `|ln(16 / 1000)|`):
            Bound of the change of log width and log height that Sparse R-CNN's box head makes in a stage.
        top_k_ratio (`float` or `None`, *optional*):
            Share of the queries kept after every stage, by objectness (Appendix C.2). `None` keeps all.
        top_k_last_stage (`bool`, *optional*, defaults to `True`):
            Select after the last stage too, as the public code does; the paper selects between stages only.
        mcm_weight (`float`, *optional*, defaults to 0.5):
            Weight beta of the maximum-component-maximisation term.
        mcm_stages (`str`, *optional*, defaults to `"all"`):
            Stages that have the maximum-component-maximisation term. `"all"` is the paper's; with `"last"` the others
            may find an object several times, and more of their components learn from it. Meant for little data.
        mcm_stop_gradient (`list[str]`, *optional*, defaults to `["F"]`):
            Factors of the MCM likelihood that pass no gradient: any of "pi", "F", "P" (Table 7).
        min_scale_ratio (`float`, *optional*, defaults to 0.04):
            Floor of gamma as a fraction of the predicted box's sides. An addition of the public code; 0 is the paper.
        likelihood_epsilon (`float`, *optional*, defaults to 1e-12):
            Added to likelihoods before the logarithm. An addition of the public code; 0 is the paper.
        coordinate_distribution (`str`, *optional*, defaults to `"cauchy"`):
            Density of a box coordinate: "cauchy", "gaussian" or "student_t".
        student_t_freedom (`float`, *optional*, defaults to 1.0):
            Degrees of freedom of "student_t".
        class_exponent (`float`, *optional*, defaults to 1.0):
            Power of the class probability in the likelihood. An addition of the public code.
        scale_mixing_by_num_objects (`bool`, *optional*, defaults to `True`):
            Multiply pi by the picture's number of ground truths. An addition of the public code.
        loss_weight (`float`, *optional*, defaults to 1.0):
            Factor of the whole loss. 2 gives the gradients of the public code, which sums over the 2
            pictures of a GPU.
        class_cost (`float`, *optional*, defaults to 2):
            Weight of the focal cost in the matching of "focal_l1_giou".
        bbox_cost (`float`, *optional*, defaults to 5):
            Weight of the L1 distance of normalised corners in that matching.
        giou_cost (`float`, *optional*, defaults to 2):
            Weight of the negative generalised IoU in that matching.
        class_loss_coefficient (`float`, *optional*, defaults to 2):
            Weight of the focal loss.
        bbox_loss_coefficient (`float`, *optional*, defaults to 5):
            Weight of the L1 loss of normalised corners.
        giou_loss_coefficient (`float`, *optional*, defaults to 2):
            Weight of the generalised IoU loss.
        focal_alpha (`float`, *optional*, defaults to 0.25):
            Weight of positives in the focal cost and loss; negatives have 1 - alpha.
        focal_gamma (`float`, *optional*, defaults to 2):
            Exponent of the focal cost and loss.
        num_ground_truth_copies (`int`, *optional*, defaults to 1):
            Times that "focal_l1_giou" matches each ground truth, to as many queries (Table 10).
        num_query_groups (`int`, *optional*, defaults to 1):
            Groups of `num_queries` queries that "focal_l1_giou" trains side by side, as Group-DETR does (12 in
            Table 11). Attention and matching stay within a group; inference uses the first group only.
        freeze_backbone_stages (`int`, *optional*, defaults to 0):
            Number of frozen backbone stages, counted with the stem: 0 freezes nothing, 1 the stem and the first stage.
        backbone_norm (`str`, *optional*, defaults to `"eval"`):
            Batch norms of the backbone while training: `"train"` uses batch statistics, `"eval"` stored
            statistics with
            trained affine parameters, `"frozen"` stored statistics and fixed affine parameters.
        category_ids (`list[int]`, *optional*):
            The data set's own category id of each label, for writing results.

    Raises:
        ValueError: if a field is unknown (the nearest is named), `id2label` is no dict, or `backbone_config` is of a
            `model_type` that transformers does not know.
        StrictDataclassError: the error of `huggingface_hub.dataclasses.strict` for wrong types and values, in one
            sentence that names field, value and rule.
    """

    model_type = "drmm"
    # by transformers' Trainer
    keys_to_ignore_at_inference = [
        "loss_dict",
        "auxiliary_outputs",
        "last_hidden_state",
        "hidden_states",
        "attentions",
    ]
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="resnet",
            init_kwargs={"out_features": ["stage1", "stage2", "stage3", "stage4"]},
        )
    }
    attribute_map = {"d_model": "hidden_size", "num_hidden_layers": "num_stages"}

    backbone_config: dict | PreTrainedConfig | None = None
    decoder_type: Literal["sparse_rcnn", "adamixer"] = "sparse_rcnn"
    neck_type: Literal["fpn", "channel_mapping"] | None = None
    head_type: Literal["mixture", "box"] = "mixture"
    criterion: Literal["nll_mcm", "nll", "max_nll", "nll_mcm_bipartite", "bipartite_nll", "focal_l1_giou"] | None = (
        None
    )

    num_queries: int = 300
    num_stages: int = 6
    hidden_size: int = 256
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    attention_dropout: float | int = 0.0
    dropout: float | int = 0.0
    dynamic_size: int = 64
    overlap_attention: bool | None = None
    num_sampling_groups: int = 4
    num_sampling_points: int = 32
    num_mixing_points: int = 128
    proposal_grid: list[int] | tuple[int, ...] | None = (15, 20)
    proposal_size: float | int = 0.5
    shared_query_features: bool = False
    roi_size: int = 7
    roi_sampling_ratio: int = 2
    roi_level_base: float | int = 56
    num_class_layers: int = 1
    num_box_layers: int | None = None
    box_delta_unit: Literal["pixels", "box"] = "pixels"
    box_delta_factor: float | int = 0.5
    box_scale_factor: float | int = 0.1
    max_log_size_delta: float | int = math.log(1000 / 16)
    top_k_ratio: float | int | None = None
    top_k_last_stage: bool = True

    mcm_weight: float | int = 0.5
    mcm_stages: Literal["all", "last"] = "all"
    mcm_stop_gradient: list[str] | tuple[str, ...] = ("F",)
    min_scale_ratio: float | int = 0.04
    likelihood_epsilon: float | int = 1e-12
    coordinate_distribution: Literal["cauchy", "gaussian", "student_t"] = "cauchy"
    student_t_freedom: float | int = 1.0
    class_exponent: float | int = 1.0
    scale_mixing_by_num_objects: bool = True
    loss_weight: float | int = 1.0

    class_cost: float | int = 2.0
    bbox_cost: float | int = 5.0
    giou_cost: float | int = 2.0
    class_loss_coefficient: float | int = 2.0
    bbox_loss_coefficient: float | int = 5.0
    giou_loss_coefficient: float | int = 2.0
    focal_alpha: float | int = 0.25
    focal_gamma: float | int = 2.0
    num_ground_truth_copies: int = 1
    num_query_groups: int = 1

    freeze_backbone_stages: int = 0
    backbone_norm: Literal["train", "eval", "frozen"] = "eval"
    category_ids: list[int] | None = None

    def __post_init__(self, **kwargs):
        for name in kwargs:
            if name not in self._known_names():
                offered = (self._known_names() - _LIBRARY_KEYWORDS) | {"num_labels"}
                nearest = difflib.get_close_matches(name, sorted(offered), n=1, cutoff=0)
                raise ValueError(
                    f"{name}={kwargs[name]!r} is not a field of DrmmConfig; the nearest is {nearest[0]!r}."
                )
        _require(isinstance(self.id2label, dict | None), "id2label", self.id2label, "be a dict of names by label")
        if isinstance(self.backbone_config, dict):
            known = self.backbone_config.get("model_type") in CONFIG_MAPPING
            rule = 'have a "model_type" that transformers knows, such as "resnet"'
            _require(known, "backbone_config", self.backbone_config, rule)
        if self.id2label is None and kwargs.get("num_labels") is None:
            kwargs["num_labels"] = 80
        defaults = {
            "neck_type": {"sparse_rcnn": "fpn", "adamixer": "channel_mapping"}.get(self.decoder_type),
            "num_box_layers": {"sparse_rcnn": 3, "adamixer": 1}.get(self.decoder_type),
            "overlap_attention": self.decoder_type == "adamixer",
            "criterion": {"mixture": "nll_mcm", "box": "focal_l1_giou"}.get(self.head_type),
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name in ("proposal_grid", "mcm_stop_gradient"):
            if getattr(self, name) is not None:
                setattr(self, name, list(getattr(self, name)))
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Build from stored fields and others that replace them, and check the whole.

        A new set of labels replaces all that was stored about the old one; with another decoder or head, fields whose
        default follows from it are determined anew unless they are given. What somebody set on a config before it was
        saved and is no field, nor a field misspelt, is kept with a warning: a checkpoint that was saved can be loaded.
        """
        num_stored = len(config_dict.get("id2label") or ())
        if "id2label" in kwargs or kwargs.get("num_labels", num_stored) != num_stored:
            names = ("num_labels", "id2label", "label2id", "category_ids")
            config_dict = {name: value for name, value in config_dict.items() if name not in names}
            config_dict |= {name: kwargs.pop(name) for name in names if name in kwargs}
        for name, dependents in (
            ("decoder_type", ("neck_type", "num_box_layers", "overlap_attention")),
            ("head_type", ("criterion",)),
        ):
            if kwargs.get(name, config_dict.get(name)) != config_dict.get(name):
                config_dict = {key: value for key, value in config_dict.items() if key not in dependents}
        # Set on the finished object, as the library does, they would never be checked.
        own = {field.name for field in fields(cls)} & set(cls.__annotations__) - {"backbone_config"}
        config_dict = config_dict | {name: kwargs.pop(name) for name in own & kwargs.keys()}
        others = {name: config_dict[name] for name in config_dict.keys() - cls._known_names()}
        for name in sorted(others):
            if difflib.get_close_matches(name, cls._known_names(), cutoff=0.8):
                del others[name]  # misspelt: refused below
            else:
                logger.warning(f"{name}={others[name]!r} in the stored config is not a field of DrmmConfig: not used.")
        config_dict = {name: value for name, value in config_dict.items() if name not in others}
        built = super().from_dict(config_dict, **kwargs)
        for name, value in others.items():
            setattr(built[0] if isinstance(built, tuple) else built, name, value)
        return built

    @classmethod
    def _known_names(cls) -> set[str]:
        return {field.name for field in fields(cls)} | set(cls.attribute_map) | _LIBRARY_KEYWORDS

    def validate_architecture(self):
        """Check what no single field can say about itself.

        Raises:
            ValueError: naming the field, its value and the rule.
        """
        _require(self.num_labels >= 1, "num_labels", self.num_labels, "be at least 1")
        for name in (
            "num_queries",
            "num_stages",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "dynamic_size",
            "roi_size",
            "roi_sampling_ratio",
            "num_class_layers",
            "num_box_layers",
            "num_sampling_groups",
            "num_sampling_points",
            "num_mixing_points",
            "num_ground_truth_copies",
            "num_query_groups",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "be at least 1")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and field.name in type(self).__annotations__:
                _require(math.isfinite(value), field.name, value, "be finite")
        _require(
            self.likelihood_epsilon == 0 or self.likelihood_epsilon >= 1e-37,
            "likelihood_epsilon",
            self.likelihood_epsilon,
            "be 0 or at least 1e-37, which float32 can hold",
        )
        for name in (
            "proposal_size",
            "roi_level_base",
            "box_delta_factor",
            "box_scale_factor",
            "max_log_size_delta",
            "student_t_freedom",
        ):
            _require(getattr(self, name) > 0, name, getattr(self, name), "be positive")
        for name in (
            "mcm_weight",
            "min_scale_ratio",
            "likelihood_epsilon",
            "class_exponent",
            "loss_weight",
            "class_cost",
            "bbox_cost",
            "giou_cost",
            "class_loss_coefficient",
            "bbox_loss_coefficient",
            "giou_loss_coefficient",
            "focal_gamma",
        ):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "not be negative")
        _require(0 <= self.focal_alpha <= 1, "focal_alpha", self.focal_alpha, "lie in [0, 1]")
        for name in ("dropout", "attention_dropout"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "lie in [0, 1)")
        _require(
            0 <= self.freeze_backbone_stages <= 4, "freeze_backbone_stages", self.freeze_backbone_stages, "be 0..4"
        )
        _require(
            self.hidden_size % self.num_attention_heads == 0,
            "hidden_size",
            self.hidden_size,
            f"be divisible by num_attention_heads={self.num_attention_heads}",
        )
        if self.proposal_grid is not None:
            _require(
                len(self.proposal_grid) == 2
                and min(self.proposal_grid) >= 1
                and self.proposal_grid[0] * self.proposal_grid[1] == self.num_queries,
                "proposal_grid",
                self.proposal_grid,
                f"be [rows, columns] whose product is num_queries={self.num_queries}",
            )
        _require(
            self.proposal_grid is not None or not self.shared_query_features,
            "shared_query_features",
            self.shared_query_features,
            "be False without proposal_grid: queries of one feature and one box would stay the same",
        )
        if self.decoder_type == "adamixer":
            _require(
                self.overlap_attention,
                "overlap_attention",
                self.overlap_attention,
                'be True with decoder_type="adamixer"',
            )
            _require(
                self.hidden_size % 8 == 0 and self.hidden_size % self.num_sampling_groups == 0,
                "hidden_size",
                self.hidden_size,
                f"be divisible by 8 and by num_sampling_groups={self.num_sampling_groups} with "
                'decoder_type="adamixer"',
            )
        if self.neck_type == "channel_mapping":
            _require(
                self.hidden_size % 32 == 0,
                "hidden_size",
                self.hidden_size,
                'be divisible by the 32 groups of the norm of neck_type="channel_mapping"',
            )
        if self.head_type == "box":
            _require(
                self.criterion == "focal_l1_giou",
                "criterion",
                self.criterion,
                'be "focal_l1_giou" with head_type="box": the others need the densities of head_type="mixture"',
            )
            _require(
                self.top_k_ratio is None,
                "top_k_ratio",
                self.top_k_ratio,
                'be None with head_type="box", which has no objectness to choose queries by',
            )
            _require(
                self.box_delta_unit == "pixels",
                "box_delta_unit",
                self.box_delta_unit,
                'be left at "pixels" with head_type="box", whose deltas always have the unit of its decoder',
            )
        else:
            _require(
                self.criterion != "focal_l1_giou",
                "criterion",
                self.criterion,
                'be one of the likelihood criteria with head_type="mixture"; "focal_l1_giou" needs head_type="box"',
            )
            for name in ("num_ground_truth_copies", "num_query_groups"):
                _require(getattr(self, name) == 1, name, getattr(self, name), 'be 1 unless head_type="box"')
        if self.top_k_ratio is not None:
            _require(0 < self.top_k_ratio <= 1, "top_k_ratio", self.top_k_ratio, "lie in (0, 1]")
            _require(self.queries_per_stage[-1] >= 1, "top_k_ratio", self.top_k_ratio, "leave at least one query")
        _require(
            set(self.mcm_stop_gradient) <= {"pi", "F", "P"},
            "mcm_stop_gradient",
            self.mcm_stop_gradient,
            'hold only "pi", "F" and "P"',
        )
        if self.category_ids is not None:
            _require(
                len(self.category_ids) == self.num_labels and len(set(self.category_ids)) == len(self.category_ids),
                "category_ids",
                self.category_ids,
                f"hold one distinct id for each of the {self.num_labels} labels",
            )

    @property
    def queries_per_stage(self) -> list[int]:
        """Number of queries that leave each stage, `top_k_ratio` applied."""
        counts, count = [], self.num_queries
        for stage in range(self.num_stages):
            if self.top_k_ratio is not None and (stage < self.num_stages - 1 or self.top_k_last_stage):
                count = int(count * self.top_k_ratio + 1e-6)  # 1400 * 0.7 is 979.9999999999999
            counts.append(count)
        return counts


def _speak_plainly(config_class: type) -> None:
    """Make the errors of a strict class one sentence, without the words that `strict` wraps around their cause."""
    set_field, validate = config_class.__setattr__, config_class.validate

    @wraps(set_field)
    def set_field_plainly(self, name, value):
        try:
            set_field(self, name, value)
        except StrictDataclassFieldValidationError as error:
            hint = next(field.type for field in fields(self) if field.name == name)
            error.args = (f"{name}={value!r} must be {_in_words(hint)}.",)
            raise

    @wraps(validate)
    def validate_plainly(self):
        try:
            validate(self)
        except StrictDataclassClassValidationError as error:
            error.args = (str(error.__cause__),)
            raise

    config_class.__setattr__, config_class.validate = set_field_plainly, validate_plainly


def _in_words(hint) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_in_words, get_args(hint)))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if hint is type(None):
        return "None"
    return str(hint) if get_args(hint) else getattr(hint, "__name__", str(hint))


_speak_plainly(DrmmConfig)


def _require(holds: bool, name: str, value, rule: str):
    if not holds:
        raise ValueError(f"{name}={value!r} must {rule}.")


__all__ = ["DrmmConfig"]
