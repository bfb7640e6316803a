"""What the blocks of a ViT give, un-merged to the full grid of patches: for dense tasks, teachers and pictures."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from timm.models._features import feature_take_indices
from torch import Tensor

from timm_tokens import blocks
from timm_tokens.blocks import Edit
from timm_tokens.driver import Limits, Stream, Trace, encode
from timm_tokens.parts.merger import groups, unmerge_all
from timm_tokens.timm_types import ViT, Wrapped

Indices: TypeAlias = int | Sequence[int] | None


class Tokens(NamedTuple):
    """Features after the final norm.

    Attributes:
        cls: (B, C) the global token: the class token, or the pooled features of a model without one.
        prefix: (B, P, C) class, register and distillation tokens.
        patches: (B, N, C) one token per patch; merged patches share theirs.
        aux_cls: (B, k_a, C) auxiliary class tokens, None without auxiliary tokens.
        pooled: (B, k_p, C) adaptively pooled tokens, None without auxiliary tokens.
    """

    cls: Tensor
    prefix: Tensor
    patches: Tensor
    aux_cls: Tensor | None = None
    pooled: Tensor | None = None


class MergedTokens(NamedTuple):
    """Features after the final norm, as few as the merging left: for decoders and language models.

        x = torch.cat([prefix, patches], dim=1)  # what a decoder attends to, with size.log() as a bias on the patches
        every_patch = patches.gather(1, groups.flatten(1).unsqueeze(2).expand(-1, -1, C))  # Tokens.patches (B, N, C)

    Attributes:
        prefix: (B, P, C) class, register and distillation tokens.
        patches: (B, M, C) what the N patches were merged into; N of them where nothing merges.
        size: (B, M) float32, how many patches each stands for.
        groups: (B, H, W) int64, the row in `patches` that each patch of the grid is in.
    """

    prefix: Tensor
    patches: Tensor
    size: Tensor
    groups: Tensor


def forward_merged(model: Wrapped, images: Tensor, edit: Edit, limits: Limits) -> MergedTokens:
    """The merged features of images (B, 3, H, W) after the final norm; the arguments are those of `encode`."""
    if model.merger is not None and model.merger.relaxed:
        raise ValueError(
            "tokens='merged' gives what is left after merging, but in training learned merging is relaxed and leaves "
            "every token: call model.merger.eval() to merge outright while the rest trains, or model.eval()"
        )
    base, (stream, trace) = model.base, encode(model, images, edit, limits=limits)
    x, prefix = base.norm(stream.x), base.num_prefix_tokens
    patches = x[:, prefix:]
    size = torch.ones(patches.shape[:2], device=x.device) if stream.size is None else stream.size[:, prefix:]
    return MergedTokens(x[:, :prefix], patches, size, _group_map(base, images, trace, patches.shape[1]))


def forward_tokens(model: Wrapped, images: Tensor, edit: Edit, limits: Limits, aux: bool) -> Tokens:
    """The features of images (B, 3, H, W) after the final norm; the arguments are those of `encode`."""
    tokens = tokens_of(model, *encode(model, images, edit, aux=aux, limits=limits))
    if not aux or model.aux is None or model.aux.pool is None:
        return tokens
    grid = blocks.grid_size(model.base, images.shape[-2:])
    _check_grid(tokens.patches.shape[1], grid, "pooled tokens need")
    pooled = model.aux.pool(tokens.patches.transpose(1, 2).unflatten(2, grid))
    return Tokens(tokens.cls, tokens.prefix, tokens.patches, tokens.aux_cls, pooled)  # torch 2.6 compiles no _replace


def tokens_of(model: Wrapped, stream: Stream, trace: Trace) -> Tokens:
    """The features of tokens after the last block, as `encode` gives them, without pooled tokens."""
    x, extra = stream.split(model.base.norm(stream.x))
    x, prefix = unmerge_all(trace, x), model.num_prefix_tokens
    cls = x[:, 0] if model.has_class_token else model.base.forward_head(x, pre_logits=True)
    return Tokens(cls, x[:, :prefix], x[:, prefix:], extra if stream.num_aux else None)


def _check_grid(count: int, grid: tuple[int, int], as_what_needs: str) -> None:
    if count != grid[0] * grid[1]:
        raise ValueError(
            f"{count} patches don't fill the grid of {grid[0]} x {grid[1]}, as {as_what_needs}; build the base without "
            "patch dropout"
        )


def intermediates(
    model: Wrapped, images: Tensor, indices: Indices, limits: Limits, *, norm: bool, stop_early: bool, final: bool
) -> tuple[list[Tensor], Tensor | None]:
    """Tokens (B, P + N, C) after chosen blocks and, with `final`, at the end: see `TokenViT.forward_intermediates`."""
    taken, final_norm = [], model.base.norm
    indices = list(indices) if isinstance(indices, Sequence) else indices
    take_indices, last = feature_take_indices(len(model.base.blocks), indices)

    def on_block(i: int, x: Tensor, trace: Trace) -> None:
        if i in take_indices:
            taken.append(unmerge_all(trace, final_norm(x) if norm else x))

    depth = last + 1 if stop_early else None
    stream, trace = encode(model, images, on_block=on_block, depth=depth, limits=limits)
    return taken, unmerge_all(trace, final_norm(stream.x)) if final else None


def pack(
    taken: list[Tensor], final: Tensor | None, prefix: int, grid: tuple[int, int] | None, prefixed: bool, as_dict: bool
) -> Any:
    """What `intermediates` gives in timm's forms: as maps (B, C, rows, columns) if there is a grid, and with names if
    `as_dict`; without the final tokens where they are None."""
    maps = [x[:, prefix:] for x in taken]
    if grid is not None:
        maps = [x.transpose(1, 2).unflatten(2, grid).contiguous() for x in maps]
    prefixes = [x[:, :prefix] for x in taken] if prefixed and prefix else None
    if as_dict:
        packed = {"image_intermediates": maps, "image_intermediates_prefix": prefixes, "image_features": final}
        return {name: value for name, value in packed.items() if value is not None}
    given: list[Any] = maps if prefixes is None else list(zip(maps, prefixes, strict=True))
    return given if final is None else (final, given)


def token_groups(model: Wrapped, images: Tensor, depth: int | None) -> Tensor:
    """Which token, counted after the prefix, each patch ends in: (B, rows, columns) int64; see `TokenViT`."""
    stream, trace = encode(model, images, depth=depth)
    return _group_map(model.base, images, trace, stream.x.shape[1] - model.num_prefix_tokens)


def _group_map(base: ViT, images: Tensor, trace: Trace, left: int) -> Tensor:
    """(B, rows, columns) int64: which of the `left` tokens after the prefix holds each patch of the grid."""
    (rows, columns), prefix = blocks.grid_size(base, images.shape[-2:]), base.num_prefix_tokens
    if trace:
        found = groups(trace)[:, prefix:] - prefix
    else:
        found = torch.arange(left, device=images.device).repeat(images.shape[0], 1)
    _check_grid(found.shape[1], (rows, columns), "a map of the groups needs")
    return found.unflatten(1, (rows, columns))
