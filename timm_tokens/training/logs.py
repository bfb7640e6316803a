"""Logs that other programs show, TensorBoard's and Weights & Biases', beside the tables of a run."""

import os
import secrets
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

KINDS = ("tensorboard", "wandb")
Row = dict[str, float]


def check(names: Sequence[str] | None) -> None:
    """Refuse a log whose package is not installed; says what to install."""
    for name in names or ():
        if find_spec(name) is None:
            raise ValueError(f"log {name} needs a package that is not installed: pip install 'timm-tokens[{name}]'")


class Logs:
    """Writes the rows of steps.csv and summary.csv to TensorBoard, to Weights & Biases, or to both.

    A run that goes on adds to its own logs. Weights & Biases' project is that of WANDB_PROJECT, else "timm-tokens".

    Args:
        folder: The run's; None on all processes but the first: nothing is written.
        start: The first step that will be taken: what a killed run logged of later ones is dropped.
        settings: What the run is set to, for Weights & Biases to show.
    """

    def __init__(self, names: Sequence[str] | None, folder: Path | None, start: int, settings: dict[str, Any]):
        names = names or ()
        self.board: Any = _tensorboard(folder, start) if folder and "tensorboard" in names else None
        self.run: Any = _wandb(folder, settings) if folder and "wandb" in names else None

    def add_steps(self, rows: Sequence[Row]) -> None:
        """Rows of steps.csv."""
        for row in rows:
            self._add({name: value for name, value in row.items() if name != "step"}, int(row["step"]))

    def add_epoch(self, row: Row, step: int) -> None:
        """A row of summary.csv; its place is the last step of the epoch."""
        self._add({f"epoch/{name}": value for name, value in row.items() if name not in ("epoch", "lr")}, step)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
        if self.run is not None:
            self.run.finish()

    def _add(self, row: Row, step: int) -> None:
        if self.board is not None:
            for name, value in row.items():
                self.board.add_scalar(name, value, step)
        if self.run is not None:
            self.run.log(row, step=step)  # steps that a killed run logged already are ignored: they were the same


def _tensorboard(folder: Path, start: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # not above: tensorboard is an extra

    return SummaryWriter(folder / "tensorboard", purge_step=start or None)


def _wandb(folder: Path, settings: dict[str, Any]) -> Any:
    import wandb  # not above: an extra

    name = folder / "wandb.txt"
    if not name.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        name.write_text(secrets.token_hex(4))
    project = os.environ.get("WANDB_PROJECT", "timm-tokens")
    given = {"name": folder.resolve().name, "dir": str(folder), "config": settings}
    return wandb.init(project=project, id=name.read_text().strip(), resume="allow", **given)
