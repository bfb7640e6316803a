"""What timm's scripts expect of a model, answered by the base: nothing here changes what is computed."""

import re
from typing import Any

from torch import Tensor, nn

from timm_tokens import blocks


def _of_base(name: str) -> property:
    return property(lambda self: getattr(self.base, name), doc=f"The base's {name}.")


PUBLISHED_HEAD = "aux_head"  # the token-label head in published checkpoints


class TimmProtocol:
    """Mixed into TokenViT: the members by which timm trains, saves and takes features from a model."""

    base: nn.Module

    num_features = _of_base("num_features")
    head_hidden_size = _of_base("head_hidden_size")
    embed_dim = _of_base("embed_dim")
    num_prefix_tokens = _of_base("num_prefix_tokens")
    global_pool = _of_base("global_pool")
    grad_checkpointing = _of_base("grad_checkpointing")
    in_chans = _of_base("in_chans")

    def _init_protocol(self) -> None:
        cfg = dict(getattr(self.base, "pretrained_cfg", None) or {})
        if cfg.get("first_conv"):
            cfg["first_conv"] = under_base(cfg["first_conv"])
        self.pretrained_cfg = self.default_cfg = cfg | {"architecture": "token_vit", "classifier": self.classifiers}
        self.register_load_state_dict_pre_hook(_accept_plain_checkpoint)

    @property
    def num_classes(self) -> int:
        """How many classes the logits are for."""
        return self.base.num_classes if self.head is None else self.head.num_classes

    @property
    def classifiers(self) -> tuple[str, ...]:
        """Names of the layers that make the logits."""
        if self.head is not None and self.head.cls is not None:
            return ("head.cls", "head.tokens")
        names = tuple(under_base(name) for name in _classifiers(self.base) if name != PUBLISHED_HEAD)
        return names if self.head is None else (*names, "head.tokens")

    @property
    def has_class_token(self) -> bool:
        """Whether the first prefix token is a class token."""
        own = self.base.embeds if hasattr(self.base, "embeds") else self.base
        return own.cls_token is not None

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """One entry a block: module, num_chs, reduction."""
        return [info | {"module": f"base.{info['module']}"} for info in self.base.feature_info]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images that the model is made for, as far as it says."""
        size = (
            getattr(blocks.stem(self.base), "img_size", None)
            or self.pretrained_cfg.get("input_size", (3, 224, 224))[1:]
        )
        return tuple(size)

    @property
    def model_args(self) -> dict[str, Any]:
        """Plain data from which `timm.create_model(architecture, **model_args)` builds this model again.

        Recent timm saves it with the model; to older timm pass it: `save_for_hf(..., model_args=model.model_args)`.

        Raises:
            ValueError: If the base was not made by timm.create_model, so that its name is unknown.
        """
        args = {name: getattr(self.base, name) for name in ("in_chans", "global_pool")}
        if getattr(blocks.stem(self.base), "img_size", None):
            args["img_size"] = list(self.image_size)
        args |= getattr(self.base, "_model_args", {})
        if self.pretrained_cfg["architecture"] == "token_vit":
            args["base"] = self._base_name()
        args["num_classes"] = self.num_classes
        if self.num_classes != self.base.num_classes:
            args["base_num_classes"] = self.base.num_classes
        args |= {name: part and part.config for name, part in self.parts.items()}
        if self.head is not None:
            del args["head"]["num_classes"]  # said above, and there to be overridden
        return args | {"mask_token": self.mask_token is not None}

    @property
    def parts(self) -> dict[str, nn.Module | None]:
        """The parts by name, None where the model has none."""
        return {"aux": self.aux, "merger": self.merger, "head": self.head}

    def _base_name(self) -> str:
        cfg = getattr(self.base, "pretrained_cfg", None) or {}
        if not cfg.get("architecture"):
            raise ValueError(
                f"the base, a {type(self.base).__name__}, does not say by which name timm.create_model makes it "
                "(base.pretrained_cfg['architecture']); save its state dict instead, or create it by name"
            )
        return f"{cfg['architecture']}.{cfg['tag']}" if cfg.get("tag") else cfg["architecture"]

    # timm records here how a model was built and resized. The base keeps that record and the merger keeps its own, so
    # both are read from there when they are asked for, and what timm sets on the wrapper is already known.
    @property
    def _model_args(self) -> dict[str, Any]:
        return self.model_args

    @_model_args.setter
    def _model_args(self, args: dict[str, Any]) -> None:
        pass

    @property
    def _traits(self) -> dict[str, Any]:
        traits = dict(getattr(self.base, "_traits", {}))
        return traits | ({"first_conv": under_base(traits["first_conv"])} if traits.get("first_conv") else {})

    @_traits.setter
    def _traits(self, traits: dict[str, Any]) -> None:
        pass

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """The classifier of the class token: the head's own, or the base's; two of them for distilled models."""
        return self.base.get_classifier() if self.head is None or self.head.cls is None else self.head.cls

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the base a new classifier, and another pooling if one is named; a token-label head follows.

        Without classes the model gives pooled features, and the token-label head goes.
        """
        self.base.reset_classifier(num_classes, global_pool)
        if self.head is not None:
            self.head = self.head.resized(num_classes) if num_classes else None

    def set_distilled_training(self, enable: bool = True) -> None:
        """Let a distilled base return both its heads' logits in training, as timm's distillation wants them.

        Raises:
            ValueError: If the model has a token-label head, which adds to one set of logits.
        """
        if enable and self.head is not None:
            raise ValueError("a model with a token-label head gives one set of logits; distil one without the head")
        self.base.set_distilled_training(enable)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping what is inside it."""
        self.base.set_grad_checkpointing(enable)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Take images of another size, resampling the position embedding."""
        self.base.set_input_size(img_size=img_size, patch_size=patch_size)

    def load_pretrained(self, checkpoint_path: str, prefix: str = "") -> None:
        """Load one of the base's foreign checkpoints (.npz) into the base."""
        self.base.load_pretrained(checkpoint_path, prefix)

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
        """Drop the blocks after the last one that is asked for; see timm's forward_intermediates."""
        taken = self.base.prune_intermediate_layers(indices, prune_norm, prune_head)
        if self.merger is not None:
            self.merger.truncate(len(self.base.blocks))
        return taken


def under_base(names: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """Names of the base's modules as the wrapper has them."""
    return f"base.{names}" if isinstance(names, str) else tuple(f"base.{name}" for name in names)


def _patterns_under_base(patterns: Any) -> Any:
    """The base's patterns for the same parameters under `base.`, without a new capturing group."""
    if isinstance(patterns, str):
        return r"^base\.(?:" + re.sub(r"(^|\|)\^", r"\1", patterns) + ")"
    return [(_patterns_under_base(pattern), order) for pattern, order in patterns]


def _classifiers(base: nn.Module) -> tuple[str, ...]:
    """Names of the classifiers in the base's published checkpoints."""
    names = (getattr(base, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _accept_plain_checkpoint(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before loading: a checkpoint of the plain ViT goes to the base, and the parts keep what they have.

    A published token-label head goes to the head. It must be there if the base is one that is published with it.
    """
    own = {name for name in state_dict if name.startswith(prefix)}
    if not own or any(name.startswith(f"{prefix}base.") for name in own):
        return
    for name in own:
        state_dict[prefix + whole_name(name[len(prefix) :])] = state_dict.pop(name)
    given = {name.rpartition(".")[0] for name in state_dict}
    if PUBLISHED_HEAD in _classifiers(model.base):
        given.add(f"{prefix}head.tokens")
    for name, value in model.state_dict(prefix=prefix, keep_vars=True).items():
        if not name.startswith(f"{prefix}base.") and name.rpartition(".")[0] not in given:
            state_dict[name] = value.detach()


def whole_name(name: str) -> str:
    """A TokenViT's name of a weight in a plain or published checkpoint."""
    module, _, leaf = name.rpartition(".")
    return f"head.tokens.{leaf}" if module == PUBLISHED_HEAD else f"base.{name}"
