"""What timm's scripts expect of a model, answered by the base: nothing here changes what is computed."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from timm_tokens import blocks, loading, saving, tracing
from timm_tokens.parts import AuxTokens, TokenLabelHead, TokenMerger
from timm_tokens.timm_types import ViT


def _of_base(name: str) -> property:
    """A member of the base, read and set there; a base without it makes it an AttributeError, as in timm."""
    return property(
        lambda self: getattr(self.base, name),
        lambda self, value: setattr(self.base, name, value),
        doc=f"The base's {name}.",
    )


class TimmProtocol(nn.Module):
    """What TokenViT has of timm: the members by which timm trains, saves and takes features from a model."""

    base: ViT
    aux: AuxTokens  # None where the model has none, as merger and head; said to be there, so that `model.merger.r = 16`
    merger: TokenMerger  # passes type checkers
    head: TokenLabelHead
    mask_token: nn.Parameter | None
    forward_intermediates: Callable[..., Any]
    _unset = False  # whether memory was made for weights (`to_empty`), and nothing has set them yet

    num_features, head_hidden_size, embed_dim = map(_of_base, ("num_features", "head_hidden_size", "embed_dim"))
    num_prefix_tokens, num_reg_tokens = map(_of_base, ("num_prefix_tokens", "num_reg_tokens"))
    in_chans, dynamic_img_size, no_embed_class = map(_of_base, ("in_chans", "dynamic_img_size", "no_embed_class"))
    global_pool, pool_include_prefix = map(_of_base, ("global_pool", "pool_include_prefix"))
    grad_checkpointing, distilled_training = map(_of_base, ("grad_checkpointing", "distilled_training"))
    rope_mixed, rope_is_mixed = map(_of_base, ("rope_mixed", "rope_is_mixed"))
    weight_init_mode, fix_init, head_init_scale = map(_of_base, ("weight_init_mode", "fix_init", "head_init_scale"))
    # its layers: setting one sets the base's, as tools do that replace a norm or take blocks away
    patch_embed, embeds, pos_embed, rope = map(_of_base, ("patch_embed", "embeds", "pos_embed", "rope"))
    cls_token, reg_token, dist_token = map(_of_base, ("cls_token", "reg_token", "dist_token"))
    cls_embed, pos_drop, patch_drop = map(_of_base, ("cls_embed", "pos_drop", "patch_drop"))
    norm_pre, blocks, norm, attn_pool = map(_of_base, ("norm_pre", "blocks", "norm", "attn_pool"))
    fc_norm, head_drop, head_dist = map(_of_base, ("fc_norm", "head_drop", "head_dist"))
    # its methods that have nothing to do with the parts
    set_input_size, get_patch_size = map(_of_base, ("set_input_size", "get_patch_size"))
    set_grad_checkpointing, load_pretrained = map(_of_base, ("set_grad_checkpointing", "load_pretrained"))
    fix_init_weight = _of_base("fix_init_weight")
    # timm records here how a model was built and resized. The base keeps that record and the merger keeps its own, so
    # both are read from there when they are asked for, and what timm sets on the wrapper is already known.
    _model_args = property(lambda self: self.model_args, lambda self, args: None)
    _traits = property(lambda self: _under_base(getattr(self.base, "_traits", {})), lambda self, traits: None)
    __prepare_scriptable__, _slow_forward = tracing.refuse_scripting, tracing.traced_forward

    def _init_protocol(self) -> None:
        cfg = _under_base(getattr(self.base, "pretrained_cfg", None) or {})
        self.pretrained_cfg = self.default_cfg = cfg | {"architecture": "token_vit", "classifier": self.classifiers}
        self.register_load_state_dict_pre_hook(loading.before_loading)
        self.register_load_state_dict_post_hook(loading.after_loading)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property):  # nn.Module would register a layer of this name here
            object.__setattr__(self, name, value)
        elif name == "head" and value is not None and not hasattr(value, "tokens"):
            raise TypeError(
                f"model.head is the token-label head, got a {type(value).__name__}; for other classes call "
                "model.reset_classifier(num_classes), or set model.base.head"
            )
        else:
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if self._has(name)]

    def _has(self, name: str) -> bool:
        """Whether a member can be had: not those that bases of other families have."""
        try:
            return not isinstance(getattr(type(self), name, None), property) or hasattr(self, name)
        except ValueError:  # model_args of a base that was not made by name
            return False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TimmProtocol":
        was_on_meta = loading.on_meta(self)
        super()._apply(fn, recurse)
        self._unset = self._unset or (was_on_meta and not loading.on_meta(self))
        return self

    @property
    def num_classes(self) -> int:
        """How many classes the logits are for."""
        return self.base.num_classes if self.head is None else self.head.num_classes

    @property
    def classifiers(self) -> tuple[str, ...]:
        """Names of the layers that make the logits."""
        if self.head is not None and self.head.cls is not None:
            return ("head.cls", "head.tokens")
        names = tuple(under_base(n) for n in loading.classifiers(self.base) if n != loading.PUBLISHED_HEAD)
        return names if self.head is None else (*names, "head.tokens")

    @property
    def has_class_token(self) -> bool:
        """Whether the first prefix token is a class token."""
        own = self.base.embeds if hasattr(self.base, "embeds") else self.base
        return own.cls_token is not None

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """One entry per block: module (where merging blocks give un-merged tokens to hooks), num_chs, reduction."""
        place = "base.blocks." if self.merger is None else "merger.unmerged."
        return [info | {"module": place + info["module"].removeprefix("blocks.")} for info in self.base.feature_info]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images that the model is made for, as far as it says."""
        size = getattr(blocks.stem(self.base), "img_size", None)
        return tuple(size or self.pretrained_cfg.get("input_size", (3, 224, 224))[1:])

    @property
    def model_args(self) -> dict[str, Any]:
        """Plain data from which `timm.create_model(architecture, **model_args)` builds this model again.

        Recent timm saves it with the model; to older timm pass it: `save_for_hf(..., model_args=model.model_args)`.

        Raises:
            ValueError: If the base was not made by timm.create_model, so that its name is unknown.
        """
        return saving.model_args(self)

    @property
    def parts(self) -> dict[str, nn.Module | None]:
        """The parts by name, None where the model has none."""
        return {"aux": self.aux, "merger": self.merger, "head": self.head}

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """The classifier of the class token: the head's own, or the base's; two of them for distilled models."""
        return self.base.get_classifier() if self.head is None or self.head.cls is None else self.head.cls

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the base a new classifier, and another pooling if one is named; a token-label head follows.

        Without classes the model gives pooled features, and the token-label head goes.
        """
        self.base.reset_classifier(num_classes, global_pool)
        if self.head is not None:
            options = blocks.placement(self.base)
            self.head = cast(Any, self.head.resized(num_classes).to(**options) if num_classes else None)

    @property
    def set_distilled_training(self) -> Callable[..., None]:
        """For distilled bases: return both heads' logits in training, as timm's distillation wants them. A ValueError
        with a token-label head, which adds to one set of logits."""
        return partial(_set_distilled, self.base.set_distilled_training, self.head)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Pool what `forward_features` gives, (B, P + N, C) -> (B, C), as the base does or by `pool_type`."""
        return (self.base._pool if hasattr(self.base, "_pool") else self.base.pool)(x, pool_type)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: Tensor | None = None,
    ) -> list[Any]:
        """`forward_intermediates` as DINO names it: tokens (B, N, C) of n blocks, with `reshape` maps (B, C, H, W)."""
        options = dict(norm=norm, output_fmt="NCHW" if reshape else "NLC", intermediates_only=True, attn_mask=attn_mask)
        return self.forward_intermediates(x, n, return_prefix_tokens=return_prefix_tokens, **options)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialise all weights anew: the base's by timm's rules, then the parts'; a merger starts as the base's keys.

        Args:
            mode: timm's name of the rules ("jax", "moco", ...); "": those that the base was made by.
            needs_reset: Whether layers that initialise themselves when they are made do so again.
        """
        self.base.init_weights(**({"mode": mode} if mode else {}), needs_reset=needs_reset)
        loading.initialise_parts(self)
        self._unset = False

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay leaves alone."""
        return {f"base.{name}" for name in self.base.no_weight_decay()} | {"aux.tokens", "mask_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into layers, for layer-wise learning rates: each embedding with its block, new
        tokens with the stem."""
        groups = {
            name: _patterns_under_base(patterns) for name, patterns in self.base.group_matcher(coarse=coarse).items()
        }
        if isinstance(groups.get("blocks"), list):
            groups["blocks"].append((r"^merger\.embed\.(\d+)", None))
        if isinstance(groups.get("stem"), str):
            groups["stem"] += r"|^aux\.tokens|^mask_token"
        return groups

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last one that is asked for; with `prune_head`, all that these features don't need:
        the classifiers, and auxiliary and mask tokens."""
        taken = self.base.prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            self.head = self.aux = self.mask_token = cast(Any, None)
        if self.merger is not None:
            self.merger.truncate(len(self.base.blocks))
        return taken


def _set_distilled(set_base: Callable[[bool], None], head: nn.Module | None, enable: bool = True) -> None:
    if enable and head is not None:
        raise ValueError("a model with a token-label head gives one set of logits; distil one without the head")
    set_base(enable)


def under_base(names: Any) -> Any:
    """Names of the base's modules as the wrapper has them."""
    return f"base.{names}" if isinstance(names, str) else tuple(f"base.{name}" for name in names)


def _under_base(record: dict[str, Any]) -> dict[str, Any]:
    """A record of timm's about the base, with the names of first convolutions as the wrapper has them."""
    convs = record.get("first_conv")
    return {**record, "first_conv": under_base(convs)} if convs else dict(record)


def _patterns_under_base(patterns: Any) -> Any:
    """The base's patterns for the same parameters under `base.`, without a new capturing group."""
    if isinstance(patterns, str):
        return r"^base\.(?:" + re.sub(r"(^|\|)\^", r"\1", patterns) + ")"
    return [(_patterns_under_base(pattern), order) for pattern, order in patterns]
