"""What `timm-tokens fewshot` measured: a table to print, a file of it, and a plot."""

import csv
from collections.abc import Sequence
from pathlib import Path

from timm_tokens.fewshot import Comparison
from timm_tokens.files import replacing


def table(results: Sequence[Comparison]) -> str:
    """Accuracies in percent with their 95 % intervals, as Markdown."""
    lines = ["| shots | classifier | accuracy | with ESFR | gain |", "|---|---|---|---|---|"]
    lines += [f"| {r.shots} | {r.classifier} | {r.plain} | {r.adapted} | {r.gain} |" for r in results]
    return "\n".join(lines)


def write_csv(path: Path, results: Sequence[Comparison]) -> None:
    """Accuracies as fractions, with half the widths of their 95 % intervals."""
    kinds = ("plain", "adapted", "gain")
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["shots", "classifier", *(f"{kind}{suffix}" for kind in kinds for suffix in ("", "_ci95"))])
        writer.writerows([r.shots, r.classifier, *r.plain, *r.adapted, *r.gain] for r in results)


def draw(path: Path, results: Sequence[Comparison]) -> None:
    """Bars with 95 % intervals: every classifier without and with ESFR, one panel for each number of shots."""
    from timm_tokens.drawing import draw_bars, save  # not above: matplotlib is an extra

    panels: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    for r in sorted(results, key=lambda r: r.shots):
        bars = {"without ESFR": r.plain, "with ESFR": r.adapted}
        bars = {name: (100 * value.mean, 100 * value.half_width) for name, value in bars.items()}
        panels.setdefault(f"{r.shots} shot" + "s" * (r.shots > 1), {})[r.classifier] = bars
    save(draw_bars(panels, "accuracy (%)"), path)
