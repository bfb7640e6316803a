"""How many tokens to merge in each block."""

from collections.abc import Sequence

from timm_tokens.ops.matching import mergeable
from timm_tokens.ops.ranges import check_counts


def schedule(r: int | Sequence[int] | tuple[int, float], depth: int) -> tuple[int, ...]:
    """Tokens to merge in each block.

    Args:
        r: One number for every block; or (number, inflection), from 2 * number in the first block down to 0 in the last
            at inflection -1, constant at 0, and the reverse at 1 (the inflection must be a float, or -1); or one number
            per block, padded with 0 at the end.
        depth: How many blocks there are.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If a number is negative, the depth is not positive, the inflection is outside [-1, 1], or there are
            more numbers than blocks.

    Source: the constant and the linear schedules of ToMe (arXiv 2210.09461), section 4.3 and appendix D.
    """
    check_counts(depth=depth)
    if isinstance(r, Sequence) and not isinstance(r, str):
        if len(r) == 2 and (isinstance(r[1], float) or r[1] == -1):
            return _inflected(_count(r[0]), r[1], depth)
        counts = tuple(_count(value) for value in r)
        if len(counts) > depth:
            raise ValueError(f"r has {len(counts)} numbers for {depth} blocks; give at most one per block, got r={r}")
        return counts + (0,) * (depth - len(counts))
    return (_count(r),) * depth


def token_counts(schedule: Sequence[int], num_tokens: int, num_prefix_tokens: int) -> list[int]:
    """Tokens (prefix included) before the first block and after each block that merges schedule[block] of them."""
    counts = [num_tokens]
    for r in schedule:
        counts.append(counts[-1] - mergeable(r, counts[-1], num_prefix_tokens))
    return counts


def _inflected(r: int, inflection: float, depth: int) -> tuple[int, ...]:
    if not -1 <= inflection <= 1:
        raise ValueError(f"the inflection of r=(number, inflection) must lie in [-1, 1], got {inflection}")
    first = int(r * (1 - inflection))
    step = (2 * r - 2 * first) / max(depth - 1, 1)
    return tuple(int(first + step * block) for block in range(depth))


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"r must be an int, a pair (int, float inflection) or a sequence of ints, got {value!r}")
    if value < 0:
        raise ValueError(f"r counts the tokens to merge in a block and must not be negative, got {value}")
    return value
