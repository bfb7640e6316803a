"""What `timm-tokens probe` measured: a table to print, files of it, and what they say."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from timm_tokens.cli.common.features import Source
from timm_tokens.cli.probe.protocol import Evaluation
from timm_tokens.files import replacing
from timm_tokens.probing import LinearResult
from timm_tokens.probing.protocols import PROTOCOLS
from timm_tokens.tables import markdown, write_csv


class Report(NamedTuple):
    """What was measured."""

    images: tuple[int, int]  # to train on, and to validate on
    knn: dict[int, float]  # accuracy by number of neighbours
    linear: LinearResult
    nmi: list[float] | None = None  # by the first token, the first two, and so on; None without a run of MTE
    tokens: tuple[str, ...] = ()  # their names
    notes: Sequence[str] = ()  # lines about images that were left out


def table(report: Report) -> str:
    """All numbers in percent, as Markdown."""
    rows = [(f"{k} nearest neighbours", f"{accuracy:.2%}") for k, accuracy in report.knn.items()]
    rows += [(f"linear classifier, learning rate {report.linear.lr:g}", f"{report.linear.accuracy:.2%}")]
    for count, nmi in enumerate(report.nmi or (), start=1):
        names = report.tokens[0] if count == 1 else f"{report.tokens[0]} to {report.tokens[count - 1]}"
        rows.append((f"NMI of prototypes, {names}", f"{nmi:.4f}"))
    return markdown(("measure", "value"), rows)


def write(out: Path, source: Source, report: Report, plot: bool) -> None:
    """Write probe.csv, and report.md, which shows the plot if there is one."""
    rows: list[tuple[str, float, float]] = [("knn", k, value) for k, value in report.knn.items()]
    rows += [("linear", report.linear.lr, report.linear.accuracy)]
    rows += [("linear held out", lr, value) for lr, value in report.linear.held_out.items()]
    rows += [("nmi", count, value) for count, value in enumerate(report.nmi or (), start=1)]
    write_csv(out / "probe.csv", ("measure", "setting", "value"), rows)
    how = f" of features of {report.images[0]} training images, on which everything was fitted."
    words = "These are features of centre crops, computed once: the linear accuracy is not comparable with published "
    words += "figures, which take crops that are augmented in each epoch (`--protocol dino`, `ibot`, `moby` or `mira`)."
    figure = ["![k-NN, the linear classifier and prototypes](probe.png)"] if plot else []
    _write_report(out, source, report, how, table(report), words, *figure)


def _write_report(out: Path, source: Source, found: Report | Evaluation, how: str, *parts: str) -> None:
    """Write report.md: which model was measured, `how`, and on what."""
    val = found.images[1]
    lines = [
        f"# {source.about['model']}",
        f"Top-1 accuracy on {val} images (standard error up to {50 / val**0.5:.1f} points){how}",
        f"Weights: {source.weights}; tokens merged in each block: {source.about['merge_r']}.",
        *found.notes,
        *parts,
    ]
    with replacing(out / "report.md") as partial:
        partial.write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def draw(path: Path, report: Report) -> None:
    """Draw the accuracies and the NMI, in percent."""
    from timm_tokens.drawing import draw_probe, save  # not above: matplotlib is an extra

    linear = report.linear
    held_out = {lr: 100 * accuracy for lr, accuracy in linear.held_out.items()}
    nmi = {name: 100 * value for name, value in zip(report.tokens, report.nmi or (), strict=False)}
    knn = {k: 100 * accuracy for k, accuracy in report.knn.items()}
    save(draw_probe(knn, held_out, (linear.lr, 100 * linear.accuracy), nmi), path)


def protocol_table(found: Evaluation) -> str:
    """The best learning rate and epoch, which the validation images chose, as Markdown, and what it is."""
    lr, epoch, value = found.best()
    last = len(found.accuracy[lr])
    rows = [(f"best: learning rate {lr:g}, after epoch {epoch}", f"{value:.2%}")]
    rows += [(f"the same rate after the last epoch, {last}", f"{found.accuracy[lr][-1]:.2%}")]
    words = f"Linear evaluation of {found.name} ({PROTOCOLS[found.name].source}), on {found.features}. As published, "
    words += "the validation images choose the rate and the epoch."
    return f"{words}\n\n{markdown(('linear classifier', 'top-1'), rows)}"


def write_protocol(out: Path, source: Source, found: Evaluation) -> None:
    """Write probe.csv, a row for each learning rate and epoch, and report.md."""
    rows = [(lr, epoch, value) for lr, values in found.accuracy.items() for epoch, value in enumerate(values, start=1)]
    write_csv(out / "probe.csv", ("lr", "epoch", "top1"), rows)
    _write_report(out, source, found, f", {found.images[0]} training images.", protocol_table(found))
