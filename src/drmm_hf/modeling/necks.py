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


NECKS = {"fpn": FPN}
