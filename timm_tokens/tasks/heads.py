"""Heads of self-supervised methods: from tokens to what a loss compares.

Shapes: B samples, T tokens, C features, D projected, K prototypes.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from timm_tokens.tasks.batch_norm import GlobalBatchNorm

_RELU = partial(nn.ReLU, inplace=True)


class Head(nn.Sequential):
    """(..., C) -> (..., D), with `unit` of unit length: an MLP, whose batch norms see the tokens of all processes."""

    def __init__(self, *sizes: int, act: Callable[[], nn.Module], batch_norm: bool, bias: bool, unit: bool) -> None:
        super().__init__()
        for before, after in pairwise(sizes[:-1]):
            self.append(nn.Linear(before, after, bias=bias))
            if batch_norm:
                self.append(GlobalBatchNorm(after))
            self.append(act())
        self.append(nn.Linear(sizes[-2], sizes[-1]))
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        rows = super().forward(x.flatten(0, -2))
        return (F.normalize(rows, dim=-1) if self.unit else rows).unflatten(0, x.shape[:-1])


def dino_head(features: int, hidden: int, width: int, batch_norm: bool) -> Head:
    """DINO's head: two hidden layers with GELU, and projections of unit length.

    What DINO counts as its last layer are `Prototypes`, so that tokens of several kinds can each have a head and share
    them. With batch_norm both hidden layers have one (DINO's use_bn_in_head); as published it is without.

    Source: DINO (arXiv 2104.14294), section 3.1 and appendix C.
    """
    head = Head(features, hidden, hidden, width, act=nn.GELU, batch_norm=batch_norm, bias=True, unit=True)
    for layer in head:
        if isinstance(layer, nn.Linear):
            trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return head


def moby_head(features: int, hidden: int, width: int) -> Head:
    """MoBY's projector, and its predictor.

    Source: MoBY (arXiv 2105.04553), section 3.
    """
    return Head(features, hidden, width, act=_RELU, batch_norm=True, bias=False, unit=False)


def mira_head(features: int, hidden: int, width: int) -> Head:
    """MIRA's projector: two hidden layers, and projections of unit length; see `MIRATask`."""
    return Head(features, hidden, hidden, width, act=_RELU, batch_norm=True, bias=False, unit=True)


class Prototypes(nn.Module):
    """(..., D) of unit length -> (..., K) cosines with K prototypes: their weight is normed, whatever length it learns.

    With learn_scale each prototype also learns a factor for its cosines (DINO's norm_last_layer=False).
    """

    def __init__(self, width: int, count: int, learn_scale: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(count, width), dim=1))
        self.scale = nn.Parameter(torch.ones(count, 1)) if learn_scale else None  # no vector: weight decay holds for it

    def forward(self, x: Tensor) -> Tensor:
        cosines = F.linear(x, F.normalize(self.weight, dim=1))
        return cosines if self.scale is None else cosines * self.scale.squeeze(1)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


class TokenHeads(nn.ModuleDict):
    """(B, T, C) -> (B, T, D): a head for each kind of token, or "cls" alone for all, whose batch norm then sees all.

    `counts` is how many tokens of each kind there are, the global one first. Views may have that one alone.
    """

    def __init__(self, heads: Mapping[str, nn.Module], counts: Mapping[str, int]) -> None:
        super().__init__(heads)
        self.counts = list(counts.values())

    def forward(self, x: Tensor) -> Tensor:
        if len(self) == 1 or x.shape[1] == 1:
            return self["cls"](x)
        parts = zip(self.values(), x.split(self.counts, 1), strict=True)
        return torch.cat([head(part) for head, part in parts], 1)
