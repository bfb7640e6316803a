"""Train token merging for a ViT, without labels: what comes out is a small file that makes the ViT faster (DTEM).

    timm-tokens train dtem --data-dir images --model vit_tiny_patch16_224 --pretrained --r 8 16 --out run
    timm-tokens train dtem --data-dir images --model vit_small_patch14_dinov2 --pretrained --img-size 224 --out run
    timm-tokens train dtem --data-dir images --model deit_small_patch16_224 --pretrained --recipe dtem --out run

The teacher is the ViT itself without merging: its logits where it classifies, else its class token and patches. With
--target labels it learns from the images' classes instead. The ViT stays as it is, unless --train all trains it, too.

The result is merger.safetensors in --out, for timm_tokens.apply_dtem_merging(vit, weights="run"), and for --merger of
other commands. At the end a table compares it with merging by keys, which needs no training, on the images of
--val-split.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from timm_tokens import options as base
from timm_tokens.cli.common import models
from timm_tokens.cli.common.datasets import class_names, class_numbers, open_split
from timm_tokens.cli.errors import CommandError
from timm_tokens.cli.options import WeightOptions
from timm_tokens.cli.train.augmentation import AugmentationOptions, MixOptions, image_alone, mixer, transform
from timm_tokens.cli.train.images import open_readable, readable
from timm_tokens.cli.train.objective import Objective, TrainOptions, launch, make_student
from timm_tokens.data import input_config, input_transform
from timm_tokens.data.images import as_images
from timm_tokens.hub import push_merger_to_hub
from timm_tokens.merger_file import NAME, read_merger, save_merger
from timm_tokens.options import changed, option
from timm_tokens.outputs import classifies
from timm_tokens.stopping import outlast_signals
from timm_tokens.tables import write_csv
from timm_tokens.tasks import DTEMTask
from timm_tokens.tradeoff import Tradeoff, table, tradeoff
from timm_tokens.training import Accuracy, Fidelity, Result
from timm_tokens.vit import TokenViT
from timm_tokens.wrap import apply_dtem_merging

TABLE = "merging.csv"


@dataclass(frozen=True, kw_only=True)
class MergeOptions(base.Options):
    """Token merging."""

    target: str = option(
        "distill", "learn the outputs of the model without merging, or the images' classes",
        choices=("distill", "labels"),
    )  # fmt: skip
    train: str = option(
        "embeddings", "train the embeddings that tokens are compared by, or all of the model",
        choices=("embeddings", "all"),
    )  # fmt: skip
    r: tuple[int, ...] | None = option(
        None, "tokens to merge in each block while training; given two numbers, each step draws one between them "
        "(default: the schedule of --merger if it was calibrated, else 16 for 196 patches and 12 blocks, and in "
        "proportion for other models)", at_least=1,
    )  # fmt: skip
    eval_r: int | None = option(
        None, "tokens to merge in each block of the trained model, whose r can be set later (default: three quarters "
        "of the default of --r, or the number in --merger)", at_least=0,
    )  # fmt: skip
    table_r: tuple[int, ...] | None = option(
        None, "tokens to merge in each block for the table at the end (default: a half, three quarters and all of "
        "the default of --r)", at_least=0,
    )  # fmt: skip
    merger: str | None = option(
        None, "merger to start from: a file, the folder of a run or of a calibration, or hf-hub:user/name; of one that "
        "compares keys, which has no embeddings, the schedule is taken (default: none)", metavar="FILE",
    )  # fmt: skip
    embed_dim: int | None = option(
        None, "dimension of the embeddings (default: that of an attention head, twice that from 1024 channels on)",
        at_least=1, rare=True,
    )  # fmt: skip
    candidates: int = option(3, "partners that each token considers in training", at_least=1, rare=True)
    tau1: float = option(0.1, "temperature of the similarities in training", above=0, rare=True)
    tau2: float = option(0.1, "temperature of the choice of pairs in training", above=0, rare=True)


@dataclass(frozen=True, kw_only=True)
class Options(MergeOptions, AugmentationOptions, MixOptions, TrainOptions, WeightOptions):
    """DTEM."""

    smoothing: float = option(0.0, "label smoothing, where mixup or CutMix is used", at_least=0, below=1,
                              group="Augmentation")  # fmt: skip
    scale: tuple[float, float] = changed(AugmentationOptions, "scale", (0.35, 1.0))
    aa: str = changed(AugmentationOptions, "aa", "")
    re_prob: float = changed(AugmentationOptions, "re_prob", 0.0)
    epochs: int = changed(TrainOptions, "epochs", 1)
    batch_size: int = changed(TrainOptions, "batch_size", 32)
    weight_decay: float = changed(TrainOptions, "weight_decay", 1e-4)
    clip_grad: float | None = changed(TrainOptions, "clip_grad", 5.0)
    val_split: str = option("val", "folder in --data-dir, or split of --dataset, to measure on; '' for none")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is not None and (len(self.r) > 2 or self.r[0] > self.r[-1]):
            raise ValueError(f"r must be one number, or the lowest and the highest, got {self.r}")
        if self.smoothing and not (self.mixup or self.cutmix):
            raise ValueError(f"smoothing needs mixup or cutmix: the labels of other images stay, got {self.smoothing}")


def build(options: Options) -> Objective:
    """The task, the images, and what is measured."""
    model = _model(options, models.make_trained)
    for name, r in (("--r", options.r), ("--eval-r", options.eval_r), ("--table-r", options.table_r)):
        models.check_r(model, r or (), name)
    train = open_split(options, options.train_split)
    numbers = class_numbers(class_names(train), model.num_classes) if classifies(model) else None
    if options.target == "labels":
        if numbers is None:
            raise CommandError(
                f"--target labels needs the model's own classes: it has {model.num_classes}, and the folders in "
                f"{options.data_dir} are not named after them; fine-tune the model first, or use --target distill"
            )
        train = open_split(options, options.train_split, numbers)
    train = readable(train, options, options.train_split)
    config = input_config(model, options.img_size)
    train.transform = image_alone(transform(options, config, interpolation=config["interpolation"]))
    mixup = mixer(options, model.num_classes, options.smoothing)
    task = DTEMTask(model, target=options.target, train=options.train, r=_trained_r(options, model), mixup=mixup)
    evaluate: Accuracy | Fidelity | None = None
    val = None
    if options.val_split:
        val = open_readable(options, options.val_split, numbers)
        val.transform = input_transform(config)
        loading = (options.batch_size, options.workers)
        evaluate = Accuracy(val, *loading, topk=(1,)) if numbers is not None else Fidelity(val, *loading)
    finish = partial(_finish, options, val, numbers is not None)
    return Objective(task, train, evaluate=evaluate, finish=finish, push=partial(_push, options))


run = partial(launch, "train dtem", build)


def _model(options: Options, make: Callable[..., nn.Module] = models.make_model) -> TokenViT:
    """The model with a merger that learns."""
    settings = {name: getattr(options, name) for name in ("embed_dim", "candidates", "tau1", "tau2")}
    model = make_student(options, make)
    if not (isinstance(model, TokenViT) and model.merger is not None):
        by_keys = options.merger is not None and read_merger(options.merger).config["metric"] == "keys"
        model = apply_dtem_merging(model, options.eval_r, weights=options.merger, **({} if by_keys else settings))
        if by_keys:
            model = apply_dtem_merging(model.base, model.merger.r, **settings)  # the same until it is trained
        if options.eval_r is None and options.merger is None:
            model.merger.r = usual_r(model, 0.75)
        return model
    if options.merger is not None:
        raise CommandError(f"{options.model} brings a merger of its own: name its base instead, or leave out --merger")
    model.merger.r = model.merger.r if options.eval_r is None else options.eval_r
    return model


def _trained_r(options: Options, model: TokenViT) -> int | tuple[int, int] | None:
    """What `DTEMTask` trains with: a number, a range, or None for a calibrated schedule, which the merger has."""
    if options.r is None:
        return usual_r(model, 1.0) if isinstance(model.merger.r, int) else None
    return options.r[0] if len(options.r) == 1 else (options.r[0], options.r[1])


def usual_r(model: TokenViT, share: float) -> int:
    """Tokens to merge in each block so that all blocks together merge this share of the patches."""
    return min(max(1, round(share * models.num_patches(model) / len(model.base.blocks))), models.most_r(model))


def make_product(options: Options, state: dict[str, Any]) -> TokenViT:
    """What a run trained, from its checkpoint's state, without a classifier."""
    weights = state.get("state_dict_ema", state["state_dict"])
    settings: dict[str, Any] = {}
    if options.merger is not None:
        settings = {"embed_dim": len(weights["merger.embed.0.weight"])}
    model = _model(replace(options, pretrained=False, checkpoint=None, checkpoint_key=None, merger=None, **settings))
    if options.merger is not None and options.eval_r is None:
        model.merger.r = read_merger(options.merger).config["r"]
    model.load_state_dict(weights)
    model.reset_classifier(0)
    return model


def _finish(options: Options, val: Dataset | None, labelled: bool, result: Result) -> None:
    """Write the merger, and the table of what it does."""
    model: Any = result.model
    rows: list[Tradeoff] = []
    if val is not None:
        loader = DataLoader(
            as_images(val), options.batch_size, num_workers=options.workers, worker_init_fn=outlast_signals
        )
        rs: list[Any] = list(options.table_r or sorted({usual_r(model, share) for share in (0.5, 0.75, 1.0)}))
        rs += [] if isinstance(model.merger.r, int) else [model.merger.r]
        rows = tradeoff(model, loader, rs, labelled=labelled)
        write_csv(options.out / TABLE, Tradeoff._fields, rows)
        print(table(rows))
    notes = {"data": str(options.data_dir), "table": [row._asdict() for row in rows]}
    path = save_merger(model, options.out / NAME, dtype=torch.float16, notes=notes)
    print(f'The merger is in {path}: timm_tokens.apply_dtem_merging(vit, weights="{options.out}").')


def _push(options: Options, result: Result, repo_id: str) -> None:
    """Upload the merger; of the data, the name of its folder is said."""
    kept = read_merger(options.out / NAME).notes
    data = options.dataset or options.data_dir.resolve().name
    push_merger_to_hub(result.model, repo_id, data=f"Images of {data}.", table=kept.get("table") or None)
