"""What every task of this package has in common: the contract between a task and the trainer."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from timm.data import Mixup
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from timm_tokens import seeding
from timm_tokens.distributed import rank, sharded_as, world_size
from timm_tokens.tasks.batch_norm import make_batch_norms_global
from timm_tokens.tasks.drop_path import make_drop_paths_global


class TokenTask(TrainingTask):
    """A timm TrainingTask with hooks around the step. `timm_tokens.training.train` calls, once a step,

        task.start_step(step, total_steps, steps_per_epoch)
        task(input, target)["loss"].backward()          # several times with --accumulate, on parts of the batch
        task.before_optimizer()                         # gradients are complete, unscaled, averaged over processes
        (clipping), optimizer.step()
        task.end_step()

    A subclass implements `forward`, and those of the hooks that it needs. The rules that make it run on several
    processes, and resume to the same losses after a kill:

    * All that has gradients is in `trainable_module`, whose forward is called once in the task's forward: DDP wraps it.
      Call `self.trainable_module(...)`; reach for its parts (weights, `momentum`, ...) through `self.student`.
    * What a later step depends on (teacher, centres, queues) is a submodule or a buffer of the task, so that it is in
      its state dict, and is the same on every process. Values from `start_step` are plain floats, set anew each step.
    * The student's weights are used by its forward alone; those outside of its blocks may be used until the backward
      pass, too. At other times a process has only its part of them under FSDP2.
    * Randomness comes from `self.sample_generators()` where each image has a draw of its own, from
      `self.step_generator()` where the batch has one, from `self.generator()` where processes may differ, or from
      torch's global generators, which the trainer seeds every step on each process. `self.place_in_order(batch)` before
      the forward makes stochastic depth the same on however many processes.

    `train()` and `eval()` reach the trainable module alone; teachers and losses stay as the task made them.

    Args:
        trainable_module: Everything with gradients, as one module.
        seed: Seed of the run; the trainer sets it.

    Attributes:
        find_unused_parameters: DDP's argument; set it in a task whose steps may leave parameters without gradients.
    """

    find_unused_parameters = False
    trainable_module: Any  # an nn.Module, with members of its own

    def __init__(self, trainable_module: nn.Module, *, seed: int = 0) -> None:
        super().__init__(verbose=False)
        self.trainable_module = trainable_module
        self.seed, self.step, self._draws, self._parts = seed, 0, 0, 0
        self.drop_paths: tuple[Any, ...] = ()  # a tuple: they are parts of the trainable module already
        self._stream: torch.Generator | None = None

    def forward(self, input: Any, target: Any) -> dict[str, Tensor]:
        """The loss of one batch.

        Args:
            input: Images (B, 3, H, W), or a list of them, one per crop.
            target: Whatever the data set gives beside the images, collated and on the device.

        Returns:
            "loss", a scalar to call backward on; detached scalars to log, by name; "output", the logits, if there are.
            The loss is the mean over this process's batch: DDP averages it over the processes.
        """
        raise NotImplementedError

    @property
    def student(self) -> Any:
        """The trainable module itself, without DDP around it."""
        return unwrap_model(self.trainable_module)

    @property
    def product(self) -> nn.Module:
        """The plain timm model that comes out of the training: what is validated, averaged, saved and published."""
        return self.student

    def advice(self) -> str:
        """What to do about a loss that is infinite or NaN, in a sentence."""
        return "Lower the learning rate, or limit the gradients with clip_grad"

    def bound_to_length(self) -> list[str]:
        """What `start_step` schedules over the whole length of a run, each in words: that length can't change then."""
        own = type(self).start_step is not TokenTask.start_step
        return [f"what {type(self).__name__} schedules may depend on it"] if own else []

    def start_step(self, step: int, total_steps: int, steps_per_epoch: int) -> None:
        """Before step 0 <= step < total_steps: set what is scheduled. Call this one first: super().start_step(...)."""
        self.step, self._draws, self._parts, self._stream = step, 0, 0, None

    def before_optimizer(self) -> None:
        """Gradients are complete: cancel some of them, or clip them in a way that the trainer doesn't know."""

    def end_step(self) -> None:
        """The weights are new (or as they were, where fp16 had to skip a step): update teacher, queues, centres."""

    def generator(self) -> torch.Generator:
        """A new generator on the CPU for this step on this process: another at each call, the same in a resumed run."""
        self._draws += 1
        return seeding.generator(self.seed, self.step, rank(), self._draws)

    def step_generator(self) -> torch.Generator:
        """A new generator on the CPU for this step, the same on all processes and for all parts of its batch."""
        return seeding.generator(self.seed, self.step)

    def sample_generators(self, batch: int) -> list[torch.Generator]:
        """New generators on the CPU, one for each of the images of this part, by their place in the global batch.

        So an image's draws are the same on however many processes, and in however many parts, the batch is computed.
        Each call in a step is for the next part, of which this process has `batch` images, as every other has.
        """
        first = (self._parts * world_size() + rank()) * batch
        self._parts += 1
        return [seeding.generator(self.seed, self.step, -1, place) for place in range(first, first + batch)]

    def place(self, rows: Tensor, total: int) -> None:
        """Before a forward, say where in the global batch of `total` this process's images are: rows (B,) int64."""
        if not self.drop_paths:
            return
        device = next(self.trainable_module.parameters()).device
        if self._stream is None:  # what one process draws from, as the trainer seeds it
            self._stream = torch.Generator(device).manual_seed(seeding.derived_seed(self.seed, self.step, 0))
        for drop_path in self.drop_paths:
            drop_path.generator, drop_path.rows, drop_path.total = self._stream, rows.to(device), total

    def place_in_order(self, batch: int) -> None:
        """`place` of as many images on each process, process after process."""
        self.place(torch.arange(batch) + rank() * batch, world_size() * batch)

    def place_mirrored(self, images: Tensor) -> Tensor:
        """`place` of a batch in an order in which its flip exchanges neighbours: 0, 2, 4, ..., 5, 3, 1.

        Returns that order, (B,) int64 on the images' device.
        """
        batch, total = len(images), len(images) * world_size()
        order = _mirrored_neighbours(batch)
        self.place(_mirrored_neighbours(total).argsort()[batch * rank() + order], total)
        return order.to(images.device, non_blocking=True)

    def mix_neighbours(self, mixup: Mixup, images: Tensor, target: Any = None) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W), and probabilities (B, K) of classes (B,), each mixed with its neighbour's.

        timm's Mixup mixes a batch with its flip, which in the order of `place_mirrored` exchanges neighbours. Without
        targets the probabilities mean nothing.
        """
        if len(images) % 2:
            raise ValueError(f"mixup mixes neighbours, so each process needs an even batch, got {len(images)} images")
        order = self.place_mirrored(images)
        target = torch.zeros_like(order) if target is None else target[order]
        with seeding.seeded(self.seed, self.step):  # timm draws from NumPy; without the rank: the same on all processes
            return mixup(images[order], target)

    def train(self, mode: bool = True) -> "TokenTask":
        self.training = mode
        self.trainable_module.train(mode)
        return self

    def followers(self) -> tuple[nn.Module, ...]:
        """Modules that follow the student, with parameters of the same names, such as teachers: under FSDP2 they are
        sharded as the student is."""
        return ()

    def make_global(self) -> None:
        """Replace batch norms and stochastic depth by ones that know of the global batch."""
        self.drop_paths = tuple(make_drop_paths_global(self.trainable_module))
        if next(self.trainable_module.parameters()).device.type == "cpu":  # on GPUs timm's convert_sync_batchnorm does
            make_batch_norms_global(self)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """A context in which DDP, or FSDP2, does not average gradients, for all but the last part of a batch."""
        module = self.trainable_module
        with ExitStack() as stack:
            if hasattr(module, "set_requires_gradient_sync"):
                module.set_requires_gradient_sync(False)
                stack.callback(module.set_requires_gradient_sync, True)
            elif hasattr(module, "no_sync"):
                stack.enter_context(module.no_sync())
            yield

    # The rest is the protocol of timm's own training script, of timm 1.0.31; 1.0.26 has less of it and never calls it.

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> "TokenTask":
        """Wrap the trainable module in DistributedDataParallel, after `make_global`."""
        self.make_global()
        options = {"find_unused_parameters": self.find_unused_parameters} | ddp_kwargs
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **options)
        return self

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The product; with `ema` what `setup_ema` keeps, if it was called."""
        if module is None and ema:
            return getattr(self, "trainable_module_ema", None)
        return self.product if module is None else module

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Tensor]:
        """All that the task needs to go on, teachers and queues included, by names without DDP's `module.`."""
        if ema:
            return {}
        return {_plain(name): value for name, value in self.state_dict().items() if not name.startswith(_EMA)}

    def load_task_state(
        self, state: Mapping[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        """Take up what `get_task_state` gave."""
        if ema or not state:
            return
        own = self.state_dict()
        names = {_plain(name): name for name in own}
        given = {names.get(name, name): value for name, value in state.items()}
        missing, unexpected = self.load_state_dict(sharded_as(given, own), strict=False)
        missing = [name for name in missing if not name.startswith(_EMA)]
        if strict and (missing or unexpected):
            raise RuntimeError(
                f"the state is not one of this {type(self).__name__}: missing {missing}, unexpected {unexpected}"
            )


_EMA, _DDP = "trainable_module_ema.", "trainable_module.module."


def check_mixup(mixup: Mixup | None) -> None:
    """Refuse a Mixup that does not draw once for the whole batch."""
    if mixup is not None and mixup.mode != "batch":
        raise ValueError(f"mixup must have mode='batch', got {mixup.mode!r}")


def _mirrored_neighbours(batch: int) -> Tensor:
    return torch.cat([torch.arange(0, batch, 2), torch.arange(1, batch, 2).flip(0)])


def _plain(name: str) -> str:
    return name.replace(_DDP, "trainable_module.", 1) if name.startswith(_DDP) else name
