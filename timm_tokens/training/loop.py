"""The training loop."""

import math
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from timm_tokens import seeding
from timm_tokens.distributed import all_reduce_max, rank, world_size
from timm_tokens.outputs import evaluating
from timm_tokens.peers import together
from timm_tokens.stopping import Requests, Stopped, listening
from timm_tokens.tasks import TokenTask
from timm_tokens.training import checkpoints, compiling, logs, sharding
from timm_tokens.training.batches import plan, step_loader, to_device
from timm_tokens.training.history import History
from timm_tokens.training.logs import Logs
from timm_tokens.training.optimization import Optimization
from timm_tokens.training.pace import Pace
from timm_tokens.training.progress import Progress
from timm_tokens.training.settings import Settings
from timm_tokens.training.sharding import Sharding

Evaluate = Callable[[nn.Module], dict[str, float]]
Augment = Callable[[Any, torch.device], Any]


class Result(NamedTuple):
    """What came out: the model (averaged, with `ema`), a row for each epoch, and the file with its weights."""

    model: nn.Module
    epochs: list[dict[str, float]]
    path: Path


def train(
    task: TokenTask,
    dataset: Dataset,
    settings: Settings,
    *,
    collate: Callable | None = None,
    evaluate: Evaluate | None = None,
    augment: Augment | None = None,
) -> Result:
    """Train a task, on as many processes as torch.distributed has, and write what comes out to `settings.out`:

        last.pth            all that it takes to go on, with `resume`, exactly as if nothing had happened
        previous.pth        the checkpoint before it, used where the last one is corrupt
        model.safetensors   the product, for timm.create_model(name, checkpoint_path=...)
        best.safetensors    the product when `evaluate` liked it best
        steps.csv           every scalar of every step, and the gradient's norm
        summary.csv         every epoch's means and validation

    Args:
        task: On any device; it is moved.
        dataset: Items by index, (input, target).
        settings: Settings of the run.
        collate: Makes a batch (input, target) of a list of items; None: torch's default.
        evaluate: Metrics of the product, called on all processes. The best model has the highest first one.
        augment: Called with the input of each batch, on the CPU, and the device; returns the input that the task gets,
            such as `DeviceCrops` makes it. It draws nothing: randomness belongs in the items, whose seeds are kept.

    Raises:
        FloatingPointError: The loss, or a weight, is infinite or NaN; names the last good checkpoint.
        ValueError: The settings don't fit the data, or the run that is to be resumed.
        FileExistsError: There is a run in the folder, and `resume` is not set.
        Stopped: SIGTERM or SIGINT came (Ctrl-C). The step was ended and a checkpoint written; a SystemExit.
        PeerLost: Another process of the job has ended.
    """
    with listening() as requests, together(patience=settings.patience):
        return _Run(task, dataset, settings.scaled(world_size()), collate, evaluate, augment).run(requests)


class _Run:
    def __init__(
        self, task: TokenTask, dataset: Any, settings: Settings, collate: Any, evaluate: Any, augment: Augment | None
    ):
        self.settings, self.device = settings, torch.device(settings.device)
        logs.check(settings.log)
        if settings.fsdp:
            sharding.check(settings)
        if settings.compile:
            compiling.check(self.device)
        self.plan, self.dataset, self.collate, self.evaluate = plan(dataset, settings), dataset, collate, evaluate
        self.augment = augment
        self.task = task.to(self.device)
        self.task.seed = settings.seed
        if world_size() > 1 and self.device.type == "cuda":
            self.task = convert_sync_batchnorm(self.task)
        self.sharding = Sharding(self.task, self.device, settings.ema) if settings.fsdp else None
        self.optimization = Optimization(self.task.student, settings, self.plan)
        self.ema = self._average()
        self.progress = Progress(settings, self.plan, len(dataset), self.task, self.optimization, self.ema)
        self.progress.restore()
        self.start = self.progress.done
        if world_size() > 1 and not settings.fsdp:
            self.task.prepare_distributed(device_ids=[self.device.index] if self.device.type == "cuda" else None)
        ended = self.start // self.plan.steps_per_epoch + (self.start == self.plan.total_steps)  # the last may be short
        self.history = History(settings.out if rank() == 0 else None, self.start, ended)
        self.pace = Pace(settings.batch_size * settings.accumulate, settings.workers)
        self.logs = Logs(settings.log, settings.out if rank() == 0 else None, self.start, settings.curve())

    def _average(self) -> ModelEmaV3 | None:
        if self.sharding is not None:
            return self.sharding.ema
        return None if self.settings.ema is None else ModelEmaV3(self.task.product, decay=self.settings.ema)

    @property
    def model(self) -> nn.Module:
        """What is validated and published; where the task is sharded, all processes must ask for it."""
        if self.sharding is not None:
            return self.sharding.gather()
        return self.task.product if self.ema is None else self.ema.module

    def run(self, requests: Requests) -> Result:
        stop = self._take_steps(requests)
        path, complete = self.settings.out / checkpoints.FINAL, self.progress.saved == self.plan.total_steps
        model = self.model
        if complete and rank() == 0:
            checkpoints.export(path, model)
        if stop:
            stopped = Stopped(stop, self.progress.how_to_go_on())
            if rank() == 0:
                print(stopped, file=sys.stderr)  # a SystemExit that nobody catches is silent
            raise stopped
        return Result(model.eval(), self.history.epochs, path)

    def _take_steps(self, requests: Requests) -> int:
        """The steps that are left, or those until a signal asks to stop; returns its number, or 0."""
        steps = step_loader(self.dataset, self.plan, self.settings, self.start, self.collate, self.pace.work)
        numbers = range(self.start, self.plan.total_steps)
        self.bar = tqdm(numbers, "training", self.plan.total_steps, initial=self.start, unit="step", disable=rank() > 0)
        self.task.train()
        compiled = compiling.compiled(self.task, self.settings.compile)
        with closing(self.bar), closing(steps), closing(self.logs), compiled, sharding.quiet():
            for step, batches in zip(self.bar, self.pace.watch(steps), strict=True):
                scalars = self._take_step(step, batches)
                self.history.add(step, self.optimization.lr, scalars)
                if stop := self._end_step(step + 1, requests):
                    return stop
        return 0

    def _take_step(self, step: int, batches: list[Any]) -> list[dict[str, Tensor]]:
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

    def _autocast(self) -> torch.autocast:
        """Mixed precision as the settings say."""
        dtype = getattr(torch, self.settings.amp or "bfloat16")
        return torch.autocast(self.device.type, dtype, enabled=self.settings.amp is not None)

    def _backward(self, batch: Any, parts: int) -> dict[str, Tensor]:
        """Add the gradients of one part; returns the scalars that the task gives."""
        input, target = batch
        if self.augment is not None:
            input = self.augment(input, self.device)
        input, target = to_device((input, target), self.device)
        with self._autocast():
            outputs = self.task(input, target)
        self.optimization.backward(outputs["loss"] / parts)
        return {name: x.detach().float() for name, x in outputs.items() if x.ndim == 0}

    def _end_step(self, done: int, requests: Requests) -> int:
        """Log, validate and save, if it is time; returns the number of the signal to stop for, or 0."""
        last, step = done == self.plan.total_steps, done - 1
        end = last or done % self.plan.steps_per_epoch == 0
        saving = end or done % self.settings.save_every == 0
        looking = saving or done % self.settings.log_every == 0
        stop = self._agreed(requests.received, looking)
        if looking or stop:
            self._flush()
        if (saving or stop) and not checkpoints.all_finite(self.task):
            self._fail(f"weights are infinite or NaN after step {step}")
        if end:
            self._end_epoch(done, last)
        if saving or stop:
            self.progress.save(done)
        return stop

    def _agreed(self, received: int, looking: bool) -> int:
        """The number of the signal that any process received. Several exchange it when they look at the losses, which
        waits for the device anyway, and so stop after the same step."""
        if world_size() == 1:
            return received
        return int(all_reduce_max(torch.tensor(received, device=self.device))) if looking else 0

    def _flush(self) -> None:
        """Read and write the losses since the last time; stop if one is infinite or NaN."""
        rows = self.history.rows()
        bad = next((i for i, row in enumerate(rows) if not math.isfinite(row["loss"])), None)
        rows = rows if bad is None else rows[: bad + 1]
        self.history.add_steps(rows)
        self.logs.add_steps(rows)
        if bad is not None:
            self._fail(f"the loss is {rows[bad]['loss']} at step {rows[bad]['step']}")
        if rows:
            self.bar.set_postfix(loss=f"{rows[-1]['loss']:.4g}", refresh=False)

    def _end_epoch(self, done: int, last: bool) -> None:
        epoch = (done - 1) // self.plan.steps_per_epoch
        if world_size() > 1:
            distribute_bn(self.task.student, world_size(), reduce=True)
        metrics = {}
        if self.evaluate is not None and (last or (epoch + 1) % self.settings.eval_every == 0):
            with torch.no_grad(), self._autocast(), evaluating(self.model) as model:
                metrics = self.evaluate(model)
        row = self.history.end_epoch(epoch, epoch * self.plan.steps_per_epoch, metrics)
        self.logs.add_epoch(row, done - 1)
        if metrics and (self.progress.best is None or next(iter(metrics.values())) > self.progress.best):
            self.progress.best = next(iter(metrics.values()))
            if rank() == 0:
                checkpoints.export(self.settings.out / checkpoints.BEST, model)
        if rank() == 0:
            self.bar.write(", ".join(f"{name} {value:.4g}" for name, value in row.items() if "/" not in name))
            if line := self.pace.first_line():
                self.bar.write(line)

    def _fail(self, reason: str) -> None:
        raise FloatingPointError(f"{reason}; {self.progress.last_good()}. {self.task.advice()}")
