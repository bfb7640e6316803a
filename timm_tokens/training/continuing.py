"""What may change between a run and its continuation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_LENGTH = {"epochs", "steps"}


def check_same(folder: Path, found: dict[str, Any], wanted: dict[str, Any], bound: Sequence[str] = ()) -> None:
    """Refuse to continue a run with other settings than it was started with. Its length may change where nothing that
    it has done depended on that.

    Args:
        folder: The run's.
        found, wanted: Its settings, and those to continue it with.
        bound: What is scheduled over the whole length of the run, each in words.

    Raises:
        ValueError: Names each setting that differs, and what is scheduled.
    """
    odd = {name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)}
    if not odd or (odd <= _LENGTH and not bound):
        return
    changes = ", ".join(f"{name} {found.get(name)} -> {wanted.get(name)}" for name in sorted(odd))
    if not odd <= _LENGTH:
        raise ValueError(f"the run in {folder} was started with other settings ({changes}): use those, or another out")
    raise ValueError(
        f"the run in {folder} can't get another length ({changes}): {', and '.join(bound)}. Keep its length, or take "
        "another out"
    )
