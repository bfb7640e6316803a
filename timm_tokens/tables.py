"""Tables: Markdown to read, and CSV files to compute with."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from timm_tokens.files import replacing


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]], formats: Sequence[str] = ()) -> str:
    """A Markdown table; None leaves a cell empty.

    Args:
        head: Names of the columns.
        rows: A value for each column.
        formats: How the values of each column are written, as `format` takes it; empty for text.
    """
    formats = formats or [""] * len(head)
    cells = [["" if x is None else format(x, kind) for x, kind in zip(row, formats, strict=True)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(head), ["---"] * len(head), *cells])


def write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file, whole or not at all; None leaves a cell empty."""
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer: Any = csv.writer(file)
        writer.writerows([head, *rows])
