"""The batch of networks that ESFR trains; those that have trained enough are taken out."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from timm_tokens.fewshot.nets import Nets, close_gaps, unit
from timm_tokens.fewshot.streams import glorot_uniform

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
