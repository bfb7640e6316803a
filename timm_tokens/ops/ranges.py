"""Numbers that can't be meant: each function takes arguments as keywords, and its ValueError has name and value."""

import math
from collections.abc import Sequence


def check_counts(least: int = 1, **counts: int) -> None:
    """Refuse counts below `least`."""
    for name, value in counts.items():
        if not value >= least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def check_ints(least: int = 1, **counts: object) -> None:
    """Refuse what is no int, by a TypeError, and ints below `least`."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        check_counts(least, **{name: value})


def check_choices(choices: Sequence[str], **names: str) -> None:
    """Refuse what is none of the choices."""
    for name, value in names.items():
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_positive(**numbers: float) -> None:
    """Refuse what is not a positive number; NaN and infinity are none."""
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive, got {value}")


def check_within(low: float = 0.0, high: float = 1.0, **numbers: float | Sequence[float]) -> None:
    """Refuse numbers, and pairs of them, outside [low, high]."""
    for name, value in numbers.items():
        if not all(low <= part <= high for part in (value if isinstance(value, Sequence) else (value,))):
            raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value}")


def check_not_negative(**numbers: float) -> None:
    """Refuse numbers that are negative or not finite."""
    for name, value in numbers.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must not be negative, got {value}")


def check_spans(low: float = 0.0, high: float = math.inf, **spans: tuple[float, float]) -> None:
    """Refuse ranges that do not lie in (low, high], their lower end first."""
    for name, (first, last) in spans.items():
        if not (low < first <= last <= high and last < math.inf):
            raise ValueError(f"{name} must be a range in ({low:g}, {high:g}], low first, got {(first, last)}")
