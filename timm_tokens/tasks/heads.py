"""Heads of self-supervised methods: from tokens to what a loss compares.

Shapes: C features, D projected, K prototypes.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from timm_tokens.tasks.batch_norm import GlobalBatchNorm


class DINOHead(nn.Sequential):
    """(..., C) -> (..., D) of unit length: an MLP with GELU and two hidden layers.

    The prototypes that DINO counts as the head's last layer are `clustering.Prototypes`, so that tokens of several
    kinds can each have a head and share them. With batch_norm both hidden layers have that of all processes' tokens
    together (DINO's use_bn_in_head); the default is without, as published.

    Source: DINO (arXiv 2104.14294), section 3.1 and appendix C.
    """

    def __init__(self, features: int, hidden: int = 2048, width: int = 256, batch_norm: bool = False) -> None:
        layers = [nn.Linear(features, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, width)]
        norms = [[GlobalBatchNorm(hidden)] if batch_norm else [] for _ in range(2)]
        super().__init__(layers[0], *norms[0], nn.GELU(), layers[1], *norms[1], nn.GELU(), layers[2])
        for layer in layers:
            trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(super().forward(x.flatten(0, -2)), dim=-1).unflatten(0, x.shape[:-1])


class MoBYHead(nn.Sequential):
    """(..., C) -> (..., D): MoBY's projector and its predictor, with the batch norm of all processes' tokens together.

    Source: MoBY (arXiv 2105.04553), section 3.
    """

    def __init__(self, features: int, hidden: int = 4096, width: int = 256) -> None:
        first = nn.Linear(features, hidden, bias=False)  # the batch norm has one
        super().__init__(first, GlobalBatchNorm(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


class TokenHeads(nn.ModuleDict):
    """(B, T, C) -> (B, T, D): a head for each kind of token, or one for all, whose batch norm then sees all.

    Args:
        heads: By kind, in the order of `counts`; or "cls" alone.
        counts: How many tokens of each kind there are, the global one first. Views may have that one alone.
    """

    def __init__(self, heads: Mapping[str, nn.Module], counts: Mapping[str, int]) -> None:
        super().__init__(heads)
        self.counts = list(counts.values())

    def forward(self, x: Tensor) -> Tensor:
        if len(self) == 1 or x.shape[1] == 1:
            return self["cls"](x)
        parts = zip(self.values(), x.split(self.counts, 1), strict=True)
        return torch.cat([head(part) for head, part in parts], 1)
