"""Work for two processes on the CPU, which reduce over gloo as those that torchrun starts do."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from timm_tokens import distributed

# Processes are forked from a server that has imported these once, which takes each of them seconds otherwise.
multiprocessing.set_forkserver_preload(["timm_tokens.cli.train.objective", "torch.distributed.fsdp"])


def on_two(work: Callable[[int, Path], Any], folder: Path) -> list[Any]:
    """What work(rank, folder) returns on each of two processes, which import it from its module."""
    multiprocessing.start_processes(_process, (work, folder), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"returned{rank}.pt") for rank in range(2)]


def _process(rank: int, work: Callable[[int, Path], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=120)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timeout)
    torch.save(work(rank, folder), folder / f"returned{rank}.pt")
    distributed.leave()
