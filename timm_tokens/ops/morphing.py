"""Token morphing: tokens that belong together are replaced by their mean (DTM, arXiv 2401.00254).

Which tokens belong together is found in rounds of bipartite matching. A round compares the current tokens, each the
mean of its members, by cosine. A cosine does not see lengths, so sums serve as well as means, and every cosine of sums
is in the Gram matrix of the tokens, where to merge one token into another is to add its row and column to the other's.
So the rounds never touch the features, which are averaged once, at the end.

Shapes: B images, N tokens, P prefix tokens, C channels, G groups, R merged tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from timm_tokens.ops.matching import flat_rows, split_positions, take
from timm_tokens.ops.precision import at_least_float32
from timm_tokens.ops.ranges import check_counts


def draw_morph_rounds(
    num_tokens: int,
    *,
    min_tokens: int = 0,
    max_rounds: int = 14,
    num_prefix_tokens: int = 0,
    generator: torch.Generator | None = None,
) -> tuple[int, ...]:
    """Draw how far to morph: how many tokens each round merges, for `morph_groups`.

    The number of tokens to end with is uniform in {min_tokens, ..., N - P}, the number of rounds in
    {1, ..., max_rounds}. The rounds share the merges equally and the last takes the remainder; but as a round merges
    at most half of the tokens, few rounds may end with more tokens than drawn.

    Args:
        num_tokens: N, the prefix included.
        min_tokens: Fewest tokens to end with, the prefix not counted.
        max_rounds: Most rounds.
        num_prefix_tokens: P, leading tokens that never merge.
        generator: On the CPU, because the draw gives Python ints and one on a device would have to be waited for.

    Raises:
        ValueError: If min_tokens is not between 0 and N - P, or max_rounds is not positive.

    Source: DTM (arXiv 2401.00254), dynamic scheduling.
    """
    check_counts(num_tokens=num_tokens)
    if not 0 <= num_prefix_tokens <= num_tokens:
        raise ValueError(f"num_prefix_tokens must be between 0 and the {num_tokens} tokens, got {num_prefix_tokens}")
    left = num_tokens - num_prefix_tokens
    if not 0 <= min_tokens <= left:
        raise ValueError(f"min_tokens must be between 0 and the {left} tokens that may merge, got {min_tokens}")
    check_counts(max_rounds=max_rounds)
    surplus = left - int(torch.randint(min_tokens, left + 1, (), generator=generator))
    count = int(torch.randint(1, max_rounds + 1, (), generator=generator))
    share = surplus // count
    rounds = []
    for wanted in [share] * (count - 1) + [surplus - share * (count - 1)]:
        rounds.append(min(wanted, left // 2))
        left -= rounds[-1]
    return tuple(rounds)


def morph_groups(target: Tensor, rounds: Sequence[int], *, num_prefix_tokens: int = 0) -> Tensor:
    """Group the tokens of each image by rounds of bipartite matching on their means.

    In each round every token at an even position finds the most similar one at an odd position, and the best pairs
    merge. The order between rounds is prefix, unmerged even, odd; groups are numbered in the order after the last.

    Args:
        target: (B, N, C) tokens to compare by cosine: the teacher's.
        rounds: R of each round; 0 merges nothing and keeps the order. From `draw_morph_rounds`.
        num_prefix_tokens: P, leading tokens that stay alone.

    Returns:
        (B, N) int64, the group of each token, in {0, ..., N - sum(rounds) - 1}, each with at least one token.

    Raises:
        TypeError: If rounds is no sequence of ints, or target is not floating-point.
        ValueError: If target is not three-dimensional, P is not between 0 and N, or a round is negative or merges more
            than half of the tokens then left.

    Source: DTM (arXiv 2401.00254), token morphing; the matching is that of ToMe (arXiv 2210.09461), section 3.
    """
    return groups_of_gram(token_gram(target), rounds, num_prefix_tokens=num_prefix_tokens)


@torch.no_grad()
def token_gram(target: Tensor) -> Tensor:
    """All inner products of the tokens of an image, in float32 at least: (B, N, C) -> (B, N, N)."""
    if target.ndim != 3:
        raise ValueError(f"target must have shape (B, N, C), got {tuple(target.shape)}")
    if not target.is_floating_point():
        raise TypeError(f"target must be floating-point, got {target.dtype}")
    target = at_least_float32(target)
    with torch.autocast(target.device.type, enabled=False):  # half precision would confuse similar tokens
        return target @ target.mT


@torch.no_grad()
def groups_of_gram(gram: Tensor, rounds: Sequence[int], *, num_prefix_tokens: int = 0) -> Tensor:
    """`morph_groups` from `token_gram`, which serves several draws: (B, N, N) -> (B, N) int64."""
    b, n = gram.shape[:2]
    check_rounds(rounds, n, num_prefix_tokens)
    gram = gram.clone()
    positions = torch.arange(n, device=gram.device).expand(b, n)
    home = rows = positions  # the row of the Gram matrix where the group of each patch is, and that of each token left
    first_even, first_odd = split_positions(num_prefix_tokens)
    for r in [r for r in rounds if r]:
        even, odd = rows[:, first_even::2], rows[:, first_odd::2]
        source, destination, unmerged = _match(gram, even, odd, r)
        _add_rows_and_columns(gram, source, destination)
        home = positions.scatter(1, source, destination).gather(1, home)
        rows = torch.cat([rows[:, :num_prefix_tokens], unmerged, odd], dim=1)
    number = torch.zeros_like(home).scatter(1, rows, positions[:, : rows.shape[1]])
    return number.gather(1, home)


def _match(gram: Tensor, even: Tensor, odd: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The R most similar pairs (source of the even rows, destination of the odd ones), and the other even rows."""
    # Sums can cancel to zero, or by rounding to less: then every cosine is 0 or arbitrary, but finite.
    scale = gram.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(gram.dtype).tiny).rsqrt()
    products = take(gram, even).gather(2, odd.unsqueeze(1).expand(-1, even.shape[1], -1))  # (B, |even|, |odd|)
    best, partner = products.mul_(scale.gather(1, odd).unsqueeze(1)).max(dim=2)
    order = best.mul_(scale.gather(1, even)).argsort(dim=1, descending=True, stable=True)
    chosen, rest = order[:, :r], order[:, r:].sort(dim=1).values
    return even.gather(1, chosen), odd.gather(1, partner.gather(1, chosen)), even.gather(1, rest)


def _add_rows_and_columns(gram: Tensor, source: Tensor, destination: Tensor) -> None:
    """Merge in place: the inner products of a sum are sums of inner products."""
    n = gram.shape[1]
    gram.view(-1, n).index_add_(0, flat_rows(destination, n).flatten(), take(gram, source).flatten(0, 1))
    columns = gram.gather(2, source.unsqueeze(1).expand(-1, n, -1))
    gram.scatter_add_(2, destination.unsqueeze(1).expand(-1, n, -1), columns)


def group_sums(x: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """The sum of the tokens of each group: (B, N, C) and (B, N) int64 -> (B, G, C)."""
    b, _, c = x.shape
    sums = x.new_zeros(b * num_groups, c).index_add(0, flat_rows(groups, num_groups).flatten(), x.reshape(-1, c))
    return sums.view(b, num_groups, c)


def group_means(x: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """The mean of the tokens of each group, 0 where there are none: (B, N, C) and (B, N) int64 -> (B, G, C).

    In float32 at least. Differentiable in x.
    """
    sizes = group_sums(torch.ones(*groups.shape, 1, device=x.device), groups, num_groups)  # (B, G, 1)
    return group_sums(at_least_float32(x), groups, num_groups) / sizes.clamp_min(1)


def morph(x: Tensor, groups: Tensor) -> Tensor:
    """Replace each token by the mean of its group. Differentiable in x.

    Args:
        x: (B, N, C) tokens.
        groups: (B, N) int64 in {0, ..., N - 1}, from `morph_groups`.

    Returns:
        (B, N, C), of x's type; averaged in float32 at least.

    Raises:
        ValueError: If the shapes do not fit.
        TypeError: If groups is not int64.

    Source: DTM (arXiv 2401.00254), token morphing.
    """
    if x.ndim != 3 or groups.shape != x.shape[:2]:
        raise ValueError(f"x must be (B, N, C) and groups (B, N), got {tuple(x.shape)} and {tuple(groups.shape)}")
    if groups.dtype != torch.int64:
        raise TypeError(f"groups must be int64, got {groups.dtype}; morph_groups gives them")
    n = x.shape[1]
    return take(group_means(x, groups, n).to(x.dtype), groups)


def check_rounds(rounds: Sequence[int], num_tokens: int, num_prefix_tokens: int) -> None:
    """Refuse rounds that `morph_groups` can't do."""
    if not 0 <= num_prefix_tokens <= num_tokens:
        raise ValueError(f"num_prefix_tokens must be between 0 and the {num_tokens} tokens, got {num_prefix_tokens}")
    if not isinstance(rounds, Sequence) or any(isinstance(r, bool) or not isinstance(r, int) for r in rounds):
        raise TypeError(f"rounds must be a sequence of ints, the tokens to merge in each round, got {rounds!r}")
    left = num_tokens - num_prefix_tokens
    for index, r in enumerate(rounds):
        if not 0 <= r <= left // 2:
            raise ValueError(
                f"rounds[{index}] = {r}: a round merges between 0 and half of the tokens that may merge, which here is "
                f"{left // 2} of {left}; use more rounds to merge more"
            )
        left -= r
