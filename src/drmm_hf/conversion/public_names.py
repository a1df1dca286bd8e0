"""Names of the public D-RMM checkpoints and torchvision's ResNets, mapped to this package's names."""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor


# torchvision's (and mmdetection's) ResNet -> transformers' ResNet.
RESNET_NAMES = {
    r"conv1\.(.+)": r"embedder.embedder.convolution.\1",
    r"bn1\.(.+)": r"embedder.embedder.normalization.\1",
    r"layer(\d)\.(\d+)\.conv(\d)\.(.+)": r"encoder.stages.{1-1}.layers.\2.layer.{3-1}.convolution.\4",
    r"layer(\d)\.(\d+)\.bn(\d)\.(.+)": r"encoder.stages.{1-1}.layers.\2.layer.{3-1}.normalization.\4",
    r"layer(\d)\.(\d+)\.downsample\.0\.(.+)": r"encoder.stages.{1-1}.layers.\2.shortcut.convolution.\3",
    r"layer(\d)\.(\d+)\.downsample\.1\.(.+)": r"encoder.stages.{1-1}.layers.\2.shortcut.normalization.\3",
}

_STAGE = r"roi_head\.bbox_head\.(\d+)\."
_LAYER = r"decoder.layers.\1."

# The public detector -> DrmmModel. A list splits the rows of one tensor: (first row, last row, name).
DETECTOR_NAMES = {
    **{rf"backbone\.{pattern}": rf"backbone.network.{name}" for pattern, name in RESNET_NAMES.items()},
    r"neck\.lateral_convs\.(\d)\.conv\.(.+)": r"neck.pyramid.inner_blocks.\1.0.\2",
    r"neck\.fpn_convs\.(\d)\.conv\.(.+)": r"neck.pyramid.layer_blocks.\1.0.\2",
    r"rpn_head\.init_proposal_bboxes\.weight": "queries.boxes",
    r"rpn_head\.init_proposal_features\.weight": "queries.features",
    _STAGE + r"fc_cls\.(.+)": [(0, 1, _LAYER + r"head.objectness.\2"), (1, None, _LAYER + r"head.classifier.\2")],
    _STAGE + r"fc_reg\.(.+)": [(0, 4, _LAYER + r"head.box_delta.\2"), (4, 8, _LAYER + r"head.box_scale.\2")],
    _STAGE + r"cls_fcs\.(\d+)\.(.+)": _LAYER + r"head.class_branch.\2.\3",
    _STAGE + r"reg_fcs\.(\d+)\.(.+)": _LAYER + r"head.box_branch.\2.\3",
    _STAGE + r"attention\.attn\.in_proj_(.+)": _LAYER + r"stage.attention.in_proj.\2",
    _STAGE + r"attention\.attn\.out_proj\.(.+)": _LAYER + r"stage.attention.out_proj.\2",
    _STAGE + r"attention_norm\.(.+)": _LAYER + r"stage.attention_norm.\2",
    _STAGE + r"instance_interactive_conv\.dynamic_layer\.(.+)": _LAYER + r"stage.dynamic_conv.generator.\2",
    _STAGE + r"instance_interactive_conv\.norm_in\.(.+)": _LAYER + r"stage.dynamic_conv.norm_inner.\2",
    _STAGE + r"instance_interactive_conv\.norm_out\.(.+)": _LAYER + r"stage.dynamic_conv.norm_outer.\2",
    _STAGE + r"instance_interactive_conv\.fc_layer\.(.+)": _LAYER + r"stage.dynamic_conv.projection.\2",
    _STAGE + r"instance_interactive_conv\.fc_norm\.(.+)": _LAYER + r"stage.dynamic_conv.norm_projection.\2",
    _STAGE + r"instance_interactive_conv_norm\.(.+)": _LAYER + r"stage.dynamic_norm.\2",
    _STAGE + r"ffn\.layers\.0\.0\.(.+)": _LAYER + r"stage.feed_forward.0.\2",
    _STAGE + r"ffn\.layers\.1\.(.+)": _LAYER + r"stage.feed_forward.3.\2",
    _STAGE + r"ffn_norm\.(.+)": _LAYER + r"stage.feed_forward_norm.\2",
}


def convert_state_dict(state_dict: Mapping[str, Tensor], names: Mapping[str, object]) -> dict[str, Tensor]:
    """Rename and split every tensor of a state dict.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): tensors by public name.
        names (`Mapping[str, str | list]`): patterns of whole public names and what they become: `DETECTOR_NAMES` or
            `RESNET_NAMES`.

    Returns:
        `dict[str, torch.Tensor]`: tensors by our name; views of the given ones.

    Raises:
        ValueError: if a name fits no pattern, or two names become the same one.
    """
    converted, unknown = {}, []
    for name, tensor in state_dict.items():
        targets = _targets(name, names)
        if targets is None:
            unknown.append(name)
            continue
        for first, last, target in targets:
            if target in converted:
                raise ValueError(f"{name!r} becomes {target!r}, which another tensor became before.")
            converted[target] = tensor[first:last] if (first, last) != (None, None) else tensor
    if unknown:
        raise ValueError(f"{len(unknown)} names fit no pattern: {_some(unknown)}")
    return converted


def _targets(name: str, names: Mapping[str, object]) -> list[tuple] | None:
    for pattern, target in names.items():
        if match := re.fullmatch(pattern, name):
            rows = target if isinstance(target, list) else [(None, None, target)]
            return [(first, last, _expand(template, match)) for first, last, template in rows]
    return None


def _expand(template: str, match: re.Match) -> str:
    """Fill in a template's groups, one in braces with `-1` as a number less one."""
    template = re.sub(r"\{(\d)-1\}", lambda group: str(int(match[int(group[1])]) - 1), template)
    return match.expand(template)


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = sorted(names)
    return ", ".join(map(repr, names[:limit])) + (f" and {len(names) - limit} more" if len(names) > limit else "")
