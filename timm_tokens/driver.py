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
from timm_tokens.parts import AuxTokens
from timm_tokens.parts.merger import Merged, unmerge_all
from timm_tokens.timm_types import Block, ViT, Wrapped

Trace: TypeAlias = list[Matching | RelaxedMatching]  # what was merged, in order
OnBlock: TypeAlias = Callable[[int, Tensor, Trace], None] | None
Limits: TypeAlias = Mapping[str, Any]  # what each token may attend to, from `limited`
UNLIMITED: Limits = {}


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


class Setting(NamedTuple):
    """What all blocks of a pass have in common; looked up once, as Python's time counts at batch size 1."""

    prefix: int  # P
    merger: Any  # a TokenMerger or None
    aux: AuxTokens | None
    limits: Limits


def limited(attn_mask: Tensor | None, is_causal: bool) -> dict[str, Any]:
    """The arguments by which timm's blocks learn what each token may attend to; none where it may attend to all."""
    if attn_mask is not None and is_causal:
        raise ValueError("give attn_mask or is_causal=True, not both: put the causal mask into attn_mask")
    return {"attn_mask": attn_mask} if attn_mask is not None else {"is_causal": True} if is_causal else {}


def encode(
    model: Wrapped, images: Tensor, edit: blocks.Edit = None, *, aux: bool = False, on_block: OnBlock = None,
    depth: int | None = None, limits: Limits = UNLIMITED, logits_only: bool = False,
) -> tuple[Stream, Trace]:  # fmt: skip
    """Run the first blocks of a TokenViT: the tokens of images (B, 3, H, W), and what was merged on the way.

    Args:
        aux: Whether auxiliary tokens travel beside the model's own, if it has any.
        on_block: Called after each block with its index, the tokens, and the merges so far.
        depth: How many blocks to run; None: all.
        logits_only: Whether only the base's class logits are wanted: the prefix tokens are returned alone where those
            need no other.
    """
    base = model.base
    x, ropes = blocks.embed(base, images, edit)
    setting = Setting(base.num_prefix_tokens, model.merger, model.aux if aux else None, limits)
    stream = _start(setting, x)
    trace: Trace = []
    watched = hooks.has_own(base.blocks) and not limits and on_block is None and blocks.calls_them_at_once(base)
    run = partial(_run_blocks, base, setting, ropes, trace, on_block, depth, logits_only and not watched)
    return (hooks.around(base.blocks, run, stream) if watched else run(stream)), trace


def _run_blocks(
    base: ViT,
    setting: Setting,
    ropes: list[Tensor] | None,
    trace: Trace,
    on_block: OnBlock,
    depth: int | None,
    logits_only: bool,
    stream: Stream,
) -> Stream:
    """The tokens after the blocks of `encode`; what was merged is added to the trace."""
    recompute, merger = base.grad_checkpointing, setting.merger
    watching = merger.unmerged if merger is not None and merger.watched else None
    short = logits_only and watching is None and last_block.needs_prefix_alone(base)
    last = len(base.blocks) - 1 if short else None
    for i, block in enumerate(base.blocks):
        if i == depth:
            break
        rope = None if ropes is None else ropes[i]
        arguments = (setting, i, block, stream, rope, i == last)
        stream, matching = checkpoint(run_block, *arguments) if recompute else run_block(*arguments)
        if matching is not None:
            trace.append(matching)
        if on_block is not None:
            on_block(i, stream.x, trace)
        if watching is not None:
            watching[i](unmerge_all(trace, stream.split(stream.x)[0]))
    return stream


def _start(setting: Setting, x: Tensor) -> Stream:
    """The tokens that enter the first block: those of the stem, (B, N, C), and auxiliary ones."""
    (b, n), numbers, aux = x.shape[:2], None, setting.aux
    if setting.merger is not None:
        tracing.refuse_old_onnx()
        numbers = torch.arange(b * n, device=x.device)
    if aux is None or aux.tokens is None:
        return Stream(x, 0, effective=n, numbers=numbers)
    if setting.limits:
        _refuse(setting.limits, "auxiliary", "; call with aux=False")
    return Stream(aux.append(x), aux.num_cls, effective=n, numbers=numbers)


def run_block(
    setting: Setting, i: int, block: Block, stream: Stream, rope: Tensor | None, prefix_only: bool = False
) -> tuple[Stream, Matching | RelaxedMatching | None]:
    """Run block i of `encode`: the tokens after it, and what it merged, None if nothing."""
    x, num_aux, effective, size, rows, numbers = stream
    prefix, merger, _, limits = setting
    attention = _attention(setting, stream, rope)
    r = 0 if merger is None else merger.count(i, effective, prefix)
    if merger is None or not r or (prefix_only and not last_block.is_watched(merger, i)):
        options = {**attention, **limits}
        if prefix_only:
            x = hooks.call(block, partial(blocks.first_tokens, block, prefix), (x,), options)
        else:
            x = block(x, **options)
        return Stream(x, num_aux, effective, size, rows, numbers), None
    if limits:
        _refuse(limits, "merged", f", and block {i} merges {r}; set model.merger.r = 0, or call model.base")
    x, (_, size, effective, matching) = _merging(setting, i, block, stream, attention, r, prefix_only)
    rows = None if rope is None else _kept_rows(rows, matching, prefix)
    return Stream(x, num_aux, effective, size, rows, numbers), matching


def _merging(
    setting: Setting, i: int, block: Block, stream: Stream, attention: dict[str, Tensor], r: int, prefix_only: bool
) -> tuple[Tensor, Merged]:
    """What the block makes of the stream's tokens with a merge between its halves, and the merge."""
    (read, attend, feed), (_, num_aux, effective, size, _, numbers) = blocks.halves(block), stream
    prefix, merger, *_ = setting
    merges: list[Merged] = []

    def forward(x: Tensor, **attention: Tensor) -> Tensor:
        y = read(block, x)
        # chosen before the attention, while y is in the caches
        choice = merger.choose(i, block, stream.split(y)[0] if num_aux else y, r, effective, prefix, numbers)
        x = attend(block, x, y, **attention)
        if num_aux:
            x, extra = stream.split(x)
        merged = merger(choice, x, size, r, effective, prefix)
        merges.append(merged)
        x = merged.x[:, :prefix] if prefix_only else merged.x
        return feed(block, torch.cat([x, extra], dim=1) if num_aux else x)

    return hooks.call(block, forward, (stream.x,), attention), merges[0]


def _refuse(limits: Limits, kind: str, advice: str) -> None:
    raise ValueError(f"{' and '.join(limits)} can't say what {kind} tokens may attend to{advice}")


def _attention(setting: Setting, stream: Stream, rope: Tensor | None) -> dict[str, Tensor]:
    """The arguments by which a block's attention learns of rotary positions, sizes and auxiliary tokens."""
    x, num_aux, _, size, rows, _ = stream
    # no bias while all sizes are 1: keeps the flash kernel
    bias = None if size is None else setting.merger.bias(size, x.dtype)
    arguments = {}
    if rope is not None:
        rope = rotary.rope_rows(rope, rows)
        arguments["rope"] = rotary.unrotated(rope, num_aux) if num_aux else rope
    if setting.aux is not None and num_aux:
        mask = setting.aux.mask(x, setting.prefix)
        bias = mask if bias is None else mask + nn.functional.pad(bias, (0, num_aux))
    if bias is not None:
        arguments["attn_mask"] = bias
    return arguments


def _kept_rows(rows: Tensor | None, matching: Matching | RelaxedMatching, prefix: int) -> Tensor:
    """A merged token keeps the rotary embedding of the token that the others merged into."""
    kept = matching.kept() if isinstance(matching, Matching) else matching.order
    kept = kept[:, prefix:] - prefix
    return kept if rows is None else rows.gather(1, kept)
