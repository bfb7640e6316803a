"""Which pseudo-labels should a clustering model learn from: MIRA's, Sinkhorn's (SwAV), or its teacher's own softmax?

    python examples/mira.py                       # handwritten digits: nothing to download, some minutes
    python examples/mira.py --data-dir DIR --model resnet10t --img-size 64

The same backbone is trained without labels with each kind of pseudo-label, from several seeds, for equally many steps
on the same crops; everything else is MIRATask. Then it is judged on val/, which nothing was trained or chosen on: by
nearest neighbours among train/, and by how far the prototypes agree with the classes (normalised mutual information).
With --hold-out a fifth of train/ takes the place of val/: to choose settings by. A table with the spread over seeds, a
plot and all numbers go to --out.

To pre-train a model for use: timm-tokens train mira.
"""

import argparse
import sys
from functools import partial

import torch
from _compare import Images, Part, Score, finish, make_parser, note, open_images, outputs, pretrain
from _crops import InMemory
from _example import run_example
from torch import Tensor, nn

from timm_tokens.cli.common.models import make_model
from timm_tokens.cli.options import ModelOptions
from timm_tokens.data import Crop
from timm_tokens.losses import MIRALoss
from timm_tokens.ops import sinkhorn_assign
from timm_tokens.probing import assignment_nmi, knn_accuracy
from timm_tokens.tasks import MIRATask

# Temperatures as published for MIRA and SwAV; the softmax's is as sharp as MIRA's labels at the start: tau (1 - beta).
LABELS = {
    "MIRA": {"criterion": MIRALoss()},
    "Sinkhorn (SwAV)": {"criterion": MIRALoss(assign=partial(sinkhorn_assign, tau=0.05))},
    "softmax": {"criterion": MIRALoss(tau_teacher=0.056), "beta": (0.0, 0.0)},
}
UNTRAINED = "no training"


def main(argv: list[str] | None = None) -> int:
    return run_example("mira", run, parse(argv))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "mira", img_size=32, steps=150, batch_size=64, lr=2e-3)
    parser.add_argument("--labels", nargs="+", choices=list(LABELS), default=list(LABELS), help="labels to compare")
    parser.add_argument("--model", default="test_resnet", help="any timm model that takes images of --img-size")
    parser.add_argument("--local-crops", type=int, default=0, help="number of crops of half the side, beside two of it")
    parser.add_argument("--prototypes", type=int, default=50, help="number of prototypes")
    parser.add_argument("--hidden", type=int, default=256, help="dimension of the projector's hidden layers")
    parser.add_argument("--width", type=int, default=64, help="dimension of the projector's output")
    parser.add_argument("--momentum", type=float, default=0.99, help="momentum of the teacher at the start")
    parser.add_argument("--amp", choices=["bfloat16"], help="faster training, where the processor has bfloat16")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> list[Score]:
    images = open_images(args, args.img_size * 5 // 4)
    scores: list[Score] = []
    for seed in args.seeds:
        for method in [UNTRAINED, *args.labels]:
            task = make_task(args, images, LABELS.get(method, {}), seed)
            if method != UNTRAINED:
                pretrain(task, images.train.images, args, seed, amp=args.amp)
            measures = measure(task, images, args.img_size)
            note(scores, method, seed, measures, args.out)
    finish(scores, args.out)
    return scores


class InMemoryTask(InMemory, MIRATask):
    """A MIRATask that cuts its crops itself."""


def make_task(args: argparse.Namespace, images: Images, labels: dict, seed: int) -> InMemoryTask:
    torch.manual_seed(seed)
    channels = images.train.images.shape[1]
    backbone = make_model(ModelOptions(model=args.model), num_classes=0, in_chans=channels)
    backbone = backbone.to(memory_format=torch.channels_last)  # faster convolutions on a CPU
    task = InMemoryTask(
        backbone, num_prototypes=args.prototypes, hidden=args.hidden, width=args.width,
        momentum=(args.momentum, 1.0), **labels,
    )  # fmt: skip
    task.crops = make_crops(args, channels)
    return task


def make_crops(args: argparse.Namespace, channels: int) -> list[Crop]:
    """Photographs are flipped and change their colours; digits are not, and do not."""
    plain = {"flip": 0.0, "jitter_prob": 0.0, "grayscale": 0.0, "blur": 0.0}
    look = {"blur_sigma": (0.1, 2 * args.img_size / 224)} if channels == 3 else plain
    crops = [Crop(args.img_size, 2, (0.4, 1.0), **look)]
    return crops + ([Crop(args.img_size // 2, args.local_crops, (0.15, 0.4), **look)] if args.local_crops else [])


def measure(task: MIRATask, images: Images, size: int) -> dict[str, float]:
    """On val/, in percent: accuracy of 20 nearest neighbours, and agreement of the nearest prototypes with classes."""
    train_part, val_part = (Part(centre(part.images, size), part.labels) for part in images)
    features = [outputs(task.product, part.images) for part in (train_part, val_part)]
    right = knn_accuracy(features[0], train_part.labels, features[1], val_part.labels, k=(20,))[20]
    nearest = outputs(Nearest(task), val_part.images, dtype=torch.int64)
    return {"20-NN, %": 100 * right, "NMI of prototypes, %": 100 * assignment_nmi(nearest, val_part.labels)}


def centre(images: Tensor, size: int) -> Tensor:
    start = (images.shape[-1] - size) // 2
    return images[..., start : start + size, start : start + size]


class Nearest(nn.Module):
    """The nearest prototype of each image, by the student."""

    def __init__(self, task: MIRATask) -> None:
        super().__init__()
        self.student = task.student

    def forward(self, images: Tensor) -> Tensor:
        return self.student([images])[0].argmax(1)


if __name__ == "__main__":
    sys.exit(main())
