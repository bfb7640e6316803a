"""What a model gives: class logits if it classifies, else features: what is distilled, compared and reported."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

Outputs = Tensor | tuple[Tensor, ...]
Model = TypeVar("Model", bound=nn.Module)


def classifies(model: nn.Module) -> bool:
    """Whether the outputs of a TokenViT are class logits, rather than features or a projection of them.

    The head of timm's CLIP and PE towers is the projection to a space shared with text: its outputs are no logits,
    unless it was fine-tuned or replaced by a classifier.
    """
    if model.head is not None:
        return True
    cfg = getattr(model.base, "pretrained_cfg", None) or {}
    projects = re.search("_clip_|_pe_core_", cfg.get("architecture") or "") and "_ft_" not in (cfg.get("tag") or "")
    return bool(model.num_classes) and not (projects and model.num_classes == cfg.get("num_classes"))


def outputs(model: nn.Module, images: Tensor, logits: bool) -> Outputs:
    """What a TokenViT, or DDP around one, makes of images (B, 3, H, W): class logits (B, K); or, without `logits`, the
    class token (B, C) and patches (B, N, C)."""
    if logits:
        return model(images)
    tokens: Any = model(images, tokens=True, aux=False)
    return tokens.cls, tokens.patches


@contextmanager
def evaluating(model: Model) -> Iterator[Model]:
    """The model in evaluation mode for a while; then each of its modules is put back into the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, training in modes:
            module.training = training
