"""A ViT with two decoders of segmentation masks, and what they are trained by."""

import torch
import torch.nn.functional as F
from _scenes import VOID
from timm.models.vision_transformer import Block
from torch import Tensor, nn


class MaskDecoder(nn.Module):
    """Segmenter's mask transformer: one query per class attends to the patches; masks are their products.

    Args:
        in_dim: C, dimension of the patches.
        num_classes: K.
        dim: Dimension of the decoder's tokens.
        depth: Number of blocks.
    """

    def __init__(self, in_dim: int, num_classes: int, dim: int = 96, depth: int = 2, num_heads: int = 3):
        super().__init__()
        self.project = nn.Linear(in_dim, dim)
        self.queries = nn.Parameter(0.02 * torch.randn(1, num_classes, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm, self.mask_norm = nn.LayerNorm(dim), nn.LayerNorm(num_classes)
        self.patch, self.mask = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, patches: Tensor, size: Tensor | None = None) -> Tensor:
        """Logits (B, M, K) of tokens (B, M, C) that stand for `size` (B, M) patches each, one if None."""
        x = torch.cat([self.project(patches), self.queries.expand(len(patches), -1, -1)], dim=1)  # (B, M + K, dim)
        bias = None
        if size is not None:
            bias = F.pad(size.log(), (0, self.queries.shape[1]))[:, None, None]  # (B, 1, 1, M + K)
        for block in self.blocks:
            x = block(x, attn_mask=bias)
        patches, queries = self.norm(x).split([patches.shape[1], self.queries.shape[1]], dim=1)
        masks = F.normalize(self.patch(patches), dim=-1) @ F.normalize(self.mask(queries), dim=-1).mT
        return self.mask_norm(masks)


class Segmenter(nn.Module):
    """A ViT with both decoders."""

    def __init__(self, vit: nn.Module, num_classes: int):
        super().__init__()
        self.vit, self.num_classes = vit, num_classes
        self.decoders = nn.ModuleDict({
            "linear": nn.Linear(vit.embed_dim, num_classes),
            "mask": MaskDecoder(vit.embed_dim, num_classes),
        })  # fmt: skip


def patches(vit: nn.Module, images: Tensor) -> Tensor:
    """Features (B, N, C) of the plain ViT's patches."""
    return vit.forward_features(images)[:, vit.num_prefix_tokens :]


def decoder_loss(model: Segmenter, features: Tensor, masks: Tensor) -> Tensor:
    """The mean cross-entropy of both decoders on features (B, N, C) of the full grid, for masks (B, H, W)."""
    logits = [full_size(model.vit, decoder(features), masks.shape[1:]) for decoder in model.decoders.values()]
    return sum(F.cross_entropy(x, masks, ignore_index=VOID) for x in logits) / len(logits)


def full_size(vit: nn.Module, logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits of patches (B, N, K) as logits of pixels (B, K, height, width)."""
    grid = vit.patch_embed.grid_size
    return F.interpolate(logits.mT.unflatten(2, grid), size, mode="bilinear")


def to_grid(x: Tensor, groups: Tensor) -> Tensor:
    """Rows of tokens (B, M, K) for the patches of `groups` (B, H, W): (B, N, K)."""
    return x.gather(1, groups.flatten(1)[..., None].expand(-1, -1, x.shape[2]))
