"""Read a detector's architecture from the names and shapes of its tensors."""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, ResNetConfig, SwinConfig


_STAGES = ["stage1", "stage2", "stage3", "stage4"]
# What the grid of the published settings looks like: rows and columns by number of queries.
_GRIDS = {100: [10, 10], 300: [15, 20], 500: [20, 25], 1000: [25, 40], 2000: [40, 50]}
_RESNETS = {
    ("basic", 512, (2, 2, 2, 2)): "ResNet-18",
    ("basic", 512, (3, 4, 6, 3)): "ResNet-34",
    ("bottleneck", 2048, (3, 4, 6, 3)): "ResNet-50",
    ("bottleneck", 2048, (3, 4, 23, 3)): "ResNet-101",
    ("bottleneck", 2048, (3, 8, 36, 3)): "ResNet-152",
}
_SWINS = {
    (96, (2, 2, 6, 2)): "Swin-T",
    (96, (2, 2, 18, 2)): "Swin-S",
    (128, (2, 2, 18, 2)): "Swin-B",
    (192, (2, 2, 18, 2)): "Swin-L",
}


class _Shapes(dict):
    """Shapes by name; a name that is not there is an error in words."""

    def __missing__(self, name: str):
        raise ValueError(f"no tensor of the checkpoint becomes {name!r}, so its architecture cannot be read.")

    def count(self, pattern: str) -> int:
        """Count the names that fit a pattern up to their end."""
        return sum(bool(re.fullmatch(pattern, name)) for name in self)


def infer_fields(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the fields of the configuration that shapes can tell.

    Of Sparse R-CNN's decoder they do not tell the number of attention heads.

    Args:
        weights (`Mapping[str, torch.Tensor]`): the tensors of a `DrmmModel`, complete, by our names.

    Returns:
        `dict[str, Any]`: fields of `DrmmConfig`.

    Raises:
        ValueError: if a tensor that tells a size is absent, or sizes contradict one another.
    """
    shapes = _Shapes({name: tuple(value.shape) for name, value in weights.items()})
    layer = r"decoder\.layers\.0\."
    first = "decoder.layers.0."
    num_queries, width = shapes["queries.features"]
    head_type = "mixture" if f"{first}head.objectness.weight" in shapes else "box"
    fields = {
        "backbone_config": _backbone_config(shapes),
        "decoder_type": "adamixer" if f"{first}stage.iof_scale" in shapes else "sparse_rcnn",
        "head_type": head_type,
        "num_labels": shapes[f"{first}head.classifier.weight"][0],
        "num_queries": num_queries,
        "hidden_size": width,
        "num_stages": shapes.count(r"decoder\.layers\.\d+\.head\.classifier\.weight"),
        "intermediate_size": shapes[f"{first}stage.feed_forward.0.weight"][0],
        # Every layer of a branch is a linear layer and a norm.
        "num_class_layers": shapes.count(layer + r"head\.class_branch\.\d+\.weight") // 2,
        "num_box_layers": shapes.count(layer + r"head\.box_branch\.\d+\.weight") // 2,
        "proposal_grid": None,
    }
    if fields["decoder_type"] == "adamixer":
        return fields | _adamixer_fields(shapes, width)
    if head_type == "mixture":
        fields["proposal_grid"] = _GRIDS.get(num_queries)
    return fields | {
        "dynamic_size": shapes[f"{first}stage.dynamic_conv.norm_inner.weight"][0],
        "roi_size": math.isqrt(shapes[f"{first}stage.dynamic_conv.projection.weight"][1] // width),
    }


def _adamixer_fields(shapes: _Shapes, width: int) -> dict[str, Any]:
    """Solve for groups and points: the generator gives groups * ((width / groups)^2 + points in * points out)."""
    stage = "decoder.layers.0.stage."
    points_of_all_groups = shapes[f"{stage}sampling_offset.weight"][0] // 3
    points_out = shapes[f"{stage}mixing.projection.weight"][1] // width
    generated = shapes[f"{stage}mixing.generator.weight"][0]
    over_channels = generated - points_of_all_groups * points_out
    groups = width**2 // over_channels if over_channels > 0 else 0
    if not groups or width % groups or points_of_all_groups % groups or groups * over_channels != width**2:
        raise ValueError(
            f"the mixing weights of AdaMixer ({generated} generated, {points_of_all_groups} points, {points_out} out, "
            f"{width} channels) fit no number of groups."
        )
    return {
        "num_attention_heads": shapes[f"{stage}iof_scale"][0],
        "num_sampling_groups": groups,
        "num_sampling_points": points_of_all_groups // groups,
        "num_mixing_points": points_out,
    }


def _backbone_config(shapes: _Shapes) -> PreTrainedConfig:
    prefix = "backbone.network."
    if f"{prefix}swin.embeddings.norm.weight" in shapes:
        layers = [f"{prefix}swin.encoder.layers.{stage}.blocks." for stage in range(4)]
        table = "0.attention.relative_position_bias.relative_position_bias_table"
        window = (math.isqrt(shapes[layers[0] + table][0]) + 1) // 2
        width, _, patch_size, _ = shapes[f"{prefix}swin.embeddings.patch_embeddings.projection.weight"]
        swin = SwinConfig(
            embed_dim=width,
            patch_size=patch_size,
            window_size=window,
            depths=[shapes.count(re.escape(layer) + r"\d+\.layernorm_before\.weight") for layer in layers],
            num_heads=[shapes[layer + table][1] for layer in layers],
            mlp_ratio=shapes[layers[0] + "0.mlp.fc1.weight"][0] / width,
            qkv_bias=layers[0] + "0.attention.q_proj.bias" in shapes,
        )
        swin.out_features = _STAGES
        return swin
    stages = [f"{prefix}encoder.stages.{stage}.layers." for stage in range(4)]
    last = 2 if f"{stages[0]}0.layer.2.convolution.weight" in shapes else 1
    resnet = ResNetConfig(
        embedding_size=shapes[f"{prefix}embedder.embedder.convolution.weight"][0],
        hidden_sizes=[shapes[f"{stage}0.layer.{last}.convolution.weight"][0] for stage in stages],
        depths=[shapes.count(re.escape(stage) + r"\d+\.layer\.0\.convolution\.weight") for stage in stages],
        layer_type="bottleneck" if last == 2 else "basic",
    )
    resnet.out_features = _STAGES
    return resnet


def backbone_name(config: dict | PreTrainedConfig | None) -> str:
    """Name a backbone as papers do.

    Args:
        config (`PreTrainedConfig`): of any backbone, as a detector's config has it, whatever that was given.

    Returns:
        `str`: such as "ResNet-50" or "Swin-T"; of other ResNets and Swins the kind with its depths and its width, of
        others what they are called in timm or transformers.
    """
    assert isinstance(config, PreTrainedConfig)
    if config.model_type not in ("resnet", "swin"):
        return getattr(config, "backbone", None) or config.model_type
    depths = tuple(config.depths)
    if config.model_type == "swin":
        kind, width, known = "Swin", config.embed_dim, _SWINS.get((config.embed_dim, depths))
    else:
        width = config.hidden_sizes[-1]
        kind, known = "ResNet", _RESNETS.get((config.layer_type, width, depths))
    return known or f"{kind} of depths {'-'.join(map(str, depths))} and width {width}"
