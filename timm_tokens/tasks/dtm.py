"""Masked image modelling on a teacher's morphed tokens (DTM, arXiv 2401.00254).

Shapes: B images, N patches, C channels of the student, D of the teacher.
"""

from typing import Any, cast

from timm.layers import to_2tuple
from torch import Tensor, nn

from timm_tokens import blocks
from timm_tokens.data.masking import block_masks
from timm_tokens.data.model_input import check_size
from timm_tokens.losses import DTMLoss
from timm_tokens.ops import superpixel_features
from timm_tokens.ops.ranges import check_counts
from timm_tokens.tasks.masked_beit import MaskedBeit, is_beit
from timm_tokens.tasks.task import TokenTask
from timm_tokens.tasks.token_teacher import TokenTeacher, channels, normalisation_of
from timm_tokens.vit import TokenViT
from timm_tokens.wrap import add_mask_token


class MaskedStudent(nn.Module):
    """A ViT whose masked patches are a learned token, and a linear map of its tokens to the teacher's width D."""

    def __init__(self, vit: TokenViT | MaskedBeit, width: int) -> None:
        super().__init__()
        self.vit = vit
        self.project = nn.Linear(vit.embed_dim, width)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """(B, 3, H, W) and (B, N) bool, True where masked -> (B, N, D)."""
        return self.project(self.vit(images, tokens=True, mask=mask).patches)


class DTMTask(TokenTask):
    """The student sees the image with blocks of patches masked, and predicts the tokens that a frozen teacher gives for
    the whole image. Both are morphed first: averaged over patches that the teacher finds similar, anew in each step.

        task = DTMTask(timm.create_model("vit_base_patch16_224", num_classes=0), teacher)

    The morphing of a step is the same on all processes, so that they have equal work.

    Args:
        student: A timm ViT that can be driven, a TokenViT, or a BEiT; `product` is the plain ViT, trained.
        teacher: Any timm ViT; a frozen copy is taken, brought to the student's grid and normalisation (TokenTeacher).
        criterion: Compares tokens (B, N, D), as `DTMLoss` does, which is the default. DTMLoss(rounds=()) compares them
            one by one. If it has a `check` of N, as DTMLoss, it is asked when building.
        image_size: Side, or (height, width), of the images that come; None: the size that the student is made for.
        mask_ratio: Share of the patches that are masked.
        masked_only: Whether the masked tokens alone count in the loss; all of them take part in the morphing.
        teacher_head: Whether the targets go through the teacher's classifier: CLIP's projection.
        seed: Seed of masks and draws.

    Raises:
        TypeError: If the student can't be driven.
        ValueError: If mask_ratio is not in (0, 1], the teacher can't be brought to the student's grid, their channels
            differ, it has no classifier for teacher_head, the student can't take images of this size, or the criterion
            so many tokens.

    Source: DTM (arXiv 2401.00254), section 3; the masks are BEiT's (arXiv 2106.08254).
    """

    def __init__(
        self,
        student: Any,
        teacher: nn.Module,
        criterion: nn.Module | None = None,
        *,
        image_size: int | tuple[int, int] | None = None,
        mask_ratio: float = 75 / 196,
        masked_only: bool = False,
        teacher_head: bool = False,
        seed: int = 0,
    ) -> None:
        if not 0 < mask_ratio <= 1:
            raise ValueError(f"mask_ratio must be in (0, 1], got {mask_ratio}; the paper masks 75 of 196 patches, 0.38")
        vit = _masked(student)
        if vit.in_chans not in (1, channels(teacher)):  # grey goes to each of the teacher's channels
            raise ValueError(f"the student takes {vit.in_chans} channels and the teacher {channels(teacher)}")
        grid = blocks.grid_size(vit.base, _image_size(vit, image_size))
        targets = TokenTeacher(teacher, grid, normalisation=normalisation_of(vit.base), head=teacher_head)
        super().__init__(MaskedStudent(vit, targets.width), seed=seed)
        loss: Any = cast(Any, DTMLoss() if criterion is None else criterion)
        self.teacher, self.criterion = targets, loss
        if hasattr(loss, "check"):
            loss.check(grid[0] * grid[1])
        self.grid, self.masked_only = grid, masked_only
        self.find_unused_parameters = _has_unused(vit.base)
        self.masked = max(1, round(mask_ratio * grid[0] * grid[1]))

    @property
    def product(self) -> nn.Module:
        """The student as a plain timm ViT."""
        return self.student.vit.base

    def forward(self, input: Tensor | list[Tensor], target: Any = None) -> dict[str, Tensor]:
        """The loss of images (B, C, H, W); of [images, mask (B, N)] with these masks instead of drawn ones."""
        images, mask = (input, self._draw_masks(input)) if isinstance(input, Tensor) else input
        self._check_grid(images)
        self.place_in_order(len(images))
        tokens = self.trainable_module(images, mask)
        counted, options = mask if self.masked_only else None, {}
        if getattr(self.criterion, "grouping", None) == "superpixels":
            options = {"points": superpixel_features(images, self.grid)}
        loss = self.criterion(tokens, self.teacher(images), counted, generator=self.step_generator(), **options)
        return {"loss": loss}

    def _check_grid(self, images: Tensor) -> None:
        size = tuple(images.shape[-2:])
        rows, columns = blocks.grid_size(self.product, size)
        if (rows, columns) != self.grid:
            raise ValueError(
                f"images of {size} have {rows} x {columns} patches, but the task was built for "
                f"{self.grid[0]} x {self.grid[1]}: build it with image_size={size}"
            )

    def _draw_masks(self, images: Tensor) -> Tensor:
        generators = self.sample_generators(len(images))
        mask = block_masks(self.masked, self.grid, len(images), generator=generators)
        return mask.to(images.device, non_blocking=True)


def _masked(student: Any) -> Any:
    """The student with a mask token."""
    if getattr(student, "mask_token", None) is not None:
        return student
    return MaskedBeit(student) if is_beit(student) else add_mask_token(student)


def _image_size(vit: Any, wanted: int | tuple[int, int] | None) -> tuple[int, int]:
    """The size of the images to come, which the student must take."""
    size = vit.image_size if wanted is None else to_2tuple(wanted)
    if size != vit.image_size and getattr(blocks.stem(vit.base), "strict_img_size", False):
        raise ValueError(
            f"the student takes images of {vit.image_size}, got image_size={wanted}: make it with img_size={size}, or "
            "with dynamic_img_size=True"
        )
    check_counts(image_size=min(size))
    check_size(vit.base, *size)
    return size


def _has_unused(base: nn.Module) -> bool:
    """Whether the ViT has pooling or a classifier with weights, which tokens don't go through."""
    modules = [getattr(base, name, None) for name in ("fc_norm", "attn_pool", "head", "head_dist")]
    return any(p.requires_grad for module in modules if module is not None for p in module.parameters())
