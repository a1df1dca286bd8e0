"""The pyramid against its definition, written with plain operations."""

import pytest
import torch
from torch.nn import functional as F

from drmm_hf.modeling.necks import FPN, NECKS


def reference(neck, maps):
    """Lateral 1x1, nearest up-sampling to the exact size of the finer map, addition, 3x3."""
    inner = [block[0] for block in neck.pyramid.inner_blocks]
    outer = [block[0] for block in neck.pyramid.layer_blocks]
    top, results = None, []
    for level in reversed(range(len(maps))):
        lateral = torch.einsum("oc,bchw->bohw", inner[level].weight[:, :, 0, 0], maps[level])
        lateral = lateral + inner[level].bias[:, None, None]
        if top is not None:
            height, width = lateral.shape[-2:]
            rows = torch.arange(height) * top.shape[-2] // height
            columns = torch.arange(width) * top.shape[-1] // width
            lateral = lateral + top[:, :, rows][..., columns]
        top = lateral
        results.append(F.conv2d(top, outer[level].weight, outer[level].bias, padding=1))
    return results[::-1]


@pytest.mark.parametrize(
    "sizes", [[(16, 24), (8, 12), (4, 6), (2, 3)], [(9, 12), (5, 6), (3, 3), (2, 2)], [(1, 1)] * 4]
)
def test_equals_its_definition_on_even_and_odd_sizes(sizes):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    neck = FPN([8, 16, 24, 32], 16).double()
    for parameter in neck.parameters():
        torch.nn.init.normal_(parameter)
    channels = [8, 16, 24, 32]
    maps = [
        torch.randn(2, c, *size, dtype=torch.float64, generator=generator)
        for c, size in zip(channels, sizes, strict=True)
    ]
    with torch.no_grad():
        for ours, expected, size in zip(neck(maps), reference(neck, maps), sizes, strict=True):
            assert ours.shape == (2, 16, *size)
            torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_has_four_levels_of_two_convolutions_with_bias_and_nothing_else():
    neck = NECKS["fpn"]([8, 16, 24, 32], 16)
    shapes = sorted(tuple(parameter.shape) for parameter in neck.parameters())
    assert shapes == sorted([*([(16,)] * 8), *((16, c, 1, 1) for c in (8, 16, 24, 32)), *([(16, 16, 3, 3)] * 4)])


@pytest.mark.parametrize("sizes", [[(16, 24), (8, 12), (4, 6), (2, 3)], [(1, 1)] * 4])
def test_channel_mapping_treats_every_level_alone_with_one_norm(sizes):
    torch.manual_seed(0)
    neck = NECKS["channel_mapping"]([8, 16, 24, 32], 64).double()
    for parameter in neck.parameters():
        torch.nn.init.normal_(parameter)
    maps = [torch.randn(2, c, *size).double() for c, size in zip([8, 16, 24, 32], sizes, strict=True)]
    with torch.no_grad():
        for level, (ours, value) in enumerate(zip(neck(maps), maps, strict=True)):
            layer = neck.projections[level]
            x = torch.einsum("oc,bchw->bohw", layer.weight[:, :, 0, 0], value) + layer.bias[:, None, None]
            groups = x.reshape(2, 32, -1)  # two channels each
            deviation = (groups.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            x = ((groups - groups.mean(-1, keepdim=True)) / deviation).reshape(x.shape)
            torch.testing.assert_close(ours, x * neck.norm.weight[:, None, None] + neck.norm.bias[:, None, None])
