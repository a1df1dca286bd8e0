"""Necks: from the backbone's four maps to four maps of `hidden_size` channels."""

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork


class FPN(nn.Module):
    """Feature pyramid network: 1x1 laterals, top-down addition, 3x3 outputs; no norm, no activation, no extra level.

    Args:
        in_channels (`list[int]`): channels of the backbone's maps, finest first.
        hidden_size (`int`): channels of every output map.

    Source: Lin et al. 2017, through torchvision.
    """

    def __init__(self, in_channels: list[int], hidden_size: int):
        super().__init__()
        self.pyramid = FeaturePyramidNetwork(in_channels, hidden_size)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Return the pyramid, finest first, each map with the height and width of its input."""
        return list(self.pyramid({str(level): value for level, value in enumerate(maps)}).values())


class ChannelMapping(nn.Module):
    """Bring every map to `hidden_size` channels by itself: a 1x1 convolution, then one group norm for all levels.

    Args:
        in_channels (`list[int]`): channels of the backbone's maps, finest first.
        hidden_size (`int`): channels of every output map, a multiple of the norm's 32 groups.

    Source: AdaMixer.
    """

    def __init__(self, in_channels: list[int], hidden_size: int):
        super().__init__()
        self.projections = nn.ModuleList(nn.Conv2d(channels, hidden_size, 1) for channels in in_channels)
        self.norm = nn.GroupNorm(32, hidden_size)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Return the maps, finest first, each with the height and width of its input."""
        return [self.norm(project(value)) for project, value in zip(self.projections, maps, strict=True)]


NECKS = {"fpn": FPN, "channel_mapping": ChannelMapping}
