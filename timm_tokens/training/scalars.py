"""Scalars of the last steps, left on the device until they are wanted, so that nothing waits for it every step."""

import math

import torch
from torch import Tensor

from timm_tokens.distributed import all_reduce_mean


class Scalars:
    """Collects what the task gives to log; `rows` reads it, as means over accumulated parts and processes."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._steps: list[tuple[int, float, Tensor]] = []

    def add(self, step: int, lr: float, parts: list[dict[str, Tensor]]) -> None:
        """Keep the scalars of the parts of one step.

        Raises:
            ValueError: They are not those of other steps.
        """
        names = list(parts[0])
        if self._names and names != self._names:
            raise ValueError(
                f"a task must log the same scalars every step; {self._names} became {names} at step {step}"
            )
        self._names = names
        means = torch.stack([torch.stack([part[name] for name in names]) for part in parts]).mean(0)
        self._steps.append((step, lr, means))

    def rows(self) -> list[dict[str, float]]:
        """A row for each step since the last time: "step", the scalars, "lr". The same on all processes."""
        if not self._steps:
            return []
        values = all_reduce_mean(torch.stack([means for *_, means in self._steps])).tolist()
        rows = [
            {"step": step} | dict(zip(self._names, row, strict=True)) | {"lr": lr}
            for (step, lr, _), row in zip(self._steps, values, strict=True)
        ]
        self._steps = []
        return rows


def first_bad(rows: list[dict[str, float]]) -> int | None:
    """The index of the first row whose loss is infinite or NaN."""
    return next((i for i, row in enumerate(rows) if not math.isfinite(row["loss"])), None)
