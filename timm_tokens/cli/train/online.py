"""k-NN accuracy and NMI while a run trains without labels: its options, and what it needs of the images."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from timm_tokens import options as base
from timm_tokens.cli.common.datasets import class_names, open_split
from timm_tokens.cli.errors import CommandError
from timm_tokens.cli.train.images import readable
from timm_tokens.data import Images, input_config, input_transform
from timm_tokens.options import option
from timm_tokens.training.neighbours import Neighbours


@dataclass(frozen=True, kw_only=True)
class OnlineOptions(base.Options):
    """Validation."""

    knn_every: int | None = option(
        None, "epochs between measurements of k-NN accuracy and NMI, for which the training and validation images must "
        "lie in folders of their classes (default: nothing is measured)", at_least=1,
    )  # fmt: skip
    knn: int = option(20, "number of nearest neighbours for --knn-every", at_least=1)
    val_split: str = option(
        "val", "folder in --data-dir, or split of --dataset, with the validation images for --knn-every"
    )


def neighbours(train: Dataset, options: Any, model: nn.Module, size: Any = None) -> Neighbours | None:
    """What measures a model on these training images, which can be read, and on those of the validation split.

    Args:
        train: The images that it is trained on; their own transform is not used.
        options: Those of the run, OnlineOptions and TrainOptions.
        model: What is trained.
        size: Side of the images, or height and width; None: the model's own.

    Raises:
        CommandError: The images have no classes, or those of the two splits differ.
    """
    if options.knn_every is None:
        return None
    names = class_names(train)
    if names is None or len(names) < 2 or not isinstance(train, Images):
        raise CommandError(
            f"--knn-every needs training images in folders of two classes or more, got {len(names or ())}: leave it out"
        )
    val = readable(open_split(options, options.val_split), options, options.val_split)
    if class_names(val) != names:
        raise CommandError(f"--knn-every needs the same classes in --train-split and --val-split {options.val_split}")
    splits = [images.select(range(len(images))) for images in (train, val)]
    for images in splits:
        images.transform = input_transform(input_config(model, size))
    return Neighbours(*splits, options.knn, options.batch_size, options.workers)
