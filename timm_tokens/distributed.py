"""Reductions and gathers over the processes of a job: what a loss needs to see the whole batch. One process needs none.

No gradient passes through them, except for `all_reduce_sum_with_gradient`. Where a loss divides by a reduced count,
DistributedDataParallel, which averages the gradients of the processes, makes it the gradient of the global batch.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """How many processes share the batch: 1 unless torch.distributed is initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them: 0 unless torch.distributed is initialised."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def leave(group: dist.ProcessGroup | None = None) -> None:
    """Leave the group of processes, once all of them are here; it must not be used after that.

    Without the wait gloo can hang: its threads need Python's lock to let go of the last reduction's tensors, and
    whoever destroys the group holds that lock while waiting for the threads. At a barrier the lock is free. The wait
    is in `group` first, if the default group would lose its patience.
    """
    if group is not None:
        dist.barrier(group=group)
    dist.barrier()
    dist.destroy_process_group()


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of x over the processes: any shape, the same on each."""
    if world_size() == 1:
        return x.detach()
    x = x.detach().clone()  # all_reduce writes in place
    dist.all_reduce(x, op=dist.ReduceOp.SUM)
    return x


def all_reduce_sum_with_gradient(x: Tensor) -> Tensor:
    """The sum of x over the processes; the gradient of x is the sum of theirs."""
    return x if world_size() == 1 else _AllReduceSum.apply(x)


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce_sum(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient)


def all_reduce_max(x: Tensor) -> Tensor:
    """The elementwise maximum of x over the processes: any shape, the same on each."""
    if world_size() == 1:
        return x.detach()
    x = x.detach().clone()
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def all_reduce_mean(x: Tensor) -> Tensor:
    """The mean of x over the processes, each counting the same: any shape, the same on each."""
    return all_reduce_sum(x) / world_size()


def batch_mean(x: Tensor) -> Tensor:
    """The mean over the global batch of all processes, which may hold parts of different sizes: (B, ...) -> (...)."""
    return all_reduce_sum(x.sum(0)) / batch_size(x)


def batch_logmeanexp(x: Tensor) -> Tensor:
    """log(batch_mean(exp(x))) of finite x, without leaving the range of its type: (B, ...) -> (...)."""
    largest = all_reduce_max(x.amax(0))
    return largest + batch_mean((x - largest).exp()).log()


def batch_size(x: Tensor) -> Tensor:
    """The size of the global batch of all processes, a scalar on the device: nothing waits for it."""
    return all_reduce_sum(torch.full((), x.shape[0], dtype=torch.float32, device=x.device))


def all_gather_batch(x: Tensor) -> Tensor:
    """The global batch of all processes, in their order: (B, ...) -> (processes B, ...). All must have the same B."""
    if world_size() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def gather_objects(item: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """What each process (of the group) has, in their order, the same on each: anything that can be pickled."""
    if world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item, group=group)
    return items


def is_sharded(x: Any) -> bool:
    """Whether it is a tensor that FSDP2 has shared out among the processes (a DTensor)."""
    return hasattr(x, "full_tensor")


def local(x: Any) -> Any:
    """This process's part of a sharded tensor; anything else as it is."""
    return x.to_local() if is_sharded(x) else x


def whole(nest: Any) -> Any:
    """The same with whole tensors, on the CPU, in the place of sharded ones; all processes must call it."""
    if isinstance(nest, dict):
        return {name: whole(x) for name, x in nest.items()}
    if isinstance(nest, list):
        return [whole(x) for x in nest]
    return nest.full_tensor().cpu() if is_sharded(nest) else nest


def sharded_like(value: Any, own: Any) -> Any:
    """A whole tensor sharded as another one is; where that is whole, or of another shape, the value as it is."""
    if not is_sharded(own) or not isinstance(value, Tensor) or value.shape != own.shape:
        return value
    from torch.distributed.tensor import distribute_tensor  # not above: it takes time to import

    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)


def sharded_as(state: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Whole tensors sharded as those of the same names are; see `sharded_like`."""
    return {name: sharded_like(value, own.get(name)) for name, value in state.items()}


def norms_of(tensors: list[Any]) -> Tensor:
    """(P,) the norm of each tensor, sharded or not; 0 where there are none."""
    if not tensors:
        return torch.zeros(1)
    found = torch.stack(torch._foreach_norm([local(x) for x in tensors]))
    return all_reduce_sum(found.square()).sqrt() if any(is_sharded(x) for x in tensors) else found
