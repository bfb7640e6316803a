"""The head of clustering methods: a projector with batch norm over the global batch, and prototypes of unit length.

Shapes: B samples, C features, D projected, K prototypes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_tokens.tasks.batch_norm import GlobalBatchNorm


class Projector(nn.Sequential):
    """(B, C) -> (B, D) of unit length: two hidden layers with batch norm and ReLU, and a linear one."""

    def __init__(self, features: int, hidden: int = 2048, width: int = 256) -> None:
        super().__init__(
            nn.Linear(features, hidden, bias=False),  # the batch norm has one
            GlobalBatchNorm(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden, bias=False),
            GlobalBatchNorm(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(super().forward(x), dim=1)


class Prototypes(nn.Module):
    """(B, D) of unit length -> (B, K) cosines with K prototypes: their weight is normed, whatever length it learns.

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
