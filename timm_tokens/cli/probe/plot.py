"""The plot of `timm-tokens probe`."""

from pathlib import Path

from timm_tokens.cli.probe.report import Report
from timm_tokens.files import replacing


def draw(path: Path, report: Report) -> None:
    """Accuracy by neighbours, by learning rate, and NMI by tokens: a panel each."""
    from matplotlib.figure import Figure  # not pyplot, which would need a display and keep state

    panels = 3 if report.nmi else 2
    figure = Figure(figsize=(4.5 * panels, 3.6), layout="constrained")
    axes = figure.subplots(1, panels)
    axes[0].plot(list(report.knn), [100 * value for value in report.knn.values()], "o-")
    axes[0].set(title="k-NN", xlabel="nearest neighbours, k", ylabel="accuracy (%)", xscale="log")
    axes[0].set_xticks(list(report.knn), [str(k) for k in report.knn], minor=False)
    axes[0].minorticks_off()
    held_out = report.linear.held_out
    axes[1].plot(list(held_out), [100 * value for value in held_out.values()], "o-", label="held-out training images")
    axes[1].plot([report.linear.lr], [100 * report.linear.accuracy], "*", markersize=14, label="chosen, validation")
    axes[1].set(title="linear classifier", xlabel="learning rate", ylabel="accuracy (%)", xscale="log")
    axes[1].legend()
    if report.nmi:
        first, *others = report.tokens
        axes[2].plot(range(1, len(report.nmi) + 1), report.nmi, "o-")
        axes[2].set(title="prototypes and classes", ylabel="NMI")
        axes[2].set_xticks(range(1, len(report.nmi) + 1), [first, *(f"+ {name}" for name in others)], rotation=60)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150)
