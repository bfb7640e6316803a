"""Hooks of a module part of whose work is called: fired as torch fires them when the module itself is called.

A block whose tokens merge is called in two halves, past `Module.__call__`, which is where torch fires hooks. What is
registered on the block (or on all modules) fires here instead, in torch's order and with torch's rules.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as everywhere  # torch keeps the hooks of all modules there
from torch.utils.hooks import BackwardHook

Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = dict[str, Any]


def has_own(module: nn.Module) -> bool:
    """Whether the module itself has hooks."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module fires hooks."""
    return has_own(module) or bool(
        everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    )


def sees_calls(layer: nn.Module) -> bool:
    """Whether the layer's own hooks see or change what it computes."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def is_plain(layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether calling the layer is nothing but its weights: no adapter, quantisation, hook or the like."""
    if type(layer) is not kind or sees_calls(layer) or "forward" in layer.__dict__:
        return False
    return is_ordinary(layer.weight)


def is_ordinary(weight: object) -> bool:
    """Whether this is a tensor and no subclass that computes in its own way, as quantised and sharded ones are."""
    return isinstance(weight, Tensor) and not hasattr(type(weight), "__tensor_flatten__")


def call(module: nn.Module, forward: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """What module(*args, **kwargs) gives, with its hooks, where `forward` stands for the module's own."""
    if not is_hooked(module):
        return forward(*args, **kwargs)
    result, done = None, set()

    def run() -> Any:
        nonlocal args, kwargs, result
        args, kwargs = before(module, args, kwargs)
        backward = _backward(module)
        if backward is not None:
            args = backward.setup_input_hook(args)
        result = forward(*args, **kwargs)
        for key, hook, takes_kwargs, _ in _after(module):
            done.add(key)
            changed = hook(module, args, kwargs, result) if takes_kwargs else hook(module, args, result)
            result = result if changed is None else changed
        return result if backward is None else backward.setup_output_hook(result)

    if torch.compiler.is_compiling():  # errors can't be caught there, no more than in torch's own call
        return run()
    try:
        return run()
    except Exception:
        for key, hook, takes_kwargs, always in _after(module):
            if always and key not in done:
                _call_anyway(hook, (module, args, kwargs, result) if takes_kwargs else (module, args, result))
        raise


def around(module: nn.Module, run: Callable[[Any], Any], state: Any) -> Any:
    """What run(state) gives, with the hooks of a module for which it stands, and which takes and gives tokens alone:
    the first field of `state`, a named tuple."""
    ends: list[Any] = []

    def forward(x: Tensor) -> Tensor:
        ends.append(run(type(state)(x, *state[1:])))
        return cast(Tensor, ends[-1][0])

    x = call(module, forward, (state[0],), {})
    return type(state)(x, *ends[-1][1:])


def _call_anyway(hook: Callable[..., Any], arguments: Args) -> None:
    """Call a hook that is to be called after errors, too, whose own error must not hide the first."""
    try:
        hook(*arguments)
    except Exception as error:
        warnings.warn(f"a forward hook with always_call=True raised, after another error: {error}", stacklevel=2)


def before(module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """What the module's forward-pre hooks make of the arguments."""
    for key, hook in (*everywhere._global_forward_pre_hooks.items(), *module._forward_pre_hooks.items()):
        if key in module._forward_pre_hooks_with_kwargs:
            changed = hook(module, args, kwargs)
            if changed is not None:
                args, kwargs = changed
        else:
            changed = hook(module, args)
            if changed is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
    return args, kwargs


def _after(module: nn.Module) -> Iterator[tuple[int, Callable[..., Any], bool, bool]]:
    """The forward hooks: key, hook, whether it takes keyword arguments, and whether it is called after errors, too."""
    for source, name in ((everywhere, "_global_forward_hooks"), (module, "_forward_hooks")):
        with_kwargs, always = getattr(source, f"{name}_with_kwargs"), getattr(source, f"{name}_always_called")
        for key, hook in getattr(source, name).items():
            yield key, hook, key in with_kwargs, key in always


def _backward(module: nn.Module) -> BackwardHook | None:
    """torch's own object that fires the module's full backward hooks; None without any."""
    hooks, deprecated = module._get_backward_hooks()
    if deprecated:
        raise TypeError(
            f"{type(module).__name__} has a backward hook from register_backward_hook, which torch deprecates and "
            "which a block whose tokens merge can't fire; use register_full_backward_hook"
        )
    before_backward = module._get_backward_pre_hooks()
    return BackwardHook(module, hooks, before_backward) if hooks or before_backward else None
