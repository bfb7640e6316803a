"""How far a run is, and how that is saved and restored."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3

from timm_tokens.distributed import all_gather_batch, rank, sharded_as, whole, world_size
from timm_tokens.files import remove_partials
from timm_tokens.tasks import TokenTask
from timm_tokens.training import checkpoints
from timm_tokens.training.batches import Plan
from timm_tokens.training.optimization import Optimization
from timm_tokens.training.settings import Settings


@dataclass
class Progress:
    """The state of a run, which its checkpoints hold; `restore` takes it up where the last one left it."""

    settings: Settings
    plan: Plan
    images: int  # how many there are to train on
    task: TokenTask
    optimization: Optimization
    ema: ModelEmaV3 | None  # the model's average
    done: int = 0  # how many steps have been taken when the run starts or goes on
    saved: int | None = None  # how many the last good checkpoint has; None: there is none yet
    best: float | None = None  # the best value of the first metric

    def restore(self) -> None:
        """Take up the last good checkpoint, if there is one, which must be of a run with the same settings."""
        folder = self.settings.out
        found = checkpoints.load(folder)
        self._check_shared(0 if found is None else found.state["step"])
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            remove_partials(folder)
        if found is None:
            return
        if not self.settings.resume:
            raise FileExistsError(
                f"there is a run in {folder} already, at step {found.state['step']}: resume it, or take another folder"
            )
        self._check(found.state)
        self.task.load_task_state(found.state["task_state"])
        if self.ema is not None:
            module = self.ema.module
            module.load_state_dict(sharded_as(found.state["state_dict_ema"], module.state_dict()))
        self.optimization.load_state_dict(found.state)
        self.done, self.saved, self.best = found.state["step"], found.state["step"], found.state["best"]
        if found.warning and rank() == 0:
            print(found.warning, file=sys.stderr)
            found.path.replace(folder / checkpoints.LAST)  # the next one must not push it out for a corrupt one

    def save(self, done: int) -> None:
        """Write the checkpoint after so many steps."""
        if rank() == 0 or self.settings.fsdp:  # what is sharded is gathered from all
            state = {"step": done, "best": self.best, "settings": self._curve()}
            state |= {"state_dict": self.task.product.state_dict(), "task_state": self.task.get_task_state()}
            if self.ema is not None:
                state["state_dict_ema"] = self.ema.module.state_dict()
            state |= self.optimization.state_dict()
            state = whole(state) if self.settings.fsdp else state
        if rank() == 0:
            checkpoints.save(self.settings.out, state)
        self.saved = done

    def last_good(self) -> str:
        """Where the last good checkpoint is, in words."""
        if self.saved is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self.settings.out / checkpoints.LAST}, after {self.saved} steps"

    def how_to_go_on(self) -> str:
        """What to do after the run was stopped, in words."""
        folder, total = self.settings.out, self.plan.total_steps
        if self.saved == total:
            return f"all {total} steps are done, and the model is in {folder / checkpoints.FINAL}"
        done = f"{folder / checkpoints.LAST} has {self.saved} of {total} steps"
        return f"{done}; to go on, run the same again with --resume (in Python, resume=True)"

    def _curve(self) -> dict[str, Any]:
        """What decides the losses."""
        return self.settings.curve() | {"processes": world_size(), "images": self.images}

    def _check(self, state: dict[str, Any]) -> None:
        folder, bound = self.settings.out, self.optimization.bound_to_length() + self.task.bound_to_length()
        check_same(folder, state["settings"], self._curve(), bound)
        if self.plan.total_steps < state["step"]:
            raise ValueError(
                f"the run in {folder} has done {state['step']} steps: it can't end after {self.plan.total_steps}"
            )

    def _check_shared(self, done: int) -> None:
        """Refuse to go on where the processes see different folders."""
        if world_size() == 1:
            return
        seen = all_gather_batch(torch.tensor([done], device=self.settings.device)).tolist()
        if len(set(seen)) > 1:
            raise ValueError(
                f"the processes find checkpoints after {seen} steps in {self.settings.out}: all must share one folder"
            )


def check_same(folder: Path, found: dict[str, Any], wanted: dict[str, Any], bound: Sequence[str] = ()) -> None:
    """Refuse to continue a run with other settings than it was started with. Its length may change where nothing that
    it has done depended on that: where `bound`, what is scheduled over the whole length, each in words, is empty.
    """
    odd = {name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)}
    length_alone = odd <= {"epochs", "steps"}
    if not odd or (length_alone and not bound):
        return
    changes = ", ".join(f"{name} {found.get(name)} -> {wanted.get(name)}" for name in sorted(odd))
    if not length_alone:
        raise ValueError(f"the run in {folder} was started with other settings ({changes}): use those, or another out")
    raise ValueError(
        f"the run in {folder} can't get another length ({changes}): {', and '.join(bound)}. Keep its length, or take "
        "another out"
    )
