"""Pre-train a ViT without labels: with patches masked it predicts a frozen teacher's morphed tokens (DTM, 2401.00254).

    timm-tokens train dtm --data-dir images --model vit_small_patch16_224 --teacher vit_base_patch16_clip_224.openai \\
        --teacher-head --out run

The teacher is any timm ViT with weights, of any patch size: its images are resized until its patches are as many as the
student's. What comes out is the plain student without a classifier: model.safetensors, for timm.create_model(...,
checkpoint_path=...). The published recipe has --batch-size 2048 --lr 1.5e-3; the default learning rate is for 256, by
the square root of the ratio.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from timm.data import create_transform, resolve_model_data_config
from torch import nn

from timm_tokens.cli._errors import CommandError
from timm_tokens.cli._sources import add_sources, make_model, open_split
from timm_tokens.cli.objectives import Objective
from timm_tokens.losses import DTMLoss
from timm_tokens.losses.dtm import DISTANCES
from timm_tokens.tasks import DTMTask

DEFAULTS = {
    "epochs": 300, "batch_size": 256, "lr": 5.3e-4, "opt_betas": (0.9, 0.98), "clip_grad": 3.0, "drop_path": 0.1,
}  # fmt: skip


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of the objective."""
    add_sources(parser)
    teacher = parser.add_argument_group("teacher")
    teacher.add_argument("--teacher", help="name of a ViT in timm")
    teacher.add_argument("--teacher-checkpoint", type=Path, help="its weights (default: timm's)")
    teacher.add_argument(
        "--teacher-head", action="store_true", help="targets through its classifier: CLIP's projection"
    )
    loss = parser.add_argument_group("targets")
    loss.add_argument("--distance", default="smooth_l1", choices=list(DISTANCES), help="between morphed tokens")
    loss.add_argument("--draws", type=int, default=2, help="draws of the morphing in each step")
    loss.add_argument("--max-rounds", type=int, default=14, help="most rounds of matching in a draw")
    loss.add_argument("--min-tokens", type=int, default=0, help="fewest tokens that morphing leaves")
    loss.add_argument("--mask-ratio", type=float, default=75 / 196, help="share of the patches that are masked")
    loss.add_argument("--masked-only", action="store_true", help="leave visible patches out of the loss")
    augment = parser.add_argument_group("augmentation")
    augment.add_argument("--scale", type=float, nargs=2, default=(0.2, 1.0), help="range of a crop's area")
    augment.add_argument("--hflip", type=float, default=0.5, help="probability of a left-right flip")
    augment.add_argument("--color-jitter", type=float, default=0.0, help="strength")


def build(options: Namespace) -> Objective:
    """The task and the images; labels are not used."""
    student = make_model(options, num_classes=0)
    loss = DTMLoss(options.distance, draws=options.draws, max_rounds=options.max_rounds, min_tokens=options.min_tokens)
    task = DTMTask(
        student, _teacher(options), loss, image_size=options.img_size,
        mask_ratio=options.mask_ratio, masked_only=options.masked_only, teacher_head=options.teacher_head,
    )  # fmt: skip
    train, config = open_split(options, options.train_split), resolve_model_data_config(student)
    size = (options.img_size,) * 2 if options.img_size else task.student.vit.image_size
    config["input_size"] = (config["input_size"][0], *size)
    train.transform = create_transform(
        **config, is_training=True, scale=tuple(options.scale), hflip=options.hflip,
        color_jitter=options.color_jitter or None,
    )  # fmt: skip
    return Objective(task, train)


def _teacher(options: Namespace) -> nn.Module:
    if options.teacher is None:
        raise CommandError("--teacher is missing: the name of a ViT in timm, whose tokens are to be predicted")
    plain = {"img_size": None, "drop_path": None, "model_kwargs": {}, "grad_checkpointing": False}
    return make_model(Namespace(model=options.teacher, checkpoint=options.teacher_checkpoint, pretrained=True, **plain))
