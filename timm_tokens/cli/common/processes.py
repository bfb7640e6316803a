"""The processes of a run: one, or as many as torchrun started."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so

from timm_tokens.cli.common import checks
from timm_tokens.distributed import gather_objects, leave


class Process(NamedTuple):
    """This process: its number, how many there are, and where it computes."""

    rank: int
    world: int
    device: str
    group: dist.ProcessGroup | None = None  # on the CPU, and patient: the fastest of a long run waits for the slowest

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier(group=self.group)

    def gather(self, items: list) -> list:
        """The items of all processes, the same on each."""
        return [item for part in gather_objects(items, self.group) for item in part]


@contextmanager
def joined(name: str | None) -> Iterator[Process]:
    """Join the processes that torchrun started, if it did, and leave them at the end.

    Args:
        name: The device's; None: a GPU if there is one. With several processes each takes the one of its number.
    """
    device = checks.device(name)
    if dist.is_available() and dist.is_initialized():  # by the caller, whose group it stays
        yield Process(dist.get_rank(), dist.get_world_size(), device, _patient_group())
        return
    found = init_distributed_device_so(device)
    group = _patient_group() if found["distributed"] else None
    try:
        yield Process(found["global_rank"], found["world_size"], found["device"], group)
    except BaseException:
        if found["distributed"]:
            dist.destroy_process_group()  # at once: the others may never come
        raise
    if found["distributed"]:
        leave(group)


def _patient_group() -> Any:
    return dist.new_group(backend="gloo", timeout=timedelta(days=30))
