"""Weights from elsewhere: checkpoints of plain ViTs, and models that were made on the meta device."""

from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from timm_tokens import blocks
from timm_tokens.timm_types import ViT, Wrapped

PUBLISHED_HEAD = "aux_head"  # the token-label head in published checkpoints


def whole_name(name: str) -> str:
    """A TokenViT's name of a weight in a plain or published checkpoint."""
    module, _, leaf = name.rpartition(".")
    return f"head.tokens.{leaf}" if module == PUBLISHED_HEAD else f"base.{name}"


def classifiers(base: ViT) -> tuple[str, ...]:
    """Names of the classifiers in the base's published checkpoints."""
    names = (getattr(base, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def on_meta(model: nn.Module) -> bool:
    """Whether anything of the model is on the meta device."""
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def before_loading(
    model: Wrapped, state_dict: dict[str, Tensor], prefix: str, metadata: dict[str, Any], *_: Any
) -> None:
    """A hook of TokenViT: a checkpoint of the plain ViT goes to the base, and the parts keep what they have.

    A published token-label head goes to the head. It must be there if the base is one that is published with it.
    """
    own = {name for name in state_dict if name.startswith(prefix)}
    model._load = {"known": bool(own), "assigns": "assign_to_params_buffers" in metadata, "kept": {}}
    if not own or any(name.startswith(f"{prefix}base.") for name in own):
        return
    for name in own:
        state_dict[prefix + whole_name(name[len(prefix) :])] = state_dict.pop(name)
    given = {name.rpartition(".")[0] for name in state_dict}
    if PUBLISHED_HEAD in classifiers(model.base):
        given.add(f"{prefix}head.tokens")
    names = {prefix + name: name for name in model.state_dict(keep_vars=True) if not name.startswith("base.")}
    model._load["kept"] = {full: name for full, name in names.items() if full.rpartition(".")[0] not in given}


def after_loading(model: Wrapped, incompatible: Any) -> None:
    """A hook of TokenViT: what a plain checkpoint lacks is not missing, and is initialised if it never was."""
    load = model.__dict__.pop("_load")
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if name not in load["kept"]]
    fresh = model._unset or (load["assigns"] and on_meta(model))
    if not (load["known"] and fresh) or any(weight.is_meta for weight in model.base.parameters()):
        return
    _compute_buffers(model.base)  # first, as embeddings start from all that makes the keys
    initialise_parts(model, set(load["kept"].values()))
    model._unset = False
    names = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if names and not incompatible.missing_keys:
        raise RuntimeError(
            f"the checkpoint leaves {', '.join(names)} on the meta device; call model.to_empty(device=...) and "
            "model.init_weights() before loading it"
        )


@torch.no_grad()
def initialise_parts(model: Wrapped, names: set[str] | None = None) -> None:
    """Give the parts' weights of these names (None: all) new values, as when they are built, on the base's device and
    in its type."""
    options = blocks.placement(model.base)
    for name, part in model.parts.items():
        own = {} if part is None else part.state_dict()
        wanted = {key for key in own if names is None or f"{name}.{key}" in names}
        if not wanted:
            continue
        loaded = {key: value.clone() for key, value in own.items() if key not in wanted}
        if on_meta(part):
            part.to_empty(device=options["device"]).to(options["dtype"])
        part.reset_parameters(*(() if part is not model.merger else (model.base,)))
        part.load_state_dict(loaded, strict=False)
    if model.mask_token is not None and (names is None or "mask_token" in names):
        if model.mask_token.is_meta:
            model.mask_token = nn.Parameter(torch.empty(model.mask_token.shape, **options))
        trunc_normal_(model.mask_token, std=0.02)


def _compute_buffers(base: ViT) -> None:
    """Compute what the base's modules compute when they are made and no checkpoint holds, such as rotary tables."""
    device = next(base.parameters()).device
    for module in base.modules():
        computes = hasattr(module, "init_non_persistent_buffers")
        for name in module._non_persistent_buffers_set:
            buffer = getattr(module, name)
            if buffer is not None and buffer.is_meta and (computes or not buffer.numel()):
                setattr(module, name, torch.empty_like(buffer, device=device))
        if computes:
            module.init_non_persistent_buffers()
