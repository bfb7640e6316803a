"""Self-distillation with no labels (DINO, arXiv 2104.14294)."""

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from timm_tokens.losses.center import Center
from timm_tokens.losses.cross_view import as_tokens, cross_view_losses
from timm_tokens.ops.cross_entropy import soft_cross_entropy
from timm_tokens.ops.ranges import check_counts, check_positive


class DINOLoss(nn.Module):
    """Cross entropy between the teacher's view and every other view of the student, over prototypes.

        loss = DINOLoss(65536)
        loss(student_logits, teacher_logits)      # lists of (B, K), one per view; the teacher's views first

    The teacher's logits are centred, against one prototype for everything, and sharpened, against all alike. In
    training mode each call moves the centre, after it was used. Schedules set both temperatures as plain attributes.

    Args:
        num_prototypes: K.
        tau_student: Temperature of the student.
        tau_teacher: Temperature of the teacher; 0.04 at first, up to 0.07 later, in the paper.
        center_momentum: Momentum of the centre; see `Center`.
        num_tokens: T, centres: one for each token that `MTELoss` compares; DINO itself has one.

    Raises:
        ValueError: If a temperature is not positive or a count below 1, when building; if views don't fit, when called.

    Source: DINO (arXiv 2104.14294), algorithm 1.
    """

    pair_weight = 1.0  # the loss is the mean over pairs of views

    def __init__(
        self,
        num_prototypes: int = 65536,
        *,
        tau_student: float = 0.1,
        tau_teacher: float = 0.04,
        center_momentum: float = 0.9,
        num_tokens: int = 1,
    ) -> None:
        super().__init__()
        check_positive(tau_student=tau_student, tau_teacher=tau_teacher)
        check_counts(num_prototypes=num_prototypes, num_tokens=num_tokens)
        self.tau_student, self.tau_teacher = tau_student, tau_teacher
        self.center = Center(num_tokens, num_prototypes, momentum=center_momentum)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The loss, a scalar.

        Args:
            student: V logits (B, K), one per view: first the teacher's views in its order, then the others.
            teacher: Logits (B, K) of the first views; they get no gradient.
        """
        student, teacher = as_tokens(student, teacher)
        targets = self.targets(teacher)
        loss = cross_view_losses(self.compare, student, targets)[0]
        self.update(teacher, targets)
        return loss

    # What MTELoss needs of a baseline: targets of each token, their combination, a comparison, and what happens after.

    @torch.no_grad()
    def targets(self, teacher: Sequence[Tensor]) -> list[Tensor]:
        """Assignments to prototypes (B, T, K) for the teacher's logits (B, T, K) of each view."""
        expected = tuple(self.center.value.shape)
        for logits in teacher:
            if logits.shape[1:] != expected:
                raise ValueError(
                    f"the teacher's logits must be (B, T, K) with (T, K) = {expected}, got {tuple(logits.shape)}; "
                    "build the loss with as many num_tokens and num_prototypes"
                )
        return [(self.center(logits) / self.tau_teacher).softmax(-1) for logits in teacher]

    def combine(self, target: Tensor) -> Tensor:
        """One assignment for the tokens of a view: their mean, (B, T, K) -> (B, 1, K)."""
        return target.mean(1, keepdim=True)

    def compare(self, student: Tensor, targets: Mapping[int, Tensor]) -> Tensor:
        """Cross entropies (B, T) of one view's logits (B, T, K), summed over targets, (B, 1, K) or (B, T, K) each."""
        return soft_cross_entropy(student, reduce(torch.add, targets.values()), self.tau_student)

    def assignments(self, targets: Sequence[Tensor]) -> list[Tensor]:
        """Targets as probabilities: what entropy and agreement are measured on."""
        return list(targets)

    def update(self, teacher: Sequence[Tensor], combined: Sequence[Tensor]) -> None:
        """In training mode, move the centres towards the teacher's mean logits."""
        if self.training:
            self.center.update(torch.cat(list(teacher)))

    def extra_repr(self) -> str:
        return f"tau_student={self.tau_student}, tau_teacher={self.tau_teacher}"
