"""Self-supervised clustering with mutual-information-regularised pseudo-labels (MIRA, arXiv 2211.02284).

Shapes: B images, V crops of each, C features, D projected, K prototypes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from timm_tokens.losses import MIRALoss
from timm_tokens.ops.ranges import check_counts, check_not_negative
from timm_tokens.tasks.heads import Prototypes, mira_head
from timm_tokens.tasks.schedules import cosine, over_the_run
from timm_tokens.tasks.task import TokenTask
from timm_tokens.tasks.teacher import frozen_copy, update_teacher, use_batch_statistics
from timm_tokens.tasks.token_encoder import of_one_size


class ProjectedBackbone(nn.Module):
    """A backbone and a projector, run on crops of several sizes, those of one size as one batch, or one by one."""

    def __init__(self, backbone: Any, hidden: int, width: int, crop_by_crop: bool = False) -> None:
        super().__init__()
        self.backbone, self.crop_by_crop = backbone, crop_by_crop
        self.projector = mira_head(getattr(backbone, "head_hidden_size", backbone.num_features), hidden, width)

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        """V crops (B, 3, h, w), equal sizes next to each other -> (V B, D) of unit length, in the same order."""
        if self.crop_by_crop:
            return torch.cat([self.projector(self.backbone(crop)) for crop in crops])
        return self.projector(torch.cat([self.backbone(batch) for batch in of_one_size(crops)]))


class ClusteringStudent(nn.Module):
    """An encoder and the prototypes that its projections are compared with: V crops -> V logits (B, K)."""

    def __init__(self, encoder: ProjectedBackbone, prototypes: Prototypes) -> None:
        super().__init__()
        self.encoder, self.prototypes = encoder, prototypes

    def forward(self, crops: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self.prototypes(self.encoder(crops)).chunk(len(crops))


class MIRATask(TokenTask):
    """The student predicts, from each crop of an image, the pseudo-labels that its teacher makes of another.

        task = MIRATask(timm.create_model("resnet50", num_classes=0))

    The teacher is a moving average of the student's backbone and projector, and compares with the student's own
    prototypes; its batch norms use the batch. Pseudo-labels are made over the batches of all processes together, and
    the batch norms see them together, too: on GPUs the trainer calls `timm.layers.convert_sync_batchnorm` for that.

    Args:
        backbone: Any timm model, a conv net or a ViT, with num_classes=0; a ViT with dynamic_img_size=True if crops
            have several sizes. It is trained in place.
        criterion: `MIRALoss()` is the default; its temperatures are the loss's own.
        num_prototypes: K.
        hidden: Width of the projector's hidden layers.
        width: D.
        global_crops: How many crops the teacher sees: the first ones.
        beta: Strength of the information, from and to, along half a cosine; each in [0, 1).
        momentum: Momentum of the teacher's average at the start and at the end, following half a cosine.
        frozen_epochs: Epochs at the start in which prototypes are frozen.
        crop_by_crop: Whether crops are encoded one by one, as in the paper's code, so that batch norms see one crop of
            each image at a time. It is slower; otherwise crops of one size are encoded together.
        publish: What comes out: "student", or "teacher", its moving average, which is what the paper's code evaluates.
        seed: Seed of the run.

    Raises:
        ValueError: If the backbone has a classifier, or a value is out of its range.

    Source: MIRA (arXiv 2211.02284), section 3 and appendix.
    """

    def __init__(
        self,
        backbone: nn.Module,
        criterion: MIRALoss | None = None,
        *,
        num_prototypes: int = 3000,
        hidden: int = 2048,
        width: int = 256,
        global_crops: int = 2,
        beta: tuple[float, float] = (0.75, 2 / 3),
        momentum: tuple[float, float] = (0.99, 1.0),
        frozen_epochs: float = 1.0,
        crop_by_crop: bool = False,
        publish: str = "student",
        seed: int = 0,
    ) -> None:
        if publish not in ("student", "teacher"):
            raise ValueError(f"publish must be 'student' or 'teacher', got {publish!r}")
        _check(backbone, beta, momentum)
        check_counts(num_prototypes=num_prototypes, hidden=hidden, width=width, global_crops=global_crops)
        check_not_negative(frozen_epochs=frozen_epochs)
        encoder = ProjectedBackbone(backbone, hidden, width, crop_by_crop)
        super().__init__(ClusteringStudent(encoder, Prototypes(width, num_prototypes)), seed=seed)
        self.teacher = use_batch_statistics(frozen_copy(encoder))
        self.criterion = MIRALoss() if criterion is None else criterion
        self.global_crops, self.frozen_epochs, self.publish = global_crops, frozen_epochs, publish
        self.betas, self.momenta = (beta[0], beta[1]), (momentum[0], momentum[1])
        self.beta, self.momentum, self.frozen = beta[0], momentum[0], frozen_epochs > 0

    @property
    def product(self) -> Any:
        """The student's backbone, or the teacher's, frozen: call requires_grad_() to train it further."""
        return (self.teacher if self.publish == "teacher" else self.student.encoder).backbone

    def bound_to_length(self) -> list[str]:
        return over_the_run("beta", self.betas) + over_the_run("teacher's momentum", self.momenta)

    def start_step(self, step: int, total_steps: int, steps_per_epoch: int) -> None:
        super().start_step(step, total_steps, steps_per_epoch)
        self.beta = cosine(*self.betas, step, total_steps)
        self.momentum = cosine(*self.momenta, step, total_steps)
        self.frozen = step < self.frozen_epochs * steps_per_epoch

    def forward(self, input: Tensor | list[Tensor], target: Any = None) -> dict[str, Tensor]:
        """The loss of V crops (B, 3, h, w), those that the teacher sees first; information in nats beside it."""
        if isinstance(input, Tensor) or len(input) < max(2, self.global_crops):
            got = "one tensor" if isinstance(input, Tensor) else f"{len(input)} crops"
            raise ValueError(f"MIRATask takes a list of {max(2, self.global_crops)} crops or more, got {got}")
        self.place_in_order(len(input[0]))
        logits = self.trainable_module(input)
        terms = self.criterion(logits, self._teach(input[: self.global_crops]), beta=self.beta)
        return terms._asdict()

    @torch.no_grad()
    def _teach(self, crops: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self.student.prototypes(self.teacher(crops)).chunk(len(crops))

    def before_optimizer(self) -> None:
        if self.frozen:
            self.student.prototypes.weight.grad = None  # not zero: weight decay and momentum would move them

    def followers(self) -> tuple[nn.Module, ...]:
        return (self.teacher,)

    def end_step(self) -> None:
        update_teacher(self.teacher, self.student.encoder, self.momentum)


def _check(backbone: nn.Module, beta: tuple[float, float], momentum: tuple[float, float]) -> None:
    if backbone.num_classes:
        raise ValueError(
            f"the backbone has a classifier for {backbone.num_classes} classes, but its features are to be clustered: "
            "make it with num_classes=0, or call backbone.reset_classifier(0)"
        )
    if not all(0 <= share < 1 for share in beta):
        raise ValueError(f"beta must stay in [0, 1), got {beta}; 0 is the plain softmax")
    if not all(0 <= share <= 1 for share in momentum):
        raise ValueError(f"momentum must stay in [0, 1], got {momentum}")
