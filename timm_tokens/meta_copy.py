"""Copies of models without data, to count what they compute."""

from copy import deepcopy
from itertools import chain
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def meta_copy(model: M) -> M:
    """A copy of the model in evaluation mode, in float32 and without data, hooks or shards.

    Quantised linear maps become plain ones, which cost as much.
    """
    memo: dict[int, Any] = {}  # what deepcopy takes in the place of an object
    for module in model.modules():
        if is_quantized(module):
            memo[id(module)] = nn.Linear(cast(int, module.in_features), cast(int, module.out_features), device="meta")
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            memo[id(hooks)] = type(hooks)()
    loose = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    for tensor in chain(model.parameters(), model.buffers(), loose):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty(tensor.shape, dtype=dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
    for module in reversed([*model.modules()]):  # parts first
        if hasattr(module, "unshard"):
            _copy_sharded(module, memo)
    return deepcopy(model, memo).eval()


def _copy_sharded(module: nn.Module, memo: dict[int, Any]) -> None:
    """Copy what FSDP2's `fully_shard` gave a class that refuses to be copied, as what it was before."""
    plain: nn.Module = object.__new__(type(module).__bases__[-1])
    memo[id(module)] = plain
    own = {name: value for name, value in vars(module).items() if not name.startswith("__")}  # without FSDP2's state
    vars(plain).update(deepcopy(own, memo))


def is_quantized(module: nn.Module) -> bool:
    """Whether the module is a linear map whose weights are not numbers in floating point, and holds no other."""
    linear, *inside = (hasattr(m, "in_features") and hasattr(m, "out_features") for m in module.modules())
    weight = getattr(module, "weight", None)
    return linear and not any(inside) and not (isinstance(weight, Tensor) and weight.is_floating_point())
