"""Pre-train without labels, with auxiliary tokens that teach the global one and are dropped afterwards (MTE).

    timm-tokens train mte --data-dir images --model vit_small_patch16_224 --objective dino --out run
    timm-tokens train mte --data-dir images --model vit_small_patch16_224 --objective moby --num-cls 0 --num-pooled 0 \\
        --weight-decay 0.05 --weight-decay-end 0.05 --clip-grad inf --out baseline

--data-dir has train/ with a folder a class; the classes play no part. What comes out is a plain timm model.
Defaults are DINO's, whose learning rate of 5e-4 is for 256 images a step; the second line is MoBY as its paper has it.
Pooled tokens alone are the default, which did best where it was measured; ViTs can have auxiliary class tokens, too.
"""

from argparse import ArgumentParser, Namespace
from typing import Any

from torch import nn

from timm_tokens import blocks
from timm_tokens.cli._errors import CommandError
from timm_tokens.cli._sources import add_sources, local_size, make_backbone, open_split
from timm_tokens.cli.objectives import Objective
from timm_tokens.data import Crop, MultiCrop, dino_crops
from timm_tokens.parts.aux_tokens import POOL_NORMS, POOL_WEIGHTS, AuxTokens
from timm_tokens.tasks import MTETask, PooledTokens
from timm_tokens.wrap import add_aux_tokens

DEFAULTS = {
    "lr": 5e-4,
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "clip_grad": 3.0,
    "clip_mode": "parameter",
    "drop_path": 0.1,
    "val_split": "",
}
TOKENS = ("num_cls", "aux_sees_cls", "aux_sees_aux")  # arguments of auxiliary class tokens
POOL = ("num_pooled", "pool_weight", "pool_norm")  # and of pooled ones


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of the objective."""
    add_sources(parser)
    loss = parser.add_argument_group("loss")
    loss.add_argument("--objective", dest="loss", choices=("dino", "ibot", "moby"), default="dino", help="the baseline")
    loss.add_argument("--prototypes", type=int, help="how many (default: 65536 of DINO, 8192 of iBOT)")
    loss.add_argument("--head-hidden", type=int, help="width of the heads (default: 2048, of MoBY 4096)")
    loss.add_argument("--batch-norm", action="store_true", help="in the heads of DINO and iBOT; MoBY's always have it")
    loss.add_argument("--learn-scale", action="store_true", help="prototypes learn their lengths, too")
    loss.add_argument("--tau-teacher", type=float, nargs=2, default=(0.04, 0.07), help="temperature, from and to")
    loss.add_argument("--tau-epochs", type=float, default=30, help="in which the temperature changes")
    loss.add_argument("--teacher-momentum", type=float, help="at first (default: 0.996, of MoBY 0.99); 1 at the end")
    loss.add_argument("--frozen-epochs", type=float, default=1, help="in which the prototypes do not learn")
    loss.add_argument("--mask-ratio", type=float, nargs=2, default=(0.1, 0.5), help="range of iBOT's masks")
    loss.add_argument("--mask-prob", type=float, default=0.5, help="probability of iBOT's masks")
    loss.add_argument("--queue-size", type=int, default=4096, help="of MoBY")
    tokens = parser.add_argument_group("auxiliary tokens")
    tokens.add_argument("--num-cls", type=int, help="auxiliary class tokens, of ViTs (default: 0)")
    tokens.add_argument("--num-pooled", type=int, help="adaptively pooled tokens (default: 6)")
    tokens.add_argument("--aux-sees-cls", action="store_true", default=None, help="class tokens see the global one")
    tokens.add_argument("--aux-sees-aux", action="store_true", default=None, help="class tokens see each other")
    tokens.add_argument(
        "--pool-weight", choices=POOL_WEIGHTS, help="one map a token (default), or each channel its own"
    )
    tokens.add_argument("--pool-norm", choices=POOL_NORMS, help="of the weights over the positions (default: softmax)")
    tokens.add_argument("--aux-target", choices=("ensemble", "own"), default="ensemble", help="what they learn from")
    tokens.add_argument("--without-global", dest="include_global", action="store_false",
                        help="the global token is no member of the ensemble")  # fmt: skip
    tokens.add_argument("--global-weight", type=float, default=0.5, help="of the global token, in the loss")
    tokens.add_argument("--heads", choices=("kind", "shared"), default="kind",
                        help="for each kind of token, or one for all")  # fmt: skip
    tokens.add_argument("--aux-on-local", action="store_true", help="local crops have them, too")
    crops = parser.add_argument_group("crops")
    crops.add_argument("--local-crops", type=int, help="how many (default: 8, of MoBY none)")
    crops.add_argument("--local-size", type=int, help="their side (default: 96 of an --img-size of 224)")
    crops.add_argument("--global-scale", type=float, nargs=2, help="range of area (default: 0.4 1, of MoBY 0.08 1)")
    crops.add_argument("--local-scale", type=float, nargs=2, default=(0.05, 0.4), help="range of area")


def build(options: Namespace) -> Objective:
    """The task, and the images as crops."""
    task = make_task(options)
    base = task.student.encoder.backbone.base
    images = open_split(options, options.train_split)
    images.transform = MultiCrop.for_model(base, _crops(options, base))
    return Objective(task, images)


def make_task(options: Namespace) -> MTETask:
    """The task alone, which needs no images."""
    return MTETask(
        _model(options),
        options.loss,
        num_prototypes=options.prototypes,
        hidden=options.head_hidden,
        learn_scale=options.learn_scale,
        aux_target=options.aux_target,
        include_global=options.include_global,
        global_weight=options.global_weight,
        heads=options.heads,
        batch_norm=options.batch_norm,
        aux_on_local=options.aux_on_local,
        tau_teacher=options.tau_teacher,
        tau_epochs=options.tau_epochs,
        momentum=None if options.teacher_momentum is None else (options.teacher_momentum, 1.0),
        frozen_epochs=options.frozen_epochs,
        mask_ratio=options.mask_ratio,
        mask_prob=options.mask_prob,
        queue_size=options.queue_size,
    )


def _model(options: Namespace) -> nn.Module:
    """The model with its auxiliary tokens: a ViT that takes crops of any size, or anything else with pooled ones."""
    model = make_backbone(options)
    asked = {name: value for name in TOKENS + POOL if (value := getattr(options, name)) is not None}
    if getattr(model, "aux", None) is not None:  # vit_small_mte and the like bring theirs
        _check_made_with(asked, model.aux, options.model)
        return model
    try:
        blocks.check(model, merging=False)
    except TypeError:
        if any(asked.get(name) for name in TOKENS):
            raise CommandError(f"{options.model} can't have auxiliary class tokens, only pooled ones") from None
        return PooledTokens(model, **{name: value for name, value in asked.items() if name in POOL})
    return add_aux_tokens(model, **{"num_cls": 0} | asked)


def _check_made_with(asked: dict[str, Any], aux: AuxTokens, model: str) -> None:
    for name, value in asked.items():
        made = aux.config[name]
        if value != made:
            raise CommandError(f"{model} was made with {name} = {made}, not {value}: name its base instead")


def _crops(options: Namespace, base: nn.Module) -> list[Crop]:
    moby = options.loss == "moby"
    num_local = (0 if moby else 8) if options.local_crops is None else options.local_crops
    scale = tuple(options.global_scale or ((0.08, 1.0) if moby else (0.4, 1.0)))
    size = options.img_size or base.pretrained_cfg["input_size"][1]
    local = options.local_size or local_size(base, size)
    return dino_crops(size, local, num_local, scale, tuple(options.local_scale))
