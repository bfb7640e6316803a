"""What the blocks of a ViT give, un-merged to the full grid of patches: for dense tasks, teachers and pictures."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from timm.models._features import feature_take_indices
from torch import Tensor

from timm_tokens import blocks
from timm_tokens.driver import UNLIMITED, Stream, Trace, encode
from timm_tokens.parts import AuxTokens, TokenMerger
from timm_tokens.parts.merger import groups, unmerge_all
from timm_tokens.timm_types import ViT


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


def forward_merged(
    base: ViT,
    images: Tensor,
    edit: Callable[[Tensor], Tensor] | None = None,
    *,
    merger: TokenMerger | None = None,
    limits: Mapping[str, Any] = UNLIMITED,
) -> MergedTokens:
    """The merged features of images (B, 3, H, W) after the final norm; the arguments are those of `encode`.

    Raises:
        ValueError: If the merging is relaxed, which leaves all tokens, or patches are missing from the grid.
    """
    if merger is not None and merger.relaxed:
        raise ValueError(
            "tokens='merged' gives what is left after merging, but in training learned merging is relaxed and leaves "
            "every token: call model.merger.eval() to merge outright while the rest trains, or model.eval()"
        )
    stream, trace = encode(base, images, edit, merger=merger, limits=limits)
    x, prefix = base.norm(stream.x), base.num_prefix_tokens
    patches = x[:, prefix:]
    size = torch.ones(patches.shape[:2], device=x.device) if stream.size is None else stream.size[:, prefix:]
    return MergedTokens(x[:, :prefix], patches, size, _group_map(base, images, trace, patches.shape[1]))


def forward_tokens(
    base: ViT,
    images: Tensor,
    edit: Callable[[Tensor], Tensor] | None = None,
    *,
    merger: TokenMerger | None = None,
    aux: AuxTokens | None = None,
    limits: Mapping[str, Any] = UNLIMITED,
    has_class_token: bool = True,
) -> Tokens:
    """The features of images (B, 3, H, W) after the final norm; the arguments are those of `encode`.

    Args:
        has_class_token: Whether the first prefix token is a class token.

    Raises:
        ValueError: If pooled tokens are asked for and patches are missing.
    """
    stream, trace = encode(base, images, edit, merger=merger, aux=aux, limits=limits)
    tokens = tokens_of(base, stream, trace, has_class_token)
    if aux is None or aux.pool is None:
        return tokens
    pooled = aux.pool(_map(tokens.patches, blocks.grid_size(base, images.shape[-2:])))
    return Tokens(tokens.cls, tokens.prefix, tokens.patches, tokens.aux_cls, pooled)  # torch 2.6 compiles no _replace


def tokens_of(base: ViT, stream: Stream, trace: Trace, has_class_token: bool) -> Tokens:
    """The features of tokens after the last block, as `encode` gives them, without pooled tokens."""
    x, extra = stream.split(base.norm(stream.x))
    x, prefix = unmerge_all(trace, x), base.num_prefix_tokens
    cls = x[:, 0] if has_class_token else base.forward_head(x, pre_logits=True)
    return Tokens(cls, x[:, :prefix], x[:, prefix:], extra if stream.num_aux else None)


def _map(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches (B, N, C) as a map (B, C, rows, columns)."""
    _check_grid(patches.shape[1], grid, "pooled tokens need")
    return patches.transpose(1, 2).unflatten(2, grid)


def _check_grid(count: int, grid: tuple[int, int], as_what_needs: str) -> None:
    if count != grid[0] * grid[1]:
        raise ValueError(
            f"{count} patches don't fill the grid of {grid[0]} x {grid[1]}, as {as_what_needs}; build the base without "
            "patch dropout"
        )


def intermediates(
    base: ViT,
    merger: TokenMerger | None,
    images: Tensor,
    indices: int | Sequence[int] | None,
    *,
    norm: bool,
    stop_early: bool,
    final: bool,
    limits: Mapping[str, Any],
) -> tuple[list[Tensor], Tensor | None]:
    """Tokens (B, P + N, C) after chosen blocks and, with `final`, at the end: see `TokenViT.forward_intermediates`."""
    taken, final_norm = [], base.norm
    take_indices, last = feature_take_indices(
        len(base.blocks), indices if indices is None or isinstance(indices, int) else list(indices)
    )

    def on_block(i: int, x: Tensor, trace: Trace) -> None:
        if i in take_indices:
            taken.append(unmerge_all(trace, final_norm(x) if norm else x))

    depth = last + 1 if stop_early else None
    stream, trace = encode(base, images, merger=merger, on_block=on_block, depth=depth, limits=limits)
    return taken, unmerge_all(trace, final_norm(stream.x)) if final else None


def pack(
    taken: list[Tensor], final: Tensor | None, prefix: int, grid: tuple[int, int] | None, prefixed: bool, as_dict: bool
) -> Any:
    """The results of forward_intermediates in timm's forms.

    Args:
        taken: (B, P + N, C) tokens of the chosen blocks.
        final: (B, P + N, C) tokens after the final norm, or None to leave them out.
        prefix: P.
        grid: Rows and columns of patches to make maps (B, C, rows, columns) of them, or None.
        prefixed: Whether prefix tokens are wanted, too.
        as_dict: Whether to name the results.
    """
    maps = [x[:, prefix:] for x in taken]
    if grid is not None:
        maps = [x.transpose(1, 2).unflatten(2, grid).contiguous() for x in maps]
    prefixes = [x[:, :prefix] for x in taken] if prefixed and prefix else None
    if as_dict:
        packed = {"image_intermediates": maps, "image_intermediates_prefix": prefixes, "image_features": final}
        return {name: value for name, value in packed.items() if value is not None}
    given: list[Any] = maps if prefixes is None else list(zip(maps, prefixes, strict=True))
    return given if final is None else (final, given)


def token_groups(base: ViT, merger: TokenMerger | None, images: Tensor, depth: int | None = None) -> Tensor:
    """Which token, counted after the prefix, each patch ends in: (B, rows, columns) int64; see `TokenViT`."""
    stream, trace = encode(base, images, merger=merger, depth=depth)
    return _group_map(base, images, trace, stream.x.shape[1] - base.num_prefix_tokens)


def _group_map(base: ViT, images: Tensor, trace: Trace, left: int) -> Tensor:
    """(B, rows, columns) int64: which of the `left` tokens after the prefix holds each patch of the grid."""
    (rows, columns), prefix = blocks.grid_size(base, images.shape[-2:]), base.num_prefix_tokens
    if trace:
        found = groups(trace)[:, prefix:] - prefix
    else:
        found = torch.arange(left, device=images.device).repeat(images.shape[0], 1)
    _check_grid(found.shape[1], (rows, columns), "a map of the groups needs")
    return found.unflatten(1, (rows, columns))
