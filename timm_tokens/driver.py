"""The loop that drives a timm ViT block by block, and what may happen to its tokens on the way."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from timm.models import checkpoint
from torch import Tensor, nn

from timm_tokens import blocks, hooks, last_block, rotary, tracing
from timm_tokens.ops.matching import Matching
from timm_tokens.ops.relaxed import RelaxedMatching
from timm_tokens.parts import AuxTokens, TokenMerger
from timm_tokens.parts.merger import Merged, unmerge_all
from timm_tokens.timm_types import Block, ViT

Trace: TypeAlias = list[Matching | RelaxedMatching]  # what was merged, in order
UNLIMITED: Mapping[str, Any] = {}


class Stream(NamedTuple):
    """Tokens on their way through the blocks.

    Attributes:
        x: (B, N + A, C) the model's own tokens, prefix first, then auxiliary ones.
        num_aux: A.
        effective: How many of the N are still active: N, but for relaxed merging, which removes none.
        size: (B, N) float32, how many patches each stands for; None while it is one each.
        rows: (B, N - P) int64, which patch each token after the prefix has its rotary embedding from; None: its own.
        numbers: int64, 0 to B * N - 1 at the start, for the merger to number tokens with; None without one.
    """

    x: Tensor
    num_aux: int
    effective: int
    size: Tensor | None = None
    rows: Tensor | None = None
    numbers: Tensor | None = None

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The model's own tokens and the auxiliary ones of x (B, N + A, C)."""
        main = x.shape[1] - self.num_aux
        return x[:, :main], x[:, main:]


def limited(attn_mask: Tensor | None, is_causal: bool) -> dict[str, Any]:
    """The arguments by which timm's blocks learn what each token may attend to; none where it may attend to all.

    Raises:
        ValueError: If both are given.
    """
    if attn_mask is not None and is_causal:
        raise ValueError("give attn_mask or is_causal=True, not both: put the causal mask into attn_mask")
    return {"attn_mask": attn_mask} if attn_mask is not None else {"is_causal": True} if is_causal else {}


def encode(
    base: ViT, images: Tensor, edit: Callable[[Tensor], Tensor] | None = None, *,
    merger: TokenMerger | None = None, aux: AuxTokens | None = None,
    on_block: Callable[[int, Tensor, Trace], None] | None = None,
    depth: int | None = None, limits: Mapping[str, Any] = UNLIMITED, logits_only: bool = False,
) -> tuple[Stream, Trace]:  # fmt: skip
    """Run the first blocks of a timm ViT: the tokens, and what was merged on the way.

    Args:
        base: The timm ViT.
        images: (B, 3, H, W).
        edit: Changes the patches (B, N, C) before they get their position embedding.
        merger: Merges tokens in the blocks.
        aux: Auxiliary tokens that travel beside the model's own.
        on_block: Called after each block with its index, the tokens, and the merges so far.
        depth: How many blocks to run; None: all.
        limits: What each token may attend to, from `limited`.
        logits_only: Whether only the base's class logits are wanted: the prefix tokens are returned alone where those
            need no other.

    Raises:
        ValueError: If there are limits, and tokens that they don't tell about: merged or auxiliary ones.
        RuntimeError: If torch.onnx.export(..., dynamo=False) traces a merger.
    """
    x, ropes = blocks.embed(base, images, edit)
    stream = _start(x, merger, aux, limits)
    trace: Trace = []
    watched = hooks.has_own(base.blocks) and not limits and on_block is None and blocks.calls_them_at_once(base)
    run = partial(_run_blocks, base, ropes, trace, merger, aux, limits, on_block, depth, logits_only and not watched)
    return (hooks.around(base.blocks, run, stream) if watched else run(stream)), trace


def _run_blocks(
    base: ViT,
    ropes: list[Tensor] | None,
    trace: Trace,
    merger: TokenMerger | None,
    aux: AuxTokens | None,
    limits: Mapping[str, Any],
    on_block: Callable[[int, Tensor, Trace], None] | None,
    depth: int | None,
    logits_only: bool,
    stream: Stream,
) -> Stream:
    """The tokens after the blocks of `encode`, which adds to the trace what was merged."""
    prefix, recompute = base.num_prefix_tokens, base.grad_checkpointing
    watching = merger.unmerged if merger is not None and merger.watched else None
    short = logits_only and watching is None and last_block.needs_prefix_alone(base)
    last = len(base.blocks) - 1 if short else None
    # At batch size 1, Python and small operations take most of the time: nothing is looked up twice in this loop.
    for i, block in enumerate(base.blocks):
        if i == depth:
            break
        rope = None if ropes is None else ropes[i]
        arguments = (i, block, stream, rope, prefix, merger, aux, limits, i == last)
        stream, matching = checkpoint(run_block, *arguments) if recompute else run_block(*arguments)
        if matching is not None:
            trace.append(matching)
        if on_block is not None:
            on_block(i, stream.x, trace)
        if watching is not None:
            watching[i](unmerge_all(trace, stream.split(stream.x)[0]))
    return stream


def _start(x: Tensor, merger: TokenMerger | None, aux: AuxTokens | None, limits: Mapping[str, Any]) -> Stream:
    """The tokens that enter the first block: those of the stem, (B, N, C), and auxiliary ones."""
    (b, n), numbers = x.shape[:2], None
    if merger is not None:
        tracing.refuse_old_onnx()
        numbers = torch.arange(b * n, device=x.device)
    if aux is None or aux.tokens is None:
        return Stream(x, 0, effective=n, numbers=numbers)
    if limits:
        _refuse(limits, "auxiliary", "; call with aux=False")
    return Stream(aux.append(x), aux.num_cls, effective=n, numbers=numbers)


def run_block(
    i: int,
    block: Block,
    stream: Stream,
    rope: Tensor | None,
    prefix: int,
    merger: TokenMerger | None,
    aux: AuxTokens | None,
    limits: Mapping[str, Any],
    prefix_alone: bool = False,
) -> tuple[Stream, Matching | RelaxedMatching | None]:
    """Run block i of `encode`: the tokens after it, and what it merged, None if nothing."""
    x, num_aux, effective, size, rows, numbers = stream
    attention = _attention(stream, rope, prefix, merger, aux)
    r = 0 if merger is None else merger.count(i, effective, prefix)
    if merger is None or not r or (prefix_alone and not last_block.is_watched(merger, i)):
        first = partial(blocks.first_tokens, block, prefix) if prefix_alone else None
        x = _call(block, first, x, {**attention, **limits})
        return Stream(x, num_aux, effective, size, rows, numbers), None
    if limits:
        _refuse(limits, "merged", f", and block {i} merges {r}; set model.merger.r = 0, or call model.base")
    x, (_, size, effective, matching) = _merging(i, block, stream, attention, r, prefix, merger, prefix_alone)
    rows = None if rope is None else _kept_rows(rows, matching, prefix)
    return Stream(x, num_aux, effective, size, rows, numbers), matching


def _merging(
    i: int,
    block: Block,
    stream: Stream,
    attention: dict[str, Tensor],
    r: int,
    prefix: int,
    merger: TokenMerger,
    prefix_alone: bool,
) -> tuple[Tensor, Merged]:
    """What the block makes of the stream's tokens with a merge between its halves, and the merge."""
    (read, attend, feed), (_, num_aux, effective, size, _, numbers) = blocks.halves(block), stream

    def run(x: Tensor, attention: dict[str, Tensor]) -> tuple[Tensor, Merged]:
        y = read(block, x)
        # chosen before the attention, while y is in the caches
        choice = merger.choose(i, block, stream.split(y)[0] if num_aux else y, r, effective, prefix, numbers)
        x = attend(block, x, y, **attention)
        if num_aux:
            x, extra = stream.split(x)
        merged = merger(choice, x, size, r, effective, prefix)
        x = merged.x[:, :prefix] if prefix_alone else merged.x
        return feed(block, torch.cat([x, extra], dim=1) if num_aux else x), merged

    if not hooks.is_hooked(block):
        return run(stream.x, attention)
    merges: list[Merged] = []

    def forward(x: Tensor, **attention: Tensor) -> Tensor:
        x, merged = run(x, attention)
        merges.append(merged)
        return x

    return hooks.call(block, forward, (stream.x,), attention), merges[0]


def _refuse(limits: Mapping[str, Any], kind: str, advice: str) -> None:
    raise ValueError(f"{' and '.join(limits)} can't say what {kind} tokens may attend to{advice}")


def _call(block: Block, forward: Callable[..., Tensor] | None, x: Tensor, attention: dict[str, Any]) -> Any:
    """What the block gives, or (not None) `forward` in its place with the block's hooks."""
    if forward is None:
        return block(x, **attention)
    return hooks.call(block, forward, (x,), attention) if hooks.is_hooked(block) else forward(x, **attention)


def _attention(
    stream: Stream, rope: Tensor | None, prefix: int, merger: TokenMerger | None, aux: AuxTokens | None
) -> dict[str, Tensor]:
    """The arguments by which a block's attention learns of rotary positions, sizes and auxiliary tokens."""
    x, num_aux, _, size, rows, _ = stream
    # no bias while all sizes are 1: keeps the flash kernel
    bias = None if merger is None or size is None else merger.bias(size, x.dtype)
    arguments = {}
    if rope is not None:
        rope = rotary.rope_rows(rope, rows)
        arguments["rope"] = rotary.unrotated(rope, num_aux) if num_aux else rope
    if aux is not None and num_aux:
        mask = aux.mask(x, prefix)
        bias = mask if bias is None else mask + nn.functional.pad(bias, (0, num_aux))
    if bias is not None:
        arguments["attn_mask"] = bias
    return arguments


def _kept_rows(rows: Tensor | None, matching: Matching | RelaxedMatching, prefix: int) -> Tensor:
    """A merged token keeps the rotary embedding of the token that the others merged into."""
    kept = matching.kept() if isinstance(matching, Matching) else matching.order
    kept = kept[:, prefix:] - prefix
    return kept if rows is None else rows.gather(1, kept)
