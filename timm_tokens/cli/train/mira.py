"""Pre-train any backbone without labels, by clustering its crops with balanced pseudo-labels (MIRA, arXiv 2211.02284).

    timm-tokens train mira --data-dir images --model resnet50 --out run
    timm-tokens train mira --data-dir images --model vit_small_patch16_224 --local-crops 6 --out run

The result is the plain backbone without a classifier: model.safetensors, for timm.create_model(...,
checkpoint_path=...). Watch marginal_entropy in steps.csv: it is log(prototypes) while all prototypes are used equally,
and falls to 0 when the training collapses.
"""

from dataclasses import dataclass
from functools import partial

from timm_tokens import options as base
from timm_tokens.cli.common.models import make_backbone
from timm_tokens.cli.train.crops import CropOptions, crop_sides, on_crops
from timm_tokens.cli.train.objective import Objective, launch, make_student
from timm_tokens.cli.train.online import OnlineOptions
from timm_tokens.data import dino_crops, swav_crops
from timm_tokens.losses import MIRALoss
from timm_tokens.ops import sinkhorn_assign
from timm_tokens.options import changed, option
from timm_tokens.tasks import MIRATask


@dataclass(frozen=True, kw_only=True)
class ClusterOptions(base.Options):
    """Clusters and pseudo-labels."""

    prototypes: int = option(3000, "number of prototypes", at_least=1)
    head_hidden: int = option(2048, "dimension of the projector's hidden layers", at_least=1, aliases=("--hidden",))
    head_dim: int = option(256, "dimension of the projector's output", at_least=1, aliases=("--width",))
    frozen_epochs: float = option(1.0, "number of epochs at the start in which the prototypes are frozen", at_least=0)
    targets: str = option(
        "mira", "pseudo-labels to learn from; sinkhorn, SwAV's, is there to compare", choices=("mira", "sinkhorn")
    )
    beta: tuple[float, float] = option(
        (0.75, 2 / 3), "strength of the mutual information at the start and at the end", at_least=0, below=1
    )
    tau_student: float = option(0.1, "temperature of the predictions", above=0)
    tau_teacher: float | None = option(
        None, "temperature of the pseudo-labels (default: 0.225, or 0.05 for --targets sinkhorn)", above=0
    )
    teacher_momentum: tuple[float, float] = option(
        (0.99, 1.0), "momentum of the teacher's average at the start and at the end", at_least=0, at_most=1
    )
    publish: str = option(
        "student", "network to save: the student, or the teacher, its moving average, which the paper's code evaluates",
        choices=("student", "teacher"), rare=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options(ClusterOptions, OnlineOptions, CropOptions):
    """MIRA."""

    colors: str = option(
        "swav", "colour changes of the crops: strong and the same for all (SwAV), or those of MIRA's code, which blur "
        "and solarise the two global crops differently", choices=("swav", "mira"), group="Crops", rare=True,
    )  # fmt: skip
    crop_by_crop: bool = option(
        False, "encode one crop after the other, so that batch norms see one crop of each image at a time",
        group="Clusters and pseudo-labels", rare=True,
    )  # fmt: skip
    local_crops: int = changed(CropOptions, "local_crops", 6)
    global_scale: tuple[float, float] = changed(CropOptions, "global_scale", (0.14, 1.0))
    local_scale: tuple[float, float] = changed(CropOptions, "local_scale", (0.05, 0.14))


def build(options: Options) -> Objective:
    """The task, and the images as crops."""
    backbone = make_student(options, make_backbone)
    swav = options.targets == "sinkhorn"
    tau = options.tau_teacher if options.tau_teacher is not None else 0.05 if swav else 0.225
    loss = MIRALoss(options.tau_student, tau, assign=partial(sinkhorn_assign, tau=tau) if swav else None)
    task = MIRATask(
        backbone, loss, num_prototypes=options.prototypes, hidden=options.head_hidden, width=options.head_dim,
        beta=options.beta, momentum=options.teacher_momentum, frozen_epochs=options.frozen_epochs,
        crop_by_crop=options.crop_by_crop, publish=options.publish,
    )  # fmt: skip
    sides = crop_sides(options, backbone)
    kinds = swav_crops if options.colors == "swav" else dino_crops  # which are BYOL's colours, as MIRA has them
    crops = kinds(*sides, options.local_crops, options.global_scale, options.local_scale)
    return on_crops(task, backbone, crops, options)


run = partial(launch, "train mira", build)
