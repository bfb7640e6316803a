"""Choose how many tokens each block of a ViT merges, with unlabelled images, for a given share of its FLOPs.

    timm-tokens calibrate --model vit_tiny_patch16_224 --pretrained --data-dir images --flops-ratio 0.6 --out calibrated
    timm-tokens calibrate --model vit_tiny_patch16_224 --pretrained --merger run --data-dir images --out calibrated

The schedule that changes the outputs least is saved with the merger in merger.safetensors in --out, for --merger of
other commands and timm_tokens.apply_dtem_merging(vit, weights="calibrated"). A table compares it with a constant number
of tokens per block, on other images of the same folder.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from timm_tokens import seeding
from timm_tokens.calibration import calibrate
from timm_tokens.cli.common import checks, models
from timm_tokens.cli.common.datasets import open_split, tell
from timm_tokens.cli.config import write_config
from timm_tokens.cli.errors import CommandError
from timm_tokens.cli.options import ImageOptions, LoadingOptions, MergerOptions, WeightOptions
from timm_tokens.data import input_config, input_transform, unreadable
from timm_tokens.data.images import check_indexed
from timm_tokens.merger_file import NAME, save_merger
from timm_tokens.options import option
from timm_tokens.stopping import outlast_signals
from timm_tokens.tradeoff import table, tradeoff
from timm_tokens.vit import TokenViT
from timm_tokens.wrap import smallest_r


@dataclass(frozen=True, kw_only=True)
class Options(WeightOptions, MergerOptions, ImageOptions, LoadingOptions):
    """Calibration."""

    flops_ratio: float = option(0.6, "largest share of the FLOPs of the model without merging", above=0, at_most=1)
    max_blocks: int | None = option(
        None, "largest number of blocks that merge; fewer are faster at batch size 1 (default: no limit)", at_least=1
    )
    model: str = option(help="name of a ViT in timm, or of a model of this package")
    metric: str | None = option(
        None, "what tokens are compared by, without --merger (default: as in the model, else keys)",
        choices=("learned", "keys"), group="Token merging",
    )  # fmt: skip
    data_dir: Path = option(help="folder with train/<class>/", metavar="FOLDER")
    split: str = option("train", "folder in --data-dir, or split of --dataset, with the images", group="Images")
    images: int = option(128, "number of images to calibrate with", at_least=1)
    test_images: int = option(128, "number of other images for the table, 0 for no table", at_least=0)
    seed: int = option(0, "seed that chooses the images", at_least=0, below=2**63)
    out: Path = option(Path("calibrated"), "folder for merger.safetensors", metavar="FOLDER")


def run(options: Options) -> tuple[int, ...]:
    """Calibrate, print the schedule, which is returned, and a table, and write the merger with its schedule."""
    options = replace(options, device=checks.device(options.device))
    checks.folder(options.out)
    model = _model(options).to(options.device).eval()
    chosen, others = _images(options, model)
    constant = smallest_r(model, options.flops_ratio)
    schedule = calibrate(model, chosen, options.flops_ratio, max_blocks=options.max_blocks)
    size = (chosen.shape[-2], chosen.shape[-1])
    costs = model.costs(size)
    share = costs.flops(schedule) / costs.flops((0,) * len(schedule))
    print(f"Weights: {models.weights_of(options)}. r = {' '.join(map(str, schedule))}: {share:.1%} of the FLOPs")
    if others is not None:
        rows = tradeoff(model, others.split(options.batch_size), [constant, schedule])
        print(table([row for row in rows if row.merging in ("none", model.merger.metric)]))
    options.out.mkdir(parents=True, exist_ok=True)
    write_config(options.out, "calibrate", options)
    path = save_merger(model, options.out / NAME, notes={"data": str(options.data_dir)})
    print(f'The merger is in {path}: timm_tokens.apply_dtem_merging(vit, weights="{options.out}").')
    return schedule


def _model(options: Options) -> TokenViT:
    model = models.make_trained(options)
    if options.merger is not None:
        if options.metric is not None:
            raise CommandError("--merger brings what tokens are compared by: leave out --metric")
        return models.with_merger(model, options.merger)
    return models.merged(model, 0, options.metric, default="keys")


def _images(options: Options, model: TokenViT) -> tuple[Tensor, Tensor | None]:
    """Images to calibrate by, and others to compare with."""
    images = open_split(options, options.split)
    check_indexed(images)
    order = torch.randperm(len(images), generator=seeding.generator(options.seed)).tolist()
    images = images.select(order[: options.images + options.test_images])
    images = images.without(unreadable(images, options.workers))
    tell(images.notes(), options.split)
    if len(images) < options.images + options.test_images:
        print(
            f"There are {len(images)} images: {min(len(images), options.images)} are to calibrate by, and "
            f"{max(len(images) - options.images, 0) or 'none'} for the table.", file=sys.stderr,
        )  # fmt: skip
    images.transform = input_transform(input_config(model, options.img_size))
    loader = DataLoader(images, options.batch_size, num_workers=options.workers, worker_init_fn=outlast_signals)
    read = torch.cat([batch for batch, _ in loader]).to(options.device)
    chosen, others = read[: options.images], read[options.images :]
    return chosen, others if len(others) else None
