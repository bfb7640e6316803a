"""Relaxed merging: bipartite matching that is differentiable in the metric (DTEM, arXiv 2412.10569, section 3.2).

No token is removed. A token that merges hands a part of itself over and its size fades; sizes weigh the attention, so
a token of size 0 is as good as gone. Shapes: B images, N tokens, P prefix tokens, C channels, E embedding width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from timm_tokens.ops.matching import cosine_similarity, mergeable, take
from timm_tokens.ops.ranges import check_counts, check_positive


class RelaxedMatching(NamedTuple):
    """What one relaxed merge did, for `relaxed_unmerge`.

    Attributes:
        assignment: (B, |A|, |B|) float32, the part of each token of A that went to each token of B.
        order: (B, N) int64, the input position of each output token.
        num_prefix_tokens: P.
        effective: How many tokens, prefix included, took part.
    """

    assignment: Tensor
    order: Tensor
    num_prefix_tokens: int
    effective: int


def relaxed_top_k(scores: Tensor, k: int, *, tau1: float = 0.1, tau2: float = 0.1, candidates: int = 3) -> Tensor:
    """A soft choice of the k best rows, each spread over its best columns.

    Args:
        scores: (B, |A|, |B|) similarities.
        k: How many (row, column) pairs to choose.
        tau1: Temperature of the scores.
        tau2: Temperature of each of the k choices.
        candidates: Columns considered for each row.

    Returns:
        (B, |A|, |B|) float32; rows sum to at most 1, everything to at most k.

    Raises:
        ValueError: A temperature is not positive, or a count is out of range.

    Source: DTEM (arXiv 2412.10569), equations 5 and 6. The paper iterates over all pairs. As each choice weakens whole
    rows, the distribution within a row never changes: it is enough to iterate over one number per row, exactly.
    """
    check_counts(0, k=k)
    check_counts(candidates=candidates)
    check_positive(tau1=tau1, tau2=tau2)
    columns = min(candidates, scores.shape[-1])
    values, index = scores.float().topk(columns, dim=-1)
    logits = values / (tau1 * tau2)
    within = logits.softmax(dim=-1)  # (B, |A|, candidates)
    row = logits.logsumexp(dim=-1)  # (B, |A|)
    chosen: Tensor = _Choices.apply(row, k, tau2).sum(dim=0)
    chosen = chosen / ((chosen.detach() - 1).clamp(min=0) + 1)  # no row gives more than itself away
    return torch.zeros_like(scores, dtype=row.dtype).scatter(-1, index, chosen.unsqueeze(-1) * within)


class _Choices(Function):
    """k soft choices of a row, one after the other, of which each weakens what it chooses.

    (B, |A|) logits -> (k, B, |A|) probabilities. The loop is much of a training step on a GPU, where the time goes by
    the number of operations: 5 a choice forward and 3 backward, where autograd takes 15.
    """

    @staticmethod
    def forward(ctx: Any, row: Tensor, k: int, tau2: float) -> Tensor:
        choices = []
        for _ in range(k):
            choices.append(row.softmax(dim=-1))
            row = row.add((1 - choices[-1]).clamp_(min=torch.finfo(row.dtype).eps).log_(), alpha=1 / tau2)
        stacked = torch.stack(choices) if k else row.new_empty(0, *row.shape)
        ctx.tau2 = tau2
        ctx.save_for_backward(stacked)
        return stacked

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (choices,) = ctx.saved_tensors
        rest = 1 - choices
        slopes = (-1 / ctx.tau2 / rest).where(rest >= torch.finfo(rest.dtype).eps, 0)
        on_row = choices.new_zeros(choices.shape[1:])  # the gradient on the logits that a choice leaves
        for p, slope, on_p in zip(*(reversed(x.unbind()) for x in (choices, slopes, grad)), strict=True):
            on_p = torch.addcmul(on_p, on_row, slope)
            on_row = on_row + torch.ops.aten._softmax_backward_data(on_p, p, -1, p.dtype)
        return on_row, None, None


def relaxed_match(
    metric: Tensor, r: int, effective: int, *, num_prefix_tokens: int, tau1: float, tau2: float, candidates: int
) -> Tensor:
    """The soft counterpart of `bipartite_match`, with the arguments of `relaxed_merge`: which part of each token of A
    (P, P + 2, ... below `effective`) goes to each token of B (P + 1, P + 3, ...), (B, |A|, |B|) float32."""
    r = mergeable(r, effective, num_prefix_tokens)
    first, second = slice(num_prefix_tokens, effective, 2), slice(num_prefix_tokens + 1, effective, 2)
    scores = cosine_similarity(metric, first, second)
    return relaxed_top_k(scores, r, tau1=tau1, tau2=tau2, candidates=candidates)


def relaxed_apply(
    assignment: Tensor, x: Tensor, size: Tensor, effective: int, num_prefix_tokens: int
) -> tuple[Tensor, Tensor, RelaxedMatching]:
    """Hand the assigned parts over and sort the tokens that took part by size, the largest first.

    Tokens of equal size, and most of those that gave nothing are, come in the order that torch.sort leaves them in: a
    stable order would be the same on every device, but not that of the published training.
    """
    p, n = num_prefix_tokens, x.shape[1]
    prefix, (xa, xb), rest = _split(x, p, effective)
    size_prefix, (size_a, size_b), size_rest = _split(size, p, effective)
    given = assignment * size_a.unsqueeze(2)  # (B, |A|, |B|)
    grown = size_b + given.sum(dim=1)
    shares = (given / grown.unsqueeze(1)).transpose(1, 2).to(x.dtype)
    xb = torch.baddbmm(xb * (size_b / grown).unsqueeze(2).to(x.dtype), shares, xa)
    stay = 1 - assignment.sum(dim=2)
    stay = stay + (stay.clamp(0, 1) - stay).detach()  # the value is clamped, the gradient is not
    sizes = torch.cat([size_a * stay, grown], dim=1)
    numbers = torch.arange(n, device=x.device).expand(x.shape[0], -1)
    order = torch.cat([numbers[:, :p], sizes.argsort(dim=1, descending=True) + p, numbers[:, effective:]], dim=1)
    x = take(torch.cat([prefix, xa, xb, rest], dim=1), order)
    size = torch.cat([size_prefix, sizes, size_rest], dim=1).gather(1, order)
    _, (even, odd), _ = _split(numbers, p, effective)
    positions = torch.cat([numbers[:, :p], even, odd, numbers[:, effective:]], dim=1)
    return x, size, RelaxedMatching(assignment, positions.gather(1, order), p, effective)


def relaxed_merge(
    x: Tensor,
    size: Tensor,
    metric: Tensor,
    r: int,
    effective: int,
    *,
    num_prefix_tokens: int = 1,
    tau1: float = 0.1,
    tau2: float = 0.1,
    candidates: int = 3,
) -> tuple[Tensor, Tensor, int]:
    """Merge r tokens softly: all N stay, but r tokens' worth of size moves into others.

    Args:
        x: (B, N, C) tokens.
        size: (B, N) float32 sizes.
        metric: (B, N, E) what tokens are compared by, by cosine.
        r: Tokens to merge; at most half of the effective ones after the prefix are.
        effective: Number of active tokens, prefix included: N at first.
        num_prefix_tokens: Leading tokens that take no part.
        tau1: Temperature of the similarities.
        tau2: Temperature of the choice of pairs.
        candidates: Partners considered for each token.

    Returns:
        Tokens (B, N, C) and sizes (B, N), the effective ones sorted by size, and the new effective count.

    Raises:
        ValueError: A temperature is not positive, or a count is out of range.

    Source: DTEM (arXiv 2412.10569), section 3.2.
    """
    check_counts(0, r=r, num_prefix_tokens=num_prefix_tokens)
    check_counts(candidates=candidates)
    check_positive(tau1=tau1, tau2=tau2)
    if not 0 <= effective <= x.shape[1]:
        raise ValueError(f"effective must be between 0 and the {x.shape[1]} tokens, got {effective}")
    r = mergeable(r, effective, num_prefix_tokens)
    if not r:
        return x, size, effective
    options: dict[str, Any] = {"tau1": tau1, "tau2": tau2, "candidates": candidates}
    assignment = relaxed_match(metric, r, effective, num_prefix_tokens=num_prefix_tokens, **options)
    x, size, _ = relaxed_apply(assignment, x, size, effective, num_prefix_tokens)
    return x, size, effective - r


def relaxed_unmerge(matching: RelaxedMatching, x: Tensor) -> Tensor:
    """Give every token of before the merge its mixture of the tokens it went to: (B, N, C) -> (B, N, C)."""
    assignment, order, p, effective = matching
    prefix, (xa, xb), rest = _split(take(x, order.argsort(dim=1)), p, effective)
    kept = (1 - assignment.sum(dim=2, keepdim=True)).to(x.dtype)
    mixed = torch.baddbmm(xa * kept, assignment.to(x.dtype), xb)
    return torch.cat([prefix, _interleave(mixed, xb), rest], dim=1)


def _split(x: Tensor, p: int, effective: int) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """The prefix of x (B, N, ...), the tokens of A and B, the rest; as slices, each would have a gradient like x."""
    pairs = (effective - p) // 2
    parts = x.split_with_sizes((p, 2 * pairs, (effective - p) % 2, x.shape[1] - effective), 1)
    a, b = parts[1].view(x.shape[0], pairs, 2, *x.shape[2:]).unbind(2)
    return parts[0], (torch.cat([a, parts[2]], dim=1) if parts[2].shape[1] else a, b), parts[3]


def _interleave(a: Tensor, b: Tensor) -> Tensor:
    pairs = torch.stack([a[:, : b.shape[1]], b], dim=2).flatten(1, 2)  # a has as many rows as b, or one more
    return torch.cat([pairs, a[:, b.shape[1] :]], dim=1)
