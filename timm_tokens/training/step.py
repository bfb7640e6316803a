"""One step: from the batches of its accumulated parts to new weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from timm_tokens import seeding
from timm_tokens.distributed import rank
from timm_tokens.tasks import TokenTask
from timm_tokens.training.batches import Plan, to_device
from timm_tokens.training.optimization import Optimization
from timm_tokens.training.settings import Settings

Augment = Callable[[Any, torch.device], Any]


@dataclass
class Stepper:
    """Takes the steps of a run; `ema` is the model's average, if there is one, and `augment` that of `train`."""

    settings: Settings
    plan: Plan
    task: TokenTask
    optimization: Optimization
    ema: ModelEmaV3 | None
    augment: Augment | None

    def __call__(self, step: int, batches: list[Any]) -> list[dict[str, Tensor]]:
        """Take a step; returns the scalars that the task gave for each part, and the norm of the step's gradient."""
        self.optimization.start_step(step)
        self.task.start_step(step, self.plan.total_steps, self.plan.steps_per_epoch)
        torch.manual_seed(seeding.derived_seed(self.settings.seed, step, rank()))  # for dropout and the like
        scalars = []
        for part in batches[:-1]:
            with self.task.no_sync():
                scalars.append(self._backward(part, len(batches)))
        scalars.append(self._backward(batches[-1], len(batches)))
        norm = self.optimization.step(self.task.before_optimizer)
        self.task.end_step()
        if self.ema is not None:
            self.ema.update(self.task.product, step=step)
        return [part | {"grad_norm": norm} for part in scalars]

    def autocast(self) -> torch.autocast:
        """Mixed precision as the settings say."""
        dtype = getattr(torch, self.settings.amp or "bfloat16")
        return torch.autocast(torch.device(self.settings.device).type, dtype, enabled=self.settings.amp is not None)

    def _backward(self, batch: Any, parts: int) -> dict[str, Tensor]:
        """Add the gradients of one part; returns the scalars that the task gives."""
        (input, target), device = batch, torch.device(self.settings.device)
        if self.augment is not None:
            input = self.augment(input, device)
        input, target = to_device((input, target), device)
        with self.autocast():
            outputs = self.task(input, target)
        self.optimization.backward(outputs["loss"] / parts)
        return {name: x.detach().float() for name, x in outputs.items() if x.ndim == 0}
