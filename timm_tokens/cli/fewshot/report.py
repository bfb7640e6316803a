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
    """Bars with intervals: every classifier without and with ESFR, one panel for each number of shots."""
    from matplotlib.figure import Figure  # not pyplot, which would need a display and keep state

    shots = sorted({r.shots for r in results})
    figure = Figure(figsize=(1 + 4 * len(shots), 4), layout="constrained")
    for axes, shot in zip(figure.subplots(1, len(shots), squeeze=False)[0], shots, strict=True):
        rows = [r for r in results if r.shots == shot]
        for offset, kind in ((-0.2, "plain"), (0.2, "adapted")):
            values = [getattr(r, kind) for r in rows]
            heights, errors = [100 * v.mean for v in values], [100 * v.half_width for v in values]
            label = "with ESFR" if kind == "adapted" else "without"
            axes.bar([i + offset for i in range(len(rows))], heights, 0.4, yerr=errors, capsize=3, label=label)
        axes.set_xticks(range(len(rows)), [r.classifier.replace("_", "\n") for r in rows])
        axes.set(title=f"{shot}-shot", ylabel="accuracy (%)")
        axes.set_ylim(bottom=max(0, axes.get_ylim()[0], min(100 * r.plain.mean for r in rows) - 15))
    axes.legend()
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150)
