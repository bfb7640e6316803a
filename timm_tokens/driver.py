"""The loop that drives a timm ViT block by block, and what may happen to its tokens on the way."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from timm.models import checkpoint
from torch import Tensor, nn

from timm_tokens import blocks
from timm_tokens.ops import size_bias
from timm_tokens.ops.matching import Matching
from timm_tokens.ops.relaxed import RelaxedMatching
from timm_tokens.parts import AuxTokens, TokenMerger


class Stream(NamedTuple):
    """Tokens on their way through the blocks.

    Attributes:
        x: (B, N + A, C) the model's own tokens, prefix first, then auxiliary ones.
        num_aux: A.
        effective: How many of the N are still in the game: N, but for relaxed merging, which removes none.
        size: (B, N) float32, how many patches each stands for; None while it is one each.
        rows: (B, N - P) int64, which patch each token after the prefix has its rotary embedding from; None: its own.
    """

    x: Tensor
    num_aux: int
    effective: int
    size: Tensor | None = None
    rows: Tensor | None = None

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The model's own tokens and the auxiliary ones of x (B, N + A, C)."""
        main = x.shape[1] - self.num_aux
        return x[:, :main], x[:, main:]


class Driver:
    """Mixed into TokenViT: runs the base's blocks, with merging and auxiliary tokens where the model has them."""

    base: nn.Module
    aux: AuxTokens | None
    merger: TokenMerger | None
    num_prefix_tokens: int

    def _encode(
        self,
        images: Tensor,
        edit: Callable[[Tensor], Tensor] | None = None,
        *,
        aux: bool = False,
        on_block: Callable[[int, Tensor, list], None] | None = None,
        depth: int | None = None,
    ) -> tuple[Stream, list[Matching | RelaxedMatching]]:
        """The driver loop over the first `depth` blocks: the tokens, and what was merged on the way.

        `edit` changes the patches before their position embedding; `on_block` is called after each block with its
        index, the tokens, and the merges so far.
        """
        x, ropes = blocks.embed(self.base, images, edit)
        own, num_aux, trace = x.shape[1], 0, []
        if aux and self.aux.tokens is not None:
            x, num_aux = self.aux.append(x), self.aux.num_cls
        stream, recompute = Stream(x, num_aux, effective=own), self.base.grad_checkpointing
        # What a single image waits for is Python and small operations: nothing is looked up twice in this loop.
        for i, block in enumerate(self.base.blocks):
            if i == depth:
                break
            rope = None if ropes is None else ropes[i]
            if recompute:
                stream, matching = checkpoint(self._block, i, block, stream, rope)
            else:
                stream, matching = self._block(i, block, stream, rope)
            if matching is not None:
                trace.append(matching)
            if on_block is not None:
                on_block(i, stream.x, trace)
        return stream, trace

    def _block(
        self, i: int, block: nn.Module, stream: Stream, rope: Tensor | None
    ) -> tuple[Stream, Matching | RelaxedMatching | None]:
        (x, num_aux, effective, size, rows), merger, prefix = stream, self.merger, self.num_prefix_tokens
        attention = self._attention(stream, rope)
        r = 0 if merger is None else merger.count(i, effective, prefix)
        if not r:
            return Stream(block(x, **attention), num_aux, effective, size, rows), None
        y = blocks.read(block, x)
        # chosen before the attention, while y is in the caches
        choice = merger.choose(i, block, stream.split(y)[0] if num_aux else y, r, effective, prefix)
        x = blocks.attend(block, x, y, **attention)
        if num_aux:
            x, aux = stream.split(x)
        x, size, effective, matching = merger(choice, x, size, r, effective, prefix)
        if num_aux:
            x = torch.cat([x, aux], dim=1)
        rows = None if rope is None else self._rows(stream, matching)
        return Stream(blocks.feed(block, x), num_aux, effective, size, rows), matching

    def _attention(self, stream: Stream, rope: Tensor | None) -> dict[str, Tensor]:
        """The arguments by which a block's attention learns of rotary positions, sizes and auxiliary tokens."""
        arguments, (x, num_aux, _, size, rows) = {}, stream
        if rope is not None:
            rope = blocks.rope_rows(rope, rows)
            arguments["rope"] = blocks.unrotated(rope, num_aux) if num_aux else rope
        bias = None
        if size is not None and self.merger.prop_attn:  # no bias while all sizes are 1: keeps the flash kernel
            bias = size_bias(size).to(x.dtype)
        if num_aux:
            mask = self.aux.mask(x, self.num_prefix_tokens)
            bias = mask if bias is None else mask + nn.functional.pad(bias, (0, num_aux))
        if bias is not None:
            arguments["attn_mask"] = bias
        return arguments

    def _rows(self, stream: Stream, matching: Matching | RelaxedMatching) -> Tensor:
        """A merged token keeps the rotary embedding of the token that the others merged into."""
        kept = matching.kept() if isinstance(matching, Matching) else matching.order
        rows = kept[:, self.num_prefix_tokens :] - self.num_prefix_tokens
        return rows if stream.rows is None else stream.rows.gather(1, rows)
