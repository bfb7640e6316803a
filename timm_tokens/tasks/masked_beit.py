"""A BEiT whose patches can be masked.

Its attention is tied to its number of tokens by relative position biases, so that nothing can be merged or added; but
a mask token takes a patch's place before the first block, and needs whole blocks only.
"""

from typing import Any

import torch
from timm.models import checkpoint
from timm.models.beit import Beit
from torch import Tensor, nn

from timm_tokens import blocks
from timm_tokens.vit import Tokens


class MaskedBeit(nn.Module):
    """A timm BEiT that stays as it is, at `.base`, and a learned token (1, C) for masked patches, at `.mask_token`.

    Source: BEiT (arXiv 2106.08254), section 2.
    """

    def __init__(self, base: Any) -> None:
        super().__init__()
        if not is_beit(base):
            raise TypeError(f"{blocks.name(base)} is no BEiT of timm's: for other ViTs use add_mask_token")
        self.base = base
        self.mask_token = nn.Parameter(torch.empty(1, base.embed_dim, **blocks.placement(base)))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.embed_dim, self.in_chans, self.image_size = base.embed_dim, base.in_chans, tuple(base.patch_embed.img_size)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay leaves alone."""
        return {f"base.{name}" for name in self.base.no_weight_decay()} | {"mask_token"}

    def forward(self, images: Tensor, *, mask: Tensor, tokens: bool = True) -> Tokens:
        """The features of images (B, 3, H, W) after the final norm, where patches (B, N) bool are masked."""
        base = self.base
        x = base.patch_embed(images)
        x = torch.where(mask.unsqueeze(2), self.mask_token.to(x.dtype), x)
        x = torch.cat([base.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = base.pos_drop(x if base.pos_embed is None else x + base.pos_embed)
        bias = None if base.rel_pos_bias is None else base.rel_pos_bias()
        for block in base.blocks:
            options = {"shared_rel_pos_bias": bias}
            x = checkpoint(block, x, **options) if base.grad_checkpointing else block(x, **options)
        x = base.norm(x)
        return Tokens(x[:, 0], x[:, :1], x[:, 1:], None, None)


def is_beit(model: Any) -> bool:
    """Whether the model computes its features as timm's BEiT does."""
    return getattr(type(model), "forward_features", None) is Beit.forward_features
