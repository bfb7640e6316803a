"""Random numbers of which every network has its own stream, so that a network's draws depend on no other network."""

import torch
from torch import Tensor

from timm_tokens.fewshot.nets import DEPTH


def glorot_uniform(like: Tensor, dim: int, streams: list[torch.Generator]) -> list[Tensor]:
    """Initial weights of N networks of D dimensions, a stream each: DEPTH tensors (N, D, D), of the kind of `like`."""
    limit = (3 / dim) ** 0.5  # sqrt(6 / (fan in + fan out))
    weights = [like.new_empty(len(streams), dim, dim) for _ in range(DEPTH)]
    for net, stream in enumerate(streams):
        for weight in weights:
            weight[net].uniform_(-limit, limit, generator=stream)
    return weights


def drop_out(points: Tensor, share: float, streams: list[torch.Generator]) -> Tensor:
    """Inverted dropout of points (N, M, D), a stream each.

    The mask takes 16 random bits an entry: on the CPU a tenth of the time of torch's Bernoulli numbers, with the share
    rounded to 1/65536.
    """
    if not share:
        return points
    size = points[0].numel()
    bits = torch.empty(len(points), -(-size // 4), dtype=torch.long, device=points.device)  # four masks a word
    for row, stream in zip(bits, streams, strict=True):
        row.random_(-(2**63), None, generator=stream)
    kept = bits.view(torch.int16)[:, :size].ge(round(share * 2**16) - 2**15)
    return (points / (1 - share)).mul_(kept.view_as(points))
