"""Tiny detectors and their weights under public names, made by replacing words, the inverse of what is tested."""

import re

import pytest
import torch
from transformers import SwinConfig

from conftest import STAGES, tiny_config, tiny_resnet
from drmm_hf import DrmmForObjectDetection


MMDETECTION = {
    "backbone.network.embedder.embedder.convolution": "backbone.conv1",
    "backbone.network.embedder.embedder.normalization": "backbone.bn1",
    "neck.pyramid.inner_blocks.{}.0": "neck.lateral_convs.{}.conv",
    "neck.pyramid.layer_blocks.{}.0": "neck.fpn_convs.{}.conv",
    "neck.projections.{}": "neck.lateral_convs.{}.conv",
    "neck.norm": "neck.gn_out",
    "queries.boxes": "rpn_head.init_proposal_bboxes.weight",
    "decoder.layers.": "roi_head.bbox_head.",
    "stage.attention.in_proj.": "attention.attn.in_proj_",
    "stage.attention.out_proj": "attention.attn.out_proj",
    "stage.attention_norm": "attention_norm",
    "stage.dynamic_conv.generator": "instance_interactive_conv.dynamic_layer",
    "stage.dynamic_conv.norm_inner": "instance_interactive_conv.norm_in",
    "stage.dynamic_conv.norm_outer": "instance_interactive_conv.norm_out",
    "stage.dynamic_conv.projection": "instance_interactive_conv.fc_layer",
    "stage.dynamic_conv.norm_projection": "instance_interactive_conv.fc_norm",
    "stage.dynamic_norm": "instance_interactive_conv_norm",
    "stage.iof_scale": "iof_tau",
    "stage.sampling_offset": "sampling_n_mixing.sampling_offset_generator.0",
    "stage.mixing.generator": "sampling_n_mixing.adaptive_mixing.parameter_generator.0",
    "stage.mixing.projection": "sampling_n_mixing.adaptive_mixing.out_proj",
    "stage.mixing_norm": "sampling_n_mixing.norm",
    "stage.feed_forward.0": "ffn.layers.0.0",
    "stage.feed_forward.3": "ffn.layers.1",
    "stage.feed_forward_norm": "ffn_norm",
    "head.class_branch": "cls_fcs",
    "head.box_branch": "reg_fcs",
    "head.classifier": "fc_cls",
    "head.box_delta": "fc_reg",
}
DETECTRON2 = {
    "backbone.network.embedder.embedder.convolution": "backbone.bottom_up.stem.conv1",
    "backbone.network.embedder.embedder.normalization": "backbone.bottom_up.stem.conv1.norm",
    "queries.boxes": "init_proposal_boxes.weight",
    "queries.features": "init_proposal_features.weight",
    "decoder.layers.": "head.head_series.",
    "stage.attention.in_proj.": "self_attn.in_proj_",
    "stage.attention.out_proj": "self_attn.out_proj",
    "stage.attention_norm": "norm1",
    "stage.dynamic_conv.generator": "inst_interact.dynamic_layer",
    "stage.dynamic_conv.norm_inner": "inst_interact.norm1",
    "stage.dynamic_conv.norm_outer": "inst_interact.norm2",
    "stage.dynamic_conv.projection": "inst_interact.out_layer",
    "stage.dynamic_conv.norm_projection": "inst_interact.norm3",
    "stage.dynamic_norm": "norm2",
    "stage.feed_forward.0": "linear1",
    "stage.feed_forward.3": "linear2",
    "stage.feed_forward_norm": "norm3",
    "head.class_branch": "cls_module",
    "head.box_branch": "reg_module",
    "head.classifier": "class_logits",
    "head.box_delta": "bboxes_delta",
}


def replaced(name: str, words: dict[str, str]) -> str:
    for level in range(4):
        for ours, theirs in words.items():
            if name.startswith(ours.format(level)) or ours.startswith(("stage.", "head.")):
                name = name.replace(ours.format(level), theirs.format(level))
    return name


def mmdetection_name(name: str, queries: str) -> str:
    if match := re.fullmatch(r"backbone.network.encoder.stages.(\d).layers.(\d+).(.+)\.(\w+)", name):
        stage, block, part, last = match.groups()
        kind = {"convolution": ("conv", "0"), "normalization": ("bn", "1")}[part.split(".")[-1]]
        layer = f"downsample.{kind[1]}" if "shortcut" in part else f"{kind[0]}{int(part.split('.')[1]) + 1}"
        return f"backbone.layer{int(stage) + 1}.{block}.{layer}.{last}"
    return f"rpn_head.{queries}.weight" if name == "queries.features" else replaced(name, MMDETECTION)


def detectron2_name(name: str) -> str:
    if match := re.fullmatch(r"backbone.network.encoder.stages.(\d).layers.(\d+).(.+)\.(\w+)", name):
        stage, block, part, last = match.groups()
        layer = "shortcut" if "shortcut" in part else f"conv{int(part.split('.')[1]) + 1}"
        norm = ".norm" if part.endswith("normalization") else ""
        return f"backbone.bottom_up.res{int(stage) + 2}.{block}.{layer}{norm}.{last}"
    if match := re.fullmatch(r"neck.pyramid.(inner|layer)_blocks.(\d).0.(\w+)", name):
        return f"backbone.fpn_{'lateral' if match[1] == 'inner' else 'output'}{int(match[2]) + 2}.{match[3]}"
    return replaced(name, DETECTRON2)


def unfolded(value: torch.Tensor) -> torch.Tensor:
    """Bring the inputs of patch merging from (column, row, channel) to the order of unfolding, one by one."""
    channels = value.shape[-1] // 4
    reordered = torch.empty_like(value)
    for channel in range(channels):
        for row in range(2):
            for column in range(2):
                reordered[..., 4 * channel + 2 * row + column] = value[..., (2 * column + row) * channels + channel]
    return reordered


def mmdetection_swin(backbone: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename transformers' SwinBackbone to mmdetection's Swin, with the buffers that it saves."""
    public = {}
    for name, value in backbone.items():
        if ".q_proj." in name:
            value = torch.cat([backbone[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
        if name.startswith("swin.layernorm") or ".k_proj." in name or ".v_proj." in name:
            continue
        for ours, theirs in {
            "swin.embeddings.patch_embeddings": "patch_embed",
            "swin.embeddings": "patch_embed",
            "swin.encoder.layers": "stages",
            "attention.q_proj": "attn.w_msa.qkv",
            "attention.o_proj": "attn.w_msa.proj",
            "attention.relative_position_bias": "attn.w_msa",
            "layernorm_before": "norm1",
            "layernorm_after": "norm2",
            "mlp.fc1": "ffn.layers.0.0",
            "mlp.fc2": "ffn.layers.1",
            "hidden_states_norms.stage1": "norm0",
            "hidden_states_norms.stage2": "norm1",
            "hidden_states_norms.stage3": "norm2",
            "hidden_states_norms.stage4": "norm3",
        }.items():
            name = name.replace(ours, theirs)
        public[name] = unfolded(value) if "downsample" in name else value
        if name.endswith("relative_position_bias_table"):
            window = (round(len(value) ** 0.5) + 1) // 2
            steps = torch.arange(window) + (2 * window - 1) * torch.arange(window)[:, None]
            index = (steps.view(-1, 1) + steps.view(1, -1)).flip(1)
            public[name.replace("bias_table", "index")] = index
    return public


def disturbed(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every tensor values that no initialisation gives, so that no two could be exchanged unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.2 * torch.rand(value.shape, generator=generator))
    return model.eval()


def tiny_detector(decoder_type: str, head_type: str, **overrides) -> DrmmForObjectDetection:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_sampling_groups": 2, "num_sampling_points": 4, "num_mixing_points": 6}
    sizes |= {"num_queries": 6, "proposal_grid": None, "freeze_backbone_stages": 1, "dynamic_size": 5}
    config = tiny_config(decoder_type=decoder_type, head_type=head_type, **(sizes | overrides))
    return disturbed(DrmmForObjectDetection(config))


def mmdetection_weights(model: DrmmForObjectDetection) -> dict[str, torch.Tensor]:
    """Return a detector's weights as a checkpoint of the mmdetection family names them."""
    ours, public = dict(model.model.state_dict()), {}
    if model.config.backbone_config.model_type == "swin":
        prefix = "backbone.network."
        network = {name.removeprefix(prefix): ours.pop(name) for name in list(ours) if name.startswith(prefix)}
        public = {f"backbone.{name}": value for name, value in mmdetection_swin(network).items()}
    for stage in range(model.config.num_stages if model.config.head_type == "mixture" else 0):
        for kind in ("weight", "bias"):
            for first, second, joint in (
                ("objectness", "classifier", "classifier"),
                ("box_delta", "box_scale", "box_delta"),
            ):
                head = f"decoder.layers.{stage}.head."
                pair = [ours.pop(f"{head}{part}.{kind}") for part in (first, second)]
                ours[f"{head}{joint}.{kind}"] = torch.cat(pair)
    adamixer = model.config.decoder_type == "adamixer"
    queries = "init_content_features" if adamixer else "init_proposal_features"
    return public | {mmdetection_name(name, queries): value.clone() for name, value in ours.items()}


def detectron2_weights(model: DrmmForObjectDetection) -> dict[str, torch.Tensor]:
    """Return a box detector's weights as detectron2's Sparse R-CNN names them, batch norms frozen ones."""
    ours = model.model.state_dict()
    kept = {name: value for name, value in ours.items() if not name.endswith("num_batches_tracked")}
    return {detectron2_name(name): value.clone() for name, value in kept.items()}


def tiny_swin() -> SwinConfig:
    return SwinConfig(
        embed_dim=8,
        depths=[2, 2, 2, 2],
        num_heads=[1, 2, 4, 4],
        window_size=3,
        out_features=STAGES,
        drop_path_rate=0.0,
    )


KINDS = [("sparse_rcnn", "mixture"), ("sparse_rcnn", "box"), ("adamixer", "mixture"), ("adamixer", "box")]


@pytest.fixture(params=KINDS, ids="-".join)
def detector(request) -> DrmmForObjectDetection:
    """Return a tiny detector of each decoder and head."""
    return tiny_detector(*request.param, backbone_config=tiny_resnet())
