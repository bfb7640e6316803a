"""What `timm-tokens bench` measured: a table to print, a file of it, and a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from timm_tokens.tables import markdown, write_csv


class Row(NamedTuple):
    """One line of the table; times are medians over the rounds, memory is the peak in MiB, None if not measured."""

    step: str
    batch: int
    r: int | tuple[int, ...] | None
    tokens: int
    gflops: float
    milliseconds: float
    images_per_second: float
    speed_up: float
    ideal: float | None
    share: float | None
    peak_memory: float | None


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    head = ("step", "batch", "r", "tokens", "GFLOPs", "ms", "images/s", "speed-up", "ideal", "share of ideal",
            "peak MiB")  # fmt: skip
    kinds = ("", "", "", "", ".2f", ".1f", ".1f", ".2f", ".2f", ".2f", ".0f")
    return markdown(head, [(*row[:2], _name(row.r), *row[3:]) for row in rows], kinds)


def _name(r: int | tuple[int, ...] | None) -> str:
    return "base" if r is None else str(r) if isinstance(r, int) else " ".join(map(str, r))


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write bench.csv, and bench.png: the speed-up by r, beside what the FLOPs promise."""
    from timm_tokens.drawing import draw_speed, save  # not above: matplotlib is an extra

    write_csv(folder / "bench.csv", Row._fields, rows)
    lines: dict[str, list[tuple[float, float]]] = {}
    ideal: set[tuple[float, float]] = set()
    for row in rows:
        if isinstance(row.r, int):
            lines.setdefault(f"{row.step}, batch {row.batch}", []).append((row.r, row.speed_up))
            ideal |= {(row.r, row.ideal)} if row.ideal else set()
    save(draw_speed(lines, sorted(ideal)), folder / "bench.png")
