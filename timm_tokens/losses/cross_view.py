"""What the losses between views of an image share."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_tokens.distributed import batch_size, world_size

# (student (B, T, K), {view: target (B, 1, K) or (B, T, K)}) -> (B, T), summed over the views
Compare = Callable[[Tensor, Mapping[int, Tensor]], Tensor]


def cross_view_losses(compare: Compare, student: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """The loss (T,) of each token, averaged over the batch and all pairs of a teacher's and another student's view.

    Its average over processes is what the global batch gives; their sizes may differ.

    Args:
        student: V views (B, T, K), first those of the teacher, in its order. Later ones may lack the last tokens.
        targets: Targets of the teacher's views, (B, T, K), or (B, 1, K) for all tokens.
    """
    if not 1 <= len(targets) <= len(student) or len(student) < 2:
        raise ValueError(
            "each of the teacher's views must be one of the student's, which needs another to compare with: got "
            f"{len(targets)} for the teacher and {len(student)} for the student"
        )
    tokens, totals, pairs = student[0].shape[1], [], [0] * student[0].shape[1]
    for view, predicted in enumerate(student):
        others = {u: target[:, : predicted.shape[1]] for u, target in enumerate(targets) if u != view}
        if others:
            total = compare(predicted, others).sum(0)
            totals.append(F.pad(total, (0, tokens - len(total))))
            pairs[: len(total)] = [n + len(others) for n in pairs[: len(total)]]
    losses = torch.stack(totals).sum(0)
    return losses / (losses.new_tensor(pairs) * samples_a_process(student[0]))


def samples_a_process(x: Tensor) -> Tensor | int:
    """What a sum over this process's samples (B, ...) is divided by, so that processes average to the global mean."""
    return len(x) if world_size() == 1 else batch_size(x) / world_size()


def as_tokens(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Views (B, K) of one token as (B, 1, K)."""
    shapes = {tuple(x.shape) for x in [*student, *teacher]}
    if any(len(shape) != 2 for shape in shapes):
        raise ValueError(f"views must have shape (B, K), got {sorted(shapes)}")
    if len(shapes) > 1:
        raise ValueError(f"all views must have the same shape (B, K), got {sorted(shapes)}")
    return [x.unsqueeze(1) for x in student], [x.unsqueeze(1) for x in teacher]
