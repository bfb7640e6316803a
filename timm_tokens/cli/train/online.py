"""k-NN accuracy and NMI during pre-training: the options, and the evaluation that they ask for."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from timm_tokens import options as base
from timm_tokens.cli.common.datasets import class_names
from timm_tokens.cli.errors import CommandError
from timm_tokens.cli.train.images import open_readable
from timm_tokens.data import Images, input_config, input_transform
from timm_tokens.options import option
from timm_tokens.training.neighbours import Neighbours


@dataclass(frozen=True, kw_only=True)
class OnlineOptions(base.Options):
    """Validation."""

    knn_every: int | None = option(
        None, "epochs between measurements of k-NN accuracy and NMI, which need images in class folders for training "
        "and validation (default: nothing is measured)", at_least=1,
    )  # fmt: skip
    knn: int = option(20, "number of nearest neighbours for --knn-every", at_least=1)
    val_split: str = option(
        "val", "folder in --data-dir, or split of --dataset, with the validation images for --knn-every",
        group="Validation",
    )  # fmt: skip


def neighbours(train: Images, options: Any, model: nn.Module, size: Any = None) -> Neighbours | None:
    """The k-NN evaluation that --knn-every asks for, on images of this size; None without it.

    The training images' own transform is not used for it. The options are those of the run: OnlineOptions among them.
    """
    if options.knn_every is None:
        return None
    names = class_names(train)
    if names is None or len(names) < 2 or not isinstance(train, Images):
        raise CommandError(
            f"--knn-every needs training images in folders of two classes or more, got {len(names or ())}: leave it out"
        )
    val = open_readable(options, options.val_split)
    if class_names(val) != names:
        raise CommandError(f"--knn-every needs the same classes in --train-split and --val-split {options.val_split}")
    known, scored = (images.select(range(len(images))) for images in (train, val))
    known.transform = scored.transform = input_transform(input_config(model, size))
    return Neighbours(known, scored, options.knn, options.batch_size, options.workers)
