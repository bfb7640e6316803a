"""What torch's older tracers can't do with a TokenViT is refused in words."""

from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.fx import Proxy


def refuse_symbols(images: object) -> None:
    """Refuse images that torch.fx stands in for, whose number of tokens can't be computed."""
    if isinstance(images, Proxy):
        raise TypeError(
            "torch.fx can't trace a TokenViT symbolically, as its shapes are computed in Python; take features by "
            "forward_intermediates or forward hooks (feature_cls='getter' or 'hook', AttentionExtract with "
            "method='hook'), and graphs by torch.export"
        )


def refuse_old_onnx() -> None:
    """Refuse torch.onnx.export(..., dynamo=False), which turns sorts and sums over indices into wrong ones."""
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "torch.onnx.export(..., dynamo=False) exports merging wrongly; pass dynamo=True, and "
            "dynamic_shapes=({0: torch.export.Dim('batch')},) for any batch size"
        )


def traced_forward(model: nn.Module, images: Any, *defaults: Any, **options: Any) -> Any:
    """What torch calls for a module's forward while it traces.

    torch.onnx.export(..., dynamo=False) gives the defaults of all options by position, in the order of the signature.
    """
    names = list(signature(model.forward).parameters)[1:]
    return nn.Module._slow_forward(model, images, **dict(zip(names, defaults, strict=False)), **options)


def refuse_scripting(model: nn.Module) -> None:
    """What torch.jit.script calls first, also where the model is inside of another module."""
    raise TypeError("torch.jit.script can't compile a TokenViT; use torch.compile, torch.export or torch.jit.trace")
