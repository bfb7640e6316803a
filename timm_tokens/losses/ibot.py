"""The patch loss of iBOT (arXiv 2111.07832): predict what the teacher makes of the patches that were masked."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from timm_tokens.losses.center import Center
from timm_tokens.losses.cross_view import samples_a_process
from timm_tokens.ops.cross_entropy import soft_cross_entropy
from timm_tokens.ops.ranges import check_counts, check_positive


class IBOTPatchLoss(nn.Module):
    """Cross entropy between the teacher's and the student's assignment of each masked patch, in the same view.

        loss = IBOTPatchLoss(8192)
        loss(student_logits, teacher_logits, masks)        # lists with an entry for each view

    Averaged over the masked patches of an image, then over images (those without a mask count as 0), then over views.
    iBOT adds this to `DINOLoss` on the class token, with the same weight. Logits may be given for the masked patches
    alone, (M, K) in the order of `x[mask]`, so that the head need not run on the others. In training mode each call
    moves the centre, after it was used, towards the mean of the teacher's logits that were given: iBOT's own code gives
    those of all patches.

    Args:
        num_prototypes: K.
        tau_student: Temperature of the student.
        tau_teacher: Temperature of the teacher.
        center_momentum: Momentum of the centre; see `Center`.

    Raises:
        ValueError: If a temperature is not positive, when building; if shapes don't fit, when called.

    Source: iBOT (arXiv 2111.07832), equation 2.
    """

    def __init__(
        self, num_prototypes: int = 8192, *,
        tau_student: float = 0.1, tau_teacher: float = 0.04, center_momentum: float = 0.9,
    ) -> None:  # fmt: skip
        super().__init__()
        check_positive(tau_student=tau_student, tau_teacher=tau_teacher)
        check_counts(num_prototypes=num_prototypes)
        self.tau_student, self.tau_teacher = tau_student, tau_teacher
        self.center = Center(num_prototypes, momentum=center_momentum)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        """The loss, a scalar; 0 if nothing is masked.

        Args:
            student: Logits of the views that were masked, (B, N, K) or (M, K) each.
            teacher: Logits of the same views, whole; as many, without gradient.
            masks: (B, N) bool each, True where a patch is masked. Masks on the CPU with logits (M, K) on another
                device are best: nothing then waits for the device to know M.
        """
        if not len(student) == len(teacher) == len(masks) > 0:
            raise ValueError(
                f"student, teacher and masks must have one per view, got {len(student)}, {len(teacher)}, {len(masks)}"
            )
        losses = [self._view(*view) for view in zip(student, teacher, masks, strict=True)]
        if self.training:
            self.center.update(torch.cat([logits.flatten(0, -2) for logits in teacher]))
        return torch.stack(losses).mean()

    def _view(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        student, teacher = _masked(student, mask), _masked(teacher, mask)  # (M, K)
        target = (self.center(teacher.detach()) / self.tau_teacher).softmax(-1)
        losses = soft_cross_entropy(student.unsqueeze(0), target.unsqueeze(0), self.tau_student).squeeze(0)
        weight = (mask / mask.sum(1, keepdim=True).clamp(min=1))[mask]  # each image counts the same
        count = samples_a_process(mask.to(losses.device, non_blocking=True))
        return (losses * weight.to(losses.device, non_blocking=True)).sum() / count

    def extra_repr(self) -> str:
        return f"tau_student={self.tau_student}, tau_teacher={self.tau_teacher}"


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    """The masked rows: (B, N, K) -> (M, K)."""
    if logits.shape[:-1] == mask.shape:
        return logits[mask]
    rows = int(mask.sum())
    if logits.ndim != 2 or len(logits) != rows:
        raise ValueError(
            f"logits must be (B, N, K) with (B, N) = {tuple(mask.shape)}, or (M, K) with M = {rows} masked patches, "
            f"got {tuple(logits.shape)}"
        )
    return logits
