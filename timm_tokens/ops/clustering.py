"""Groups of tokens by k-means, beside those by bipartite matching (`morphing`).

Shapes: B images, N tokens, P prefix tokens, C channels, G groups.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_tokens.ops.morphing import group_sums
from timm_tokens.ops.ranges import check_counts


@torch.no_grad()
def kmeans_groups(x: Tensor, num_groups: int, *, rounds: int = 10, num_prefix_tokens: int = 0) -> Tensor:
    """Group the tokens of each image by k-means: each token with the nearest mean.

    It starts from tokens at equal distances in their order, which spreads them over an image, and takes a fixed number
    of rounds, so that nothing is random and shapes don't depend on values. A group that loses its last token keeps its
    mean, and may stay empty.

    Args:
        x: (B, N, C) tokens, compared by Euclidean distance; of unit length they are compared by cosine.
        num_groups: G, prefix tokens not counted.
        rounds: How often means and groups are made anew.
        num_prefix_tokens: P, leading tokens that stay alone.

    Returns:
        (B, N) int64, the group of each token in {0, ..., P + G - 1}.

    Raises:
        ValueError: If x is not three-dimensional, or G is not between 1 and N - P.

    Source: Lloyd, "Least squares quantization in PCM", 1982.
    """
    if x.ndim != 3:
        raise ValueError(f"x must have shape (B, N, C), got {tuple(x.shape)}")
    check_counts(rounds=rounds)
    points = x[:, num_prefix_tokens:].float()
    (b, n, _), device = points.shape, x.device
    if not 1 <= num_groups <= n:
        raise ValueError(f"num_groups must be between 1 and the {n} tokens to group, got {num_groups}")
    if num_groups == n:
        return torch.arange(x.shape[1], device=device).repeat(b, 1)
    means = points[:, torch.arange(num_groups, device=device) * n // num_groups]
    ones = points.new_ones(b, n, 1)
    for _ in range(rounds):
        groups = _nearest(points, means)
        count = group_sums(ones, groups, num_groups)
        means = torch.where(count > 0, group_sums(points, groups, num_groups) / count.clamp_min(1), means)
    alone = torch.arange(num_prefix_tokens, device=device).expand(b, -1)
    return torch.cat([alone, _nearest(points, means) + num_prefix_tokens], dim=1)


def _nearest(points: Tensor, means: Tensor) -> Tensor:
    """The nearest of the means (B, G, C) for each point: (B, N) int64."""
    with torch.autocast(points.device.type, enabled=False):  # half precision would confuse similar tokens
        return (means.square().sum(2).unsqueeze(1) - 2 * points @ means.mT).argmin(2)


def superpixel_features(images: Tensor, grid: tuple[int, int], compactness: float = 2.0) -> Tensor:
    """What super-pixels are grouped by, for `kmeans_groups`: the mean colour of each patch, and where it is.

    Args:
        images: (B, channels, height, width).
        grid: Patches in a column and in a row.
        compactness: How far apart in colour counts as much as a side of the image: the larger, the rounder.

    Returns:
        (B, N, channels + 2).

    Source: SLIC (Achanta et al., TPAMI 2012), on patches instead of pixels, with RGB in the place of Lab.
    """
    colours = F.adaptive_avg_pool2d(images.float(), grid).flatten(2).mT
    sides = [torch.linspace(0, 1, size, device=images.device) for size in grid]
    places = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1).flatten(0, 1) * compactness
    return torch.cat([colours, places.expand(images.shape[0], -1, -1)], dim=2)
