"""LV-ViT's base: timm's VisionTransformer with a convolutional stem, and with residual branches divided by a constant.

Source: token labeling (arXiv 2104.10858), section 3.
"""

from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.layers import LayerNorm, PatchEmbed, to_2tuple
from timm.layers.format import nchw_to
from timm.layers.trace_utils import _assert
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn


class ConvStem(PatchEmbed):
    """Patch embedding, of an even patch size, after three convolutions of `width` channels at half resolution:
    (B, 3, H, W) -> (B, N, C)."""

    def __init__(self, width: int = 64, *, patch_size: int = 16, in_chans: int = 3, embed_dim: int, **options: Any):
        super().__init__(patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, **options)
        conv = partial(nn.Conv2d, device=options.get("device"), dtype=options.get("dtype"))
        norm = partial(nn.BatchNorm2d, width, device=options.get("device"), dtype=options.get("dtype"))
        self.conv1, self.bn1 = conv(in_chans, width, 7, stride=2, padding=3, bias=False), norm()
        self.conv2, self.bn2 = conv(width, width, 3, padding=1, bias=False), norm()
        self.conv3, self.bn3 = conv(width, width, 3, padding=1, bias=False), norm()
        self.proj = conv(width, embed_dim, patch_size // 2, stride=patch_size // 2)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Take images of another size; patches stay as they are."""
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise ValueError(f"this stem's patch size is {self.patch_size} and can't be changed, got {patch_size}")
        super().set_input_size(img_size=img_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self._whole_patches(x)
        x = F.relu(self.bn1(self.conv1(x)))  # (B, 3, H, W) -> (B, width, H / 2, W / 2)
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2) if self.flatten else nchw_to(x, self.output_fmt))

    def _whole_patches(self, x: Tensor) -> Tensor:
        """The images, refused or padded where timm's own patch embedding does so."""
        (height, width), (rows, columns) = x.shape[-2:], self.patch_size
        if self.img_size is not None and self.strict_img_size:
            fits = (height, width) == tuple(self.img_size)
            _assert(fits, f"Images of {height} x {width} pixels don't match the model, made for {self.img_size}.")
        if self.dynamic_img_pad:
            return F.pad(x, (0, -width % columns, 0, -height % rows))
        _assert(
            height % rows == 0 and width % columns == 0,
            f"Images of {height} x {width} pixels should be divisible by the patch size, {self.patch_size}.",
        )
        return x


class ScaledBlock(Block):
    """timm's Block with both residual branches divided by `skip_lam`; its forward is timm's."""

    def __init__(self, *args: Any, skip_lam: float = 1.0, **options: Any):
        super().__init__(*args, **options)
        if skip_lam != 1:
            layers: Any = Divide(skip_lam), Divide(skip_lam)
            self.ls1, self.ls2 = layers


class Divide(nn.Module):
    """x / by, in the place of a LayerScale and without its weights."""

    def __init__(self, by: float):
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x / self.by

    def extra_repr(self) -> str:
        return f"by={self.by}"


def lvvit_base(*, skip_lam: float = 1.0, stem_width: int = 64, **options: Any) -> VisionTransformer:
    """LV-ViT without its dense head: a timm VisionTransformer whose weights are named as the published ones."""
    defaults = {"mlp_ratio": 3.0, "qkv_bias": False, "norm_layer": partial(LayerNorm, eps=1e-5)}
    layers = {"embed_layer": partial(ConvStem, stem_width), "block_fn": partial(ScaledBlock, skip_lam=skip_lam)}
    arguments: dict[str, Any] = defaults | options | layers
    return VisionTransformer(**arguments)
