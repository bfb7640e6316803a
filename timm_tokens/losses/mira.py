"""Self-supervised clustering with mutual-information-regularised pseudo-labels (MIRA, arXiv 2211.02284)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from timm_tokens.distributed import all_reduce_mean
from timm_tokens.ops.assignment import assignment_information, check_regularisation, mira_assign
from timm_tokens.ops.ranges import check_positive


class MIRATerms(NamedTuple):
    """The loss and what to watch beside it: scalars on the device, to be read when they are logged.

    Attributes:
        loss: The only one with a gradient.
        entropy: Entropy of a sample's pseudo-label, in nats; all three are averaged over the teacher's views.
        marginal_entropy: Entropy of the average pseudo-label; it falls towards 0 when training collapses.
        mutual_information: Marginal entropy less entropy, which the assignment raises.
    """

    loss: Tensor
    entropy: Tensor
    marginal_entropy: Tensor
    mutual_information: Tensor


def mira_loss(student: Sequence[Tensor], assignments: Sequence[Tensor], tau: float) -> Tensor:
    """Cross entropy between the pseudo-labels of each view and the student's prediction on every other view.

    Averaged over the pairs of views and the samples. With processes that hold different numbers of samples, the average
    over processes is what the global batch gives.

    Args:
        student: V logits (B, K); the first are of the views in assignments, in their order.
        assignments: Pseudo-labels (B, K) of the first views.
        tau: The student's temperature.

    Returns:
        A scalar.

    Raises:
        ValueError: If there is no pair of views, or shapes differ.

    Source: MIRA (arXiv 2211.02284), section 3, the swapped prediction of pseudo-labels.
    """
    _check_views(student, assignments)
    losses = []
    for view, logits in enumerate(student):
        labels = [w for other, w in enumerate(assignments) if other != view]
        if labels:  # the cross entropy is linear in the labels: one for their sum serves them all
            losses.append(-(sum(labels) * (logits.float() / tau).log_softmax(1)).sum())
    pairs = len(assignments) * (len(student) - 1)
    samples = all_reduce_mean(torch.full((), student[0].shape[0], dtype=torch.float32, device=student[0].device))
    return torch.stack(losses).sum() / (pairs * samples)


class MIRALoss(nn.Module):
    """Pseudo-labels from the teacher's views by `mira_assign`, predicted from the student's other views.

    The labels are as close to the teacher's own predictions as they can be while they stay informative. No prototype is
    forced to an equal share, there is no queue, and a small batch is enough.

    Args:
        tau_student: Temperature of the student's predictions.
        tau_teacher: Temperature of the teacher's logits.
        beta: Strength of the mutual information, in [0, 1); the default of `forward`.
        iterations: Fixed-point iterations.
        assign: Instead of `mira_assign`, the teacher's logits (B, K) to pseudo-labels (B, K); as `sinkhorn_assign`.
            tau_teacher, beta and iterations are then not used.

    Raises:
        ValueError: If a temperature is not positive, beta is outside [0, 1) or iterations is negative.
    """

    def __init__(
        self,
        tau_student: float = 0.1,
        tau_teacher: float = 0.225,
        beta: float = 0.75,
        iterations: int = 30,
        assign: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        check_positive(tau_student=tau_student)
        check_regularisation(tau_teacher, beta, iterations)
        self.tau_student, self.tau_teacher, self.beta, self.iterations = tau_student, tau_teacher, beta, iterations
        self.assign = assign

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], *, beta: float | None = None) -> MIRATerms:
        """The loss, and the information in the pseudo-labels.

        Args:
            student: V logits (B, K), one per view: first the teacher's views in its order, then the others.
            teacher: Logits (B, K) of the first views; they get no gradient.
            beta: In place of the loss's own, where it follows a schedule.
        """
        beta = self.beta if beta is None else beta
        own = partial(mira_assign, tau=self.tau_teacher, beta=beta, iterations=self.iterations)
        assignments = [(self.assign or own)(logits) for logits in teacher]
        loss = mira_loss(student, assignments, self.tau_student)
        information = zip(*(assignment_information(w) for w in assignments), strict=True)
        return MIRATerms(loss, *(torch.stack(values).mean() for values in information))

    def extra_repr(self) -> str:
        return f"tau_student={self.tau_student}, tau_teacher={self.tau_teacher}, beta={self.beta}"


def _check_views(student: Sequence[Tensor], assignments: Sequence[Tensor]) -> None:
    if not 1 <= len(assignments) <= len(student) or len(student) < 2:
        raise ValueError(
            "each of the teacher's views must be one of the student's, which needs another to predict from: got "
            f"{len(assignments)} for the teacher and {len(student)} for the student"
        )
    shapes = {tuple(x.shape) for x in [*student, *assignments]}
    if len(shapes) > 1 or len(next(iter(shapes))) != 2:
        raise ValueError(f"all views must have the same shape (B, K), got {sorted(shapes)}")
