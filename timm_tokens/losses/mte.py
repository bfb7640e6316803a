"""Multi-token enhancing (MTE, arXiv 2411.15787): auxiliary tokens teach the global one while pre-training."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from timm_tokens.distributed import batch_mean
from timm_tokens.losses.cross_view import cross_view_losses
from timm_tokens.losses.dino import DINOLoss
from timm_tokens.losses.moby import MoBYLoss


class MTETerms(NamedTuple):
    """The loss and what to watch beside it, on the device, to be read when they are logged.

    Attributes:
        loss: The only one with a gradient, a scalar.
        token_losses: (T,) of the global token (the distillation) and of each auxiliary one.
        entropy: (T,) nats of a sample's assignment, averaged; None if not asked for, as the following.
        marginal_entropy: (T,) of the average assignment; it falls towards 0 when the prototypes collapse.
        agreement: (T,) the share of other tokens with the same first prototype; near 1 when the tokens have become
            alike, and an ensemble of them is of no use. 1 for a single token.
    """

    loss: Tensor
    token_losses: Tensor
    entropy: Tensor | None = None
    marginal_entropy: Tensor | None = None
    agreement: Tensor | None = None


class MTELoss(nn.Module):
    """A baseline's loss for several tokens of each view, the first of which, the global one, learns from them all.

        loss = MTELoss(DINOLoss(65536, num_tokens=1 + 6 + 6))
        loss(student, teacher).loss               # lists of logits (B, T, K), one per view; the teacher's views first

        L = w L_distil + (1 - w) L_aux
        L_distil = H(mean_i P_i, S_0)             the teacher's tokens together -> the student's global token
        L_aux    = mean_i H(T_i, S_i)             T_i: the same mean, or the token's own P_i; i > 0

    L_aux is averaged over the views that have auxiliary tokens. With the global token alone it is the baseline itself.
    For iBOT add its patch loss, which is unchanged.

    Args:
        baseline: A `DINOLoss` made for as many tokens, or a `MoBYLoss`.
        aux_target: "ensemble", or "own": what auxiliary tokens are compared with.
        include_global: Whether the global token is a member of the ensemble.
        global_weight: w, in (0, 1], the share of the global token's loss.

    Raises:
        ValueError: If aux_target or global_weight is out of range, when building; if views don't fit, when called.

    Source: Our definition, after the abstract of MTE (arXiv 2411.15787): its loss is not public.
    """

    def __init__(
        self,
        baseline: DINOLoss | MoBYLoss,
        *,
        aux_target: str = "ensemble",
        include_global: bool = True,
        global_weight: float = 0.5,
    ) -> None:
        super().__init__()
        if not 0 < global_weight <= 1:
            raise ValueError(f"global_weight must be in (0, 1], got {global_weight}")
        self.global_weight = global_weight
        if aux_target not in ("ensemble", "own"):
            raise ValueError(f"aux_target must be 'ensemble' or 'own', got {aux_target!r}")
        self.baseline, self.aux_target, self.include_global = baseline, aux_target, include_global

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], *, watch: bool = True) -> MTETerms:
        """The loss.

        Args:
            student: V logits (B, T, K) (MoBY: queries), one per view, the global token first; first the views that the
                teacher sees, in its order. The others may have the global token alone.
            teacher: Logits (B, T, K) (MoBY: keys) of the first views; they get no gradient.
            watch: Whether to compute entropies and agreement as well.
        """
        _check(student, teacher)
        targets = self.baseline.targets(teacher)
        combined = [self._combine(target) for target in targets]
        compared = combined  # (B, 1, K), the same for all tokens
        if self.aux_target == "own":
            compared = [torch.cat([all_, own[:, 1:]], 1) for all_, own in zip(combined, targets, strict=True)]
        losses = cross_view_losses(self.baseline.compare, student, compared)
        loss = losses[0] if len(losses) == 1 else losses[1:].mean().lerp(losses[0], self.global_weight)
        watched = _watch(self.baseline.assignments(targets)) if watch else ()
        self.baseline.update(teacher, combined)
        weight = self.baseline.pair_weight
        return MTETerms(weight * loss, weight * losses.detach(), *watched)

    def _combine(self, target: Tensor) -> Tensor:
        """The ensemble's target: (B, T, K) -> (B, 1, K)."""
        if target.shape[1] == 1:
            return target
        return self.baseline.combine(target if self.include_global else target[:, 1:])

    def extra_repr(self) -> str:
        return (
            f"aux_target={self.aux_target!r}, include_global={self.include_global}, global_weight={self.global_weight}"
        )


@torch.no_grad()
def _watch(views: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy, marginal entropy and agreement of assignments (B, T, K), over all views, samples and processes."""
    assignments = torch.cat(list(views))
    first = assignments.argmax(-1)  # (B, T)
    same = (first[:, :, None] == first[:, None, :]).float().sum(2) - 1  # other tokens that agree
    others = first.shape[1] - 1
    agreement = batch_mean(same) / others if others else torch.ones_like(same[0])
    entropy = batch_mean(torch.special.entr(assignments).sum(-1))
    return entropy, torch.special.entr(batch_mean(assignments)).sum(-1), agreement


def _check(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    shapes = [tuple(x.shape) for x in [*student, *teacher]]
    full = shapes[0] if shapes else ()
    views = len(teacher)
    alike = all(s == full for s in shapes[:views] + shapes[len(student) :])
    fewer = all(len(s) == 3 and s[1] <= full[1] and (s[0], s[2]) == (full[0], full[2]) for s in shapes)
    if not (len(full) == 3 and alike and fewer):
        raise ValueError(
            "views must be (B, T, K), all of the same shape, but that the student's further views may have fewer "
            f"tokens; got {shapes[: len(student)]} and {shapes[len(student) :]}"
        )
