"""Pre-train any backbone without labels, by clustering its crops with balanced pseudo-labels (MIRA, arXiv 2211.02284).

    timm-tokens train mira --data-dir images --model resnet50 --out run
    timm-tokens train mira --data-dir images --model vit_small_patch16_224 --local-crops 6 --out run

What comes out is the plain backbone without a classifier: model.safetensors, for timm.create_model(...,
checkpoint_path=...). Watch marginal_entropy in steps.csv: it is log(prototypes) where all are used alike, and falls
to 0 in a collapse.
"""

from argparse import ArgumentParser, Namespace
from functools import partial

from timm.data import resolve_model_data_config

from timm_tokens.cli._sources import add_sources, check_size, local_size, make_backbone, open_split
from timm_tokens.cli.objectives import Objective
from timm_tokens.data import MultiCrop, swav_crops
from timm_tokens.losses import MIRALoss
from timm_tokens.ops import sinkhorn_assign
from timm_tokens.tasks import MIRATask


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of the objective."""
    add_sources(parser)
    clusters = parser.add_argument_group("clusters")
    clusters.add_argument("--prototypes", type=int, default=3000)
    clusters.add_argument("--hidden", type=int, default=2048, help="width of the projector's hidden layers")
    clusters.add_argument("--width", type=int, default=256, help="of what the projector gives")
    clusters.add_argument("--frozen-epochs", type=float, default=1.0, help="the prototypes rest for so long")
    labels = parser.add_argument_group("pseudo-labels")
    labels.add_argument("--targets", default="mira", choices=("mira", "sinkhorn"), help="sinkhorn: SwAV's, to compare")
    labels.add_argument(
        "--beta", type=float, nargs=2, default=(0.75, 2 / 3), help="strength of the information, 0 to 1"
    )
    labels.add_argument("--tau-student", type=float, default=0.1, help="temperature of the predictions")
    labels.add_argument("--tau-teacher", type=float, help="of the pseudo-labels (default: 0.225; sinkhorn: 0.05)")
    labels.add_argument("--teacher-momentum", type=float, nargs=2, default=(0.99, 1.0), help="of the teacher's average")
    crops = parser.add_argument_group("crops")
    crops.add_argument("--local-crops", type=int, default=6, help="small crops, beside two large ones")
    crops.add_argument("--local-size", type=int, help="side of the small ones (default: 96 of 224)")
    crops.add_argument("--global-scale", type=float, nargs=2, default=(0.14, 1.0), help="range of a large one's area")
    crops.add_argument("--local-scale", type=float, nargs=2, default=(0.05, 0.14), help="range of a small one's area")


def build(options: Namespace) -> Objective:
    """The task and the images; labels are not used."""
    backbone = make_backbone(options)
    swav = options.targets == "sinkhorn"
    tau = options.tau_teacher if options.tau_teacher is not None else 0.05 if swav else 0.225
    loss = MIRALoss(options.tau_student, tau, assign=partial(sinkhorn_assign, tau=tau) if swav else None)
    task = MIRATask(
        backbone, loss, num_prototypes=options.prototypes, hidden=options.hidden, width=options.width,
        beta=tuple(options.beta), momentum=tuple(options.teacher_momentum), frozen_epochs=options.frozen_epochs,
    )  # fmt: skip
    train = open_split(options, options.train_split)
    size = options.img_size or resolve_model_data_config(backbone)["input_size"][-1]
    local = options.local_size or local_size(backbone, size)
    for side, option in ((size, "--img-size"), (local, "--local-size")):
        check_size(backbone, side, option)
    crops = swav_crops(
        size, local, options.local_crops,
        tuple(options.global_scale), tuple(options.local_scale),
    )  # fmt: skip
    train.transform = MultiCrop.for_model(backbone, crops)
    return Objective(task, train)
