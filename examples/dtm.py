"""What should a masked image model predict: a teacher's tokens one by one, morphed (DTM), or their mean?

    python examples/dtm.py                             # handwritten digits: nothing to download, some minutes
    python examples/dtm.py --data-dir DIR --teacher vit_tiny_patch16_224 [--teacher-checkpoint FILE]

The same small ViT is pre-trained from the same teacher with each kind of target, from several seeds, for equally many
steps. Then the features are judged on val/, which nothing was trained or chosen on: by a linear classifier on frozen
features, and by fine-tuning on some of train/. With --hold-out a fifth of train/ takes the place of val/: to choose
settings by. A table with the spread over seeds, a plot and all numbers go to --out.

The teacher of the digits is a ViT trained on their classes; that of a folder is timm's, with ImageNet's weights. To
pre-train a model for use, with augmentation and from any teacher: timm-tokens train dtm.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch
from _compare import Images, Part, Score, finish, make_parser, note, open_images, outputs, pretrain, supervised
from _example import averaging_vit, normalised, run_example
from torch import Tensor, nn

from timm_tokens.cli.common.models import make_model
from timm_tokens.cli.options import ModelOptions
from timm_tokens.losses import DTMLoss
from timm_tokens.probing import linear_probe
from timm_tokens.tasks import DTMTask


def one_group(tokens: int) -> tuple[int, ...]:
    """Rounds of morphing that leave one token: as many merges as a round can do, until there is nothing to merge."""
    rounds = []
    while tokens > 1:
        rounds.append(tokens // 2)
        tokens -= rounds[-1]
    return tuple(rounds)


TARGETS = {
    "token by token": lambda tokens: DTMLoss(rounds=()),
    "morphed (DTM)": lambda tokens: DTMLoss(),
    "image-level": lambda tokens: DTMLoss(rounds=one_group(tokens)),
}
UNTRAINED = "no pre-training"


def main(argv: list[str] | None = None) -> int:
    return run_example("dtm", run, parse(argv))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "dtm", img_size=24, steps=250, lr=3e-3)
    parser.add_argument("--teacher", default="vit_tiny_patch16_224", help="any timm ViT, with --data-dir")
    parser.add_argument("--teacher-checkpoint", type=Path, help="weights of the teacher (default: timm's pretrained)")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="targets to compare")
    parser.add_argument("--patch-size", type=int, default=4, help="side of the student's patches in pixels")
    parser.add_argument("--dim", type=int, default=48, help="dimension of the student's tokens")
    parser.add_argument("--depth", type=int, default=4, help="number of the student's blocks")
    parser.add_argument("--amp", choices=["bfloat16"], help="faster pre-training, where the processor has bfloat16")
    parser.add_argument("--finetune-images", type=int, default=200, help="number of labelled images to fine-tune on")
    parser.add_argument("--finetune-epochs", type=int, default=20, help="number of passes over them")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> list[Score]:
    images = open_images(args)
    teacher = folder_teacher(args) if args.data_dir else digits_teacher(args, images)
    targets = teach(teacher, images, args)
    scores: list[Score] = []
    for seed in args.seeds:
        for method in [UNTRAINED, *args.targets]:
            student = make_student(args, images, seed)
            if method != UNTRAINED:
                task = RememberingTask(student, teacher, TARGETS[method](targets.tokens.shape[1]))
                task.teacher = targets
                pretrain(task, images.train.images, args, seed, opt_betas=(0.9, 0.98), clip_grad=3.0, amp=args.amp)
            measures = measure(student, images, args, seed)
            note(scores, method, seed, measures, args.out)
    finish(scores, args.out)
    return scores


def make_student(args: argparse.Namespace, images: Images, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    channels = images.train.images.shape[1]
    heads = next(heads for heads in range(max(1, args.dim // 24), 0, -1) if args.dim % heads == 0)
    student = averaging_vit(args.img_size, args.patch_size, channels, args.dim, args.depth, heads)
    student.pretrained_cfg = {"mean": (0.5,) * channels, "std": (0.5,) * channels}  # as `normalised` makes images
    return student


def digits_teacher(args: argparse.Namespace, images: Images) -> nn.Module:
    """A ViT trained on the classes of the digits."""
    teacher = make_student(args, images, seed=1000)
    teacher.reset_classifier(10)
    supervised(teacher, images.train, 20, generator=torch.Generator().manual_seed(0))
    right = outputs(teacher, images.val.images).argmax(1) == images.val.labels
    print(f"The teacher gets {100 * right.float().mean():.1f} % of the digits right.")
    return teacher


def folder_teacher(args: argparse.Namespace) -> nn.Module:
    given = {"model": args.teacher, "checkpoint": args.teacher_checkpoint}
    return make_model(ModelOptions(**given, pretrained=args.teacher_checkpoint is None))


class Remembered(nn.Module):
    """The teacher's tokens (N, n, D) of images that never change, looked up by the images' numbers."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens, self.numbers = tokens, None

    def forward(self, images: Tensor) -> Tensor:
        return self.tokens[self.numbers].float()


class RememberingTask(DTMTask):
    """DTM on uint8 images and their numbers, unaugmented: the teacher sees each image once, before the training."""

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        self.teacher.numbers = target
        return super().forward(normalised(input))


def teach(teacher: nn.Module, images: Images, args: argparse.Namespace) -> Remembered:
    """The tokens of all images to learn from, on the student's grid, in half precision."""
    task = DTMTask(make_student(args, images, seed=0), teacher)
    return Remembered(outputs(task.teacher, images.train.images, 64, torch.float16, amp=args.amp is not None))


def measure(student: nn.Module, images: Images, args: argparse.Namespace, seed: int) -> dict[str, float]:
    """Accuracies in percent on val/."""
    (train_images, labels), (val_images, val_labels) = images
    features = outputs(student, train_images), labels, outputs(student, val_images), val_labels
    linear = linear_probe(*features, generator=torch.Generator().manual_seed(seed)).accuracy
    tuned = copy.deepcopy(student)
    tuned.reset_classifier(int(labels.max()) + 1)
    generator = torch.Generator().manual_seed(seed)
    some = torch.randperm(len(labels), generator=generator)[: args.finetune_images]
    supervised(tuned, Part(train_images[some], labels[some]), args.finetune_epochs, generator=generator)
    right = (outputs(tuned, val_images).argmax(1) == val_labels).float().mean().item()
    return {"linear probe, %": 100 * linear, f"fine-tuned on {len(some)} images, %": 100 * right}


if __name__ == "__main__":
    sys.exit(main())
