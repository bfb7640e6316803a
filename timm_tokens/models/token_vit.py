"""`token_vit`: any timm ViT by name, with parts from plain data. Every registered model is made by `build`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
from timm.layers import resample_abs_pos_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, register_model
from torch import Tensor, nn

from timm_tokens.protocol import under_base
from timm_tokens.vit import TokenViT
from timm_tokens.wrap import add_aux_tokens, add_mask_token, apply_dtem_merging, token_label_head

DEFAULT_BASE = "vit_tiny_patch16_224"  # of token_vit, so that what walks over timm.list_models() can make it


def build(
    variant: str,
    pretrained: bool,
    base: str,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **kwargs: Any,
) -> TokenViT:
    """Create a TokenViT through timm's own builder.

    Args:
        pretrained: Load weights: the base's own, or those of a whole TokenViT where timm found such a checkpoint
            (`local-dir:`, `hf-hub:`).
        base: Any timm ViT's name, with or without a tag; or a model's of this package, which then gets the parts.
        pretrained_cfg: A tag of the base's weights; or, from timm, the description of a whole checkpoint.
        pretrained_cfg_overlay: Replacements in it, such as dict(file="weights.safetensors") for the base's weights.
        kwargs: The parts, as for `with_parts`, and timm's arguments for the base, such as img_size.
    """
    if not isinstance(base, str):
        raise TypeError(f'base must be the name of a timm ViT, such as "vit_small_patch16_224", got {base!r}')
    whole = pretrained_cfg is not None and not isinstance(pretrained_cfg, str)
    if isinstance(pretrained_cfg, str):
        base = f"{base.split('.')[0]}.{pretrained_cfg}"
    weights: dict[str, Any] = dict(pretrained=pretrained and not whole, cache_dir=kwargs.get("cache_dir"))
    weights |= {} if whole else {"pretrained_cfg_overlay": pretrained_cfg_overlay}
    make: Callable[..., Any] = partial(timm.create_model, base, **weights)

    model = build_model_with_cfg(
        make if _is_own(base) else partial(with_parts, make),
        variant,
        pretrained=pretrained and whole,
        pretrained_cfg=pretrained_cfg if whole else wrapped_cfg(base) | {"architecture": variant},
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        pretrained_filter_fn=fit_position_embedding,
        feature_cfg=dict(out_indices=3, feature_cls="getter"),
        **kwargs,
    )
    if isinstance(model, TokenViT):  # and no feature extractor
        model.pretrained_cfg["classifier"] = model.classifiers
    return model


def with_parts(
    make: Callable[..., nn.Module],
    *,
    aux: dict[str, Any] | None = None,
    merger: dict[str, Any] | None = None,
    head: dict[str, Any] | None = None,
    mask_token: bool = False,
    base_num_classes: int | None = None,
    **base_args: Any,
) -> TokenViT:
    """A TokenViT around the plain ViT that make(**base_args) gives.

    `aux`, `merger` and `head` are arguments of `add_aux_tokens`, `apply_dtem_merging` and `token_label_head`;
    `base_num_classes` are those of the base's own classifier, where the head's are others.
    """
    if base_num_classes is not None:
        head = {"num_classes": base_args.get("num_classes")} | (head or {})
        base_args["num_classes"] = base_num_classes
    model = TokenViT(make(**base_args))
    for add, options in ((add_aux_tokens, aux), (apply_dtem_merging, merger), (token_label_head, head)):
        model = model if options is None else add(model, **options)
    return add_mask_token(model) if mask_token else model


def wrapped_cfg(base: str) -> dict[str, Any]:
    """The pretrained_cfg of a timm model, for a TokenViT around it."""
    cfg = get_pretrained_cfg(base)
    if cfg is None:
        raise RuntimeError(f"Unknown base model ({base})")
    cfg = cfg.to_dict()
    names = () if _is_own(base) else ("first_conv", "classifier")  # which are those of a TokenViT already
    return cfg | {key: under_base(cfg[key]) for key in names if cfg.get(key)}


def _is_own(base: str) -> bool:
    """Whether the model of this name is one of this package's."""
    return timm.is_model(base) and timm.models.model_entrypoint(base).__module__.startswith(__package__)


def cfgs(variants: dict[str, str]) -> dict[str, Any]:
    """timm's default_cfgs for variants {name: base}: each has all pretrained tags of its base."""
    found: dict[str, Any] = {}
    for name, base in variants.items():
        found |= {tagged.replace(base, name, 1): wrapped_cfg(tagged) for tagged in timm.list_pretrained(f"{base}.*")}
    return generate_default_cfgs(found)


def fit_position_embedding(state_dict: dict[str, Tensor], model: TokenViT, described: bool = True) -> dict[str, Tensor]:
    """Resample a whole checkpoint's position embedding to the model's grid.

    `described` says whether timm told the model of the checkpoint that it now loads, image size included.
    """
    own, given = getattr(model.base, "pos_embed", None), state_dict.get("base.pos_embed")
    if own is None or given is None:
        return state_dict
    new, prefix = list(model.base.patch_embed.grid_size), 0 if model.base.no_embed_class else model.num_prefix_tokens
    old = _saved_grid(model, given.shape[1] - prefix) if described else None
    if own.shape != given.shape or old not in (None, new):
        given = resample_abs_pos_embed(given, new_size=new, old_size=old, num_prefix_tokens=prefix)
    return state_dict | {"base.pos_embed": given}


def _saved_grid(model: TokenViT, count: int) -> list[int] | None:
    """The grid of a checkpoint's `count` patches, by the image size that it was saved with; None: a square one."""
    size = getattr(model, "pretrained_model_args", {}).get("img_size")
    if size is None:
        return None
    sides = [size, size] if isinstance(size, int) else size
    grid = [side // patch for side, patch in zip(sides, model.base.patch_embed.patch_size, strict=True)]
    return grid if grid[0] * grid[1] == count else None


default_cfgs = cfgs({"token_vit": DEFAULT_BASE})


@register_model
def token_vit(pretrained: bool = False, base: str = DEFAULT_BASE, **kwargs: Any) -> TokenViT:
    """Any timm ViT with parts: `timm.create_model("token_vit", base="<name>", merger=dict(r=13))`."""
    return build("token_vit", pretrained, base=base, **kwargs)
