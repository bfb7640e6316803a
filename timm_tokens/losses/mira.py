"""Self-supervised clustering with mutual-information-regularised pseudo-labels (MIRA, arXiv 2211.02284)."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from timm_tokens.losses.cross_view import as_tokens, cross_view_losses
from timm_tokens.ops.assignment import assignment_information, check_regularisation, mira_assign
from timm_tokens.ops.cross_entropy import soft_cross_entropy
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
        ValueError: If a temperature is not positive, beta is outside [0, 1) or iterations is negative, when building;
            if views don't fit, when called.

    Source: MIRA (arXiv 2211.02284), section 3, the swapped prediction of pseudo-labels.
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
        """The loss, averaged over the pairs of views and the samples, and the information in the pseudo-labels.

        Processes may hold different numbers of samples: the average over them is what the global batch gives.

        Args:
            student: V logits (B, K), one per view: first the teacher's views in its order, then the others.
            teacher: Logits (B, K) of the first views; they get no gradient.
            beta: In place of the loss's own, where it follows a schedule.
        """
        beta = self.beta if beta is None else beta
        own = partial(mira_assign, tau=self.tau_teacher, beta=beta, iterations=self.iterations)
        assignments = [(self.assign or own)(logits) for logits in teacher]
        loss = cross_view_losses(self._compare, *as_tokens(student, assignments))[0]
        information = zip(*(assignment_information(w) for w in assignments), strict=True)
        return MIRATerms(loss, *(torch.stack(values).mean() for values in information))

    def _compare(self, student: Tensor, labels: Mapping[int, Tensor]) -> Tensor:
        """Cross entropies (B, 1) of one view's logits (B, 1, K), summed over the pseudo-labels of other views."""
        return soft_cross_entropy(student, reduce(torch.add, labels.values()), self.tau_student)

    def extra_repr(self) -> str:
        return f"tau_student={self.tau_student}, tau_teacher={self.tau_teacher}, beta={self.beta}"
