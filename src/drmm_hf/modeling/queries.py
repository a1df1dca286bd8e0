"""Initial queries: learnt boxes and features, the same for every picture."""

import torch
from torch import Tensor, nn

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
    """Learnt query boxes and features.

    Args:
        config (`DrmmConfig`): reads `num_queries`, `hidden_size`, `proposal_grid`, `proposal_size`.
    """

    def __init__(self, config):
        super().__init__()
        self.grid, self.size = config.proposal_grid, config.proposal_size
        self.boxes = nn.Parameter(torch.empty(config.num_queries, 4))
        self.features = nn.Parameter(torch.empty(config.num_queries, config.hidden_size))

    def forward(self, image_sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Place the queries on pictures.

        Args:
            image_sizes (`torch.Tensor` of shape `(B, 2)`): (height, width) of the unpadded pictures, in pixels.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: boxes `(B, K, 4)`, xyxy, pixels of the model input, at least float32;
            features `(B, K, hidden_size)`.
        """
        boxes = self.boxes.to(torch.promote_types(self.boxes.dtype, torch.float32))
        boxes = cxcywh_to_xyxy(boxes)[None] * frame_scale(image_sizes, boxes.dtype)
        return boxes, self.features[None].expand(len(image_sizes), -1, -1)
