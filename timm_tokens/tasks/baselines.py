"""What DINO, iBOT and MoBY differ in: the student's heads, and the loss."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from timm_tokens.tasks.heads import Prototypes, TokenHeads, dino_head, moby_head
from timm_tokens.tasks.token_encoder import MultiCropEncoder, PooledTokens, TokenEncoder, token_counts
from timm_tokens.vit import TokenViT
from timm_tokens.wrap import add_mask_token

BASELINES = {  # what a paper sets: the heads' hidden width, the number of prototypes, the teacher's momentum at first
    "dino": (2048, 65536, 0.996),
    "ibot": (2048, 8192, 0.996),
    "moby": (4096, 0, 0.99),
}


def token_backbone(model: nn.Module, objective: str) -> TokenViT | PooledTokens:
    """The model as one that gives `Tokens`; for iBOT with a mask token. Refuses what can't be."""
    if objective not in BASELINES:
        raise ValueError(f"objective must be one of {', '.join(BASELINES)}, got {objective!r}")
    base = getattr(model, "base", model)
    if base.num_classes:
        raise ValueError(
            f"the model has a classifier for {base.num_classes} classes, but it is to learn without labels: "
            "make it with num_classes=0, or call reset_classifier(0)"
        )
    if isinstance(model, PooledTokens):
        if objective == "ibot":
            raise ValueError("iBOT masks patches, which takes a ViT: choose 'dino' or 'moby'")
        return model
    if objective == "ibot" and getattr(model, "mask_token", None) is None:
        return add_mask_token(model)
    return model if isinstance(model, TokenViT) else TokenViT(model)


def make_student(
    backbone: TokenViT | PooledTokens, objective: str, *,
    num_prototypes: int, hidden: int, width: int, learn_scale: bool, heads: str, batch_norm: bool, crop_by_crop: bool,
) -> MultiCropEncoder:  # fmt: skip
    """Heads on a backbone: for each "kind" of token, or "shared" by all of them.

    Prototypes are always shared, so that assignments can be averaged.
    """
    if crop_by_crop and objective == "ibot":
        raise ValueError("crop_by_crop is for DINO and MoBY, and iBOT encodes its masked crops together: leave it out")
    if heads not in ("kind", "shared"):
        raise ValueError(f"heads must be 'kind' or 'shared', got {heads!r}")
    base: Any = backbone.base
    counts = token_counts(backbone)
    features: dict[str, int] = dict.fromkeys(counts if heads == "kind" else ["cls"], base.num_features)
    features["cls"] = getattr(base, "head_hidden_size", base.num_features)
    make: Callable[..., nn.Module] = moby_head if objective == "moby" else partial(dino_head, batch_norm=batch_norm)
    make = partial(make, hidden=hidden, width=width)
    encoder = TokenEncoder(backbone, _alike(make, features))
    if objective == "moby":
        predictor = TokenHeads(_alike(make, dict.fromkeys(features, width)), counts)
        return MultiCropEncoder(encoder, predictor=predictor, crop_by_crop=crop_by_crop)
    prototypes = Prototypes(width, num_prototypes, learn_scale)
    return MultiCropEncoder(encoder, prototypes, crop_by_crop=crop_by_crop)


def _alike(make: Callable[[int], nn.Module], features: dict[str, int]) -> dict[str, nn.Module]:
    """A head for each kind, the same at first: the mean of heads that know nothing of each other says little."""
    heads = {kind: make(size) for kind, size in features.items()}
    for kind, size in features.items():
        if size == features["cls"]:
            heads[kind].load_state_dict(heads["cls"].state_dict())
    return heads
