"""A picture of a run: what its tables hold."""

from pathlib import Path

from timm_tokens.training.history import STEPS, SUMMARY, read

CURVES = "curves.png"


def draw_curves(folder: Path) -> Path:
    """Draw every scalar of steps.csv by step, and the validation of summary.csv by epoch. Takes matplotlib.

    Returns:
        The picture's path, in the folder.
    """
    from matplotlib.figure import Figure  # not pyplot, which would need a display and keep state

    steps, epochs = read(folder / STEPS), read(folder / SUMMARY)
    panels = {name: [(row["step"], row[name]) for row in steps] for name in steps[0] if name != "step"}
    validated = dict.fromkeys(name for row in epochs for name in row if name.startswith("eval_"))
    panels |= {name: [(row["epoch"], row[name]) for row in epochs if name in row] for name in validated}
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 2.6 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (name, points) in zip(grid, panels.items(), strict=False):
        axes.plot(*zip(*points, strict=True), "o-" if name in validated else "-", markersize=3, linewidth=1)
        axes.set(title=name, xlabel="epoch" if name in validated else "step")
        axes.grid(alpha=0.3)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.savefig(folder / CURVES, dpi=120)
    return folder / CURVES
