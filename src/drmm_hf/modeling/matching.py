"""One-to-one assignment of ground truths to predictions: the host's part of the criteria that match."""

import math
from itertools import product

import torch
from torch import Tensor
from transformers.utils import is_scipy_available


@torch.compiler.disable
def match(cost: Tensor, valid: Tensor) -> Tensor:
    """Assign ground truths to predictions within each stage and picture: as many as possible, at the least total cost.

    This is the one place where training waits for the host, and `torch.compile` breaks its graph here, by design: the
    algorithm branches on values. The costs of all stages and pictures come in one transfer and the result returns in
    one; between them scipy solves one picture of one stage after the other, in float64. No gradient passes.

    Args:
        cost (`torch.Tensor` of shape `(S, B, N, K)`): of giving prediction k to ground truth i.
        valid (`torch.Tensor` of shape `(S, B, N, K)`, or one that broadcasts to it): bool, True on pairs that may be
            matched. The cost of other pairs is not looked at; a row or column of them is padding.

    Returns:
        `torch.Tensor` of shape `(S, B, N)`: int64, on the device of `cost`: the prediction of each ground truth, or -1
        where none is left for it or it is padding.

    Raises:
        ImportError: if scipy is not installed.
        FloatingPointError: if the cost of a valid pair is infinite or not a number; names the stage and the picture.

    Source: the Hungarian matching of DETR and Sparse R-CNN; Table 2, B.
    """
    if is_scipy_available():
        from scipy.optimize import linear_sum_assignment
    else:
        raise ImportError(
            "The criteria that match one to one (focal_l1_giou, bipartite_nll, nll_mcm_bipartite) need scipy, which "
            "is not installed: pip install scipy."
        )
    # Validity travels inside the costs: infinite on pairs that must not be matched, NaN on valid ones in error.
    marked = torch.where(cost.isfinite(), cost.detach(), math.nan)
    costs = torch.where(valid, marked, math.inf).cpu()
    wrong = costs.isnan().flatten(2).any(dim=-1).nonzero()
    if len(wrong):
        stage, picture = wrong[0].tolist()
        raise FloatingPointError(
            f"The matching cost of stage {stage}, picture {picture} is not finite for "
            f"{costs[stage, picture].isnan().sum()} pairs of ground truth and prediction: the predictions, or the "
            "boxes of the labels, hold infinite values or NaN."
        )
    assigned = torch.full(costs.shape[:3], -1)
    matrices, results = costs.numpy().astype("float64"), assigned.numpy()
    for stage, picture in product(range(len(matrices)), range(matrices.shape[1])):
        open_pairs = matrices[stage, picture] < math.inf
        rows, columns = open_pairs.any(1).nonzero()[0], open_pairs.any(0).nonzero()[0]
        if not len(rows):
            continue
        matrix = matrices[stage, picture][rows][:, columns]
        blocked = ~open_pairs[rows][:, columns]
        # A blocked pair costs more than rearranging all others can save: it is taken where nothing else is left.
        least, most = matrix.min(), matrix[~blocked].max()
        matrix[blocked] = most + 1 + (most - least) * min(matrix.shape)
        chosen_rows, chosen_columns = linear_sum_assignment(matrix)
        kept = ~blocked[chosen_rows, chosen_columns]
        results[stage, picture, rows[chosen_rows[kept]]] = columns[chosen_columns[kept]]
    return assigned.to(cost.device)
