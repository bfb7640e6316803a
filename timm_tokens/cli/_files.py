"""Writing files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; on success it takes the place of `path`, on failure it vanishes.

    with replacing(path) as partial:
        image.save(partial)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")  # the suffix decides how pictures are written
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
