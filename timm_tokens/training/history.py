"""The losses of every step and the summary of every epoch, as CSV files that a resumed run continues.

The summary has the columns of timm's update_summary, which is not used: it can't have epochs without validation.
"""

import csv
from io import StringIO
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from timm_tokens.distributed import all_reduce_mean
from timm_tokens.files import naming, replacing

STEPS, SUMMARY = "steps.csv", "summary.csv"


class History:
    """Collects what the task gives to log, and leaves it on the device until `rows` reads it: so nothing waits for it
    every step. Writes `steps.csv`, one row per step, and `summary.csv`, one row per epoch; without a folder, nothing.

    `step` steps and `epoch` epochs are done: rows of later ones, of a run that was killed, are dropped.
    """

    def __init__(self, folder: Path | None, step: int = 0, epoch: int = 0):
        self.folder = folder
        self.steps = _cut(folder / STEPS, "step", step) if folder else []
        self.epochs = _cut(folder / SUMMARY, "epoch", epoch) if folder else []
        self._names: list[str] = []
        self._waiting: list[tuple[int, float, Tensor]] = []

    def add(self, step: int, lr: float, parts: list[dict[str, Tensor]]) -> None:
        """Keep the scalars of the parts of one step, which must be those of all steps."""
        names = list(parts[0])
        if self._names and names != self._names:
            raise ValueError(
                f"a task must log the same scalars every step; {self._names} became {names} at step {step}"
            )
        self._names = names
        means = torch.stack([torch.stack([part[name] for name in names]) for part in parts]).mean(0)
        self._waiting.append((step, lr, means))

    def rows(self) -> list[dict[str, float]]:
        """A row for each step since the last time, the same on all processes: "step", the scalars, as means over
        accumulated parts and processes, and "lr"."""
        if not self._waiting:
            return []
        values = all_reduce_mean(torch.stack([means for *_, means in self._waiting])).tolist()
        rows = [
            {"step": step} | dict(zip(self._names, row, strict=True)) | {"lr": lr}
            for (step, lr, _), row in zip(self._waiting, values, strict=True)
        ]
        self._waiting = []
        return rows

    def add_steps(self, rows: list[dict[str, float]]) -> None:
        """Append rows, one per step, each with "step" first and "lr" last."""
        if self.folder and rows:
            path = self.folder / STEPS
            text = _text(rows, header=not path.is_file())
            with naming(path), path.open("a", newline="") as file:
                file.write(text)
        self.steps += rows

    def end_epoch(self, epoch: int, first_step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Summarise the steps from `first_step` on, as means, and forget them."""
        steps = [row for row in self.steps if row["step"] >= first_step]
        row: dict[str, float] = {"epoch": epoch}
        row |= {f"train_{n}": fmean(step[n] for step in steps) for n in steps[0] if n not in ("step", "lr")}
        row |= {f"eval_{name}": value for name, value in metrics.items()}
        self.epochs.append(row | {"lr": steps[-1]["lr"]})
        self.steps = []
        if self.folder:
            _write(self.folder / SUMMARY, self.epochs)
        return self.epochs[-1]


def read(path: Path) -> list[dict[str, float]]:
    """The rows of a file, without empty cells and a last row that a kill cut short; none if there is no file."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    try:
        whole = StringIO(data[: data.rfind(b"\n") + 1].decode(), newline="")
        return [{name: _number(cell) for name, cell in row.items() if cell} for row in csv.DictReader(whole)]
    except (ValueError, TypeError, AttributeError, csv.Error) as error:  # more cells than names are a list
        raise ValueError(f"{path} is corrupt ({error}): move it away to go on without its rows") from error


def _number(cell: str) -> float:
    return int(cell) if cell.isdigit() else float(cell)


def _cut(path: Path, key: str, end: int) -> list[dict[str, float]]:
    """Drop the rows from `end` on, and return the others."""
    rows = read(path)
    if not all(key in row for row in rows):
        raise ValueError(f"{path} is corrupt (rows without {key!r}): move it away to go on without them")
    rows = [row for row in rows if row[key] < end]
    if rows:
        _write(path, rows)
    else:
        path.unlink(missing_ok=True)
    return rows


def _write(path: Path, rows: list[dict[str, float]]) -> None:
    with replacing(path) as partial, partial.open("w", newline="") as file:
        file.write(_text(rows, header=True))


def _text(rows: list[dict[str, float]], header: bool) -> str:
    file = StringIO(newline="")
    writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
