"""How timm's Vision Transformers are driven from outside; only this module and its neighbours know their internals.

A model is driven as stem -> for each block: attend, feed -> norm -> head. `embed` is the stem; `attend` and `feed` are
the two halves of a block, so that tokens can change in between; `classification` pools tokens of several patches.
What a block does is looked up by its class's forward function, not by its class: a subclass with a forward of its own
does something else, and is refused. A test compares every driven model with the model itself.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from timm.layers import AttentionRope, DiffAttention
from timm.layers.attention import Attention
from timm.models import Eva, VisionTransformer
from timm.models import eva as _eva
from timm.models import vision_transformer as _vit
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from timm_tokens import rotary
from timm_tokens.timm_types import Block, ViT

Embedded: TypeAlias = tuple[Tensor, list[Tensor] | None]  # tokens (B, N, C), each block's rotary embedding if any
Edit: TypeAlias = Callable[[Tensor], Tensor] | None  # of patches (B, N, C), before they get their position embedding


class Halves(NamedTuple):
    """The two halves of a block."""

    read: Callable[[Any, Tensor], Tensor]  # what the attention reads
    attend: Callable[..., Tensor]  # (block, x, read, **attention arguments): the attention half, residual included
    feed: Callable[[Any, Tensor], Tensor]  # the MLP half, residual included


def _scaled(gamma: Tensor | None, x: Tensor) -> Tensor:
    return x if gamma is None else gamma * x


_PRE_NORM = Halves(
    read=lambda block, x: block.norm1(x),
    attend=lambda block, x, y, **kw: x + block.drop_path1(block.ls1(block.attn(y, **kw))),
    feed=lambda block, x: x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))),
)
_POST_NORM = Halves(
    read=lambda block, x: x,
    attend=lambda block, x, y, **kw: x + block.drop_path1(block.norm1(block.attn(y, **kw))),
    feed=lambda block, x: x + block.drop_path2(block.norm2(block.mlp(x))),
)
_EVA = Halves(
    read=lambda block, x: block.norm1(x),
    attend=lambda block, x, y, **kw: x + block.drop_path1(_scaled(block.gamma_1, block.attn(y, **kw))),
    feed=lambda block, x: x + block.drop_path2(_scaled(block.gamma_2, block.mlp(block.norm2(x)))),
)
_HALVES = {
    _vit.Block.forward: _PRE_NORM,
    _vit.ResPostBlock.forward: _POST_NORM,
    _eva.EvaBlock.forward: _EVA,
    _eva.EvaBlockPostNorm.forward: _POST_NORM,
}
_WHOLE = {  # attention and MLP side by side: nothing can happen in between
    _vit.ParallelThingsBlock.forward,
    _vit.ParallelScalingBlock.forward,
    _vit.DiffParallelScalingBlock.forward,
}
ATTENTIONS = {m.forward for m in (Attention, AttentionRope, DiffAttention, _eva.EvaAttention)}
_MODELS = {m.forward_features for m in (VisionTransformer, Eva, NaFlexVit)}
_SUPPORTED = (
    "timm's VisionTransformer (ViT, DeiT, DeiT-III, CLIP, SigLIP, DINOv2, ...), Eva (EVA-02, DINOv3, PE, ROPE-ViT) and "
    "NaFlexVit, with the blocks Block, ResPostBlock, EvaBlock and EvaBlockPostNorm"
)


def check(base: ViT, merging: bool) -> None:
    """Refuse a model that can't be driven exactly, or (merging) whose blocks leave no place to merge tokens."""
    if getattr(type(base), "forward_features", None) not in _MODELS:
        inside = getattr(base, "blocks", None)
        block = f" (blocks: {name(inside[0])})" if isinstance(inside, (nn.Sequential, nn.ModuleList)) else ""
        raise TypeError(f"{name(base)}{block} can't be driven from outside; supported are {_SUPPORTED}")
    if not len(base.blocks):
        raise TypeError(f"{name(base)} has no blocks")
    for i, block in enumerate(base.blocks):
        forward = type(block).forward
        if forward in _WHOLE and merging:
            raise TypeError(
                f"block {i}, {name(block)}, runs attention and MLP in parallel: no tokens can be merged in between; "
                f"merging supports {_SUPPORTED}"
            )
        known = forward in _WHOLE or (forward in _HALVES and type(block.attn).forward in ATTENTIONS)
        if not known:
            attention = f" with {name(block.attn)}" if hasattr(block, "attn") else ""
            raise TypeError(f"block {i}, {name(block)}{attention}, is not known; supported are {_SUPPORTED}")


def name(module: nn.Module) -> str:
    """The module's class, and the file that it is from, for messages."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def embed(base: ViT, images: Tensor, edit: Edit = None) -> Embedded:
    """Patches, position embedding, prefix tokens (first), patch dropout, norm: everything before the first block."""
    # FSDP2 gives what it wraps a method `unshard`
    if is_replaced(base) or "forward_features" in base.__dict__ or hasattr(type(base), "unshard"):
        raise TypeError(
            f"{name(base)} was wrapped by FSDP, compiled or given another forward, but it is called module by module, "
            "past that; wrap or compile the TokenViT instead of its base"
        )
    if isinstance(base, NaFlexVit):
        return _embed_naflex(base, images, edit)
    x = base.patch_embed(images)
    if edit is not None:  # (B, H, W, C) where image sizes are dynamic
        x = edit(x) if x.ndim == 3 else edit(x.flatten(1, 2)).unflatten(1, x.shape[1:3])
    if isinstance(base, Eva):
        x, rope = base._pos_embed(x)
        x = base.norm_pre(x)
        mixed = getattr(base, "rope_mixed", False)
        return x, rotary.per_block(rope, len(base.blocks), mixed)
    return base.norm_pre(base.patch_drop(base._pos_embed(x))), None


def _embed_naflex(base: ViT, images: Tensor, edit: Edit) -> Embedded:
    if not isinstance(images, Tensor):
        raise TypeError(f"NaFlexVit is supported with images as a tensor (B, 3, H, W), got a {type(images).__name__}")
    stem = base._forward_embeds(images, patch_coord=None, patch_valid=None, attn_mask=None)
    x, keep = stem["patches"], stem["keep_indices"]
    if edit is not None:
        x = _edit_naflex(base, x, grid_size(base, images.shape[-2:]), edit)
    ropes = rotary.per_block(stem["rope_embeds"], len(base.blocks), base.rope_is_mixed)
    if ropes is not None and keep is not None and base.rope_is_mixed:  # timm's own loop over the blocks does this
        ropes = [rotary.rope_rows(rope, keep) for rope in ropes]
    return x, ropes


def _edit_naflex(base: ViT, x: Tensor, grid: tuple[int, int], edit: Callable[[Tensor], Tensor]) -> Tensor:
    """Edit patches that have their position embedding already: take it off, and put it back."""
    stem, prefix = base.embeds, base.num_prefix_tokens
    dropout = base.training and (base.patch_drop is not None or stem.pos_drop.p > 0)
    if dropout or not isinstance(base.norm_pre, nn.Identity):
        raise ValueError(
            "a NaFlexVit with patch dropout, position dropout or a norm before its blocks can't have its patches mixed "
            "or masked: it does not give them out before that; build it without"
        )
    position = x.new_zeros(1, x.shape[1] - prefix, x.shape[2])
    if stem.pos_embed_type == "learned":
        stem._apply_learned_pos_embed(position, grid_size=grid)
    elif stem.pos_embed_type == "factorized":
        stem._apply_factorized_pos_embed(position, grid_size=grid)
    return torch.cat([x[:, :prefix], edit(x[:, prefix:] - position) + position], dim=1)


def halves(block: Block) -> Halves:
    """How the block is called in halves, so that its tokens can change in between."""
    found = _HALVES.get(type(block).forward)
    if found is None or "forward" in block.__dict__:
        raise TypeError(
            f"{name(block)} is a wrapped block, but a block whose tokens merge is called in two halves, past the "
            "wrapper; wrap its attn and mlp, or the whole model"
        )
    if block._compiled_call_impl is not None:
        raise TypeError(
            f"{name(block)}.compile() was called, but a block whose tokens merge is called in two halves, past what "
            "was compiled; compile its attn and mlp, or the whole model"
        )
    return found


def is_replaced(module: nn.Module) -> bool:
    """Whether something else than its class's forward runs when the module is called."""
    return "forward" in module.__dict__ or module._compiled_call_impl is not None


def calls_them_at_once(base: ViT) -> bool:
    """Whether the model calls the module that holds its blocks, and not each of them."""
    return type(base).forward_features is VisionTransformer.forward_features and not base.grad_checkpointing


def has_halves(block: Block) -> bool:
    """Whether the block can be called in halves as it is now."""
    return type(block).forward in _HALVES and not is_replaced(block)


def first_tokens(block: Block, count: int, x: Tensor, **attention: Any) -> Tensor:
    """The first tokens (B, count, C) of what the block makes of x (B, N, C)."""
    read, attend, feed = halves(block)
    return feed(block, attend(block, x, read(block, x), **attention)[:, :count])


def placement(base: ViT) -> dict[str, Any]:
    """The device and dtype that the base computes in; quantised weights don't say."""
    for tensor in (*base.parameters(), *base.buffers()):
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1:
            return {"device": tensor.device, "dtype": tensor.dtype}
    raise TypeError(f"{name(base)} has no weights in floating point, which say what type its tokens have")


def stem(base: ViT) -> Any:
    """The module that turns images into patches."""
    return base.embeds if isinstance(base, NaFlexVit) else base.patch_embed


def grid_size(base: ViT, image_size: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of patches in an image of (height, width)."""
    rows, columns = stem(base).dynamic_feat_size(tuple(image_size))
    return rows, columns
