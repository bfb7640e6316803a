"""Teachers: a frozen copy of the student that follows it as an exponential moving average."""

import copy

import torch
from timm.utils import unwrap_model
from torch import nn

from timm_tokens.distributed import is_sharded, local
from timm_tokens.ops.ranges import check_within


def frozen_copy(student: nn.Module) -> nn.Module:
    """A deep copy without gradients, in evaluation mode (so without drop path). Call its `train()` where batch norm
    should use the batch. `TokenTask.train` leaves its mode alone."""
    return copy.deepcopy(unwrap_model(student)).requires_grad_(False).eval()


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, for all that the teacher has, matched by name.

    Parameters and floating-point buffers are averaged, in a few foreach kernels; integer buffers are copied. The
    student may be wrapped in DDP, and may have more than the teacher (a predictor, say).

    Args:
        momentum: In [0, 1]; 1 leaves the teacher as it is.

    Raises:
        ValueError: The momentum is out of range, or the teacher has something that the student lacks, or of another
            shape, or one of the two is sharded by FSDP2 and the other is not.
    """
    check_within(momentum=momentum)
    source, ours, theirs = unwrap_model(student).state_dict(), [], []
    for name, value in teacher.state_dict().items():
        given = source.get(name)
        if given is None or given.shape != value.shape:
            found = "nothing of this name" if given is None else f"shape {tuple(given.shape)}"
            raise ValueError(f"the teacher's {name!r} has shape {tuple(value.shape)}, the student has {found}")
        if is_sharded(value) != is_sharded(given):
            raise ValueError(f"{name!r} is sharded in the teacher or the student alone: a task names its `followers()`")
        if value.is_floating_point():
            ours.append(local(value))
            theirs.append(local(given))
        else:
            value.copy_(given)
    if ours:
        torch._foreach_lerp_(ours, theirs, 1 - momentum)


def use_batch_statistics(teacher: nn.Module) -> nn.Module:
    """Let the batch norms of a frozen copy normalise by the batch, as the student's do; everything else stays as is."""
    for module in teacher.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.training = True  # not train(): timm's hold an activation, and may hold a dropout
    return teacher
