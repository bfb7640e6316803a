"""Models for the commands: made by name or as options say, and merged, with one clear line for what can't be."""

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import timm
from torch import nn

from timm_tokens.cli.common import checkpoints
from timm_tokens.cli.errors import CommandError
from timm_tokens.cli.options import ModelOptions, WeightOptions
from timm_tokens.data import model_input
from timm_tokens.ops.finite import check_weights
from timm_tokens.vit import TokenViT
from timm_tokens.wrap import apply_dtem_merging


def create(name: str | None, **kwargs: Any) -> nn.Module:
    """timm.create_model, whose refusals become one line."""
    if name is None:
        raise CommandError("--model is missing: the name of a model in timm")
    known = timm.is_model(name) or ":" in name  # "hf-hub:..." and "local-dir:..." are for timm to judge
    if not known:
        close = get_close_matches(name, timm.list_models(), n=3)
        raise CommandError(f"timm has no model {name!r}{f'; close are {chr(44).join(close)}' if close else ''}")
    try:
        model = timm.create_model(name, **kwargs)
    except Exception as error:  # its arguments are the user's, and models meet those that don't fit in many ways
        raise CommandError(f"timm can't make {name!r}: {error or type(error).__name__}") from error
    if getattr(getattr(plain(model), "patch_embed", None), "num_patches", None) == 0:  # timm 1.0.26 makes it
        raise CommandError(f"timm can't make {name!r}: its images are smaller than a patch; give a larger img_size")
    if isinstance(kwargs.get("img_size"), int):
        check_size(model, kwargs["img_size"])
    return model


def make_model(options: ModelOptions, *, classifier: bool = False, any_size: bool = False, **kwargs: Any) -> nn.Module:
    """The model that the options name.

    Args:
        classifier: Whether the checkpoint's classifier has to fit, too.
        any_size: Whether a ViT is to take images of all sizes, as conv nets do.
        kwargs: For timm.create_model: num_classes, and what the command needs; the options come first.
    """
    path = options.checkpoint
    kwargs |= {"pretrained": options.pretrained and path is None} | arguments(options)
    sizes: dict[str, Any] = {} if options.img_size is None else {"img_size": options.img_size}
    sizes |= {"dynamic_img_size": True} if any_size and "dynamic_img_size" not in kwargs else {}
    model = _create_sized(options.model, sizes, kwargs)
    if path is not None:
        checkpoints.load(model, path, options.checkpoint_key, classifier=classifier)
    check_weights(model)
    return model


def _create_sized(name: str | None, sizes: dict[str, Any], kwargs: dict[str, Any]) -> nn.Module:
    """`create`, without those arguments about sizes that the model does not know: conv nets take any size."""
    try:
        return create(name, **kwargs | sizes)
    except CommandError as error:
        known = {size: x for size, x in sizes.items() if f"unexpected keyword argument '{size}'" not in str(error)}
        if known == sizes:
            raise
    return _create_sized(name, known, kwargs)


def arguments(options: ModelOptions) -> dict[str, Any]:
    """What the options say for timm.create_model, beside names, weights and sizes."""
    channels = {} if options.in_chans is None else {"in_chans": options.in_chans}
    return channels | options.model_kwargs


def weights_of(options: WeightOptions) -> str:
    """Where the weights come from, in words, for commands that measure or use what a model has learned."""
    if options.random:
        if options.pretrained or options.checkpoint:
            raise CommandError("--random is for a model without --pretrained and --checkpoint: leave them out")
        return "random"
    if options.checkpoint:
        return str(options.checkpoint)
    if ":" in (options.model or ""):  # "hf-hub:..." and "local-dir:..." name weights
        return f"those of {options.model}"
    if not options.pretrained:
        raise CommandError(
            "which weights? Give --pretrained for timm's, or --checkpoint FILE. Without them the weights would be "
            "random, which --random asks for"
        )
    return "timm's"


def make_trained(options: WeightOptions, *, load: bool = True, **kwargs: Any) -> nn.Module:
    """`make_model` with the weights that the options have to name; not `load`: of a checkpoint they are not loaded."""
    weights_of(options)
    options = replace(options, pretrained=options.checkpoint is None and not options.random)
    return make_model(options if load else replace(options, checkpoint=None, checkpoint_key=None), **kwargs)


def make_backbone(options: ModelOptions, **kwargs: Any) -> nn.Module:
    """The model without a classifier; a ViT so that it takes crops of all sizes."""
    return make_model(options, any_size=True, num_classes=0, **kwargs)


def merged(model: nn.Module, r: int | Sequence[int], metric: str | None = None, default: str = "learned") -> TokenViT:
    """The model with r tokens merged in each block; metric None: as its own merger has it, or `default` without one."""
    if isinstance(model, TokenViT) and model.merger is not None and metric in (None, model.merger.metric):
        model.merger.r = r
        net = model
    else:
        net = apply_dtem_merging(plain(model), r=r, metric=metric or default)
    check_r(net, r)
    return net


def num_patches(model: TokenViT) -> int:
    """How many patches an image of the model's own size has."""
    return model.token_counts(0)[0] - model.num_prefix_tokens


def most_r(model: TokenViT) -> int:
    """The most tokens that a block can merge."""
    return num_patches(model) // 2


def check_r(model: TokenViT, r: int | Sequence[int], option: str = "--r") -> None:
    """Refuse more tokens to merge than the first block can, which must be a slip."""
    for each in (r,) if isinstance(r, int) else r:
        if each > most_r(model):
            raise CommandError(
                f"{option} {each} is too large: a block merges at most half of the {num_patches(model)} patches, "
                f"{most_r(model)}"
            )


def with_merger(model: nn.Module, weights: str, r: int | Sequence[int] | None = None) -> TokenViT:
    """The model with a trained merger, which replaces one of its own; r None: as the merger was saved."""
    if not isinstance(model, TokenViT) or model.merger is None:
        return apply_dtem_merging(model, r, weights=weights)
    merger = apply_dtem_merging(model.base, r, weights=weights).merger
    return TokenViT(model.base, model.aux, merger, model.head).train(model.training)


def plain(model: nn.Module) -> nn.Module:
    """The timm ViT inside, if it is wrapped."""
    return model.base if isinstance(model, TokenViT) else model


def check_size(model: nn.Module, size: int, option: str = "--img-size") -> None:
    """Refuse a side of images that a ViT can't cut into whole patches."""
    try:
        model_input.check_size(model, size, size)
    except ValueError as error:
        raise CommandError(f"{option} {size} does not fit: {error}") from error
