"""Build detectors of transformers and torchvision around a backbone of ours, each as its published code starts."""

import copy
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, box_convert
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    PreTrainedModel,
    ResNetConfig,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
)
from transformers.modeling_outputs import BackboneOutput

from drmm_hf import DrmmForObjectDetection, DrmmImageProcessor
from drmm_hf.modeling.backbone import DrmmBackbone


CPU = torch.device("cpu")
TOP_K = 100  # detections of a picture, as in `drmm evaluate`
HIDDEN, FEED_FORWARD, QUERIES = 128, 512, 100  # the sizes of `bccd_study.yaml`


class TransformersPeer(nn.Module):
    """Train and run a DETR of transformers on the maps of a backbone of ours, from stride 8 on.

    transformers' own encoders cannot hold this backbone: they replace each batch norm by one that is frozen, and
    timm's batch norms apply the activation too, which would be lost without a word.

    Args:
        backbone (`DrmmBackbone`): With its weights.
        detector (`PreTrainedModel`): Made for maps of its channels; its own backbone is thrown away.
        sees_padding (`bool`): Whether it knows from the mask what is padding. Its boxes are then fractions of the
            picture, and otherwise of the padded one.
    """

    def __init__(self, backbone: DrmmBackbone, detector: PreTrainedModel, sees_padding: bool):
        super().__init__()
        self.backbone, self.detector, self.sees_padding = backbone, detector, sees_padding
        detector.model.backbone.model = MapsFromStride8(backbone)
        self.processor = DrmmImageProcessor()

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the loss of a batch of the training loader."""
        labels = batch["labels"]
        if not self.sees_padding:
            height, width = batch["pixel_values"].shape[-2:]
            shares = [label["size"].flip(0).repeat(2) / torch.tensor([width, height] * 2) for label in labels]
            labels = [{**label, "boxes": label["boxes"] * share} for label, share in zip(labels, shares, strict=True)]
        outputs = self.detector(pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"], labels=labels)
        return outputs.loss + self.proposal_loss(outputs, labels)

    def proposal_loss(self, outputs: Any, labels: list[dict[str, Tensor]]) -> Tensor | float:
        """Return the loss of Deformable DETR's first stage, which transformers leaves out: it would never be trained.

        Source: the published code, which takes all objects for class 0 there.
        """
        config = self.detector.config
        if not getattr(config, "two_stage", False):
            return 0.0
        config = copy.copy(config)
        config.auxiliary_loss = False
        labels = [{**label, "class_labels": torch.zeros_like(label["class_labels"])} for label in labels]
        boxes = outputs.enc_outputs_coord_logits.sigmoid()
        loss, *_ = self.detector.loss_function(outputs.enc_outputs_class, labels, CPU, boxes, config)
        return loss

    def detect(self, inputs: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Return `boxes` (xyxy, pixels of the original picture), `scores` and `labels` of each picture."""
        if not self.sees_padding:
            (height, width), whole = inputs["pixel_values"].shape[-2:], sizes
            parts = map(size_of, inputs["pixel_mask"])
            sizes = [(a * height / h, b * width / w) for (a, b), (h, w) in zip(whole, parts, strict=True)]
        outputs = self.detector(**inputs)
        return self.processor.post_process_object_detection(outputs, -1.0, sizes, TOP_K)

    def settings(self) -> dict[str, Any]:
        """Return what the detector was built with."""
        return {name: value for name, value in self.detector.config.to_diff_dict().items() if "backbone" not in name}


class DrmmPeer(nn.Module):
    """Train and run D-RMM in the loop, and on the clock, of the others.

    Args:
        detector (`DrmmForObjectDetection`): The model.
        processor (`DrmmImageProcessor`): Its processor.
    """

    def __init__(self, detector: DrmmForObjectDetection, processor: DrmmImageProcessor):
        super().__init__()
        self.backbone, self.detector, self.processor = detector.model.backbone, detector, processor

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the loss of a batch of the training loader."""
        return self.detector(**batch, output_auxiliary=False).loss

    def detect(self, inputs: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Return `boxes` (xyxy, pixels of the original picture), `scores` and `labels` of each picture."""
        return self.processor.post_process_object_detection(self.detector(**inputs), -1.0, sizes, TOP_K)

    def settings(self) -> dict[str, Any]:
        """Return what the detector was built with."""
        return {name: value for name, value in self.detector.config.to_diff_dict().items() if "backbone" not in name}


class MapsFromStride8(nn.Module):
    """Give the maps of a backbone from stride 8 on, in the form in which a transformers detector asks for them."""

    def __init__(self, backbone: DrmmBackbone):
        super().__init__()
        self.body = backbone

    def forward(self, pixel_values: Tensor) -> BackboneOutput:
        """Return the maps of (B, 3, H, W)."""
        return BackboneOutput(feature_maps=tuple(self.body(pixel_values)[1:]))


class TorchvisionPeer(nn.Module):
    """Train and run a detector of torchvision.

    Args:
        backbone (`DrmmBackbone`): With its weights; part of the detector.
        detector (`nn.Module`): `FasterRCNN` or `FCOS`.
        settings (`dict`): What it was built with.
        first_label (`int`): Its label of our class 0: 1 where 0 is the background.
        heads (`Sequence[nn.Module]`): Give float32 under autocast, as the pyramid does: anchors and boxes take their
            type from it, and bfloat16 would round a pixel to two.
    """

    def __init__(
        self,
        backbone: DrmmBackbone,
        detector: nn.Module,
        settings: dict[str, Any],
        first_label: int,
        heads: Sequence[nn.Module],
    ):
        super().__init__()
        for module in (detector.backbone, *heads):
            module.register_forward_hook(lambda _, inputs, outputs: convert_to_fp32(outputs))
        self.backbone, self.detector, self.first_label, self._settings = backbone, detector, first_label, settings
        detector.transform = BatchAlone(0, 0, [0.0] * 3, [1.0] * 3)

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the loss of a batch of the training loader."""
        images, targets = [], []
        for pixels, label in zip(batch["pixel_values"], batch["labels"], strict=True):
            height, width = label["size"].tolist()
            images.append(pixels[:, :height, :width])
            boxes = box_convert(label["boxes"], "cxcywh", "xyxy") * torch.tensor([width, height] * 2)
            targets.append({"boxes": boxes, "labels": label["class_labels"] + self.first_label})
        return sum(self.detector(images, targets).values())

    def detect(self, inputs: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Return `boxes` (xyxy, pixels of the original picture), `scores` and `labels` of each picture."""
        parts = [size_of(mask) for mask in inputs["pixel_mask"]]
        images = [pixels[:, :h, :w] for pixels, (h, w) in zip(inputs["pixel_values"], parts, strict=True)]
        results = self.detector(images)
        for result, (a, b), (h, w) in zip(results, sizes, parts, strict=True):
            result["boxes"] = result["boxes"] * torch.tensor([b / w, a / h] * 2)
            result["labels"] = result["labels"] - self.first_label
        return results

    def settings(self) -> dict[str, Any]:
        """Return what the detector was built with."""
        return self._settings


class BatchAlone(GeneralizedRCNNTransform):
    """Put pictures into a batch; the image processor has resized and normalised them."""

    def normalize(self, image: Tensor) -> Tensor:
        """Return the picture."""
        return image

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, Any]:
        """Return both."""
        return image, target


class Pyramid(nn.Module):
    """Make a feature pyramid of a backbone's maps, as torchvision's detectors ask for it.

    Its levels are normalised: the maps of some backbones have entries of 50, of which the boxes start far off.

    Args:
        backbone (`DrmmBackbone`): Maps of strides 4, 8, 16 and 32.
        first (`int`): The first map that is used.
        extra (`ExtraFPNBlock`): Makes the coarser levels.
    """

    def __init__(self, backbone: DrmmBackbone, first: int, extra: nn.Module):
        super().__init__()
        self.body, self.first, self.out_channels = backbone, first, HIDDEN
        self.pyramid = FeaturePyramidNetwork(backbone.channels[first:], HIDDEN, extra, partial(nn.GroupNorm, 32))

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return the levels, finest first."""
        maps = self.body(pixel_values)[self.first :]
        return self.pyramid(OrderedDict((str(level), value) for level, value in enumerate(maps)))


def size_of(mask: Tensor) -> tuple[int, int]:
    """Return height and width of a picture from its mask, `(H, W)`."""
    return int(mask[:, 0].sum()), int(mask[0].sum())


def start_as_published(detector: PreTrainedModel, heads: Sequence[nn.ModuleList]) -> None:
    """Give a detector the initial weights of its published code.

    transformers' are made to be replaced by a checkpoint: scales of batch norms about 0, or class scores of 0.5.

    Args:
        detector (`PreTrainedModel`): Changed in place.
        heads (`Sequence[nn.ModuleList]`): Those of classes, linear, and those of boxes, whose `layers` are.
    """
    for module in detector.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    for module in detector.modules():
        if hasattr(module, "sampling_offsets"):
            detector._init_weights(module)
    for head in heads[0]:
        nn.init.constant_(head.bias, -math.log(99))  # scores of 0.01
    for head in heads[1]:
        nn.init.zeros_(head.layers[-1].weight)


def stand_in(backbone: DrmmBackbone) -> ResNetConfig:
    """Return a tiny backbone with the channels of ours from stride 8 on, for a detector to be built around."""
    channels = [8, *backbone.channels[1:]]
    names = ["stage2", "stage3", "stage4"]
    return ResNetConfig(
        embedding_size=8, depths=[1] * 4, hidden_sizes=channels, layer_type="basic", out_features=names
    )


def deformable_detr(backbone: DrmmBackbone, num_labels: int) -> TransformersPeer:
    """Build Deformable DETR in its best form, two stages with refined boxes."""
    config = DeformableDetrConfig(
        backbone_config=stand_in(backbone),
        num_labels=num_labels,
        d_model=HIDDEN,
        encoder_layers=3,
        decoder_layers=4,
        encoder_ffn_dim=FEED_FORWARD,
        decoder_ffn_dim=FEED_FORWARD,
        num_queries=QUERIES,
        two_stage_num_proposals=QUERIES,
        two_stage=True,
        with_box_refine=True,
        auxiliary_loss=True,
    )
    detector = DeformableDetrForObjectDetection(config)
    start_as_published(detector, [detector.class_embed, detector.bbox_embed])
    nn.init.normal_(detector.model.level_embed)
    return TransformersPeer(backbone, detector, sees_padding=True)


def rt_detr_v2(backbone: DrmmBackbone, num_labels: int) -> TransformersPeer:
    """Build RT-DETRv2 with the depth and the narrow encoder of its smallest published model."""
    config = RTDetrV2Config(
        backbone_config=stand_in(backbone),
        num_labels=num_labels,
        encoder_in_channels=backbone.channels[1:],
        encoder_hidden_dim=HIDDEN,
        encoder_ffn_dim=FEED_FORWARD,
        hidden_expansion=0.5,
        d_model=HIDDEN,
        decoder_in_channels=[HIDDEN] * 3,
        decoder_ffn_dim=FEED_FORWARD,
        decoder_layers=3,
        num_queries=QUERIES,
    )
    detector = RTDetrV2ForObjectDetection(config)
    model = detector.model
    heads = [*detector.class_embed, model.enc_score_head], [*detector.bbox_embed, model.enc_bbox_head]
    start_as_published(detector, heads)
    nn.init.xavier_uniform_(model.denoising_class_embed.weight)
    return TransformersPeer(backbone, detector, sees_padding=False)


def faster_rcnn(backbone: DrmmBackbone, num_labels: int) -> TorchvisionPeer:
    """Build Faster R-CNN with a feature pyramid; anchors half as large as for pictures of 800 pixels."""
    settings = {"anchor_sizes": [16, 32, 64, 128, 256], "aspect_ratios": [0.5, 1.0, 2.0], "box_head": FEED_FORWARD}
    options = {"box_batch_size_per_image": 128, "box_score_thresh": 0.0, "box_detections_per_img": TOP_K}
    options |= {"rpn_pre_nms_top_n_train": 1000, "rpn_post_nms_top_n_train": 1000}
    sizes = [(size,) for size in settings["anchor_sizes"]]
    detector = FasterRCNN(
        Pyramid(backbone, 0, LastLevelMaxPool()),
        rpn_anchor_generator=AnchorGenerator(sizes, [tuple(settings["aspect_ratios"])] * len(sizes)),
        box_head=TwoMLPHead(HIDDEN * 7 * 7, FEED_FORWARD),
        box_predictor=FastRCNNPredictor(FEED_FORWARD, num_labels + 1),
        **options,
    )
    heads = [detector.rpn.head, detector.roi_heads.box_predictor]
    return TorchvisionPeer(backbone, detector, {"pyramid": HIDDEN} | settings | options, 1, heads)


def fcos(backbone: DrmmBackbone, num_labels: int) -> TorchvisionPeer:
    """Build FCOS with levels of strides 8 to 128. Its scores are sigmoids, so it needs no class for the background."""
    options = {"score_thresh": 0.0, "detections_per_img": TOP_K}
    pyramid = Pyramid(backbone, 1, LastLevelP6P7(HIDDEN, HIDDEN))
    detector = FCOS(pyramid, num_labels, **options)
    return TorchvisionPeer(backbone, detector, {"pyramid": HIDDEN} | options, 0, [detector.head])


BUILDERS = {"deformable_detr": deformable_detr, "rt_detr_v2": rt_detr_v2, "faster_rcnn": faster_rcnn, "fcos": fcos}
