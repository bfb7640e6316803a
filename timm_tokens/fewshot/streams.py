"""Random numbers of which every network has its own stream, so that a network's draws depend on no other network."""

import torch
from torch import Tensor

from timm_tokens.fewshot.nets import DEPTH


def glorot_uniform(like: Tensor, dim: int, streams: list[torch.Generator]) -> list[Tensor]:
    """Initial weights of N networks of D dimensions, a stream each: DEPTH tensors (N, D, D), of the kind of `like`.

    A weight takes 32 random bits: on the CPU half the time of torch's uniform numbers.
    """
    limit = (3 / dim) ** 0.5  # sqrt(6 / (fan in + fan out))
    bits = _random_bits(like, DEPTH * dim * dim, torch.int32, streams)
    return [part.view(-1, dim, dim).to(like.dtype).mul_(limit / 2**31) for part in bits.chunk(DEPTH, dim=1)]


def drop_out(points: Tensor, share: float, streams: list[torch.Generator], out: Tensor) -> Tensor:
    """Inverted dropout of points (N, M, D), a stream each, written to `out` unless the share is 0.

    The mask takes 8 random bits an entry where they are enough, as for a half, or else 16, to which the share is
    rounded: on the CPU less than a tenth of the time of torch's Bernoulli numbers.
    """
    if not share:
        return points
    dtype = torch.int8 if (share * 2**8).is_integer() else torch.int16
    first = round(share * 2 ** (8 * dtype.itemsize)) + torch.iinfo(dtype).min
    bits = _random_bits(points, points[0].numel(), dtype, streams)
    return torch.ge(bits.view_as(points), first, out=out).mul_(points).mul_(1 / (1 - share))


def _random_bits(like: Tensor, count: int, dtype: torch.dtype, streams: list[torch.Generator]) -> Tensor:
    """Random integers of all values of their type, a stream for each row: (streams, count)."""
    words = -(-count * dtype.itemsize // 8)
    bits = torch.empty(len(streams), words, dtype=torch.long, device=like.device)
    for row, stream in zip(bits, streams, strict=True):
        row.random_(-(2**63), None, generator=stream)
    return bits.view(dtype)[:, :count]
