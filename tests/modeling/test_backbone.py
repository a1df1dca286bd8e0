"""Backbones of four families: strides, freezing by module, batch-norm modes."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoBackbone, ConvNextConfig, ResNetConfig, SwinConfig, TimmBackboneConfig

from conftest import STAGES, random_pictures, tiny_config, tiny_resnet
from drmm_hf.modeling.backbone import DrmmBackbone


def timm_config(name="tf_efficientnet_lite0", out_indices=(1, 2, 3, 4)):
    return TimmBackboneConfig(backbone=name, out_indices=out_indices)


BACKBONES = {
    "resnet": tiny_resnet,
    "swin": lambda: SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, image_size=64, out_features=STAGES
    ),
    "convnext": lambda: ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], out_features=STAGES),
    "timm": timm_config,
}
# What the names of the stem's and of each stage's parameters start with.
PREFIXES = {
    "resnet": [("embedder", "encoder.stages.0"), *((f"encoder.stages.{i}",) for i in (1, 2, 3))],
    "swin": [("swin.embeddings", "swin.encoder.layers.0"), *((f"swin.encoder.layers.{i}",) for i in (1, 2, 3))],
    "convnext": [("embeddings", "encoder.stages.0"), *((f"encoder.stages.{i}",) for i in (1, 2, 3))],
    "timm": [
        ("_backbone.conv_stem", "_backbone.bn1", "_backbone.blocks.0", "_backbone.blocks.1"),
        ("_backbone.blocks.2",),
        ("_backbone.blocks.3", "_backbone.blocks.4"),
        ("_backbone.blocks.5", "_backbone.blocks.6"),
    ],
}


def build(family, **overrides):
    torch.manual_seed(0)
    return DrmmBackbone(tiny_config(backbone_config=BACKBONES[family](), **overrides))


def is_within(name, prefixes):
    return any(name.startswith(f"{prefix}.") for prefix in prefixes)


@pytest.mark.parametrize("size", [(64, 96), (70, 100)])
@pytest.mark.parametrize("family", BACKBONES)
def test_gives_four_maps_at_strides_4_to_32(family, size):
    backbone = build(family).eval()
    with torch.no_grad():
        maps = backbone(random_pictures(1, *size))
    assert [value.shape[1] for value in maps] == backbone.channels
    for value, stride in zip(maps, (4, 8, 16, 32), strict=True):
        for cells, pixels in zip(value.shape[-2:], size, strict=True):
            assert cells in (pixels // stride, -(-pixels // stride))


@pytest.mark.parametrize("count", range(5))
@pytest.mark.parametrize("family", BACKBONES)
def test_freezes_the_stem_and_the_first_stages_and_nothing_else(family, count):
    backbone = build(family, freeze_backbone_stages=count, backbone_norm="train").train()
    frozen = [prefix for stage in PREFIXES[family][:count] for prefix in stage]
    unused = ["swin.layernorm"]  # no map passes through it
    for name, parameter in backbone.network.named_parameters():
        assert parameter.requires_grad != is_within(name, frozen + unused), name
    for name, module in backbone.network.named_modules():
        if isinstance(module, (_BatchNorm, nn.Dropout)):
            assert module.training != is_within(f"{name}.", frozen), name


@pytest.mark.parametrize("family", BACKBONES)
def test_frozen_stages_stay_put_through_training_steps_and_the_rest_moves(family):
    backbone = build(family, freeze_backbone_stages=2, backbone_norm="train").train()
    before = {name: value.clone() for name, value in backbone.network.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in backbone.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    for seed in range(2):
        sum((value**2).mean() for value in backbone(random_pictures(2, seed=seed))).backward()
        assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    frozen = [prefix for stage in PREFIXES[family][:2] for prefix in stage] + ["swin.layernorm"]
    moved = {name for name, value in backbone.network.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and not [name for name in moved if is_within(name, frozen)]
    trainable = {name for name, parameter in backbone.network.named_parameters() if parameter.requires_grad}
    assert trainable <= moved


class TestNormModes:
    @pytest.mark.parametrize("family", ["resnet", "timm"])
    @pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
    def test_statistics_and_affine_parameters(self, family, mode):
        backbone = build(family, backbone_norm=mode).train()
        norms = [module for module in backbone.modules() if isinstance(module, _BatchNorm)]
        assert norms and all(module.training == (mode == "train") for module in norms)
        assert all(module.weight.requires_grad == (mode != "frozen") for module in norms)
        assert all(module.bias.requires_grad == (mode != "frozen") for module in norms)
        before = [module.running_mean.clone() for module in norms]
        backbone(random_pictures(2))
        moved = [not torch.equal(m.running_mean, old) for m, old in zip(norms, before, strict=True)]
        assert all(moved) if mode == "train" else not any(moved)

    @pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
    def test_toggling_the_mode(self, mode):
        backbone = build("resnet", backbone_norm=mode, freeze_backbone_stages=1)
        flags = [parameter.requires_grad for parameter in backbone.parameters()]
        picture = random_pictures(1)
        before = backbone.eval()(picture)
        for _ in range(2):
            assert backbone.train() is backbone and backbone.training
            assert not backbone.network.encoder.stages[0].training
            assert backbone.network.encoder.stages[1].training
            assert not backbone.eval().network.encoder.stages[1].training
        assert [parameter.requires_grad for parameter in backbone.parameters()] == flags
        assert all(torch.equal(a, b) for a, b in zip(backbone(picture), before, strict=True))

    def test_hold_from_construction_on(self):
        backbone = build("resnet", backbone_norm="eval")
        assert backbone.training
        assert not any(module.training for module in backbone.modules() if isinstance(module, _BatchNorm))

    def test_survive_a_conversion_to_synchronised_batch_norm(self):
        backbone = build("resnet", backbone_norm="train", freeze_backbone_stages=1)
        backbone = nn.SyncBatchNorm.convert_sync_batchnorm(backbone).train()
        for name, module in backbone.network.named_modules():
            if isinstance(module, nn.SyncBatchNorm):
                assert module.training != is_within(f"{name}.", PREFIXES["resnet"][0])
                assert module.weight.requires_grad == module.training


class TestFolding:
    """A ResNet without gradients folds its norms into the convolutions; with gradients it takes transformers' path."""

    @pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
    def test_changes_nothing_but_the_rounding(self, layer_type, dtype, tolerance):
        backbone = self.disturbed(layer_type).to(dtype)
        picture = random_pictures(2).to(dtype)
        plain = AutoBackbone.from_config(backbone.network.config).to(dtype).eval()
        plain.load_state_dict(backbone.network.state_dict())
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with context():
                for ours, expected in zip(backbone(picture), plain(picture).feature_maps, strict=True):
                    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance * expected.max().item())

    @pytest.mark.parametrize("grad", [False, True])
    def test_bfloat16_loses_as_much_as_without(self, grad):
        backbone = self.disturbed("bottleneck")
        with torch.set_grad_enabled(grad):
            exact = backbone(random_pictures(2))
            rounded = backbone.to(torch.bfloat16)(random_pictures(2).bfloat16())
        for ours, expected in zip(rounded, exact, strict=True):
            assert (ours - expected).abs().max() < 0.05 * expected.abs().max()

    def test_follows_the_weights_and_keeps_them(self):
        backbone = self.disturbed("basic")
        before = {name: value.clone() for name, value in backbone.state_dict().items()}
        with torch.no_grad():
            first = backbone(random_pictures(1))
        assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
        with torch.no_grad():
            for name, value in backbone.state_dict().items():
                if name.endswith("running_mean"):
                    value += 1
        second = backbone(random_pictures(1))
        with torch.no_grad():
            third = backbone(random_pictures(1))
        for old, new, folded in zip(first, second, third, strict=True):
            assert not torch.allclose(old, new)
            torch.testing.assert_close(folded, new, rtol=1e-4, atol=1e-4)

    def test_norms_in_training_mode_update_without_gradients_too(self):
        backbone = build("resnet", backbone_norm="train").train()
        with torch.no_grad():
            backbone(random_pictures(2))
        assert all(module.running_mean.any() for module in backbone.modules() if isinstance(module, _BatchNorm))

    @staticmethod
    def disturbed(layer_type):
        config = tiny_resnet()
        config.layer_type = layer_type
        torch.manual_seed(0)
        backbone = DrmmBackbone(tiny_config(backbone_config=config)).eval()
        for module in backbone.modules():
            if isinstance(module, _BatchNorm):
                for value in (module.running_var, module.weight.data):
                    value.uniform_(0.5, 2)
                for value in (module.running_mean, module.bias.data):
                    value.normal_(std=0.3)
        return backbone


def test_timm_networks_that_are_stored_flattened_can_be_frozen():
    backbone = DrmmBackbone(
        tiny_config(backbone_config=timm_config("convnext_atto", (0, 1, 2, 3)), freeze_backbone_stages=1)
    )
    trainable = {name.split(".")[1] for name, value in backbone.network.named_parameters() if value.requires_grad}
    frozen = {name.split(".")[1] for name, value in backbone.network.named_parameters() if not value.requires_grad}
    assert frozen == {"stem_0", "stem_1", "stages_0"} and trainable == {"stages_1", "stages_2", "stages_3"}


@pytest.mark.parametrize("family", ["timm", "convnext"])
class TestDepthwiseConvolutionsUnderAutocast:
    def types(self, backbone):
        """Return the types that depthwise convolutions of trained and of frozen stages give."""
        found = {}
        for module in backbone.network.modules():
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                module.register_forward_hook(
                    lambda module, _, output: found.setdefault(module.weight.requires_grad, set()).add(output.dtype)
                )
        with torch.autocast("cpu", torch.bfloat16):
            backbone(random_pictures())
        return found

    def test_are_float32_only_where_there_will_be_a_backward(self, family):
        backbone = build(family, freeze_backbone_stages=1).train()
        assert self.types(backbone) == {True: {torch.float32}, False: {torch.bfloat16}}
        with torch.no_grad():
            assert self.types(backbone) == {True: {torch.bfloat16}, False: {torch.bfloat16}}

    def test_a_copy_uses_its_own_weights(self, family):
        backbone = build(family)
        copy = deepcopy(backbone)
        before = backbone(random_pictures())
        with torch.no_grad():
            for parameter in copy.parameters():
                parameter.zero_()
        for expected, found in zip(before, backbone(random_pictures()), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert all(level_map.abs().max() == 0 for level_map in copy(random_pictures()))


class TestErrors:
    def test_number_of_maps(self):
        with pytest.raises(ValueError, match="backbone_config gives 1 feature maps; it must give 4"):
            DrmmBackbone(tiny_config(backbone_config=ResNetConfig(depths=[1, 1, 1, 1], out_features=["stage4"])))

    def test_strides(self):
        config = tiny_resnet()
        config.downsample_in_first_stage = True
        backbone = DrmmBackbone(tiny_config(backbone_config=config))
        with pytest.raises(ValueError, match=r"maps of heights \[8, 4, 2, 1\] .* strides must be \(4, 8, 16, 32\)"):
            backbone(random_pictures(1))

    def test_freezing_a_family_whose_stages_are_not_known(self):
        sizes = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
        config = {"model_type": "convnextv2", "out_features": STAGES, **sizes}
        DrmmBackbone(tiny_config(backbone_config=config))
        with pytest.raises(ValueError, match="freeze_backbone_stages=1 .* 'convnextv2'; known are .*'resnet'"):
            DrmmBackbone(tiny_config(backbone_config=config, freeze_backbone_stages=1))


@pytest.mark.parametrize("with_gradients", [True, False])
def test_only_inference_brings_pictures_into_channels_last(with_gradients):
    """On CPUs the backward pass of an 8-channel 1x1 convolution of stride 2 writes beyond its memory in that order."""
    backbone, seen = DrmmBackbone(tiny_config()), []
    backbone.network.register_forward_pre_hook(
        lambda _, arguments: seen.append(arguments[0].is_contiguous(memory_format=torch.channels_last))
    )
    with torch.set_grad_enabled(with_gradients):
        backbone(torch.randn(1, 3, 64, 96))
    assert seen == [not with_gradients]
