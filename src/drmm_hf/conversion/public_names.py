"""Names of public checkpoints, mapped to this package's names.

A table maps patterns of whole public names to ours, in which `{1-2}` is the number of group 1 less 2. Where one tensor
of theirs is several of ours, or has its columns in another order, our names stand in `Parts`, beside a function.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeAlias

from torch import Tensor


class Parts(NamedTuple):
    """What becomes of a tensor that is several of ours, or has its columns in another order.

    Attributes:
        split (`Callable`): from the tensor to ours.
        names (`tuple[str, ...]`): what they are called.
    """

    split: Callable[[Tensor], tuple[Tensor, ...]]
    names: tuple[str, ...]


Names: TypeAlias = Mapping[str, str | Parts]


def _first_row_apart(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor[:1], tensor[1:]


def _halves(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.chunk(2)


def _thirds(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.chunk(3)


def _channels_last(tensor: Tensor) -> tuple[Tensor, ...]:
    """Reorder the inputs of patch merging from (channel, row, column), the order of unfolding."""
    return (tensor.unflatten(-1, (-1, 2, 2)).transpose(-3, -1).flatten(-3),)


def _under(theirs: str, ours: str, names: Names) -> dict[str, str | Parts]:
    """Put a prefix before the names of a table."""
    return {
        theirs + pattern: ours + target
        if isinstance(target, str)
        else Parts(target.split, tuple(ours + name for name in target.names))
        for pattern, target in names.items()
    }


# torchvision's (and mmdetection's) ResNet -> transformers' ResNet.
RESNET_NAMES = {
    r"conv1\.(.+)": r"embedder.embedder.convolution.\1",
    r"bn1\.(.+)": r"embedder.embedder.normalization.\1",
    r"layer(\d)\.(\d+)\.conv(\d)\.(.+)": r"encoder.stages.{1-1}.layers.\2.layer.{3-1}.convolution.\4",
    r"layer(\d)\.(\d+)\.bn(\d)\.(.+)": r"encoder.stages.{1-1}.layers.\2.layer.{3-1}.normalization.\4",
    r"layer(\d)\.(\d+)\.downsample\.0\.(.+)": r"encoder.stages.{1-1}.layers.\2.shortcut.convolution.\3",
    r"layer(\d)\.(\d+)\.downsample\.1\.(.+)": r"encoder.stages.{1-1}.layers.\2.shortcut.normalization.\3",
}

# detectron2's ResNet -> transformers' ResNet.
DETECTRON2_RESNET_NAMES = {
    r"stem\.conv1\.weight": r"embedder.embedder.convolution.weight",
    r"stem\.conv1\.norm\.(.+)": r"embedder.embedder.normalization.\1",
    r"res(\d)\.(\d+)\.conv(\d)\.weight": r"encoder.stages.{1-2}.layers.\2.layer.{3-1}.convolution.weight",
    r"res(\d)\.(\d+)\.conv(\d)\.norm\.(.+)": r"encoder.stages.{1-2}.layers.\2.layer.{3-1}.normalization.\4",
    r"res(\d)\.(\d+)\.shortcut\.weight": r"encoder.stages.{1-2}.layers.\2.shortcut.convolution.weight",
    r"res(\d)\.(\d+)\.shortcut\.norm\.(.+)": r"encoder.stages.{1-2}.layers.\2.shortcut.normalization.\3",
}

# mmdetection's Swin -> transformers' SwinBackbone.
_BLOCK, _OUR_BLOCK = r"stages\.(\d)\.blocks\.(\d+)\.", r"swin.encoder.layers.\1.blocks.\2."
SWIN_NAMES = {
    r"patch_embed\.projection\.(.+)": r"swin.embeddings.patch_embeddings.projection.\1",
    r"patch_embed\.norm\.(.+)": r"swin.embeddings.norm.\1",
    **_under(
        _BLOCK,
        _OUR_BLOCK,
        {
            r"norm1\.(.+)": r"layernorm_before.\3",
            r"attn\.w_msa\.qkv\.(.+)": Parts(_thirds, tuple(rf"attention.{part}_proj.\3" for part in "qkv")),
            r"attn\.w_msa\.proj\.(.+)": r"attention.o_proj.\3",
            r"attn\.w_msa\.(relative_position_.+)": r"attention.relative_position_bias.\3",
            r"norm2\.(.+)": r"layernorm_after.\3",
            r"ffn\.layers\.0\.0\.(.+)": r"mlp.fc1.\3",
            r"ffn\.layers\.1\.(.+)": r"mlp.fc2.\3",
        },
    ),
    r"stages\.(\d)\.downsample\.(.+)": Parts(_channels_last, (r"swin.encoder.layers.\1.downsample.\2",)),
    r"norm0\.(.+)": r"hidden_states_norms.stage1.\1",
    r"norm1\.(.+)": r"hidden_states_norms.stage2.\1",
    r"norm2\.(.+)": r"hidden_states_norms.stage3.\1",
    r"norm3\.(.+)": r"hidden_states_norms.stage4.\1",
}

# Outside the heads, by `decoder_type`. Group 1 of the second part is the stage.
_AROUND_THE_HEADS = {
    "sparse_rcnn": {
        r"neck\.lateral_convs\.(\d)\.conv\.(.+)": r"neck.pyramid.inner_blocks.\1.0.\2",
        r"neck\.fpn_convs\.(\d)\.conv\.(.+)": r"neck.pyramid.layer_blocks.\1.0.\2",
        r"rpn_head\.init_proposal_bboxes\.weight": r"queries.boxes",
        r"rpn_head\.init_proposal_features\.weight": r"queries.features",
        **_under(
            r"roi_head\.bbox_head\.(\d+)\.instance_interactive_conv",
            r"decoder.layers.\1.stage.",
            {
                r"\.dynamic_layer\.(.+)": r"dynamic_conv.generator.\2",
                r"\.norm_in\.(.+)": r"dynamic_conv.norm_inner.\2",
                r"\.norm_out\.(.+)": r"dynamic_conv.norm_outer.\2",
                r"\.fc_layer\.(.+)": r"dynamic_conv.projection.\2",
                r"\.fc_norm\.(.+)": r"dynamic_conv.norm_projection.\2",
                r"_norm\.(.+)": r"dynamic_norm.\2",
            },
        ),
    },
    "adamixer": {
        r"neck\.lateral_convs\.(\d)\.conv\.(.+)": r"neck.projections.\1.\2",
        r"neck\.gn_out\.(.+)": r"neck.norm.\1",
        r"rpn_head\.init_proposal_bboxes\.weight": r"queries.boxes",
        r"rpn_head\.init_content_features\.weight": r"queries.features",
        r"roi_head\.bbox_head\.(\d+)\.iof_tau": r"decoder.layers.\1.stage.iof_scale",
        **_under(
            r"roi_head\.bbox_head\.(\d+)\.sampling_n_mixing\.",
            r"decoder.layers.\1.stage.",
            {
                r"sampling_offset_generator\.0\.(.+)": r"sampling_offset.\2",
                r"adaptive_mixing\.parameter_generator\.0\.(.+)": r"mixing.generator.\2",
                r"adaptive_mixing\.out_proj\.(.+)": r"mixing.projection.\2",
                r"norm\.(.+)": r"mixing_norm.\2",
            },
        ),
    },
}
_EVERY_STAGE: dict[str, str | Parts] = {
    r"attention\.attn\.in_proj_(.+)": r"stage.attention.in_proj.\2",
    r"attention\.attn\.out_proj\.(.+)": r"stage.attention.out_proj.\2",
    r"attention_norm\.(.+)": r"stage.attention_norm.\2",
    r"ffn\.layers\.0\.0\.(.+)": r"stage.feed_forward.0.\2",
    r"ffn\.layers\.1\.(.+)": r"stage.feed_forward.3.\2",
    r"ffn_norm\.(.+)": r"stage.feed_forward_norm.\2",
    r"cls_fcs\.(\d+)\.(.+)": r"head.class_branch.\2.\3",
    r"reg_fcs\.(\d+)\.(.+)": r"head.box_branch.\2.\3",
}
# The last layers, by `head_type`.
_LAST_LAYERS: dict[str, dict[str, str | Parts]] = {
    "mixture": {
        r"fc_cls\.(.+)": Parts(_first_row_apart, (r"head.objectness.\2", r"head.classifier.\2")),
        r"fc_reg\.(.+)": Parts(_halves, (r"head.box_delta.\2", r"head.box_scale.\2")),
    },
    "box": {
        r"fc_cls\.(.+)": r"head.classifier.\2",
        r"fc_reg\.(.+)": r"head.box_delta.\2",
    },
}

# A detector of the mmdetection family -> DrmmModel, by `decoder_type` and `head_type`.
MMDETECTION_NAMES = {
    (decoder_type, head_type): {
        **_under(r"backbone\.", r"backbone.network.", RESNET_NAMES | SWIN_NAMES),
        **around,
        **_under(r"roi_head\.bbox_head\.(\d+)\.", r"decoder.layers.\1.", _EVERY_STAGE | last_layers),
    }
    for decoder_type, around in _AROUND_THE_HEADS.items()
    for head_type, last_layers in _LAST_LAYERS.items()
}
DETECTOR_NAMES = MMDETECTION_NAMES["sparse_rcnn", "mixture"]  # D-RMM as its authors published it

# Sparse R-CNN of the detectron2 family -> DrmmModel.
DETECTRON2_NAMES = {
    **_under(r"backbone\.bottom_up\.", r"backbone.network.", DETECTRON2_RESNET_NAMES),
    r"backbone\.fpn_lateral(\d)\.(.+)": r"neck.pyramid.inner_blocks.{1-2}.0.\2",
    r"backbone\.fpn_output(\d)\.(.+)": r"neck.pyramid.layer_blocks.{1-2}.0.\2",
    r"init_proposal_boxes\.weight": r"queries.boxes",
    r"init_proposal_features\.weight": r"queries.features",
    **_under(
        r"head\.head_series\.(\d+)\.",
        r"decoder.layers.\1.",
        {
            r"self_attn\.in_proj_(.+)": r"stage.attention.in_proj.\2",
            r"self_attn\.out_proj\.(.+)": r"stage.attention.out_proj.\2",
            r"norm1\.(.+)": r"stage.attention_norm.\2",
            r"inst_interact\.dynamic_layer\.(.+)": r"stage.dynamic_conv.generator.\2",
            r"inst_interact\.norm1\.(.+)": r"stage.dynamic_conv.norm_inner.\2",
            r"inst_interact\.norm2\.(.+)": r"stage.dynamic_conv.norm_outer.\2",
            r"inst_interact\.out_layer\.(.+)": r"stage.dynamic_conv.projection.\2",
            r"inst_interact\.norm3\.(.+)": r"stage.dynamic_conv.norm_projection.\2",
            r"norm2\.(.+)": r"stage.dynamic_norm.\2",
            r"linear1\.(.+)": r"stage.feed_forward.0.\2",
            r"linear2\.(.+)": r"stage.feed_forward.3.\2",
            r"norm3\.(.+)": r"stage.feed_forward_norm.\2",
            r"cls_module\.(\d+)\.(.+)": r"head.class_branch.\2.\3",
            r"reg_module\.(\d+)\.(.+)": r"head.box_branch.\2.\3",
            r"class_logits\.(.+)": r"head.classifier.\2",
            r"bboxes_delta\.(.+)": r"head.box_delta.\2",
        },
    ),
}


def detector_names(state_dict: Mapping[str, Tensor]) -> Names:
    """Choose the table of names that a detector's state dict needs.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): tensors by public name; those of backbone and neck may be absent.

    Returns:
        `Mapping`: `DETECTRON2_NAMES` or one of `MMDETECTION_NAMES`. The head is a mixture's if `fc_reg` has 8 rows.

    Raises:
        ValueError: if the names are of no known family.
    """
    if "init_proposal_boxes.weight" in state_dict:
        return DETECTRON2_NAMES
    last_layer = state_dict.get("roi_head.bbox_head.0.fc_reg.weight")
    for decoder_type, queries in (("sparse_rcnn", "init_proposal_features"), ("adamixer", "init_content_features")):
        if last_layer is not None and f"rpn_head.{queries}.weight" in state_dict:
            return MMDETECTION_NAMES[decoder_type, "mixture" if len(last_layer) == 8 else "box"]
    raise ValueError(
        "the names are of no D-RMM, Sparse R-CNN or AdaMixer detector of the mmdetection or detectron2 family: "
        f"{list_some(state_dict)}."
    )


def convert_state_dict(state_dict: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Rename, split and reorder every tensor of a state dict.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): tensors by public name.
        names (`Mapping[str, str | Parts]`): a table of this module, such as `detector_names(state_dict)`.

    Returns:
        `dict[str, torch.Tensor]`: tensors by our name; views of the given ones where the order is kept.

    Raises:
        ValueError: if a name fits no pattern, or two names become the same one.
    """
    converted, unknown = {}, []
    for name, tensor in state_dict.items():
        found = _find(name, names)
        if found is None:
            unknown.append(name)
            continue
        match, target = found
        tensors = (tensor,) if isinstance(target, str) else target.split(tensor)
        for ours, part in zip(_expand(match, target), tensors, strict=True):
            if ours in converted:
                raise ValueError(f"{name!r} becomes {ours!r}, which another tensor became before.")
            converted[ours] = part
    if unknown:
        raise ValueError(f"no pattern fits {len(unknown)} of {len(state_dict)} names: {list_some(unknown)}.")
    return converted


def our_names(name: str, names: Names) -> list[str]:
    """Return what a public name becomes.

    Args:
        name (`str`): a whole public name.
        names (`Mapping[str, str | Parts]`): a table of this module.

    Returns:
        `list[str]`: our names, empty if the name fits no pattern.
    """
    found = _find(name, names)
    return [] if found is None else _expand(*found)


def list_some(names: Iterable[str], limit: int = 5) -> str:
    """Return the first of some names in alphabetical order, and how many more there are."""
    names = sorted(names)
    return ", ".join(map(repr, names[:limit])) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _find(name: str, names: Names) -> tuple[re.Match[str], str | Parts] | None:
    """Return the match of the first pattern that fits, and what stands beside it."""
    matches = ((re.fullmatch(pattern, name), target) for pattern, target in names.items())
    return next(((match, target) for match, target in matches if match), None)


def _expand(match: re.Match[str], target: str | Parts) -> list[str]:
    """Fill in the groups of our names; one in braces is a number less another."""

    def difference(part: re.Match[str]) -> str:
        return str(int(match[int(part[1])]) - int(part[2]))

    names = (target,) if isinstance(target, str) else target.names
    return [match.expand(re.sub(r"\{(\d)-(\d)\}", difference, name)) for name in names]
