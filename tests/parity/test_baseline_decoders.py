"""Sparse R-CNN and AdaMixer: queries, stages, losses, gradients and detections from given maps."""

import pytest
import torch
from torch import nn

from drmm_hf import DrmmConfig
from drmm_hf.conversion.public_names import MMDETECTION_NAMES, convert_state_dict
from drmm_hf.modeling.adamixer_stage import (
    initial_offset_bias,
    position_embedding,
    sample_points,
)
from drmm_hf.modeling.boxes import frame_scale, move_xyzr, xyxy_to_cxcywh, xyxy_to_xyzr, xyzr_to_xyxy
from drmm_hf.modeling.criteria import CRITERIA, pad_targets, reduce_terms
from drmm_hf.modeling.decoder import DrmmDecoder
from drmm_hf.modeling.modeling_drmm import DrmmObjectDetectionOutput
from drmm_hf.modeling.necks import ChannelMapping
from drmm_hf.modeling.queries import DrmmQueries, initial_query_boxes
from drmm_hf.modeling.query_layers import log_overlap
from drmm_hf.modeling.roi_pooling import roi_levels
from parity.conftest import Case, cases, check_detections, error, gradient_error


DECODERS = [
    *cases("sparse_rcnn_decoder*.safetensors"),
    *cases("adamixer_decoder*.safetensors"),
    *cases("adamixer_neck_decoder_postproc*.safetensors", golden=False),
]
TERMS = {"class": "loss_cls", "bbox": "loss_bbox", "giou": "loss_iou"}


def config_of_baseline(info: dict) -> DrmmConfig:
    is_adamixer = info["kind"].startswith("adamixer")
    sizes = {
        "num_sampling_points": "in_points",
        "num_mixing_points": "out_points",
        "num_sampling_groups": "n_groups",
        "dynamic_size": "dynamic_feat_channels",
    }
    return DrmmConfig(
        decoder_type="adamixer" if is_adamixer else "sparse_rcnn",
        head_type="box",
        proposal_grid=None,
        num_labels=info["num_classes"],
        num_queries=info["num_query" if is_adamixer else "num_proposals"],
        hidden_size=info["content_dim" if is_adamixer else "channels"],
        num_attention_heads=info["num_heads"],
        intermediate_size=info["ffn_channels"],
        num_stages=info["num_stages"],
        **{ours: info[theirs] for ours, theirs in sizes.items() if theirs in info},
    )


class Run:
    """A recorded case, recomputed in `dtype`."""

    def __init__(self, path, dtype):
        self.case = case = Case(path)
        self.config = config = config_of_baseline(case.info)
        config._attn_implementation = "sdpa"
        self.modules = nn.ModuleDict({"queries": DrmmQueries(config), "decoder": DrmmDecoder(config)})
        neck_channels = case.info.get("neck_in_channels")
        if neck_channels:
            self.modules["neck"] = ChannelMapping(neck_channels, config.hidden_size)
        self.names = MMDETECTION_NAMES[config.decoder_type, "box"]
        weights = convert_state_dict(case.starting_with("param."), self.names)
        self.modules.load_state_dict(weights, strict=True)
        self.modules.to(dtype).eval()
        self.inputs = [f"c{level}" for level in range(2, 6)] if neck_channels else [f"feat{n}" for n in range(4)]
        self.given = [case[f"in.{name}"].to(dtype).requires_grad_() for name in self.inputs]
        self.maps = self.modules["neck"](self.given) if neck_channels else self.given
        self.queries = self.modules["queries"](case["in.img_hw"])
        self.seen = []
        for layer in self.modules["decoder"].layers:
            layer.stage.register_forward_hook(lambda module, inputs, output: self.seen.append((module, *inputs)))
        self.last, self.stages = self.modules["decoder"](self.maps, *self.queries)
        targets = pad_targets(case.labels(), case["in.img_hw"], dtype)
        self.loss, self.parts = reduce_terms(CRITERIA["focal_l1_giou"](self.stages, targets, config), targets, config)

    def weighted_part(self, term, stage):
        return getattr(self.config, f"{term}_loss_coefficient") * self.parts[f"{term}.stage{stage}"]


@pytest.mark.parametrize("path", DECODERS)
def test_stages_losses_and_detections_in_float32(path):
    run = Run(path, torch.float32)
    case = run.case
    tolerance = 1e-3 if case.info["num_stages"] == 6 else 2e-4
    features_name = "content" if run.config.decoder_type == "adamixer" else "obj_feat"
    if run.config.decoder_type == "adamixer":
        assert error(xyxy_to_xyzr(run.queries[0]), case["query.xyzr"]) < 2e-4
        assert error(run.queries[1], case["query.content"]) < 2e-4
    else:
        assert error(run.queries[0], case["proposals.boxes"]) < 2e-4
        assert error(run.queries[1], case["proposals.feats"]) < 2e-4
    for level, value in enumerate(run.maps, start=2):
        if f"neck.p{level}" in case.tensors:
            assert error(value, case[f"neck.p{level}"]) < 2e-4
    for stage, predictions in enumerate(run.stages):
        recorded = case.starting_with(f"stage{stage}.")
        assert error(predictions.boxes, recorded["boxes"]) < tolerance
        assert error(predictions.class_logits, recorded["cls_score"]) < tolerance
        if "rois" in recorded:
            _, _, boxes, _ = run.seen[stage]
            assert error(boxes.flatten(0, 1), recorded["rois"][:, 1:]) < tolerance
            assert torch.equal(roi_levels(boxes, 4, 56).flatten(), recorded["roi_level"])
        if stage + 1 < len(run.stages):
            assert error(run.seen[stage + 1][3], recorded[features_name]) < tolerance
        for term, name in TERMS.items():
            assert error(run.weighted_part(term, stage), case[f"loss.stage{stage}.{name}"]) < tolerance
    assert error(run.last, case[f"stage{len(run.stages) - 1}.{features_name}"]) < tolerance
    assert error(run.loss, case["loss.total"]) < tolerance
    boxes = xyxy_to_cxcywh(run.stages[-1].boxes) / frame_scale(case["in.img_hw"], torch.float32)
    check_detections(case, DrmmObjectDetectionOutput(logits=run.stages[-1].class_logits, pred_boxes=boxes))


@pytest.mark.parametrize("path", DECODERS)
def test_losses_and_gradients_in_float64(path):
    run = Run(path, torch.float64)
    case, last = run.case, len(run.stages) - 1
    recorded = case.starting_with(f"stage{last}.f64.")
    if recorded:
        assert error(run.stages[-1].boxes, recorded["boxes"]) < 1e-8
        assert error(run.stages[-1].class_logits, recorded["cls_score"]) < 1e-8
        assert error(run.last, recorded["content"]) < 1e-8
    for stage in range(last + 1):
        for term, name in TERMS.items():
            assert error(run.weighted_part(term, stage), case[f"loss64.stage{stage}.{name}"]) < 1e-8
    assert error(run.loss, case["loss64.total"]) < 1e-8
    run.loss.backward()
    gradients = case.starting_with("grad.")
    for name, value in zip(run.inputs, run.given, strict=True):
        if f"in.{name}" in gradients:
            assert gradient_error(value.grad, gradients.pop(f"in.{name}")) < 1e-5
    ours = {name: parameter.grad for name, parameter in run.modules.named_parameters()}
    fixed = convert_state_dict({name: torch.empty(0) for name in case.info.get("params_without_grad", ())}, run.names)
    converted = convert_state_dict(gradients, run.names)
    assert len(converted) > 10
    for name, gradient in converted.items():
        if name in fixed:
            assert ours[name] is None and not gradient.any()
        else:
            assert gradient_error(ours[name], gradient) < 1e-5, name


@pytest.mark.parametrize("path", [path for path in DECODERS if "adamixer" in path.id])
def test_sampling_points_and_samples(path, monkeypatch):
    from drmm_hf.modeling import adamixer_stage

    seen = []
    sample = adamixer_stage.sample_maps

    def record(maps, points, strides):
        seen.append((points, sample(maps, points, strides)))
        return seen[-1][1]

    monkeypatch.setattr(adamixer_stage, "sample_maps", record)
    run = Run(path, torch.float32)
    assert len(seen) == len(run.stages)
    for stage, (points, samples) in enumerate(seen):
        recorded = run.case.starting_with(f"stage{stage}.")
        assert error(xyxy_to_xyzr(run.seen[stage][2]), recorded["in_xyzr"]) < 1e-3
        assert error(points.flatten(2, 3), recorded["sample_points"].squeeze(2)) < 1e-3
        assert error(samples, recorded["sampled_feat"]) < 1e-3
    if "init.xyzr" in run.case.tensors:
        boxes = initial_query_boxes(run.config.num_queries, None, 1.0)
        queries = run.modules["queries"]
        with torch.no_grad():
            queries.boxes.copy_(boxes)
        assert error(xyxy_to_xyzr(queries(run.case["in.img_hw"])[0]), run.case["init.xyzr"]) < 1e-5


@pytest.mark.parametrize("path", cases("adamixer_neck.safetensors"))
def test_neck(path):
    case = Case(path)
    neck = ChannelMapping(case.info["in_channels"], case.info["out_channels"])
    assert neck.norm.num_groups == case.info["group_norm_groups"]
    weights = convert_state_dict(case.starting_with("param."), MMDETECTION_NAMES["adamixer", "box"])
    neck.load_state_dict({name.removeprefix("neck."): value for name, value in weights.items()}, strict=True)
    maps = [case[f"in.c{level}"] for level in range(2, 6)]
    for level, value in enumerate(neck(maps)):
        assert error(value, case[f"out.{level}"]) < 2e-5
    for level, value in enumerate(neck.double()([value.double() for value in maps])):
        assert error(value, case[f"out64.{level}"]) < 1e-8


@pytest.mark.parametrize("path", cases("adamixer_ops*.safetensors"))
def test_closed_forms(path):
    case = Case(path)
    xyzr, boxes = case["xyzr"], case["boxes"]
    assert error(xyzr_to_xyxy(xyzr), boxes) < 1e-5
    assert error(move_xyzr(boxes, case["delta"]), case["refined_boxes"]) < 1e-5
    assert error(xyxy_to_xyzr(case["refined_boxes"]), case["refined_xyzr"]) < 1e-5
    assert error(position_embedding(xyzr, 8), case["pos_embed_8"]) < 1e-5
    assert error(position_embedding(xyzr, 64), case["pos_embed_64"]) < 1e-5
    assert error(log_overlap(boxes), case["log_iof"]) < 1e-4
    assert error(log_overlap(boxes).exp() - 1e-7, case["iof"]) < 1e-5
    points = sample_points(xyzr, case["offset"].unflatten(-1, (-1, 3)))
    assert error(points, case["sample_points_12"].squeeze(2)) < 1e-5
    distance = (xyzr[..., 2:3] - torch.tensor([4, 8, 16, 32]).log2()) ** 2
    assert error((-distance / 2).softmax(-1), case["level_weight"]) < 1e-5
    assert error(initial_offset_bias(16, 4), case["init_offset_bias_16points_4groups"]) < 1e-6
