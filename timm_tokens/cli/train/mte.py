"""Pre-train by DINO, iBOT or MoBY with auxiliary tokens that teach the global one and are then dropped (MTE).

    timm-tokens train mte --data-dir images --model vit_small_patch16_224 --loss dino --out run
    timm-tokens train mte --data-dir images --model deit_small_patch16_224 --recipe moby --num-pooled 0 --out baseline

--data-dir has train/ with one folder per class, but the classes are not used. The result is a plain timm model. The
defaults are DINO's; the second line is MoBY as in its paper, without auxiliary tokens. The default is six pooled tokens
and no auxiliary class tokens, because that measured best; ViTs can have auxiliary class tokens, too.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from timm_tokens import blocks
from timm_tokens import options as base
from timm_tokens.cli.common.models import make_backbone
from timm_tokens.cli.errors import CommandError
from timm_tokens.cli.train.crops import CropOptions, crop_sides, on_crops
from timm_tokens.cli.train.objective import Objective, TrainOptions, launch, make_student
from timm_tokens.cli.train.online import OnlineOptions
from timm_tokens.data import Crop, dino_crops
from timm_tokens.options import changed, option
from timm_tokens.parts.aux_tokens import POOL_NORMS, POOL_WEIGHTS
from timm_tokens.tasks import MTETask, PooledTokens
from timm_tokens.wrap import add_aux_tokens

TOKENS = ("num_cls", "aux_sees_cls", "aux_sees_aux")  # arguments of auxiliary class tokens
POOL = ("num_pooled", "pool_weight", "pool_norm")  # and of pooled ones
SAME = (  # arguments of MTETask that are options of the same name
    "learn_scale", "aux_target", "include_global", "global_weight", "heads", "batch_norm", "aux_on_local",
    "tau_teacher", "tau_epochs", "frozen_epochs", "mask_ratio", "mask_prob", "exact_masks", "patch_center",
    "queue_size", "crop_by_crop",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LossOptions(base.Options):
    """Loss."""

    loss: str = option(
        "dino", "self-supervised loss to train with", choices=("dino", "ibot", "moby"), aliases=("--objective",)
    )
    prototypes: int | None = option(
        None, "number of prototypes (default: 65536 for DINO, 8192 for iBOT; MoBY has none)", at_least=1
    )
    head_hidden: int | None = option(
        None, "dimension of the heads' hidden layers (default: 2048, or 4096 for MoBY)", at_least=1
    )
    batch_norm: bool = option(False, "use batch normalisation in the heads of DINO and iBOT; MoBY's always have it")
    learn_scale: bool = option(False, "let the prototypes learn their lengths as well as their directions")
    tau_teacher: tuple[float, float] = option(
        (0.04, 0.07), "temperature of the teacher at the start and after --tau-epochs", above=0
    )
    tau_epochs: float = option(30.0, "number of epochs over which the teacher's temperature rises", at_least=0)
    teacher_momentum: float | None = option(
        None, "momentum of the teacher at the start; it rises to 1 (default: 0.996, or 0.99 for MoBY)",
        at_least=0, at_most=1,
    )  # fmt: skip
    frozen_epochs: float = option(1.0, "number of epochs at the start in which the prototypes are frozen", at_least=0)
    mask_ratio: tuple[float, float] = option(
        (0.1, 0.5), "iBOT: range of the share of patches that are masked", at_least=0, at_most=1, ascending=True
    )
    mask_prob: float = option(0.5, "iBOT: probability that an image is masked", at_least=0, at_most=1)
    exact_masks: bool = option(
        True, "iBOT: draw masks as its published code does, which rejects blocks and may mask fewer patches than drawn",
        flag="--rejected-masks", rare=True,
    )  # fmt: skip
    patch_center: str = option(
        "masked", "iBOT: which of the teacher's patches centre the patch loss; the published code takes all",
        choices=("masked", "all"), rare=True,
    )  # fmt: skip
    queue_size: int = option(4096, "MoBY: length of the key queue", at_least=1)
    crop_by_crop: bool = option(
        False, "encode one crop after the other, so that batch norms see one crop of each image at a time", rare=True
    )


@dataclass(frozen=True, kw_only=True)
class TokenOptions(base.Options):
    """Auxiliary tokens."""

    num_cls: int | None = option(
        None, "number of auxiliary class tokens, which only ViTs have (default: 0)", at_least=0
    )
    num_pooled: int | None = option(None, "number of adaptively pooled tokens (default: 6)", at_least=0)
    aux_target: str = option(
        "ensemble", "what an auxiliary token learns from: the mean of the teacher's tokens, or the same token",
        choices=("ensemble", "own"),
    )  # fmt: skip
    global_weight: float = option(0.5, "weight of the global token in the loss", at_least=0, at_most=1)
    heads: str = option("kind", "one projection head for each kind of token, or one shared by all",
                        choices=("kind", "shared"))  # fmt: skip
    pool_weight: str | None = option(
        None, "weights that pool the patches: one map per token, or one per token and channel (default: spatial)",
        choices=POOL_WEIGHTS, rare=True,
    )  # fmt: skip
    pool_norm: str | None = option(
        None, "normalisation of the pooling weights over the positions (default: softmax)", choices=POOL_NORMS,
        rare=True,
    )  # fmt: skip
    aux_sees_cls: bool | None = option(
        None, "let auxiliary class tokens attend to the class token (default: they do not)", rare=True
    )
    aux_sees_aux: bool | None = option(
        None, "let auxiliary class tokens attend to each other (default: they do not)", rare=True
    )
    include_global: bool = option(
        True, "leave the global token out of the ensemble", flag="--without-global", rare=True
    )
    aux_on_local: bool = option(False, "give local crops auxiliary tokens as well", rare=True)


@dataclass(frozen=True, kw_only=True)
class Options(LossOptions, TokenOptions, OnlineOptions, CropOptions):
    """MTE."""

    lr: float = changed(TrainOptions, "lr", 5e-4)
    lr_base_size: int | None = changed(TrainOptions, "lr_base_size", 256)
    weight_decay: float = changed(TrainOptions, "weight_decay", 0.04)
    weight_decay_end: float | None = changed(TrainOptions, "weight_decay_end", 0.4)
    clip_grad: float | None = changed(TrainOptions, "clip_grad", 3.0)
    clip_mode: str = changed(TrainOptions, "clip_mode", "parameter")
    drop_path: float | None = changed(TrainOptions, "drop_path", 0.1)


def build(options: Options) -> Objective:
    """The task, and the images as crops."""
    task = make_task(options)
    base = task.student.encoder.backbone.base
    return on_crops(task, base, _crops(options, base), options)


run = partial(launch, "train mte", build)


def make_task(options: Options) -> MTETask:
    """The task alone, which needs no images."""
    same = {name: getattr(options, name) for name in SAME}
    momentum = None if options.teacher_momentum is None else (options.teacher_momentum, 1.0)
    return MTETask(
        _model(options), options.loss, momentum=momentum, num_prototypes=options.prototypes, hidden=options.head_hidden,
        **same,
    )  # fmt: skip


def _model(options: Options) -> nn.Module:
    """The model with its auxiliary tokens: a ViT that takes crops of any size, or anything else with pooled ones."""
    model: Any = make_student(options, make_backbone)
    asked = {name: value for name in TOKENS + POOL if (value := getattr(options, name)) is not None}
    if getattr(model, "aux", None) is not None:  # vit_small_mte and the like bring theirs
        for name, value in asked.items():
            if value != (made := model.aux.config[name]):
                raise CommandError(f"{options.model} was made with {name} = {made}, not {value}: name its base instead")
        return model
    try:
        blocks.check(model, merging=False)
    except TypeError:
        if any(asked.get(name) for name in TOKENS):
            raise CommandError(f"{options.model} can't have auxiliary class tokens, only pooled ones") from None
        return PooledTokens(model, **{name: value for name, value in asked.items() if name in POOL})
    return add_aux_tokens(model, **{"num_cls": 0} | asked)


def _crops(options: Options, base: nn.Module) -> list[Crop]:
    moby = options.loss == "moby"
    num_local = (0 if moby else 8) if options.local_crops is None else options.local_crops
    scale = options.global_scale or ((0.08, 1.0) if moby else (0.4, 1.0))
    return dino_crops(*crop_sides(options, base), num_local, scale, options.local_scale)
