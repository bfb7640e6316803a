"""Masked image modelling on morphed tokens (DTM, arXiv 2401.00254)."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_tokens.distributed import all_reduce_mean
from timm_tokens.ops import morphing
from timm_tokens.ops.clustering import kmeans_groups
from timm_tokens.ops.ranges import check_counts

# Between tokens (B, N, C) of student and teacher -> (B, N)
DISTANCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "smooth_l1": lambda u, v, beta: F.smooth_l1_loss(u, v, beta=beta, reduction="none").mean(-1),
    "cosine": lambda u, v, beta: 1 - F.cosine_similarity(u, v, dim=-1),
    "l1": lambda u, v, beta: (u - v).abs().mean(-1),
    "l2": lambda u, v, beta: (u - v).square().mean(-1),
}
GROUPINGS = ("matching", "kmeans", "superpixels")


class DTMLoss(nn.Module):
    """The distance between student and teacher tokens, both morphed by the teacher's groups, in schedules drawn anew.

    The teacher's tokens differ from patch to patch of one thing, and predicting them one by one learns that noise. So
    patches that the teacher finds similar are averaged, on both sides, before they are compared; how many is random,
    from none (the token-wise loss) to nearly all (close to the image-level one). The tokens of a group are all the same
    after morphing, so the mean over tokens is one over groups, weighed by their sizes.

    A schedule decides shapes, so each new one makes torch.compile trace again: compile the models, not this loss.

    Args:
        distance: "smooth_l1", "l1", "l2" (squared), all averaged over channels, or "cosine", 1 - cos.
        beta: Where smooth L1 turns from quadratic to linear.
        draws: Schedules to average over in each call.
        max_rounds: K, the most rounds of a schedule.
        min_tokens: The fewest tokens to end with.
        num_prefix_tokens: P, leading tokens that stay alone. They count in the loss like the others.
        rounds: One fixed schedule, as `morph_groups` takes it, instead of the draws; () compares token by token.
        normalize_target: Whether morphed targets get mean 0 and variance 1 over their channels.
        grouping: "matching": tokens that the teacher finds alike, by bipartite matching; "kmeans": the same by k-means;
            "superpixels": k-means of what is given as `points`, colours and places (`superpixel_features`).

    Raises:
        ValueError: If an argument is out of its range, when building; if shapes do not fit, there is no schedule, or as
            `morph_groups`, when called. What depends on the number of tokens, `check` refuses before.
        TypeError: If mask is not bool, or as `morph_groups`, when called.

    Source: DTM (arXiv 2401.00254), the objective with weights w_i.
    """

    def __init__(
        self,
        distance: str = "smooth_l1",
        *,
        beta: float = 2.0,
        draws: int = 2,
        max_rounds: int = 14,
        min_tokens: int = 0,
        num_prefix_tokens: int = 0,
        rounds: Sequence[int] | None = None,
        normalize_target: bool = False,
        grouping: str = "matching",
    ) -> None:
        super().__init__()
        if grouping not in GROUPINGS:
            raise ValueError(f"grouping must be one of {', '.join(GROUPINGS)}, got {grouping!r}")
        if distance not in DISTANCES:
            raise ValueError(f"distance must be one of {', '.join(DISTANCES)}, got {distance!r}")
        if not 0 < beta < math.inf:
            raise ValueError(f"beta must be positive, got {beta}; for beta 0 choose distance='l1'")
        check_counts(draws=draws, max_rounds=max_rounds)
        check_counts(0, min_tokens=min_tokens, num_prefix_tokens=num_prefix_tokens)
        self.distance, self.beta, self.draws = distance, beta, draws
        self.max_rounds, self.min_tokens, self.num_prefix_tokens = max_rounds, min_tokens, num_prefix_tokens
        self.rounds = None if rounds is None else tuple(rounds)
        self.normalize_target, self.grouping = normalize_target, grouping

    def check(self, num_tokens: int) -> None:
        """Refuse numbers of tokens N that can't be morphed so.

        Raises:
            ValueError: If there are fewer tokens than min_tokens, or a round merges more than half of them.
            TypeError: If rounds is no sequence of ints.
        """
        if self.rounds is None:
            self._draw(num_tokens, torch.Generator())
        else:
            morphing.check_rounds(self.rounds, num_tokens, self.num_prefix_tokens)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor | None = None,
        *,
        schedules: Sequence[Sequence[int]] | None = None,
        points: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The loss, a scalar. The teacher gets no gradient.

        Where processes count different numbers of tokens, the average over processes is the global batch's loss.

        Args:
            student: (B, N, C) tokens, projected to the teacher's width.
            teacher: (B, N, C) tokens of the unmasked image.
            mask: (B, N) bool, the tokens to count, for a loss on masked ones alone; None: all. All tokens take part in
                the morphing.
            schedules: Instead of the loss's own: rounds for `morph_groups`, one sequence a draw; () is token by token.
            points: (B, N, F), what super-pixels are grouped by.
            generator: Random generator of the draws, on the CPU.
        """
        if schedules is None:
            draws = (self._draw(student.shape[1], generator) for _ in range(self.draws))
            schedules = [*draws] if self.rounds is None else [self.rounds]
        _check_tokens(student, teacher, mask, schedules)
        group, teacher = self._grouping(teacher, points), teacher.detach()
        counted = torch.ones(student.shape[:2], device=student.device) if mask is None else mask.float()
        total = all_reduce_mean(counted.sum()).clamp_min(1e-6)  # nothing masked anywhere: 0, not 0 / 0
        losses = []
        for rounds in schedules:
            groups, num_groups = group(rounds), student.shape[1] - sum(rounds)
            u, v = morphing.group_means(student, groups, num_groups), morphing.group_means(teacher, groups, num_groups)
            v = _normalized(v) if self.normalize_target else v
            weight = morphing.group_sums(counted.unsqueeze(2), groups, num_groups).squeeze(2)  # (B, G)
            losses.append((weight * DISTANCES[self.distance](u, v, self.beta)).sum() / total)
        return torch.stack(losses).mean()

    def _grouping(self, teacher: Tensor, points: Tensor | None) -> Callable[[Sequence[int]], Tensor]:
        """What makes groups (B, N) of rounds: by matching, or by k-means, as many as the rounds would leave."""
        prefix = self.num_prefix_tokens
        if self.grouping == "matching":
            return partial(morphing.groups_of_gram, morphing.token_gram(teacher), num_prefix_tokens=prefix)
        given = F.normalize(teacher.detach().float(), dim=-1) if self.grouping == "kmeans" else points
        if given is None:
            raise ValueError("grouping='superpixels' needs points: those that superpixel_features(images, grid) makes")
        count = given.shape[1] - prefix
        return lambda rounds: kmeans_groups(given, count - sum(rounds), num_prefix_tokens=prefix)

    def _draw(self, num_tokens: int, generator: torch.Generator | None) -> tuple[int, ...]:
        return morphing.draw_morph_rounds(
            num_tokens,
            min_tokens=self.min_tokens,
            max_rounds=self.max_rounds,
            num_prefix_tokens=self.num_prefix_tokens,
            generator=generator,
        )

    def extra_repr(self) -> str:
        if self.rounds is not None:
            return f"{self.distance!r}, rounds={self.rounds}"
        draws = f"draws={self.draws}, max_rounds={self.max_rounds}, min_tokens={self.min_tokens}"
        return f"{self.distance!r}, {draws}, grouping={self.grouping!r}"


def _check_tokens(student: Tensor, teacher: Tensor, mask: Tensor | None, schedules: Sequence[Sequence[int]]) -> None:
    if not schedules:
        raise ValueError("schedules must have at least one schedule; [()] compares token by token")
    if student.ndim != 3 or student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must both be (B, N, C), got {tuple(student.shape)} and {tuple(teacher.shape)}; "
            "bring the teacher to the student's grid and project the student to the teacher's width"
        )
    if mask is None:
        return
    if mask.shape != student.shape[:2]:
        raise ValueError(f"mask must have shape (B, N) = {tuple(student.shape[:2])}, got {tuple(mask.shape)}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True where a token counts, got {mask.dtype}")


def _normalized(tokens: Tensor) -> Tensor:
    variance, mean = torch.var_mean(tokens, dim=-1, keepdim=True)
    return (tokens - mean) * (variance + 1e-6).rsqrt()
