"""Train a classifier; with label maps (from `timm-tokens annotate`) every patch has a label of its own.

    timm-tokens train token-label --data-dir images --labels labels --model lvvit_s --out run
    timm-tokens train token-label --data-dir images --model vit_small_patch16_224 --out run

--data-dir has train/<class>/ and val/<class>/. With --labels, a ViT without a token-label head gets one. Without them
the model is trained as an ordinary classifier, with the same augmentation.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from timm_tokens import options as base
from timm_tokens.cli.common.datasets import class_names, class_numbers, open_split, tell
from timm_tokens.cli.errors import CommandError
from timm_tokens.cli.train.augmentation import AugmentationOptions, MixOptions, image_alone, mixer, transform
from timm_tokens.cli.train.images import open_readable, readable
from timm_tokens.cli.train.objective import Objective, TrainOptions, launch, make_student
from timm_tokens.data import Images, TokenLabelDataset, TokenLabelStore, image_names, input_config, input_transform
from timm_tokens.data.images import left_out_lines
from timm_tokens.distributed import rank
from timm_tokens.losses import TokenLabelLoss
from timm_tokens.options import option
from timm_tokens.tasks import TokenLabelTask
from timm_tokens.training import Accuracy
from timm_tokens.vit import TokenViT
from timm_tokens.wrap import token_label_head


@dataclass(frozen=True, kw_only=True)
class LabelOptions(base.Options):
    """Labels."""

    labels: Path | None = option(
        None, "label store, or folder of published .pt labels (default: none, train on the images' classes alone)",
        metavar="FOLDER",
    )  # fmt: skip
    num_classes: int | None = option(
        None, "number of classes of the labels (default: as the labels or the folders say)", at_least=1
    )
    dense_weight: float = option(0.5, "weight of the patches' loss", at_least=0)
    cls_weight: float = option(1.0, "weight of the class token's loss", at_least=0)
    ground_truth: bool = option(False, "mix the class token's label with the true class")
    smoothing: float = option(0.1, "label smoothing", at_least=0, below=1)
    mix: bool = option(True, "train without MixToken, which mixes the patches of two images")
    even_boxes: bool = option(
        False, "draw MixToken's boxes with an even number of patches per side, as the published code does", rare=True
    )


@dataclass(frozen=True, kw_only=True)
class Options(LabelOptions, AugmentationOptions, MixOptions, TrainOptions):
    """Token labeling."""

    ratio: tuple[float, float] = option(
        (3 / 4, 4 / 3), "range of a crop's aspect ratio", above=0, ascending=True, group="Augmentation"
    )
    crop_last: bool = option(
        False, "flip and apply RandAugment before the crop instead of after it, as the published code does; slower",
        group="Augmentation", rare=True,
    )  # fmt: skip
    val_split: str = option("val", "folder in --data-dir, or split of --dataset, to validate on; '' for none")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels is not None and (self.mixup or self.cutmix):
            raise ValueError("mixup and cutmix are for training without labels; with them MixToken takes their place")


def build(options: Options) -> Objective:
    """The task, the images with their labels, and validation by top-1 accuracy."""
    store = None if options.labels is None else TokenLabelStore(options.labels, options.num_classes)
    train = open_split(options, options.train_split)
    names = class_names(train)
    if names == [""]:
        raise CommandError(f"the training images in {options.data_dir} lie in no folders that name their classes")
    count = options.num_classes or (store is not None and store.num_classes) or len(names or ())
    if not count:
        raise CommandError("neither the labels nor the images say how many classes there are: give --num-classes")
    if options.labels is not None:
        store = TokenLabelStore(options.labels, count)  # .pt files don't say how many
    numbers = _numbers(names, count)
    if numbers is not None:
        train = open_split(options, options.train_split, numbers)
    model = make_student(options, num_classes=count)
    if store is not None and not (isinstance(model, TokenViT) and model.head is not None):
        model = token_label_head(model)
    config = input_config(model, options.img_size)
    loss = TokenLabelLoss(options.dense_weight, options.cls_weight, options.ground_truth, options.smoothing)
    task = TokenLabelTask(
        model, loss, num_classes=None if store is None else count,
        mix=options.mix, even_boxes=options.even_boxes, mixup=mixer(options, count),
    )  # fmt: skip
    evaluate = None
    train = readable(train, options, options.train_split)
    if options.val_split:
        val = open_readable(options, options.val_split, numbers)
        val.transform = input_transform(config)
        evaluate = Accuracy(val, options.batch_size, options.workers, topk=(1, 5) if count > 5 else (1,))
    return Objective(task, _training_data(train, store, options, config), evaluate=evaluate)


run = partial(launch, "train token-label", build)


def _numbers(names: list[str] | None, count: int) -> dict[str, int] | None:
    """The number of each class among so many; None for a data set whose classes have no names."""
    numbers = class_numbers(names, count)
    if names and numbers is None:
        raise CommandError(
            f"the labels have {count} classes, but the images are in {len(names)} folders, such as {names[0]!r}, which "
            "are not all named by ImageNet's WordNet names: annotate with a classifier of these folders' classes"
        )
    return numbers


def _training_data(train: Images, store: TokenLabelStore | None, options: Options, config: dict[str, Any]) -> Dataset:
    """The training images; with a store those that have a label, and their labels. The others are named."""
    views = transform(options, config, ratio=options.ratio, crop_last=options.crop_last)
    if store is None:
        train.transform = image_alone(views)
        return train
    missing = {row: "" for row, name in enumerate(image_names(train)) if name not in store}
    train = train.without(missing, why := f"no label in {store.folder}: timm-tokens annotate makes them")
    if rank() == 0 and missing:
        tell(left_out_lines({why: train.left_out[why]}))
    labelled = TokenLabelDataset(train, store, views)
    share = labelled.others_share(store.num_classes)
    if share > 0.5 and rank() == 0:
        print(
            f"warning: the labels leave {share:.0%} of a cell's probability to the classes that they do not name, on "
            "average, and training learns little from them: make them again with timm-tokens annotate"
        )
    return labelled
