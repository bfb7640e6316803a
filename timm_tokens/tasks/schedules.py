"""Values that change with the step, as pure functions of it."""

import math


def cosine(start: float, end: float, step: int, total_steps: int) -> float:
    """From `start` at step 0 along half a cosine to `end` at the last step, total_steps - 1, and after."""
    return end + (start - end) * (1 + math.cos(math.pi * _share(step, total_steps))) / 2


def linear(start: float, end: float, step: int, total_steps: int) -> float:
    """From `start` at step 0 along a line to `end` at the last step, total_steps - 1, and after. For warm-ups."""
    return start + (end - start) * _share(step, total_steps)


def over_the_run(name: str, values: tuple[float, float]) -> list[str]:
    """A line for `TokenTask.bound_to_length` about what changes from the run's start to its end; none if it doesn't."""
    start, end = values
    return [] if start == end else [f"the {name} goes from {start:.6g} at its start to {end:.6g} at its end"]


def _share(step: int, total_steps: int) -> float:
    return min(step / (total_steps - 1), 1.0) if total_steps > 1 else 1.0
