"""A frozen ViT that gives a target for each patch of a student, whatever its own size, patches and normalisation."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from timm_tokens.data.model_input import per_channel
from timm_tokens.tasks.teacher import frozen_copy

Normalisation = tuple[Sequence[float], Sequence[float]]


class TokenTeacher(nn.Module):
    """Tokens of images as a student sees them, by a frozen copy of any timm ViT, one token for each of its patches.

    The grids are matched by the size of the images: those that come are resized so that the teacher cuts them into as
    many rows and columns as the student does (a student of 16 px patches at 224 px and a teacher of 14 px patches: 196
    px). The teacher's position embedding is resampled to it, and the images' normalisation changed to the teacher's.

    The copy is no submodule, so that it is not saved with each checkpoint of a task: it never changes.

    Args:
        vit: A timm ViT, EVA, BEiT, NaFlexVit, ..., or a TokenViT: what has patches and `forward_features`.
        grid: (H, W), the student's patches in a column and in a row.
        normalisation: (mean, std) of the images that come; None: as the teacher's own.
        head: Give each token through the teacher's classifier; for CLIP it is the projection to the shared space.
    """

    vit: Any
    scale: Tensor
    shift: Tensor

    def __init__(
        self, vit: Any, grid: tuple[int, int], *, normalisation: Normalisation | None = None, head: bool = False
    ) -> None:
        super().__init__()
        vit = frozen_copy(vit)
        self.grid, self.head = (grid[0], grid[1]), head
        self.size = _fit(vit, self.grid)
        self.__dict__["vit"] = vit  # no submodule
        if head and isinstance(vit.get_classifier(), nn.Identity):
            raise ValueError("head=True sends the tokens through the teacher's classifier, but this one has none")
        scale, shift = _renormalisation(normalisation, normalisation_of(vit), channels(vit))
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self.width = self._check_tokens()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Tokens (B, N, D) of images (B, C, H, W), without prefix tokens. No gradient passes."""
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        tokens = self.vit.forward_features(images * self.scale + self.shift)
        if tokens.ndim == 3:
            tokens = tokens[:, self.vit.num_prefix_tokens :]
        if not self.head:
            return tokens
        return self.vit.get_classifier()(getattr(self.vit, "fc_norm", nn.Identity())(tokens))

    def _check_tokens(self) -> int:
        """The dimension of the tokens; refuses a teacher that has not one for each patch."""
        tokens = self(torch.zeros(1, channels(self.vit), *self.size))
        count = self.grid[0] * self.grid[1]
        if tokens.ndim != 3 or tokens.shape[1] != count:
            raise ValueError(
                f"for an image of {self.size} the teacher, a {type(self.vit).__name__}, gives {tuple(tokens.shape)}, "
                f"but the student's grid of {self.grid[0]} x {self.grid[1]} takes (1, {count}, D); choose a "
                "ViT with one token per patch"
            )
        return tokens.shape[2]

    def _apply(self, *args: Any, **kwargs: Any) -> "TokenTeacher":
        self.vit._apply(*args, **kwargs)  # moves along, though it is no submodule
        return super()._apply(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{type(self.vit).__name__} at {self.size[0]} x {self.size[1]} px, width={self.width}"


def normalisation_of(model: nn.Module) -> Normalisation | None:
    """(mean, std) that a timm model was made for, averaged where it takes grey images; None if it does not say."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    if not cfg.get("mean") or not cfg.get("std"):
        return None
    return per_channel(cfg["mean"], channels(model)), per_channel(cfg["std"], channels(model))


def channels(model: nn.Module) -> int:
    """How many channels the model's images have."""
    return getattr(model, "in_chans", 3)


def _fit(vit: Any, grid: tuple[int, int]) -> tuple[int, int]:
    """Make the ViT take images of the size that gives this grid, and return it."""
    stem: Any = getattr(vit, "patch_embed", None) or getattr(vit, "embeds", None)
    if not hasattr(stem, "feat_ratio"):
        raise ValueError(
            f"the teacher, a {type(vit).__name__}, does not cut images into patches: its tokens can't be matched with "
            f"the student's grid of {grid[0]} x {grid[1]}; choose a ViT"
        )
    ratio = to_2tuple(stem.feat_ratio(as_scalar=False))
    size = grid[0] * ratio[0], grid[1] * ratio[1]
    if tuple(getattr(stem, "img_size", None) or size) == size:
        return size
    if not hasattr(vit, "set_input_size"):
        raise ValueError(
            f"the teacher, a {type(vit).__name__}, is tied to images of {tuple(stem.img_size)}, but the student's grid "
            f"of {grid[0]} x {grid[1]} takes {size}: make it with img_size={size}, or the student of another size"
        )
    vit.set_input_size(img_size=size)
    return size


def _renormalisation(own: Normalisation | None, teachers: Normalisation | None, channels: int) -> tuple[Tensor, Tensor]:
    """Factor and summand (C, 1, 1) that take images normalised in one way to the other; grey ones to all channels."""
    if own is None or teachers is None:
        return torch.ones(channels, 1, 1), torch.zeros(channels, 1, 1)
    (mean, std), (target_mean, target_std) = ([torch.tensor(v)[:, None, None] for v in n] for n in (own, teachers))
    if len(mean) not in (1, len(target_mean)):
        raise ValueError(f"images are normalised in {len(mean)} channels, but the teacher takes {len(target_mean)}")
    return std / target_std, (mean - target_mean) / target_std
