"""What happens to the patches of an image before they get their position embedding."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from timm_tokens.ops import mix_tokens


def patch_edit(
    grid: tuple[int, int], box: Tensor | Sequence[int] | None, mask: Tensor | None, mask_token: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """What happens to the patches (B, N, C) of a grid before their position embedding: those of the mask (B, N) become
    the mask token (1, C), or zeros without one, and those in the box are taken from the flipped batch."""

    def edit(x: Tensor) -> Tensor:
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
                raise ValueError(
                    f"mask must be bool (B, N) = {tuple(x.shape[:2])} for a grid of {grid[0]} x {grid[1]} patches, "
                    f"got {mask.dtype} {tuple(mask.shape)}"
                )
            token = x.new_zeros(()) if mask_token is None else mask_token.to(x.dtype)
            x = torch.where(mask.unsqueeze(2), token, x)
        return x if box is None else mix_tokens(x, box, grid)

    return edit
