"""What `timm-tokens fewshot` measured: a table to print, a file of it, and a plot."""

from collections.abc import Sequence
from pathlib import Path

from timm_tokens.fewshot import Comparison, Interval
from timm_tokens.tables import markdown, write_csv


def table(results: Sequence[Comparison]) -> str:
    """Accuracies in percent with their 95 % intervals, as Markdown."""
    rows = [(r.shots, r.classifier, *map(str, (r.plain, r.adapted, r.gain))) for r in results]
    return markdown(("shots", "classifier", "accuracy", "with ESFR", "gain"), rows)


def write(path: Path, results: Sequence[Comparison]) -> None:
    """Write a CSV file of accuracies as fractions, with the half-widths of their 95 % intervals."""
    head = ["shots", "classifier", *(f"{kind}{end}" for kind in ("plain", "adapted", "gain") for end in ("", "_ci95"))]
    write_csv(path, head, [(r.shots, r.classifier, *r.plain, *r.adapted, *r.gain) for r in results])


def methods(results: Sequence[Comparison]) -> str:
    """The same as papers have it, as Markdown: a row for each method, a column for each number of shots."""
    shots, rows = _by_method(results)
    cells = [(name, *(str(row[n]) for n in shots)) for name, row in rows.items()]
    return markdown(("method", *(f"{n}-shot" for n in shots)), cells)


def write_methods(path: Path, results: Sequence[Comparison]) -> None:
    """Write that table to a CSV file: in percent, with the half-widths of the 95 % intervals."""
    shots, rows = _by_method(results)
    head = ["method", *(f"{n}-shot{end}" for n in shots for end in ("", "_ci95"))]
    write_csv(path, head, [(name, *(100 * x for n in shots for x in row[n])) for name, row in rows.items()])


def _by_method(results: Sequence[Comparison]) -> tuple[list[int], dict[str, dict[int, Interval]]]:
    rows: dict[str, dict[int, Interval]] = {}
    for r in results:
        rows.setdefault(r.classifier, {})[r.shots] = r.plain
        rows.setdefault(f"{r.classifier} + ESFR", {})[r.shots] = r.adapted
    return sorted({r.shots for r in results}), rows


def draw(path: Path, results: Sequence[Comparison]) -> None:
    """Bars with 95 % intervals: every classifier without and with ESFR, one panel for each number of shots."""
    from timm_tokens.drawing import draw_bars, save  # not above: matplotlib is an extra

    panels: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    for r in sorted(results, key=lambda r: r.shots):
        found = {"without ESFR": r.plain, "with ESFR": r.adapted}
        bars = {name: (100 * value.mean, 100 * value.half_width) for name, value in found.items()}
        panels.setdefault(f"{r.shots} shot" + "s" * (r.shots > 1), {})[r.classifier] = bars
    save(draw_bars(panels, "accuracy (%)"), path)
