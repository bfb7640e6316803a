"""A backbone that gives several tokens of an image, and the heads that project them.

Shapes: B images, T tokens: the global one, then auxiliary class tokens, then pooled ones; C features, D projected.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from timm_tokens.parts.aux_tokens import AdaptivePool
from timm_tokens.tasks.heads import TokenHeads
from timm_tokens.vit import Tokens, TokenViT


class PooledTokens(nn.Module):
    """A backbone without attention, or with several stages, that gives pooled tokens beside its global feature.

        backbone = PooledTokens(timm.create_model("convnext_tiny", num_classes=0), num_pooled=6)
        task = MTETask(backbone)

    The pooled tokens come from the last feature map. `base` is the model itself, which nothing is added to.

    Args:
        base: A timm model with num_classes=0 whose forward_features gives a map, (B, C, H, W) or, as its `output_fmt`
            says, (B, H, W, C): conv nets, Swin.
        num_pooled: k_p; with 0 the global feature is all.
        pool_options: Further arguments of `AdaptivePool`.
    """

    def __init__(self, base: Any, num_pooled: int = 6, **pool_options: Any) -> None:
        super().__init__()
        self.base, self.num_pooled = base, num_pooled
        self.pool = AdaptivePool(base.num_features, num_pooled, **pool_options) if num_pooled else None

    def forward(self, images: Tensor, *, tokens: bool = True, mask: Tensor | None = None, aux: bool = True) -> Tokens:
        """`Tokens` of images (B, 3, H, W), the map's positions as patches."""
        if mask is not None:
            raise ValueError(f"{type(self.base).__name__} has no patches to mask: iBOT needs a ViT")
        x = self.base.forward_features(images)
        if x.ndim != 4:
            raise ValueError(f"forward_features must give a map, got {tuple(x.shape)}: for a ViT use add_aux_tokens")
        cls = self.base.forward_head(x, pre_logits=True)
        x = x.permute(0, 3, 1, 2) if getattr(self.base, "output_fmt", "NCHW") == "NHWC" else x
        pooled = self.pool(x) if aux and self.pool is not None else None
        return Tokens(cls, cls.unsqueeze(1), x.flatten(2).mT, None, pooled)


def token_counts(backbone: Any) -> dict[str, int]:
    """How many tokens of each kind a TokenViT or PooledTokens gives; kinds that it lacks are left out."""
    if isinstance(backbone, PooledTokens):
        counts = {"cls": 1, "pooled": backbone.num_pooled}
    else:
        aux = backbone.aux
        counts = {"cls": 1, "aux": 0 if aux is None else aux.num_cls, "pooled": 0 if aux is None else aux.num_pooled}
    return {kind: count for kind, count in counts.items() if count}


class Encoded(NamedTuple):
    """What an `TokenEncoder` makes of images.

    Attributes:
        features: (B, T, C) tokens of the backbone.
        projected: (B, T, D) the same, projected.
        patches: (M, D) projected patches, those asked for.
    """

    features: Tensor
    projected: Tensor
    patches: Tensor | None


class TokenEncoder(nn.Module):
    """A backbone, and a head for each kind of token: "cls", which also serves patches, "aux" and "pooled".

    Args:
        backbone: A `TokenViT` or `PooledTokens`.
        heads: By kind; or "cls" alone, which then serves all of them.
    """

    def __init__(self, backbone: TokenViT | PooledTokens, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.backbone, self.heads = backbone, TokenHeads(heads, token_counts(backbone))

    def forward(
        self, images: Tensor, *, aux: bool = True, mask: Tensor | None = None, patches: Tensor | None = None
    ) -> Encoded:
        """Tokens of images (B, 3, H, W).

        Args:
            aux: Whether to give the auxiliary and pooled tokens.
            mask: (B, N) bool, patches that the backbone sees as masked.
            patches: (M,) int64, patches to project, counted through the images: of image b the first is b N.
        """
        tokens = self.backbone(images, tokens=True, mask=mask, aux=aux)
        kinds = (tokens.cls.unsqueeze(1), tokens.aux_cls, tokens.pooled)
        features = _between_graphs(torch.cat([x for x in kinds if x is not None], 1))
        rows = None if patches is None else self.heads["cls"](tokens.patches.flatten(0, 1).index_select(0, patches))
        return Encoded(features, self.heads(features), rows)


@torch.compiler.disable
def _between_graphs(features: Tensor) -> Tensor:
    """Ends a compiled graph: what is inside of one can't be watched for its gradient, as features are."""
    return features
