"""Bipartite soft matching: fewer tokens by merging the most similar ones (ToMe, arXiv 2210.09461, section 3).

Everything is a gather, a scatter-sum and a division over shapes known beforehand, so that it compiles, exports and
never waits for the device. Shapes: B images, N tokens, P prefix tokens, C channels, E embedding width, R merged tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Matching(NamedTuple):
    """Which tokens stay and where the others go.

    Attributes:
        order: (B, N) int64, the input position of each token: first the N - R that stay, in the order of the output
            (prefix, even positions, odd positions), then the R that are merged away.
        destination: (B, R) int64, where in the output each of those is merged into.
    """

    order: Tensor
    destination: Tensor

    def kept(self) -> Tensor:
        """(B, N - R) int64: the input position of each output token."""
        return self.order[:, : self.order.shape[1] - self.destination.shape[1]]

    def position(self) -> Tensor:
        """(B, N) int64: the output position that holds each input token."""
        b, left = self.kept().shape
        slots = torch.arange(left, device=self.order.device).expand(b, -1)
        return torch.empty_like(self.order).scatter(1, self.order, torch.cat([slots, self.destination], dim=1))


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
    device = metric.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # asking about meta tensors is an error
        with torch.autocast(device, enabled=False):
            return torch.bmm(metric[:, first], metric[:, second].transpose(1, 2))
    return torch.bmm(metric[:, first], metric[:, second].transpose(1, 2))


def bipartite_match(metric: Tensor, r: int, num_prefix_tokens: int = 1) -> Matching:
    """Match each token at an even position with its most similar one at an odd position, and merge the r best pairs.

    Args:
        metric: (B, N, E) what tokens are compared by; compared by cosine, in float32.
        r: tokens to remove; at most half of the tokens after the prefix are.
        num_prefix_tokens: leading tokens (class, registers, distillation) that neither merge nor are merged into.

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
    b, n = metric.shape[:2]
    r = mergeable(r, n, num_prefix_tokens)
    even, odd = split_positions(num_prefix_tokens)
    positions = torch.arange(n, device=metric.device).expand(b, -1)
    if not r:
        order = torch.cat([positions[:, :num_prefix_tokens], positions[:, even::2], positions[:, odd::2]], dim=1)
        return Matching(order, order[:, :0])
    similarity = cosine_similarity(metric, slice(even, None, 2), slice(odd, None, 2))  # (B, |A|, |B|)
    best, partner = similarity.max(dim=-1)
    ranked = best.argsort(dim=-1, descending=True)  # ONNX has no stable sort
    evens = positions[:, even::2].gather(1, ranked)
    stay = evens[:, r:].sort(dim=-1).values
    order = torch.cat([positions[:, :num_prefix_tokens], stay, positions[:, odd::2], evens[:, :r]], dim=1)
    first_odd = num_prefix_tokens + stay.shape[1]  # where B begins in the output
    return Matching(order, first_odd + partner.gather(1, ranked[:, :r]))


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, N, ...) by index (B, M) -> (B, M, ...).

    One index_select over the flattened batch copies whole rows; a gather would look each element up (13 times slower
    for 384 channels on a CPU).
    """
    return x.flatten(0, 1).index_select(0, flat_rows(index, x.shape[1])).unflatten(0, index.shape)


def flat_rows(index: Tensor, n: int) -> Tensor:
    """Indices (B, M) into n tokens of each image as indices (B * M,) into the flattened batch."""
    if index.shape[0] == 1:  # a single image waits for every small operation
        return index.flatten()
    return (index + torch.arange(0, index.shape[0] * n, n, device=index.device).unsqueeze(1)).flatten()


def merge(matching: Matching, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Merge tokens by their size-weighted mean; sizes add up.

    Args:
        matching: From `bipartite_match`.
        x: (B, N, C) tokens.
        size: (B, N) float32, how many patches each token stands for; None: one each.

    Returns:
        Tokens (B, N - R, C) in the order prefix, unmerged A, B; and their sizes (B, N - R) float32.

    Source: ToMe (arXiv 2210.09461), section 3.
    """
    order, destination = matching
    left = order.shape[1] - destination.shape[1]
    size = torch.ones(x.shape[:2], device=x.device) if size is None else size.gather(1, order)
    gone_size = size[:, left:]
    new_size = size[:, :left].scatter_add(1, destination, gone_size)
    # The weighted mean as a step from the destination towards what it takes in: x_d + sum of share * (x_s - x_d). So
    # all rows are copied once, and nothing exceeds the tokens in half precision.
    share = (gone_size / new_size.gather(1, destination)).to(x.dtype).unsqueeze(2)
    kept = take(x, order[:, :left])
    step = (take(x, order[:, left:]) - take(kept, destination)) * share  # (B, R, C)
    return _add_rows(kept, destination, step), new_size


def _add_rows(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """x (B, N, C), which may be overwritten, with rows (B, R, C) added to its rows index (B, R)."""
    if x.is_cpu and not torch.compiler.is_compiling():
        flat = x.flatten(0, 1).index_add_(0, flat_rows(index, x.shape[1]), rows.flatten(0, 1))
        return flat.view(x.shape)
    # A small matrix product: deterministic, where a GPU that adds rows in any order is not (and inductor of torch 2.6
    # gets that wrong).
    into = x.new_zeros(*x.shape[:2], index.shape[1]).scatter(1, index.unsqueeze(1), 1.0)
    return x + torch.bmm(into, rows)  # torch 2.6 exports no baddbmm to ONNX


def unmerge(matching: Matching, x: Tensor) -> Tensor:
    """Give every token of before the merge its group's token: (B, N - R, C) -> (B, N, C)."""
    return take(x, matching.position())
