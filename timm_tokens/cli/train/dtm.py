"""Pre-train a ViT to predict a frozen teacher's tokens from a masked image, both morphed (DTM, arXiv 2401.00254).

    timm-tokens train dtm --data-dir images --model vit_small_patch16_224 --teacher vit_base_patch16_clip_224.openai \\
        --teacher-head --out run

The teacher is any timm ViT with weights, of any patch size: its images are resized so that it has as many patches as
the student. The result is the plain student without a classifier: model.safetensors, for timm.create_model(...,
checkpoint_path=...). The learning rate is for a global batch of 2048 and grows with its square root, as published.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from timm_tokens import options as base
from timm_tokens.cli.common import models
from timm_tokens.cli.options import ModelOptions
from timm_tokens.cli.train.augmentation import CropAndFlip
from timm_tokens.cli.train.images import open_readable
from timm_tokens.cli.train.objective import Objective, TrainOptions, launch, make_student
from timm_tokens.cli.train.online import OnlineOptions, neighbours
from timm_tokens.data import input_config, input_transform
from timm_tokens.losses import DTMLoss
from timm_tokens.losses.dtm import DISTANCES, GROUPINGS
from timm_tokens.options import changed, option
from timm_tokens.tasks import DTMTask


@dataclass(frozen=True, kw_only=True)
class TeacherOptions(base.Options):
    """Teacher and targets."""

    teacher: str = option(help="name of the ViT in timm whose tokens are predicted")
    teacher_checkpoint: Path | None = option(
        None, "checkpoint with the teacher's weights (default: timm's pretrained weights)", metavar="FILE"
    )
    teacher_checkpoint_key: str | None = option(
        None, "weights to take from --teacher-checkpoint where several fit (default: the only ones that fit)",
        metavar="KEY", rare=True,
    )  # fmt: skip
    teacher_head: bool = option(False, "pass the teacher's tokens through its classifier, such as CLIP's projection")
    distance: str = option("smooth_l1", "distance between morphed tokens", choices=tuple(DISTANCES))
    normalize_target: bool = option(False, "give morphed targets mean 0 and variance 1 over their channels", rare=True)
    grouping: str = option(
        "matching", "how patches are grouped for morphing: by the similarity of the teacher's tokens, with bipartite "
        "matching or k-means, or by the super-pixels of the image", choices=GROUPINGS, rare=True,
    )  # fmt: skip
    draws: int = option(2, "number of random morphings in each step", at_least=1)
    max_rounds: int = option(14, "largest number of matching rounds in a morphing", at_least=1)
    min_tokens: int = option(0, "smallest number of groups that a morphing may leave", at_least=0)
    mask_ratio: float = option(75 / 196, "share of the patches that are masked", above=0, at_most=1)
    masked_only: bool = option(False, "leave visible patches out of the loss")


@dataclass(frozen=True, kw_only=True)
class Options(TeacherOptions, CropAndFlip, OnlineOptions, TrainOptions):
    """DTM."""

    scale: tuple[float, float] = changed(CropAndFlip, "scale", (0.2, 1.0))
    color_jitter: float = option(0.0, "strength of colour jitter", at_least=0, group="Augmentation")
    epochs: int = changed(TrainOptions, "epochs", 300)
    batch_size: int = changed(TrainOptions, "batch_size", 256)
    lr: float = changed(TrainOptions, "lr", 1.5e-3)
    lr_base_size: int | None = changed(TrainOptions, "lr_base_size", 2048)
    lr_base_scale: str = changed(TrainOptions, "lr_base_scale", "sqrt")
    opt_betas: tuple[float, ...] | None = changed(TrainOptions, "opt_betas", (0.9, 0.98))
    clip_grad: float | None = changed(TrainOptions, "clip_grad", 3.0)
    drop_path: float | None = changed(TrainOptions, "drop_path", 0.1)


def build(options: Options) -> Objective:
    """The task and the images; labels are not used."""
    student, path = make_student(options, num_classes=0), options.teacher_checkpoint
    key = None if path is None else options.teacher_checkpoint_key
    teacher = ModelOptions(model=options.teacher, pretrained=True, checkpoint=path, checkpoint_key=key)
    loss = DTMLoss(
        options.distance, draws=options.draws, max_rounds=options.max_rounds, min_tokens=options.min_tokens,
        normalize_target=options.normalize_target, grouping=options.grouping,
    )  # fmt: skip
    task = DTMTask(
        student, models.make_model(teacher, classifier=options.teacher_head), loss, image_size=options.img_size,
        mask_ratio=options.mask_ratio, masked_only=options.masked_only, teacher_head=options.teacher_head,
    )  # fmt: skip
    train = open_readable(options, options.train_split)
    size = options.img_size or task.student.vit.image_size
    config = input_config(student, size)
    changes = {"scale": options.scale, "hflip": options.hflip, "color_jitter": options.color_jitter or None}
    train.transform = input_transform(config, is_training=True, **changes)
    return Objective(task, train, evaluate=neighbours(train, options, student, size))


run = partial(launch, "train dtm", build)
