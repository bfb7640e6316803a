"""A student or teacher as the losses between views see it: a backbone that gives several tokens of each crop of an
image, the heads that project them, and what makes logits of them.

Shapes: B images, V crops of each, T tokens: the global one, then auxiliary class tokens, then pooled ones; C features,
D projected, K prototypes, M masked patches.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
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
    aux = backbone if isinstance(backbone, PooledTokens) else backbone.aux
    counts = {"cls": 1, "aux": getattr(aux, "num_cls", 0), "pooled": getattr(aux, "num_pooled", 0)}
    return {kind: count for kind, count in counts.items() if count}


class TokenEncoder(nn.Module):
    """A backbone, and `TokenHeads`: for each kind of token, "cls", which also serves patches, "aux" and "pooled"."""

    def __init__(self, backbone: TokenViT | PooledTokens, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.backbone, self.heads = backbone, TokenHeads(heads, token_counts(backbone))

    def forward(
        self, images: Tensor, *, aux: bool = True, mask: Tensor | None = None, patches: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens (B, T, C) of images (B, 3, H, W), the same projected (B, T, D), and projected patches (M, D).

        Args:
            aux: Whether to give the auxiliary and pooled tokens.
            mask: (B, N) bool, patches that the backbone sees as masked.
            patches: (M,) int64, patches to project, counted through the images: of image b the first is b N.
        """
        tokens = self.backbone(images, tokens=True, mask=mask, aux=aux)
        kinds = (tokens.cls.unsqueeze(1), tokens.aux_cls, tokens.pooled)
        features = _between_graphs(torch.cat([x for x in kinds if x is not None], 1))
        rows = None if patches is None else self.heads["cls"](tokens.patches.flatten(0, 1).index_select(0, patches))
        return features, self.heads(features), rows


@torch.compiler.disable
def _between_graphs(features: Tensor) -> Tensor:
    """Ends a compiled graph: what is inside of one can't be watched for its gradient, as features are."""
    return features


def of_one_size(crops: Sequence[Tensor]) -> list[Tensor]:
    """Crops (B, 3, h, w), those of one size next to each other -> a batch for each size."""
    return [torch.cat(list(same)) for _, same in groupby(crops, key=lambda crop: crop.shape[1:])]


class CropOutputs(NamedTuple):
    """What a `MultiCropEncoder` makes of crops."""

    tokens: list[Tensor]  # a view each, (B, T, K): logits, or (B, T, D) where there are no prototypes
    patches: Tensor | None  # (M, K) logits of the patches asked for, None if none were
    projected: Tensor  # (V B, T, D) of the V global crops
    gradient_norms: Tensor  # (T,) of the global crops' features, averaged over the batch; 0 until backward fills it in


class MultiCropEncoder(nn.Module):
    """An encoder of crops of several sizes, and the prototypes or the predictor that tell views apart.

    Args:
        prototypes: (..., D) -> (..., K), shared by tokens of all kinds and by patches; None for contrastive methods.
        predictor: (B, T, D) -> (B, T, D) of the student alone, or None.
        crop_by_crop: Whether crops are encoded one by one, so that batch norms see one crop of each image at a time.
    """

    def __init__(
        self,
        encoder: TokenEncoder,
        prototypes: nn.Module | None = None,
        predictor: nn.Module | None = None,
        crop_by_crop: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.prototypes, self.predictor, self.crop_by_crop = encoder, prototypes, predictor, crop_by_crop

    def forward(
        self,
        crops: Sequence[Tensor],
        *,
        num_global: int = 2,
        aux_on_local: bool = False,
        mask: Tensor | None = None,
        patches: Tensor | None = None,
    ) -> CropOutputs:
        """V views of B images: crops (B, 3, h, w), the global ones, of one size, first; one forward a size.

        Args:
            num_global: How many crops are global.
            aux_on_local: Whether local crops have auxiliary tokens too.
            mask: (num_global B, N) of the global crops; see `TokenEncoder`.
            patches: (M,) of the global crops; see `TokenEncoder`.
        """
        batches = list if self.crop_by_crop else of_one_size
        whole = [self.encoder(x, mask=mask, patches=patches) for x in batches(crops[:num_global])]
        local = [self.encoder(x, aux=aux_on_local) for x in batches(crops[num_global:])]
        norms = _norms_of_gradient([features for features, _, _ in whole])
        tokens, rows = self._compare([projected for _, projected, _ in whole + local], whole[0][2])
        views = [view for x in tokens for view in x.split(len(crops[0]))]
        return CropOutputs(views, rows, torch.cat([projected for _, projected, _ in whole]), norms)

    def _compare(self, projected: list[Tensor], patches: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        """Logits of all tokens by one product with the prototypes; or the predictions."""
        if self.prototypes is None:
            return projected if self.predictor is None else [self.predictor(x) for x in projected], patches
        rows = [x.flatten(0, 1) for x in projected] + ([] if patches is None else [patches])
        logits = self.prototypes(torch.cat(rows)).split([len(x) for x in rows])
        tokens = [x.unflatten(0, shape.shape[:2]) for x, shape in zip(logits, projected, strict=False)]
        return tokens, None if patches is None else logits[-1]


@torch.compiler.disable  # hooks on what is inside of a graph are more than the compiler can do
def _norms_of_gradient(features: Sequence[Tensor]) -> Tensor:
    """(T,) norms of the gradient of features, (B, T, C) each, of a sample's loss, averaged; filled in by backward."""
    norms = torch.zeros(features[0].shape[1], device=features[0].device)

    def fill(gradient: Tensor) -> None:
        norms.add_(gradient.float().norm(dim=2).sum(0))

    for x in features:
        if x.requires_grad:
            x.register_hook(fill)
    return norms
