"""TokenViT: a timm Vision Transformer with parts that change its tokens, driven from outside."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from timm_tokens import blocks, features, hooks, tracing
from timm_tokens.classification import check_call, class_logits, dense_logits
from timm_tokens.driver import encode, limited
from timm_tokens.features import MergedTokens, Tokens
from timm_tokens.flops import Costs, schedule_of
from timm_tokens.forward_type import Box, Forward, Mask, typed
from timm_tokens.meta_copy import meta_copy
from timm_tokens.ops import mix_tokens
from timm_tokens.ops.schedule import token_counts
from timm_tokens.outputs import evaluating
from timm_tokens.parts import AuxTokens, DenseLogits, TokenLabelHead, TokenMerger
from timm_tokens.parts.merger import unmerge_all
from timm_tokens.protocol import TimmProtocol
from timm_tokens.timm_types import ViT


class TokenViT(TimmProtocol):
    """A timm ViT that is left as it is, and parts that act between its layers.

        images -> base embeds -> [aux appends its tokens] -> for each block: attend -> [merger merges] -> feed
               -> base norm -> [aux splits off / pools its tokens] -> base head or [head: token-label head]

    The base stays a working plain ViT at `.base`; its weights are shared, its class and forward are untouched. Without
    parts the outputs are the base's. Use `apply_dtem_merging`, `add_aux_tokens` and `token_label_head` to build one.

    Hooks of the base's modules fire as in the base, and FSDP2 may wrap blocks, layers and the whole model. DDP needs
    find_unused_parameters=True or static_graph=True where parameters get no gradient: embeddings of blocks that merge
    nothing, and auxiliary tokens where only class logits are asked for.

    Args:
        base: A timm VisionTransformer, Eva or NaFlexVit.
        aux: Auxiliary tokens, or None.
        merger: Merges tokens, or None.
        head: The token-label head, or None.
        mask_token: Whether to have a learned token (1, C) that stands for masked patches, at `.mask_token`.

    Raises:
        TypeError: If the base can't be driven exactly; the message names its class and what is supported.
    """

    def __init__(
        self,
        base: ViT,
        aux: AuxTokens | None = None,
        merger: TokenMerger | None = None,
        head: TokenLabelHead | None = None,
        mask_token: bool = False,
    ) -> None:
        super().__init__()
        blocks.check(base, merging=merger is not None)
        self.base = base
        self.aux, self.merger, self.head = cast(Any, (aux, merger, head))
        self.mask_token = None
        if mask_token:
            self.mask_token = nn.Parameter(torch.empty(1, base.embed_dim, **blocks.placement(base)))
            nn.init.trunc_normal_(self.mask_token, std=0.02)
        self._frozen = False
        self._init_protocol()

    @typed
    def forward(
        self,
        images: Tensor,
        attn_mask: Mask = None,
        is_causal: bool = False,
        *,
        dense: bool = False,
        box: Box = None,
        tokens: bool | str = False,
        mask: Mask = None,
        aux: bool = True,
    ) -> Tensor | DenseLogits | Tokens | MergedTokens:
        """Class logits (B, K) of images (B, 3, H, W), in training and evaluation alike.

        Args:
            attn_mask: What each of the P + N tokens may attend to, (P + N, P + N) or broadcast to (B, heads, P + N,
                P + N): bool, or added to the scores. For where no tokens merge.
            is_causal: Whether tokens attend to themselves and earlier ones alone. For where no tokens merge.
            dense: Give `DenseLogits` instead: the class token's logits and those of every patch. Needs the head.
            box: (top, left, bottom, right) on the patch grid: the patches inside are taken from the flipped batch, and
                their logits are given back to their own images (MixToken). With dense=True.
            tokens: Give `Tokens` instead: the features after the final norm, one for each patch. "merged": give
                `MergedTokens`, the features that are left after merging, and which patches each stands for.
            mask: (B, N) bool: these patches are replaced by the mask token (zeros if the model has none) before they
                get their position embedding.
            aux: With tokens=True, whether auxiliary tokens are computed; nothing else needs them.

        Raises:
            ValueError: If the arguments don't fit each other, the model's parts or the images.
        """
        tracing.refuse_symbols(images)
        check_call(self.head, dense, box, tokens)
        run, limits = partial(self._forward, dense, box, tokens, mask, aux), limited(attn_mask, is_causal)
        if not hooks.is_hooked(self.base):
            return run(images, **limits)
        if dense or tokens or self.head is not None:  # what the base does not give, its forward hooks can't see
            args, limits = hooks.before(self.base, (images,), limits)
            return run(*args, **limits)
        return hooks.call(self.base, run, (images,), limits)

    def _forward(
        self, dense: bool, box: Box, tokens: bool | str, mask: Mask, aux: bool, images: Tensor, **limits: Any
    ) -> Tensor | DenseLogits | Tokens | MergedTokens:
        edit = None if box is None and mask is None else partial(self._edit, box, mask, self._grid(images))
        if tokens == "merged":
            return features.forward_merged(self, images, edit, limits)
        if tokens:
            return features.forward_tokens(self, images, edit, limits, aux)
        stream, trace = encode(self, images, edit, limits=limits, logits_only=self.head is None)
        x = self.base.norm(stream.x)
        if not dense:
            return class_logits(self, x, stream.size, trace)
        cls, patches = dense_logits(self, x, stream.size, trace)
        return DenseLogits(cls, patches if box is None else mix_tokens(patches, box, self._grid(images)))

    def _edit(self, box: Box, mask: Mask, grid: tuple[int, int], x: Tensor) -> Tensor:
        """Mask patches x (B, N, C) before their position embedding, and mix them."""
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
                raise ValueError(
                    f"mask must be bool (B, N) = {tuple(x.shape[:2])} for a grid of {grid[0]} x {grid[1]} patches, "
                    f"got {mask.dtype} {tuple(mask.shape)}"
                )
            token = x.new_zeros(()) if self.mask_token is None else self.mask_token.to(x.dtype)
            x = torch.where(mask.unsqueeze(2), token, x)
        return x if box is None else mix_tokens(x, box, grid)

    if TYPE_CHECKING:
        __call__: Forward

    def forward_features(self, images: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens (B, P + N, C) after the final norm, un-merged: every patch has its group's token.

        So `forward_head` needs no sizes: the mean over patches is the mean over tokens weighted by size. The arguments
        are those of `forward`.
        """
        stream, trace = encode(self, images, limits=limited(attn_mask, is_causal))
        return unmerge_all(trace, self.base.norm(stream.x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify what `forward_features` gives: (B, P + N, C) -> (B, K)."""
        if self.head is None or pre_logits:
            logits: Tensor = self.base.forward_head(x, pre_logits=pre_logits)
            return logits
        return class_logits(self, x, None, [])

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
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
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
            attn_mask: Which tokens may attend to which, as in `forward`.
            is_causal: Whether tokens attend only to earlier ones, as in `forward`.

        Raises:
            ValueError: If output_fmt is unknown, or tokens merge that attn_mask or is_causal can't tell about.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        options = dict(norm=norm, stop_early=stop_early, final=not intermediates_only)
        taken, final = features.intermediates(self, x, indices, limited(attn_mask, is_causal), **options)
        grid = self._grid(x) if output_fmt == "NCHW" else None
        return features.pack(taken, final, self.num_prefix_tokens, grid, return_prefix_tokens, output_dict)

    @torch.no_grad()
    def token_groups(self, images: Tensor, block: int | None = None) -> Tensor:
        """Which token, counted after the prefix, each patch of images (B, 3, H, W) ends in: (B, rows, columns) int64.

        Tokens are merged as in evaluation, whatever mode the model is in. With `block`, it is the token after so many
        blocks.
        """
        with evaluating(self):
            return features.token_groups(self, images, block)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of the images' patches."""
        return blocks.grid_size(self.base, images.shape[-2:])

    def flops(self, r: Any = None, image_size: tuple[int, int] | None = None) -> int:
        """Multiply-adds for the class logits of one image in evaluation, from shapes alone.

        Args:
            r: Tokens to merge in each block, as in `timm_tokens.ops.schedule`; None: as the merger is set.
            image_size: (height, width); None: the size the model was made for.
        """
        return self.costs(image_size).flops(schedule_of(self.merger, len(self.base.blocks), r))

    def costs(self, image_size: tuple[int, int] | None = None) -> Costs:
        """What the model's pieces cost for one image, to count the FLOPs of many schedules; arguments as in `flops`."""
        return Costs(meta_copy(self), image_size or self.image_size)

    def token_counts(self, r: Any = None, image_size: tuple[int, int] | None = None) -> list[int]:
        """Tokens, prefix included, before the first block and after each; arguments as in `flops`."""
        rows, columns = blocks.grid_size(self.base, image_size or self.image_size)
        counts = schedule_of(self.merger, len(self.base.blocks), r)
        return token_counts(counts, self.num_prefix_tokens + rows * columns, self.num_prefix_tokens)

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
