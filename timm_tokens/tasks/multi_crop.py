"""A student or teacher as the losses between views see it: crops of an image in, logits of tokens out.

Shapes: B images, V crops of each, T tokens, D projected, K prototypes, M masked patches.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from timm_tokens.tasks.token_encoder import TokenEncoder


class CropOutputs(NamedTuple):
    """What a `MultiCropEncoder` makes of crops.

    Attributes:
        tokens: A view each, (B, T, K): logits, or (B, T, D) where there are no prototypes.
        patches: (M, K) logits of the patches asked for, None if none were.
        projected: (V B, T, D) of the V global crops.
        gradient_norms: (T,) of the global crops' features, averaged over the batch; 0 until backward fills it in.
    """

    tokens: list[Tensor]
    patches: Tensor | None
    projected: Tensor
    gradient_norms: Tensor


class MultiCropEncoder(nn.Module):
    """An encoder of crops of several sizes, and the prototypes or the predictor that tell views apart.

    Args:
        encoder: Encodes images of one size.
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
            mask: (num_global B, N) of the global crops; patches: (M,) of them; see `TokenEncoder`.
        """
        whole = [self.encoder(x, mask=mask, patches=patches) for x in self._together(crops[:num_global])]
        local = [self.encoder(x, aux=aux_on_local) for x in self._together(crops[num_global:])]
        norms = _norms_of_gradient([encoded.features for encoded in whole])
        tokens, rows = self._compare([encoded.projected for encoded in whole + local], whole[0].patches)
        views = [view for x in tokens for view in x.split(len(crops[0]))]
        return CropOutputs(views, rows, torch.cat([encoded.projected for encoded in whole]), norms)

    def _together(self, crops: Sequence[Tensor]) -> list[Tensor]:
        """The batches that are encoded at once: those of a size together, or each for itself."""
        if self.crop_by_crop:
            return list(crops)
        return [torch.cat(list(same)) for _, same in groupby(crops, key=lambda crop: crop.shape[1:])]

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
