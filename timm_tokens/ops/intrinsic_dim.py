"""How many dimensions the points around each point fill: Amsaleg et al., KDD 2015; used in arXiv 2106.11486."""

import torch
from torch import Tensor

from timm_tokens.ops.chunking import makes_graph


def local_intrinsic_dimensionality(x: Tensor, k: int = 21) -> Tensor:
    """The maximum-likelihood estimate of the local intrinsic dimensionality around every point.

    With d_1 <= ... <= d_{k-1} the distances to the nearest other points, it is `(k - 1) / sum_i log(d_{k-1} / d_i)`.
    Two limits have a meaning and are returned as such: 0 where a neighbour coincides with the point (any number of
    them, so all-zero features have dimension 0), and infinity where all the neighbours are equally far away.

    Args:
        x: Points, (..., M, D).
        k: Neighbours, counted with the point itself; 3 <= k <= M.

    Returns:
        The estimate for every point, (..., M), never NaN for finite points. It has a gradient where none coincide.

    Raises:
        ValueError: k is below 3 or above the number of points.
    """
    if not 3 <= k <= x.shape[-2]:
        raise ValueError(
            f"k = {k} neighbours (the point itself among them) do not fit {x.shape[-2]} points of shape "
            f"{tuple(x.shape)}: choose 3 <= k <= {x.shape[-2]}, or pass more points"
        )
    near, farthest = _smallest(_squared_distances(x), k - 1)  # (..., M, k - 1), (..., M, 1)
    stretch = farthest.div(near).masked_fill_(near == 0, torch.inf)  # 0 / 0 is a coincidence too
    return stretch.log_().sum(-1).reciprocal().mul(2 * (k - 1)).to(x.dtype)  # 2: the distances are squared


def _squared_distances(x: Tensor) -> Tensor:
    """Squared Euclidean distances (..., M, M), infinite from a point to itself, exactly 0 between coinciding points.

    r_i - 2 x_i x_j + r_j cancels where points are close, in float32 down to negative numbers: it needs float64. All
    are in units of the largest coordinate, for ratios alone matter, and squares of small or large ones leave float32.
    """
    wide = x.flatten(0, -3) if x.ndim > 2 else x[None]  # (..., M, D) -> (B, M, D)
    wide = wide if wide.device.type == "mps" else wide.double()  # MPS has no float64
    largest = torch.linalg.vector_norm(wide.detach(), torch.inf, dim=(-2, -1), keepdim=True)
    wide = wide / largest.clamp_min(torch.finfo(x.dtype).tiny)
    norms: Tensor = torch.linalg.vector_norm(wide, dim=-1).square()
    norms = norms - 4 * torch.finfo(wide.dtype).eps * norms.amax(-1, keepdim=True)  # what coincides must not part
    squared = (norms[..., :, None] + norms[..., None, :]).baddbmm_(wide, wide.mT, alpha=-2).float().clamp_min_(0)
    squared.flatten(-2)[..., :: x.shape[-2] + 1] = torch.inf  # not .diagonal(), of which inductor's lowering warns
    return squared.view(*x.shape[:-1], x.shape[-2])


def _smallest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest numbers of each row in any order, and the largest of them: (..., M) -> (..., k), (..., 1).

    Where no gradient is asked for, NumPy takes a third of topk's time on a CPU; it overwrites x.
    """
    if x.device.type == "cpu" and not x.requires_grad and not makes_graph():
        x.numpy().partition(k - 1)
        return x[..., :k], x[..., k - 1 : k]
    near = x.topk(k, largest=False, sorted=False).values
    return near, near.amax(-1, keepdim=True)
