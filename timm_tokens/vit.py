"""TokenViT: a timm Vision Transformer with parts that change its tokens, driven from outside."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from timm_tokens import blocks
from timm_tokens.flops import model_flops
from timm_tokens.ops import size_bias
from timm_tokens.ops.matching import Matching
from timm_tokens.ops.relaxed import RelaxedMatching
from timm_tokens.parts.merger import TokenMerger, groups, unmerge_all
from timm_tokens.protocol import TimmProtocol


class Tokens(NamedTuple):
    """Features after the final norm.

    Attributes:
        cls: (B, C) the global token: the class token, or the pooled features of a model without one.
        prefix: (B, P, C) class, register and distillation tokens.
        patches: (B, N, C) one token a patch; merged patches share theirs.
        aux_cls: (B, k_a, C) auxiliary class tokens, None without auxiliary tokens.
        pooled: (B, k_p, C) adaptively pooled tokens, None without auxiliary tokens.
    """

    cls: Tensor
    prefix: Tensor
    patches: Tensor
    aux_cls: Tensor | None = None
    pooled: Tensor | None = None


class Stream(NamedTuple):
    """Tokens on their way through the blocks.

    Attributes:
        x: (B, N, C) tokens, prefix first.
        effective: How many of them are still in the game: N, but for relaxed merging, which removes none.
        size: (B, N) float32, how many patches each stands for; None while it is one each.
        rows: (B, N - P) int64, which patch each token after the prefix has its rotary embedding from; None: its own.
    """

    x: Tensor
    effective: int
    size: Tensor | None = None
    rows: Tensor | None = None


class TokenViT(TimmProtocol, nn.Module):
    """A timm ViT that is left as it is, and parts that act between its layers.

        images -> base embeds -> for each block: attend -> [merger merges] -> feed -> base norm -> base head

    The base stays a working plain ViT at `.base`; its weights are shared, its class and forward are untouched. Without
    parts the outputs are the base's. Use `timm_tokens.apply_dtem_merging` to build one.

    FSDP must wrap the attentions and MLPs (or the whole model), not the blocks: a block whose tokens merge is called in
    two halves, which does not fire the block's own hooks.

    Args:
        base: A timm VisionTransformer, Eva or NaFlexVit.
        merger: Merges tokens, or None.

    Raises:
        TypeError: If the base can't be driven exactly; the message names its class and what is supported.
    """

    aux = head = None  # parts that no model has yet

    def __init__(self, base: nn.Module, *, merger: TokenMerger | None = None) -> None:
        super().__init__()
        blocks.check(base, merging=merger is not None)
        self.base = base
        self.merger = merger
        self._frozen = False
        self._init_protocol()

    def forward(self, images: Tensor, tokens: bool = False) -> Tensor | Tokens:
        """Class logits (B, K) of images (B, 3, H, W); with tokens=True the features after the final norm."""
        if tokens:
            return self._tokens(images)
        stream, trace = self._encode(images)
        x, size = self.base.norm(stream.x), stream.size
        if trace and not blocks.pools_by_size(self.base):
            x, size = unmerge_all(trace, x), None
        return blocks.head(self.base, x, size)

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens (B, P + N, C) after the final norm, un-merged: every patch has its group's token.

        So `forward_head` needs no sizes: the mean over patches is the mean over tokens weighted by size.
        """
        stream, trace = self._encode(images)
        return unmerge_all(trace, self.base.norm(stream.x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify what `forward_features` gives: (B, P + N, C) -> (B, K)."""
        return self.base.forward_head(x, pre_logits=pre_logits)

    def _tokens(self, images: Tensor) -> Tokens:
        x = self.forward_features(images)
        prefix, patches = x.split([self.num_prefix_tokens, x.shape[1] - self.num_prefix_tokens], dim=1)
        return Tokens(x[:, 0] if self.has_class_token else self.forward_head(x, pre_logits=True), prefix, patches)

    def _encode(
        self, images: Tensor, on_block: Callable[[int, Tensor, list], None] | None = None, depth: int | None = None
    ) -> tuple[Stream, list[Matching | RelaxedMatching]]:
        """The driver loop over the first `depth` blocks: the tokens, and what was merged on the way.

        `on_block` is called after each block with its index, the tokens, and the merges so far.
        """
        x, ropes = blocks.embed(self.base, images)
        stream, trace = Stream(x, effective=x.shape[1]), []
        for i in range(len(self.base.blocks) if depth is None else depth):
            rope = None if ropes is None else ropes[i]
            if self.base.grad_checkpointing:
                stream, matching = checkpoint(self._block, i, stream, rope)
            else:
                stream, matching = self._block(i, stream, rope)
            if matching is not None:
                trace.append(matching)
            if on_block is not None:
                on_block(i, stream.x, trace)
        return stream, trace

    def _block(self, i: int, stream: Stream, rope: Tensor | None) -> tuple[Stream, Matching | RelaxedMatching | None]:
        block, x, attention = self.base.blocks[i], stream.x, {}
        if rope is not None:
            attention["rope"] = blocks.rope_rows(rope, stream.rows)
        if stream.size is not None and self.merger.prop_attn:  # no bias while all sizes are 1: keeps the flash kernel
            attention["attn_mask"] = size_bias(stream.size).to(x.dtype)
        if self.merger is None or not self.merger.count(i, stream.effective, self.num_prefix_tokens):
            return stream._replace(x=block(x, **attention)), None
        y = blocks.read(block, x)
        x = blocks.attend(block, x, y, **attention)
        merged = self.merger(i, block, x, y, stream.size, stream.effective, self.num_prefix_tokens)
        rows = None if rope is None else self._rows(stream, merged.matching)
        return Stream(blocks.feed(block, merged.x), merged.effective, merged.size, rows), merged.matching

    def _rows(self, stream: Stream, matching: Matching | RelaxedMatching) -> Tensor:
        """A merged token keeps the rotary embedding of the token that the others merged into."""
        kept = matching.kept() if isinstance(matching, Matching) else matching.order
        rows = kept[:, self.num_prefix_tokens :] - self.num_prefix_tokens
        return rows if stream.rows is None else stream.rows.gather(1, rows)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Features after chosen blocks, un-merged to the full grid; arguments and results as timm's.

        Args:
            x: (B, 3, H, W) images.
            indices: The last n blocks if an int, all if None, else these blocks.
            return_prefix_tokens: Return (patches, prefix tokens) pairs.
            norm: Apply the final norm to each.
            stop_early: Don't run the blocks after the last one asked for.
            output_fmt: "NCHW" for maps (B, C, H, W), "NLC" for tokens (B, N, C).
            intermediates_only: Leave the final features out.
            output_dict: Return a dict with "image_intermediates", "image_intermediates_prefix", "image_features".

        Raises:
            ValueError: If output_fmt is unknown.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        taken, final_norm = [], self.base.norm
        take_indices, last = feature_take_indices(len(self.base.blocks), indices)

        def on_block(i: int, x: Tensor, trace: list) -> None:
            if i in take_indices:
                taken.append(unmerge_all(trace, final_norm(x) if norm else x))

        stream, trace = self._encode(x, on_block, depth=last + 1 if stop_early else None)
        final = None if intermediates_only else unmerge_all(trace, final_norm(stream.x))
        prefix = [y[:, : self.num_prefix_tokens] for y in taken]
        maps = [y[:, self.num_prefix_tokens :] for y in taken]
        if output_fmt == "NCHW":
            grid = blocks.grid_size(self.base, x.shape[-2:])
            maps = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in maps]
        return _pack(maps, prefix if return_prefix_tokens and self.num_prefix_tokens else None, final, output_dict)

    @torch.no_grad()
    def token_groups(self, images: Tensor, block: int | None = None) -> Tensor:
        """Which token, counted after the prefix, each patch of images (B, 3, H, W) ends in: (B, rows, columns) int64.

        Tokens are merged as in evaluation, whatever mode the model is in. With `block`, it is the token after so many
        blocks.
        """
        training = self.training
        try:
            _, trace = self.eval()._encode(images, depth=block)
        finally:
            self.train(training)
        grid = blocks.grid_size(self.base, images.shape[-2:])
        if not trace:
            return torch.arange(grid[0] * grid[1], device=images.device).view(1, *grid).repeat(len(images), 1, 1)
        return groups(trace)[:, self.num_prefix_tokens :].unflatten(1, grid) - self.num_prefix_tokens

    def flops(self, r: Any = None, image_size: tuple[int, int] | None = None) -> int:
        """Multiply-adds for one image in evaluation, from shapes alone.

        Args:
            r: Tokens to merge in each block, as in `timm_tokens.ops.schedule`; None: as the merger is set.
            image_size: (height, width); None: the size the model was made for.
        """
        return model_flops(self, r, image_size)

    def freeze_base(self, frozen: bool = True) -> "TokenViT":
        """Train the parts alone: the base gets no gradients and stays in evaluation mode (DTEM's modular training)."""
        self._frozen = frozen
        self.base.requires_grad_(not frozen)
        return self.train(self.training)

    def train(self, mode: bool = True) -> "TokenViT":
        super().train(mode)
        if self._frozen:
            self.base.eval()
        return self


def _pack(maps: list[Tensor], prefix: list[Tensor] | None, final: Tensor | None, as_dict: bool) -> Any:
    """The results of forward_intermediates in timm's forms."""
    if as_dict:
        packed = {"image_intermediates": maps, "image_intermediates_prefix": prefix, "image_features": final}
        return {name: value for name, value in packed.items() if value is not None}
    maps = maps if prefix is None else list(zip(maps, prefix, strict=True))
    return maps if final is None else (final, maps)
