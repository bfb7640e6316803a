"""End soon when another process of the job dies, instead of waiting for it until the network times out.

A thread on each process joins a small reduction on the CPU every second. A process that is killed breaks its
connections, which the others' threads see at once; a machine that is gone without a word is found out by a time-out.
The main thread may then be waiting for a GPU, where no exception can reach it: if it does not return by itself, the
thread ends the process.
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from timm_tokens.distributed import world_size
from timm_tokens.stopping import Requests, Stopped

INTERVAL = 1.0  # seconds between two reductions
GRACE = 5.0  # seconds for the main thread to notice by itself that a process is lost

_MESSAGE = "another process of the job has ended, so this one ends, too: start all of them again, and let them resume"


class PeerLost(ConnectionError):
    """Another process of the job has ended, or can't be reached any more."""


@contextmanager
def together(requests: Requests | None = None, patience: float = 45.0) -> Iterator[None]:
    """While the block runs, watch the other processes; at its end, wait until all of them have reached theirs.

    Where an exception leaves the block on one process, the others end, too. On a single process it does nothing.

    Args:
        requests: A signal that one process has heard is noted here on all of them; None: each keeps its own.
        patience: Seconds without a sign of life after which a process is taken for dead.

    Raises:
        PeerLost: Another process has ended, by a signal or an error of its own.
    """
    if world_size() == 1:
        yield
        return
    watch = _Watch(requests or Requests(), patience)
    watch.start()
    try:
        yield
    except Stopped:  # on all of them
        watch.leave()
        raise
    except BaseException as error:
        watch.leave(failed=True)
        if _of_network(error):
            raise PeerLost(_MESSAGE) from error
        raise
    watch.leave()
    if watch.lost:
        raise PeerLost(_MESSAGE)


class _Watch(threading.Thread):
    """Takes part in the reductions until all processes leave, or one is lost."""

    def __init__(self, requests: Requests, patience: float):
        super().__init__(name="timm-tokens peers", daemon=True)
        self.requests, self.patience = requests, patience
        self.leaving, self.failed, self.lost = threading.Event(), False, False
        self.group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=patience))

    def leave(self, failed: bool = False) -> None:
        """End the watch: when all processes leave, or without waiting for them after an error."""
        self.failed = failed
        self.leaving.set()
        self.join(self.patience if failed else None)

    def run(self) -> None:
        try:
            while self._all_are_there():
                self.leaving.wait(INTERVAL)
        except RuntimeError:  # a connection is broken, or nothing came for too long
            self.lost = True
        if self.lost and not self.leaving.wait(GRACE):
            print(_MESSAGE, file=sys.stderr, flush=True)
            os._exit(1)

    def _all_are_there(self) -> bool:
        """One reduction: whether to go on watching."""
        leaving = self.leaving.is_set()
        state = torch.tensor([not leaving, self.failed, self.requests.received], dtype=torch.int32)
        dist.all_reduce(state, op=dist.ReduceOp.MAX, group=self.group)
        staying, failed, received = state.tolist()
        if received:  # only then, for the main thread may just have heard one
            self.requests.received = received
        self.lost = bool(failed) and not self.failed
        return bool(staying) and not failed


def _of_network(error: BaseException) -> bool:
    """Whether a process group raised it, because a connection broke or a time ran out."""
    named = any(word in str(error) for word in ("gloo", "Gloo", "NCCL", "ProcessGroup"))
    return isinstance(error, RuntimeError) and (named or isinstance(error, dist.DistError))
