"""Bipartite soft matching: fewer tokens by merging the most similar ones (ToMe, arXiv 2210.09461, section 3).

Everything is a gather, a scatter-sum and a division over shapes known beforehand, so that it compiles, exports and
never waits for the device. Shapes: B images, N tokens, P prefix tokens, C channels, E embedding width, R merged tokens.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Matching(NamedTuple):
    """Which tokens stay and where the others go. Tokens that stay keep the order prefix, even, odd positions.

    Attributes:
        kept: (B, N - R) int64, the input position of each token that stays.
        source: (B, R) int64, the input position of each token that is merged away.
        destination: (B, R) int64, where in the output each of those is merged into.
    """

    kept: Tensor
    source: Tensor
    destination: Tensor

    @property
    def position(self) -> Tensor:
        """(B, N) int64: the output position that holds each input token."""
        b, n = self.kept.shape[0], self.kept.shape[1] + self.source.shape[1]
        slots = torch.arange(self.kept.shape[1], device=self.kept.device).expand(b, -1)
        position = torch.empty((b, n), dtype=torch.int64, device=self.kept.device)
        return position.scatter(1, self.kept, slots).scatter(1, self.source, self.destination)


def mergeable(r: int, num_tokens: int, num_prefix_tokens: int) -> int:
    """How many of the r tokens asked for can be merged in one step: at most half of those that are no prefix."""
    return max(min(r, (num_tokens - num_prefix_tokens) // 2), 0)


def split_positions(num_prefix_tokens: int) -> tuple[int, int]:
    """The first even and the first odd position after the prefix: where the sets A (even) and B (odd) begin."""
    even = num_prefix_tokens + num_prefix_tokens % 2
    odd = num_prefix_tokens + 1 - num_prefix_tokens % 2
    return even, odd


def cosine_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of all pairs, (B, M, E) and (B, N, E) -> (B, M, N), in float32 also where autocast is on."""
    device = a.device.type
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).transpose(1, 2)


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
    similarity = cosine_similarity(metric[:, even::2], metric[:, odd::2])  # (B, |A|, |B|)
    best, partner = similarity.max(dim=-1) if r else (similarity.new_zeros(similarity.shape[:2]), None)
    order = best.argsort(dim=-1, descending=True, stable=True)
    chosen, rest = order[:, :r], order[:, r:].sort(dim=-1).values
    prefix = torch.arange(num_prefix_tokens, device=metric.device).expand(b, -1)
    odds = torch.arange(odd, max(n, odd), 2, device=metric.device).expand(b, -1)
    first_odd = num_prefix_tokens + rest.shape[1]  # where B begins in the output
    return Matching(
        kept=torch.cat([prefix, even + 2 * rest, odds], dim=1),
        source=even + 2 * chosen,
        destination=first_odd + partner.gather(1, chosen) if r else chosen,
    )


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, N, ...) by index (B, M) -> (B, M, ...).

    One index_select over the flattened batch copies whole rows; a gather would look each element up (13 times slower
    for 384 channels on a CPU).
    """
    b, n = x.shape[:2]
    flat = index + n * torch.arange(b, device=x.device).unsqueeze(1)
    return x.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, (b, index.shape[1]))


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
    kept, source, destination = matching
    if size is None:
        size = torch.ones(x.shape[:2], device=x.device)
    source_size, kept_size = size.gather(1, source), size.gather(1, kept)
    new_size = kept_size.scatter_add(1, destination, source_size)
    # A small matrix product adds the merged rows. Unlike a scatter_add of rows it is deterministic on every device, and
    # in half precision it accumulates in float32. Shares, not sums and a division: no intermediate exceeds the tokens.
    slots = torch.arange(kept.shape[1], device=x.device).unsqueeze(1)
    shares = (destination.unsqueeze(1) == slots) * source_size.unsqueeze(1) / new_size.unsqueeze(2)  # (B, N - R, R)
    stay = take(x, kept) * (kept_size / new_size).unsqueeze(2).to(x.dtype)
    return torch.baddbmm(stay, shares.to(x.dtype), take(x, source)), new_size


def unmerge(matching: Matching, x: Tensor) -> Tensor:
    """Give every token of before the merge its group's token: (B, N - R, C) -> (B, N, C)."""
    return take(x, matching.position)
