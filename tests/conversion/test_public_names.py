import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn
from torch.nn import functional as F
from transformers import AutoBackbone

from conversion.conftest import (
    detectron2_name,
    detectron2_weights,
    disturbed,
    mmdetection_name,
    mmdetection_weights,
    tiny_detector,
    tiny_swin,
    unfolded,
)
from drmm_hf.conversion.public_names import (
    DETECTOR_NAMES,
    DETECTRON2_NAMES,
    MMDETECTION_NAMES,
    RESNET_NAMES,
    SWIN_NAMES,
    convert_state_dict,
    detector_names,
    our_names,
)


def test_rows_of_joint_layers_are_split():
    weight = torch.arange(12.0).reshape(4, 3)
    converted = convert_state_dict({"roi_head.bbox_head.2.fc_cls.weight": weight}, DETECTOR_NAMES)
    assert torch.equal(converted["decoder.layers.2.head.objectness.weight"], weight[:1])
    assert torch.equal(converted["decoder.layers.2.head.classifier.weight"], weight[1:])
    bias = torch.arange(8.0)
    converted = convert_state_dict({"roi_head.bbox_head.0.fc_reg.bias": bias}, DETECTOR_NAMES)
    assert torch.equal(converted["decoder.layers.0.head.box_delta.bias"], bias[:4])
    assert torch.equal(converted["decoder.layers.0.head.box_scale.bias"], bias[4:])


def test_stage_numbers_count_from_zero():
    converted = convert_state_dict({"layer3.1.conv2.weight": torch.ones(1)}, RESNET_NAMES)
    assert list(converted) == ["encoder.stages.2.layers.1.layer.1.convolution.weight"]
    assert our_names("backbone.fpn_output5.bias", DETECTRON2_NAMES) == ["neck.pyramid.layer_blocks.3.0.bias"]


def test_unknown_names_are_errors_that_name_them():
    with pytest.raises(ValueError, match="no pattern fits 1 of 1 names: 'optimizer.state'"):
        convert_state_dict({"optimizer.state": torch.ones(1)}, DETECTOR_NAMES)
    assert our_names("optimizer.state", DETECTOR_NAMES) == []


def test_two_names_for_one_tensor_are_an_error():
    with pytest.raises(ValueError, match="which another tensor became before"):
        convert_state_dict({"a": torch.ones(1), "b": torch.ones(1)}, {"[ab]": "c"})


def test_every_tensor_of_the_mmdetection_family_comes_back(detector):
    ours = detector.model.state_dict()
    public = mmdetection_weights(detector)
    names = detector_names(public)
    assert names is MMDETECTION_NAMES[detector.config.decoder_type, detector.config.head_type]
    converted = convert_state_dict(public, names)
    assert converted.keys() == ours.keys()
    assert all(torch.equal(converted[name], value) for name, value in ours.items())
    assert sorted(name for theirs in public for name in our_names(theirs, names)) == sorted(ours)


def test_every_tensor_of_the_detectron2_family_comes_back():
    detector = tiny_detector("sparse_rcnn", "box")
    ours = detector.model.state_dict()
    public = detectron2_weights(detector)
    assert detector_names(public) is DETECTRON2_NAMES
    converted = convert_state_dict(public, DETECTRON2_NAMES)
    assert ours.keys() - converted.keys() == {name for name in ours if name.endswith("num_batches_tracked")}
    assert all(torch.equal(value, ours[name]) for name, value in converted.items())


def test_the_words_of_this_test_are_public_ones():
    """A few names of published files, so that the inverse above is not only the inverse of the table."""
    ours = "decoder.layers.4.stage.attention.in_proj.weight"
    assert mmdetection_name(ours, "") == "roi_head.bbox_head.4.attention.attn.in_proj_weight"
    assert detectron2_name(ours) == "head.head_series.4.self_attn.in_proj_weight"
    ours = "backbone.network.encoder.stages.3.layers.1.layer.2.normalization.running_var"
    assert mmdetection_name(ours, "") == "backbone.layer4.1.bn3.running_var"
    assert detectron2_name(ours) == "backbone.bottom_up.res5.1.conv3.norm.running_var"
    assert detectron2_name("neck.pyramid.inner_blocks.0.0.weight") == "backbone.fpn_lateral2.weight"
    assert detectron2_name("decoder.layers.0.stage.dynamic_norm.bias") == "head.head_series.0.norm2.bias"


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match=r"no D-RMM, Sparse R-CNN or AdaMixer .*: 'transformer.x'"):
        detector_names({"transformer.x": torch.ones(1)})


# Swin


def test_patch_merging_reads_unfolded_channels():
    """mmdetection unfolds 2x2 pixels, then norm and linear layer; transformers concatenates four strided maps."""
    merging = disturbed(AutoBackbone.from_config(tiny_swin())).swin.encoder.layers[0].downsample
    norm, linear = nn.LayerNorm(32), nn.Linear(32, 16, bias=False)
    disturbed(nn.ModuleList([norm, linear]), seed=1)
    public = {f"stages.0.downsample.norm.{name}": value for name, value in norm.state_dict().items()}
    public |= {f"stages.0.downsample.reduction.{name}": value for name, value in linear.state_dict().items()}
    converted = convert_state_dict(public, SWIN_NAMES)
    prefix = "swin.encoder.layers.0.downsample."
    merging.load_state_dict({name.removeprefix(prefix): value for name, value in converted.items()}, strict=True)
    pixels = torch.randn(2, 8, 6, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = linear(norm(F.unfold(pixels, 2, stride=2).transpose(1, 2)))
        actual = merging(pixels.flatten(2).transpose(1, 2), (6, 4))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def mmdetection_names_of_timm(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename timm's Swin to mmdetection's, which merges patches at the end of a stage, on unfolded channels."""
    public = {}
    for name, value in weights.items():
        if name.startswith("norm.") or "relative_position_index" in name or "attn_mask" in name:
            continue
        if "downsample" in name:
            stage, rest = int(name.split(".")[1]), name.split("downsample.")[1]
            public[f"stages.{stage - 1}.downsample.{rest}"] = unfolded(value)
            continue
        for ours, theirs in (
            ("layers.", "stages."),
            ("patch_embed.proj.", "patch_embed.projection."),
            (".attn.", ".attn.w_msa."),
            (".mlp.fc1.", ".ffn.layers.0.0."),
            (".mlp.fc2.", ".ffn.layers.1."),
        ):
            name = name.replace(ours, theirs, 1)
        public[name] = value
    return public


def test_swin_gives_the_features_of_timms():
    """The same random weights under mmdetection's names give timm's features in transformers' Swin.

    All maps are whole windows: on others timm shifts before it pads, mmdetection and transformers after.
    """
    height, width = 96, 192
    timm_swin = disturbed(
        SwinTransformer(
            img_size=(height, width),
            window_size=3,
            embed_dim=8,
            depths=(2, 2, 2, 2),
            num_heads=(1, 2, 4, 4),
            num_classes=0,
            always_partition=True,
            drop_path_rate=0.0,
        )
    ).double()
    public = mmdetection_names_of_timm(timm_swin.state_dict())
    norms = disturbed(nn.ModuleList(nn.LayerNorm(8 * 2**stage) for stage in range(4)), seed=1).double()
    public |= {f"norm{name}": value for name, value in norms.state_dict().items()}
    backbone = AutoBackbone.from_config(tiny_swin()).eval().double()
    missing, unexpected = backbone.load_state_dict(convert_state_dict(public, SWIN_NAMES), strict=False)
    assert missing == ["swin.layernorm.weight", "swin.layernorm.bias"] and not unexpected

    picture = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        features = timm_swin.forward_intermediates(picture, intermediates_only=True)
        expected = [norm(feature.movedim(1, -1)).movedim(-1, 1) for norm, feature in zip(norms, features, strict=True)]
        actual = backbone(picture).feature_maps
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def mmdetection_attention(weights: dict[str, torch.Tensor], pixels: torch.Tensor, window: int, heads: int):
    """Attend pixel by pixel as mmdetection's second block of a stage does: pad, shift, window, mask.

    `pixels` is `(H, W, C)` after the block's first norm; the result has the same shape.
    """
    height, width, channels = pixels.shape
    shift = window // 2
    padded = F.pad(pixels, (0, 0, 0, -width % window, 0, -height % window))
    rows, columns = padded.shape[:2]
    qkv = F.linear(padded.reshape(-1, channels), weights["qkv.weight"], weights["qkv.bias"])
    query, key, value = qkv.view(rows * columns, 3, heads, -1).unbind(1)
    index = torch.arange(rows * columns)
    row, column = (index // columns - shift) % rows, (index % columns - shift) % columns

    def region(position, length):
        return (position >= length - window).long() + (position >= length - shift)

    places = torch.stack([row // window, column // window, region(row, rows), region(column, columns)])
    together = (places[:, :, None] == places[:, None]).all(0)
    step = row % window * (2 * window - 1) + column % window
    last = (window - 1) * 2 * window
    table = weights["relative_position_bias_table"]
    bias = table[(step[:, None] - step[None] + last).clamp(0, len(table) - 1)]
    scores = torch.einsum("ihd,jhd->ijh", query, key) / query.shape[-1] ** 0.5 + bias
    attention = scores.masked_fill(~together[..., None], -torch.inf).softmax(1)
    mixed = torch.einsum("ijh,jhd->ihd", attention, value).reshape(rows, columns, channels)
    return F.linear(mixed[:height, :width], weights["proj.weight"], weights["proj.bias"])


def test_a_shifted_block_on_a_padded_map_computes_what_mmdetections_does():
    backbone = disturbed(AutoBackbone.from_config(tiny_swin())).double()
    generator = torch.Generator().manual_seed(2)
    prefix = "stages.1.blocks.1.attn.w_msa."
    shapes = {"qkv.weight": (48, 16), "qkv.bias": (48,), "proj.weight": (16, 16), "proj.bias": (16,)}
    shapes["relative_position_bias_table"] = (25, 2)
    weights = {name: torch.randn(*shape, generator=generator).double() for name, shape in shapes.items()}
    converted = convert_state_dict({prefix + name: value for name, value in weights.items()}, SWIN_NAMES)
    assert not backbone.load_state_dict(converted, strict=False).unexpected_keys
    block = backbone.swin.encoder.layers[1].blocks[1]
    block.mlp.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    pixels = torch.randn(5, 7, 16, generator=generator).double()
    with torch.no_grad():
        actual = block(pixels.view(1, 35, 16), (5, 7), always_partition=True)[0].view(5, 7, 16)
        expected = pixels + mmdetection_attention(weights, block.layernorm_before(pixels), window=3, heads=2)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


def test_window_positions_are_those_of_mmdetection():
    """mmdetection counts the positions of a window by steps; the dropped buffer is checked against the model's."""
    window = 3
    steps = (torch.arange(0, window * (2 * window - 1), 2 * window - 1)[:, None] + torch.arange(window)).flatten()
    theirs = (steps[:, None] + steps).flip(1)
    name = "stages.1.blocks.0.attn.w_msa.relative_position_index"
    (ours,) = our_names(name, SWIN_NAMES)
    computed = AutoBackbone.from_config(tiny_swin()).get_buffer(ours)
    assert torch.equal(computed, theirs.flatten())


# detectron2


def detectron2_stage(weights: dict[str, torch.Tensor], boxes, features, regions, num_heads: int):
    """Compute a stage of detectron2's Sparse R-CNN from its names and formulas.

    Returns the features `(K, D)`, the class logits and the boxes of one picture, from regions `(K, positions, D)`.
    """

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    width = features.shape[-1]
    attention = nn.MultiheadAttention(width, num_heads)
    prefix = "self_attn."
    attention.load_state_dict({n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)})
    x = norm(features + attention(features, features, features)[0], "norm1")
    generated = linear(x, "inst_interact.dynamic_layer")
    inner = generated.shape[-1] // 2 // width
    first = generated[:, : width * inner].view(-1, width, inner)
    second = generated[:, width * inner :].view(-1, inner, width)
    region = norm(torch.bmm(regions, first), "inst_interact.norm1").relu()
    region = norm(torch.bmm(region, second), "inst_interact.norm2").relu()
    region = norm(linear(region.flatten(1), "inst_interact.out_layer"), "inst_interact.norm3").relu()
    x = norm(x + region, "norm2")
    x = norm(x + linear(linear(x, "linear1").relu(), "linear2"), "norm3")
    class_features, box_features = norm(linear(x, "cls_module.0"), "cls_module.1").relu(), x
    for layer in (0, 3, 6):
        box_features = norm(linear(box_features, f"reg_module.{layer}"), f"reg_module.{layer + 1}").relu()
    delta = linear(box_features, "bboxes_delta")
    size = boxes[:, 2:] - boxes[:, :2]
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + delta[:, :2] / 2 * size
    size = size * delta[:, 2:].exp()
    return x, linear(class_features, "class_logits"), torch.cat([centre - size / 2, centre + size / 2], dim=1)


def test_a_stage_computes_what_detectron2s_does(monkeypatch):
    detector = tiny_detector("sparse_rcnn", "box", num_stages=1)
    prefix = "head.head_series.0."
    public = {n.removeprefix(prefix): v for n, v in detectron2_weights(detector).items() if n.startswith(prefix)}
    generator = torch.Generator().manual_seed(0)
    features, regions = (torch.randn(*shape, generator=generator) for shape in ((6, 32), (6, 49, 32)))
    corner = 40 * torch.rand(6, 2, generator=generator)
    boxes = torch.cat([corner, corner + 10 + 20 * torch.rand(6, 2, generator=generator)], dim=1)
    monkeypatch.setattr("drmm_hf.modeling.sparse_rcnn_stage.pool_regions", lambda *args: regions[None])
    layer = detector.model.decoder.layers[0]
    with torch.no_grad():
        updated = layer.stage([], boxes[None], features[None])
        predicted = layer.head(updated, boxes[None])
        expected = detectron2_stage(public, boxes, features, regions, detector.config.num_attention_heads)
    for ours, theirs in zip((updated, predicted.class_logits, predicted.boxes), expected, strict=True):
        torch.testing.assert_close(ours[0], theirs, rtol=1e-4, atol=1e-4)
