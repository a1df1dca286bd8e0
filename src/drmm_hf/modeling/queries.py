"""Initial queries: learnt boxes and features, the same for every picture."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .boxes import cxcywh_to_xyxy, frame_scale


def initial_query_boxes(num_queries: int, grid: list[int] | None, size: float) -> Tensor:
    """Lay out the query boxes before training.

    Args:
        num_queries (`int`): number K of boxes.
        grid (`list[int]` or `None`): rows and columns of box centres, row by row; `None` puts every box on the whole
            picture, (0.5, 0.5, 1, 1).
        size (`float`): width and height of the grid's boxes.

    Returns:
        `torch.Tensor` of shape `(K, 4)`: cxcywh in [0, 1] of the picture.

    Source: public code adds the grid; Sparse R-CNN starts from the whole picture.
    """
    if grid is None:
        return torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(num_queries, 1)
    rows, columns = grid
    y, x = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij")
    return torch.stack([x, y, torch.full_like(x, size), torch.full_like(y, size)], dim=-1).flatten(0, 1)


class DrmmQueries(nn.Module):
    """Learnt query boxes and features; AdaMixer's boxes are fixed and its features normalised.

    Args:
        config (`DrmmConfig`): reads `num_queries`, `num_query_groups`, `hidden_size`, `proposal_grid`,
            `proposal_size`, `decoder_type`.
    """

    def __init__(self, config):
        super().__init__()
        self.grid, self.size = config.proposal_grid, config.proposal_size
        self.num_queries, self.num_groups = config.num_queries, config.num_query_groups
        self.is_adamixer = config.decoder_type == "adamixer"
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)  # 8 bits would round boxes to pixels
        self.boxes = nn.Parameter(torch.empty(self.num_groups * self.num_queries, 4, dtype=dtype))
        self.features = nn.Parameter(torch.empty(self.num_groups * self.num_queries, config.hidden_size))
        self.train(self.training)

    def train(self, mode: bool = True):
        """Set the mode; fix AdaMixer's boxes here, because `from_pretrained` makes every parameter trainable."""
        super().train(mode)
        if self.is_adamixer:
            self.boxes.requires_grad_(False)
        return self

    def forward(self, image_sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Place the queries on pictures.

        Args:
            image_sizes (`torch.Tensor` of shape `(B, 2)`): (height, width) of the unpadded pictures, in pixels.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: boxes `(B * G, K, 4)`, xyxy, pixels of the model input, at least
            float32; features `(B * G, K, hidden_size)`. G is `num_query_groups` in training mode, groups of one
            picture following each other, and 1 otherwise.
        """
        groups = self.num_groups if self.training else 1
        boxes, features = (
            values[: groups * self.num_queries]
            .unflatten(0, (groups, self.num_queries))
            .repeat(image_sizes.shape[0], 1, 1)
            for values in (self.boxes, self.features)
        )
        if self.is_adamixer:
            features = F.layer_norm(features, features.shape[-1:])
        boxes = cxcywh_to_xyxy(boxes.to(torch.promote_types(boxes.dtype, torch.float32)))
        return boxes * frame_scale(image_sizes, boxes.dtype).repeat_interleave(groups, dim=0), features
