"""How fast images are loaded and how fast steps take them: which of the two waits for the other."""

from collections.abc import Iterable, Iterator
from time import perf_counter
from typing import TypeVar

import torch
from torch.utils.data import get_worker_info

from timm_tokens.distributed import world_size

Batch = TypeVar("Batch")


class Work:
    """What the processes that load images have done: the time that it took, and how many images it was.

    With 0 workers the main process loads them.
    """

    def __init__(self, workers: int):
        self.done = torch.zeros(max(1, workers), 2, dtype=torch.float64)  # seconds, images
        if workers:
            self.done.share_memory_()

    def add(self, started: float) -> None:
        """Note an image that was begun at this time, by `perf_counter`, and is ready now."""
        info = get_worker_info()
        self.done[info.id if info else 0] += torch.tensor([perf_counter() - started, 1.0], dtype=torch.float64)

    def rate(self) -> float:
        """Images per second of all workers together."""
        seconds, images = self.done[self.done[:, 1] > 0].unbind(1)
        return float((images / seconds).sum())


class Pace:
    """Watches the batches and steps of a run, all but the first, which come with costs of their own, such as compiling.

    The time of a step is that of its Python code: where a GPU is behind it, the code waits for it now and then, when it
    reads the losses. So the rates are right where the steps are what takes long. A step takes `images` on this process.
    """

    def __init__(self, images: int, workers: int):
        self.images, self.workers, self.work = images, workers, Work(workers)
        self.waited = self.stepped = 0.0
        self.steps, self.told = 0, False

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches."""
        came = done = 0.0
        for count, batch in enumerate(batches):
            before, came = came, perf_counter()
            if count > 1:
                self.waited += came - done
                self.stepped += done - before
                self.steps += 1
            yield batch
            done = perf_counter()

    def first_line(self) -> str | None:
        """What was measured, in words; None if there was nothing to measure yet, or if it was told before."""
        if not self.steps or self.told:
            return None
        self.told = True
        loader, step = (x * world_size() for x in (self.work.rate(), self.steps * self.images / self.stepped))
        share = self.waited / (self.waited + self.stepped)
        who = f"the steps are slower, and wait for images {share:.0%} of the time"
        if loader < step:
            who = f"the loader is slower, and the steps wait for images {share:.0%} of the time: more workers may help"
        workers = f"{self.workers or 'no'} worker{'s' if self.workers != 1 else ''}"
        return f"loader {loader:.4g} images/s ({workers}), steps {step:.4g} images/s: {who}"
