"""Which images each step sees, and how they are augmented: a function of the seed and the step alone."""

from collections.abc import Callable, Generator, Iterator
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from timm_tokens import seeding
from timm_tokens.data.images import as_images
from timm_tokens.distributed import rank, world_size
from timm_tokens.stopping import outlast_signals
from timm_tokens.training.pace import Work
from timm_tokens.training.settings import Settings


class Plan(NamedTuple):
    """How long a run is. The global batch is that of all processes and all accumulated parts."""

    global_batch: int
    steps_per_epoch: int
    total_steps: int


def plan(dataset: Dataset, settings: Settings) -> Plan:
    """The plan of a run over an indexed data set, no stream; what fills no global batch is left to other epochs."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise TypeError(f"{type(dataset).__name__} is a stream: training takes data sets with a length and an index")
    joined = settings.batch_size * settings.accumulate * world_size()
    steps = len(dataset) // joined
    if not steps:
        raise ValueError(
            f"a batch takes {joined} images ({settings.batch_size} x {settings.accumulate} parts x {world_size()} "
            f"processes), and there are {len(dataset)}: lower batch_size"
        )
    return Plan(joined, steps, settings.steps or settings.epochs * steps)


def step_batches(length: int, plan: Plan, settings: Settings, start: int = 0) -> Iterator[list[tuple[int, int]]]:
    """The batches of this process, from step `start` on to the end of the run: lists of (epoch, index).

    An epoch's order of the `length` images depends on (seed, epoch). A step takes the next part of it, cut first into
    accumulated parts and then into processes: so two processes together see what one with the global batch sees.
    """
    order, shuffled, size = [], None, settings.batch_size
    for step in range(start, plan.total_steps):
        epoch, number = divmod(step, plan.steps_per_epoch)
        if epoch != shuffled:
            order = torch.randperm(length, generator=seeding.generator(settings.seed, epoch)).tolist()
            shuffled = epoch
        for part in range(settings.accumulate):
            at = number * plan.global_batch + (part * world_size() + rank()) * size
            yield [(epoch, index) for index in order[at : at + size]]


class SeededDataset(Dataset):
    """Items by (epoch, index), whose random augmentation depends on (seed, epoch, index) alone.

    The time that each takes is noted in `work`, if it is given.
    """

    def __init__(self, dataset: Any, seed: int, work: Work | None = None):
        self.dataset: Any = as_images(dataset)
        self.seed, self.work = seed, work

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        (epoch, index), started = key, perf_counter()
        with seeding.seeded(self.seed, epoch, index):
            item = self.dataset[index]
        if self.work is not None:
            self.work.add(started)
        return item


def step_loader(
    dataset: Any, plan: Plan, settings: Settings, start: int = 0, collate: Callable | None = None,
    work: Work | None = None,
) -> Generator[list[Any], None, None]:  # fmt: skip
    """The accumulated parts of each step, as lists of batches on the CPU."""
    loader = DataLoader(
        SeededDataset(dataset, settings.seed, work),
        batch_sampler=step_batches(len(dataset), plan, settings, start),
        num_workers=settings.workers,
        worker_init_fn=outlast_signals,
        collate_fn=collate,
        pin_memory=settings.device.startswith("cuda"),
    )
    batches = iter(loader)  # one for the whole run: workers start once, and load across the ends of epochs
    for _ in range(start, plan.total_steps):
        yield [next(batches) for _ in range(settings.accumulate)]


def to_device(nest: Any, device: torch.device) -> Any:
    """All tensors in lists, tuples, named tuples and dicts, moved."""
    if isinstance(nest, Tensor):
        return nest.to(device, non_blocking=True)
    if isinstance(nest, dict):
        return {key: to_device(value, device) for key, value in nest.items()}
    if isinstance(nest, (list, tuple)):
        moved = [to_device(value, device) for value in nest]
        return type(nest)(*moved) if hasattr(nest, "_fields") else type(nest)(moved)
    return nest
