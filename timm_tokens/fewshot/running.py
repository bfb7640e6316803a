"""The batch of networks that ESFR trains, each with random numbers of its own; those that have trained enough go.

A network's draws depend on no other network, because each has its own stream.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from timm_tokens.fewshot.nets import DEPTH, Nets, close_gaps, unit

# Features are padded with zeros, which stay zero, to whole vector registers: the leftover numbers of a vectorised loop
# are rounded in another way, and which ones are left over would depend on what else is in the batch.
_LANES = 16


class Run:
    """The networks of a chunk that have not stopped yet, and what goes with each: all of them indexed alike.

    Args:
        features: Prepared episodes, (T, M, D).
        labels: (T, S) labels of the support; S = 0 without.
        seeds: T * num_nets, one for every net of the first episode, then of the second, and so on.
        weights: Initial weights, 4 tensors (num_nets, D, D), the same for all the episodes; None: drawn.
        lr: Adam's learning rate.
    """

    def __init__(self, features: Tensor, labels: Tensor, seeds: list[int], weights: list[Tensor] | None, lr: float):
        copies, dim = len(seeds) // max(len(features), 1), features.shape[-1]
        padding = -dim % _LANES
        features = pad(features, (0, padding))
        self.points, self.labels = (t.repeat_interleave(copies, 0) for t in (features, labels))  # (N, M, D), (N, S)
        self.inputs, self.target = torch.empty_like(self.points), unit(self.points)
        self.index = torch.arange(len(seeds), device=features.device)
        self.streams = [torch.Generator(features.device).manual_seed(seed) for seed in seeds]
        if weights is None:
            weights = glorot_uniform(self.points, dim, self.streams)
        else:
            weights = [w.to(features).repeat(len(features), 1, 1) for w in weights]
        if padding:
            weights = [pad(w, (0, padding, 0, padding)) for w in weights]
        ways = int(labels.max()) + 1 if labels.numel() else 0
        self.nets = Nets(weights, features.shape[1], ways, lr)
        self.dimension = self.points.new_zeros(len(seeds))

    def drop(self, stopped: Tensor) -> None:
        """Takes the networks with these indices out of the batch."""
        going = torch.ones_like(self.index, dtype=torch.bool).index_fill_(0, stopped, False).nonzero().squeeze(1)
        n = len(going)
        holes, movers = stopped[stopped < n], going[going >= n]
        self.nets.drop(holes, movers, n)
        for name in ("points", "target", "labels", "index", "dimension"):
            setattr(self, name, close_gaps(getattr(self, name), holes, movers, n))
        self.inputs = self.inputs[:n]  # written anew by each update
        for hole, mover in zip(holes.tolist(), movers.tolist(), strict=True):
            self.streams[hole] = self.streams[mover]
        del self.streams[n:]


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
