"""Which pseudo-labels should a clustering model learn from: MIRA's, Sinkhorn's (SwAV), or its teacher's own softmax?

    python examples/mira.py                       # handwritten digits: nothing to download, some minutes
    python examples/mira.py --data-dir DIR --model resnet10t --img-size 64

The same backbone is trained without labels with each kind of pseudo-label, from several seeds, for equally many steps
on the same crops; everything else is MIRATask. Then it is judged on val/, which nothing was trained or chosen on: by
nearest neighbours among train/, and by how far the prototypes agree with the classes (normalised mutual information).
A table with the spread over seeds, a plot and all numbers go to --out.

To pre-train a model for use: timm-tokens train mira.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from _compare import Images, Part, Score, digits, finish, folders, note, outputs
from _data import InputError
from torch import Tensor, nn
from torch.utils.data import Dataset

from timm_tokens.data import Crop, MultiCrop
from timm_tokens.losses import MIRALoss
from timm_tokens.ops import sinkhorn_assign
from timm_tokens.probing import assignment_nmi, knn_accuracy
from timm_tokens.tasks import MIRATask
from timm_tokens.training import Settings, train

# Temperatures as published for MIRA and SwAV; the softmax's is as sharp as MIRA's labels at the start: tau (1 - beta).
LABELS = {
    "MIRA": {"criterion": MIRALoss()},
    "Sinkhorn (SwAV)": {"criterion": MIRALoss(assign=partial(sinkhorn_assign, tau=0.05))},
    "softmax": {"criterion": MIRALoss(tau_teacher=0.056), "beta": (0.0, 0.0)},
}
UNTRAINED = "no training"


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        run(args)
    except InputError as error:
        print(f"mira: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="train/<class>/ and val/<class>/ with images; default: digits")
    parser.add_argument("--model", default="test_resnet", help="any timm model that takes images of --img-size")
    parser.add_argument("--out", type=Path, default=Path("output/mira"), help="folder for the results")
    parser.add_argument("--img-size", type=int, default=32, help="side of the global crops")
    parser.add_argument("--local-crops", type=int, default=0, help="of half the side, beside two global ones")
    parser.add_argument("--prototypes", type=int, default=50)
    parser.add_argument("--hidden", type=int, default=256, help="width of the projector's hidden layers")
    parser.add_argument("--width", type=int, default=64, help="of what the projector gives")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> list[Score]:
    images = folders(args.data_dir, args.img_size * 5 // 4) if args.data_dir else digits(args.img_size)
    scores: list[Score] = []
    for seed in args.seeds:
        for method in [UNTRAINED, *LABELS]:
            task = make_task(args, images, LABELS.get(method, {}), seed)
            if method != UNTRAINED:
                pretrain(task, images.train.images, args, seed)
            measures = measure(task, images, args.img_size)
            note(scores, method, seed, measures, args.out)
    finish(scores, args.out)
    return scores


def make_task(args: argparse.Namespace, images: Images, labels: dict, seed: int) -> MIRATask:
    torch.manual_seed(seed)
    try:
        backbone = timm.create_model(args.model, num_classes=0, in_chans=images.train.images.shape[1])
    except (RuntimeError, TypeError) as error:
        raise InputError(f"can't use --model {args.model}: {error}") from None
    return MIRATask(backbone, num_prototypes=args.prototypes, hidden=args.hidden, width=args.width, **labels)


class Crops(Dataset):
    """(crops of an image, 0): no labels."""

    def __init__(self, images: Tensor, transform: MultiCrop) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        return self.transform(self.images[index]), 0


def make_crops(args: argparse.Namespace, channels: int) -> MultiCrop:
    """Photographs are flipped and change their colours; digits are not, and do not."""
    mean = std = (0.5,) * channels
    plain = {} if channels == 3 else {"flip": 0.0, "jitter_prob": 0.0, "grayscale": 0.0, "blur": 0.0}
    crops = [Crop(args.img_size, 2, (0.4, 1.0), **plain)]
    if args.local_crops:
        crops.append(Crop(args.img_size // 2, args.local_crops, (0.15, 0.4), **plain))
    return MultiCrop(crops, mean, std, interpolation="bilinear")


def pretrain(task: MIRATask, images: Tensor, args: argparse.Namespace, seed: int) -> None:
    with TemporaryDirectory() as out:
        settings = Settings(
            out=Path(out), steps=args.steps, batch_size=args.batch_size, lr=args.lr, workers=0, seed=seed, log_every=50
        )
        train(task, Crops(images, make_crops(args, images.shape[1])), settings)


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
