"""What the speed of merging is compared with: tokens dropped without looking at them."""

from typing import Any, cast

import torch
from torch import Tensor

from timm_tokens.ops.matching import Matching
from timm_tokens.parts import TokenMerger
from timm_tokens.parts.merger import Merged
from timm_tokens.timm_types import Block, ViT
from timm_tokens.vit import TokenViT


class Dropping(TokenMerger):
    """Drops the last tokens, as many as a merger would merge: no way of choosing tokens can be faster."""

    def compared_by(self, index: int, block: Block, y: Tensor) -> Tensor:
        return y[..., :0]

    def choose(
        self, index: int, block: Block, y: Tensor, r: int, effective: int, num_prefix_tokens: int, numbers: Any = None
    ) -> Matching:
        b, n = y.shape[:2]
        rows = (torch.arange(b * n, device=y.device) if numbers is None else numbers[: b * n]).view(b, n)
        return Matching(rows, rows[:1, :1].expand(b, r), 0)  # as if the first token took them

    def forward(
        self, choice: Matching | Tensor, x: Tensor, size: Tensor | None, r: int, effective: int, num_prefix_tokens: int
    ) -> Merged:
        return Merged(x[:, : x.shape[1] - r], None, effective - r, cast(Matching, choice))


def dropping(base: ViT, r: int | tuple[int, ...]) -> TokenViT:
    """The model with r tokens dropped in each block."""
    return TokenViT(base, merger=Dropping(base, r, metric="keys", prop_attn=False))
