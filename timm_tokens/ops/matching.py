"""Bipartite soft matching: fewer tokens by merging the most similar ones (ToMe, arXiv 2210.09461, section 3).

Everything is a gather, a scatter-sum and a division over shapes known beforehand, so that it compiles, exports and
never waits for the device.

Shapes: B images, N tokens, P prefix tokens, C channels, E embedding dimension, R merged tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Matching(NamedTuple):
    """Which tokens stay and where the others go.

    Attributes:
        rows: (B, N) int64, where each token stands among the B * N of the whole batch: first the N - R that stay, in
            the order of the output (prefix, even positions, odd positions), then the R that are merged away.
        into: (B, R) int64, which of the tokens at odd positions, counted from 0, each of those is merged into.
        first_odd: Where in the output the tokens at odd positions begin.
    """

    rows: Tensor
    into: Tensor
    first_odd: int

    @property
    def order(self) -> Tensor:
        """(B, N) int64: the position in its image of each token, in the order of `rows`."""
        return self.rows % self.rows.shape[1]

    @property
    def destination(self) -> Tensor:
        """(B, R) int64: the output position that each of the merged tokens goes to."""
        return self.into + self.first_odd

    def kept(self) -> Tensor:
        """(B, N - R) int64: the input position of each output token."""
        n = self.rows.shape[1]  # torch 2.6 does not compile properties of a NamedTuple
        return self.rows[:, : n - self.into.shape[1]] % n

    def position(self) -> Tensor:
        """(B, N) int64: the output position that holds each input token."""
        b, n = self.rows.shape
        slots = torch.arange(n - self.into.shape[1], device=self.rows.device).expand(b, -1)
        slots = torch.cat([slots, self.into + self.first_odd], dim=1)
        return torch.empty_like(self.rows).scatter(1, self.rows % n, slots)


def mergeable(r: int, num_tokens: int, num_prefix_tokens: int) -> int:
    """How many of the r tokens asked for can be merged in one step: at most half of those that are no prefix."""
    return max(min(r, (num_tokens - num_prefix_tokens) // 2), 0)


def split_positions(num_prefix_tokens: int) -> tuple[int, int]:
    """The first even and the first odd position after the prefix: where the sets A (even) and B (odd) begin."""
    even = num_prefix_tokens + num_prefix_tokens % 2
    odd = num_prefix_tokens + 1 - num_prefix_tokens % 2
    return even, odd


def cosine_similarity(metric: Tensor, first: slice, second: slice) -> Tensor:
    """Cosines between two sets of tokens of metric (B, N, E) -> (B, |A|, |B|), in float32 also where autocast is on."""
    metric = metric.float()
    # what F.normalize computes, in half the time for the few small tensors here
    metric = metric / torch.linalg.vector_norm(metric, dim=-1, keepdim=True).clamp_min(1e-12)
    a, b = metric[:, first], metric[:, second].mT
    device = metric.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # asking about meta tensors is an error
        with torch.autocast(device, enabled=False):
            return torch.bmm(a, b)
    return torch.bmm(a, b)


def bipartite_match(metric: Tensor, r: int, num_prefix_tokens: int = 1, numbers: Tensor | None = None) -> Matching:
    """Match each token at an even position with its most similar one at an odd position, and merge the r best pairs.

    Of equally similar tokens the first is taken, on every device; an exported model leaves that to what runs it.

    Args:
        metric: (B, N, E) what tokens are compared by; compared by cosine, in float32.
        r: Tokens to remove; at most half of the tokens after the prefix are.
        num_prefix_tokens: Leading tokens (class, registers, distillation) that neither merge nor are merged into.
        numbers: int64, 0 to B * N - 1 or further; a model makes them once for all its blocks. None: they are made here.

    Returns:
        The matching, for `merge` and `unmerge`.

    Raises:
        ValueError: If metric is not three-dimensional, or r or num_prefix_tokens is negative.

    Source: ToMe (arXiv 2210.09461), section 3, steps 1 to 5.
    """
    if metric.ndim != 3:
        raise ValueError(f"metric must have shape (B, N, E), got {tuple(metric.shape)}")
    if r < 0 or num_prefix_tokens < 0:
        raise ValueError(f"r and num_prefix_tokens must not be negative, got r={r}, {num_prefix_tokens=}")
    b, n, _ = metric.shape
    r = mergeable(r, n, num_prefix_tokens)
    even, odd = split_positions(num_prefix_tokens)
    rows = (torch.arange(b * n, device=metric.device) if numbers is None else numbers[: b * n]).view(b, n)
    stay, odds, gone = rows[:, even::2], rows[:, odd::2], rows[:, :0]
    left, into = stay.shape[1] - r, gone
    if r:
        best, partner = cosine_similarity(metric, slice(even, None, 2), slice(odd, None, 2)).max(-1)
        ranked = _rank(best)
        gone, stay = stay.gather(1, ranked).split_with_sizes((r, left), 1)
        into, stay = partner.gather(1, ranked)[:, :r], stay.sort(1)[0]
    return Matching(torch.cat([rows[:, :num_prefix_tokens], stay, odds, gone], 1), into, num_prefix_tokens + left)


def _rank(scores: Tensor) -> Tensor:
    """Indices (B, N) of the scores, the highest first; equal ones stay in their order."""
    exporting = torch.compiler.is_compiling() and (
        not torch.compiler.is_dynamo_compiling() or torch.onnx.is_in_onnx_export()
    )
    if exporting:  # ONNX can't be asked for a stable sort; ONNX Runtime has no other
        return scores.argsort(dim=-1, descending=True)
    return scores.argsort(dim=-1, descending=True, stable=True)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, N, ...) by index (B, M) -> (B, M, ...)."""
    return take_rows(x, flat_rows(index, x.shape[1]))


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x (B, N, ...) by their number in the whole batch (B, M) -> (B, M, ...).

    One index_select over the flattened batch copies whole rows; a gather would look each element up (13 times slower
    for 384 channels on a CPU).
    """
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, *x.shape[2:])


def flat_rows(index: Tensor, n: int) -> Tensor:
    """Indices (B, M) into n tokens of each image as rows (B, M) of the flattened batch."""
    return index + torch.arange(0, index.shape[0] * n, n, device=index.device).unsqueeze(1)


def merge(matching: Matching, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Merge tokens by their size-weighted mean; sizes add up.

    A GPU adds several float32 tokens to one in any order, unless torch.use_deterministic_algorithms(True) is set.

    Args:
        matching: From `bipartite_match`.
        x: (B, N, C) tokens.
        size: (B, N) float32, how many patches each token stands for; None: one each.

    Returns:
        Tokens (B, N - R, C) in the order prefix, unmerged A, B; and their sizes (B, N - R) float32.

    Source: ToMe (arXiv 2210.09461), section 3.
    """
    rows, into, first_odd = matching
    left = rows.shape[1] - into.shape[1]
    x = take_rows(x, rows)
    sizes = torch.ones(rows.shape, device=x.device) if size is None else size.take(rows)
    if torch.compiler.is_compiling() or x.element_size() < 4:
        return _merge_by_product(x, sizes, into + first_odd)
    # at batch size 1 each operation counts, and at larger ones the memory that it goes through: sums are made in place,
    # and divided in the end
    if size is not None:
        x *= sizes.unsqueeze(2)
        sizes = sizes.clone() if x.requires_grad else sizes  # autograd keeps the factors
    x, moved, sizes, weights = x[:, :left], x[:, left:], sizes[:, :left], sizes[:, left:]
    x[:, first_odd:].scatter_add_(1, into.unsqueeze(2).expand(moved.shape), moved)
    sizes[:, first_odd:].scatter_add_(1, into, weights)
    return x / sizes.unsqueeze(2), sizes


def _merge_by_product(x: Tensor, sizes: Tensor, to: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens x (B, N, C) of sizes (B, N), of which the last go to the others that `to` (B, R) names, as one product.

    Compiled, this is two passes over the tokens (inductor of torch 2.6 scatters wrong sums, and ONNX is slow at
    changing slices in place). In half precision it is added up in float32 without a copy of all tokens.
    """
    left = x.shape[1] - to.shape[1]
    kept, weights = sizes[:, :left], sizes[:, left:]
    sizes = kept.scatter_add(1, to, weights)
    shares = (weights / sizes.gather(1, to)).to(x.dtype).unsqueeze(1)
    given = torch.bmm(x.new_zeros(x.shape[0], left, to.shape[1]).scatter(1, to.unsqueeze(1), shares), x[:, left:])
    given = given.to(x.dtype)  # autocast may have another
    x, share = x[:, :left], (kept / sizes).to(x.dtype).unsqueeze(2)
    if torch.compiler.is_compiling():  # torch 2.6 can't export addcmul of shapes that are not known
        return given + x * share, sizes
    return torch.addcmul(given, x, share), sizes


def unmerge(matching: Matching, x: Tensor) -> Tensor:
    """Give every token of before the merge its group's token: (B, N - R, C) -> (B, N, C)."""
    return take(x, matching.position())
