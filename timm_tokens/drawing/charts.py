"""Charts of what was measured: curves of a run, accuracies, speed. Axes start at zero, or say where they start."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from timm_tokens.drawing.style import LINES, figure, from_zero, legend_beside

Points = Sequence[tuple[float, float]]
Series = Mapping[str, Points]  # by their names in the legend


def draw_accuracy(points: Series, labels: Sequence[str], ylabel: str = "accuracy (%)") -> Figure:
    """Accuracy (%) against GFLOPs, a line for each way of merging; `labels` name the points, such as "r = 8"."""
    picture = figure(7.4, 4.2)
    axes = picture.add_subplot(xlabel="GFLOPs per image (multiply-adds)", ylabel=ylabel)
    _lines(axes, points)
    for i, label in enumerate(labels):
        highest = max((series[i] for series in points.values()), key=lambda point: point[1])
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}  # for lines that pass behind it
        axes.annotate(label, highest, (0, 7), textcoords="offset points", ha="center", fontsize=8, bbox=box)
    axes.margins(x=0.1, y=0.15)
    low, high = axes.get_ylim()
    room = max(0.0, 4 - (high - low)) / 2  # so that tenths of a point don't look like much
    axes.set_ylim(low - room, high + room)
    _finish(axes)
    return picture


def draw_speed(points: Series, ideal: Points) -> Figure:
    """Speed-up against r, a line for each setting, with the speed-up that the FLOPs alone would give."""
    picture = figure(7, 4)
    axes = picture.add_subplot(xlabel="r, tokens merged in each block", ylabel="speed-up over the base")
    _lines(axes, points)
    if ideal:
        axes.plot(*zip(*ideal, strict=True), "k--", label="ideal (FLOPs)")
    axes.axhline(1, color="grey", linewidth=0.8)
    _finish(axes, whole=True)
    return picture


def draw_bars(panels: Mapping[str, Mapping[str, Mapping[str, tuple[float, float]]]], ylabel: str) -> Figure:
    """Bars from zero with error bars: by panel, by group of bars, by bar, (height, half of the interval)."""
    picture = figure(2 + 4 * len(panels), 4)
    row = picture.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (title, groups) in zip(row, panels.items(), strict=True):
        kinds = list(dict.fromkeys(kind for bars in groups.values() for kind in bars))
        for i, kind in enumerate(kinds):
            heights, errors = zip(*(bars[kind] for bars in groups.values()), strict=True)
            places = [g + 0.8 * (i - (len(kinds) - 1) / 2) / len(kinds) for g in range(len(groups))]
            axes.bar(places, heights, 0.8 / len(kinds), yerr=errors, capsize=3, label=kind, color=LINES[i])
        axes.set_xticks(range(len(groups)), list(groups), fontsize=8)
        axes.set_title(title)
    row[0].set(ylabel=ylabel, ylim=(0, None))
    legend_beside(row[-1])
    return picture


def draw_probe(
    knn: Mapping[int, float],
    held_out: Mapping[float, float],
    chosen: tuple[float, float],
    nmi: Mapping[str, float],
) -> Figure:
    """What frozen features are worth, in percent: k-NN accuracy by k, linear accuracy by learning rate, NMI by tokens.

    Args:
        knn: Accuracy by number of neighbours.
        held_out: Accuracy on held-out training images by learning rate.
        chosen: The learning rate that was chosen, and its accuracy on validation images.
        nmi: NMI of prototypes and classes as tokens are added, by the token's name; empty leaves the panel out.
    """
    panels = 3 if nmi else 2
    picture = figure(4.6 * panels, 3.8)
    row = picture.subplots(1, panels)
    row[0].plot(list(knn), list(knn.values()), "o-")
    row[0].set(title="k-NN", xlabel="neighbours k", ylabel="accuracy (%)", xscale="log")
    row[0].set_xticks(list(knn), [str(k) for k in knn], minor=False)
    row[0].minorticks_off()
    row[1].plot(list(held_out), list(held_out.values()), "o-", label="held-out training images")
    row[1].plot(*chosen, "*", markersize=14, label="chosen, on validation images")
    row[1].set(title="linear classifier", xlabel="learning rate", ylabel="accuracy (%)", xscale="log")
    if nmi:
        row[2].plot(range(len(nmi)), list(nmi.values()), "o-")
        row[2].set(title="prototypes and classes", ylabel="NMI (%)")
        row[2].set_xticks(range(len(nmi)), [name if i == 0 else f"+ {name}" for i, name in enumerate(nmi)], rotation=60)
    for axes in row:
        from_zero(axes)
        axes.grid(alpha=0.3)
    picture.legend(*row[1].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return picture


def draw_curves(steps: Sequence[Mapping[str, float]], epochs: Sequence[Mapping[str, float]]) -> Figure:
    """Every scalar of a run by step, and every validation by epoch; the tokens of one loss share a panel.

    Args:
        steps: Rows with "step" and scalars; "loss/aux1" and "loss/aux2" belong to one panel, "loss/...".
        epochs: Rows with "epoch" and validation results, whose names start with "eval_".
    """
    panels: dict[str, dict[str, Points]] = {}
    for axis, rows in (("step", steps), ("epoch", epochs)):
        names = dict.fromkeys(name for row in rows for name in row if name != axis)
        for name in (name for name in names if axis == "step" or name.startswith("eval_")):
            title, _, token = name.partition("/")
            points = [(row[axis], row[name]) for row in rows if name in row]
            panels.setdefault(f"{title} by {axis}" + (", per token" if token else ""), {})[token or title] = points
    columns = min(3, len(panels))
    picture = figure(4.4 * columns, 2.8 * -(-len(panels) // columns))
    grid = picture.subplots(-(-len(panels) // columns), columns, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, series) in zip(grid, panels.items(), strict=False):
        axes.set_title(title, fontsize=10)
        _lines(axes, series, marker="" if " by step" in title else "o")
        _finish(axes, legend=len(series) > 1, whole=True)
    return picture


def draw_runs(curves: Mapping[str, Sequence[Mapping[int, float]]], xlabel: str, ylabel: str) -> Figure:
    """For each method the mean over its runs, as a line, and their range; a run gives a value by epoch."""
    picture = figure(7.4, 4.2)
    axes = picture.add_subplot(xlabel=xlabel, ylabel=ylabel)
    values = {name: {epoch: [run[epoch] for run in runs] for epoch in runs[0]} for name, runs in curves.items()}
    _lines(axes, {name: [(epoch, fmean(v)) for epoch, v in by_epoch.items()] for name, by_epoch in values.items()})
    for colour, by_epoch in zip(LINES, values.values(), strict=False):
        low, high = [min(v) for v in by_epoch.values()], [max(v) for v in by_epoch.values()]
        axes.fill_between(list(by_epoch), low, high, alpha=0.2, color=colour)
    _finish(axes, whole=True)
    return picture


def draw_scores(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """A panel for each measure: by method a dot for each run, and a line at their mean."""
    picture = figure(1 + 3.2 * len(scores), 3.8)
    for axes, (measure, by_method) in zip(
        picture.subplots(1, len(scores), squeeze=False)[0], scores.items(), strict=True
    ):
        for i, values in enumerate(by_method.values()):
            axes.plot([i] * len(values), values, "o", color="C0", alpha=0.6)
            if values:  # not every method has every measure
                axes.plot([i - 0.25, i + 0.25], [fmean(values)] * 2, "-", color="C1", linewidth=2)
        axes.set_xticks(range(len(by_method)), [method.replace(" ", "\n") for method in by_method], fontsize=8)
        axes.set_title(measure, fontsize=10)
        from_zero(axes)
        axes.grid(axis="y", alpha=0.3)
    return picture


def _lines(axes: Axes, series: Series, marker: str = "o") -> None:
    style: dict[str, Any] = {"marker": marker, "markersize": 4, "linewidth": 1.2}
    for i, (name, points) in enumerate(series.items()):
        axes.plot(*zip(*points, strict=True), label=name, color=LINES[i % len(LINES)], **style)


def _finish(axes: Axes, legend: bool = True, whole: bool = False) -> None:
    """Grid, legend and scales, the horizontal one in whole numbers if `whole`."""
    from_zero(axes)
    if whole:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if legend:
        legend_beside(axes)
