"""Learn which tokens of a Vision Transformer to merge, and see what that buys.

    python examples/quickstart.py                     # handwritten digits: nothing to download, 1.5 minutes
    python examples/quickstart.py --data-dir DIR --model vit_tiny_patch16_224 [--checkpoint FILE]

The ViT is frozen; only the embeddings that tokens are compared by learn, on train/ (DTEM's modular training, arXiv
2412.10569). The report is on val/, which nothing was trained or chosen on: for each r (tokens merged in every block),
how fast the model is, and how accurate with learned and with training-free merging (attention keys, arXiv 2210.09461).
A table, a plot, a picture of what was merged, and the trained merger go to --out. Without --data-dir the speed of a
full-size ViT is measured as well. The time is that of two CPU cores with nothing else running.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from _data import Data, image_folder, moving_digits, samples
from _example import make_parser, positive, run_example
from _measure import Row, report
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import timm_tokens
from timm_tokens import TokenViT, drawing
from timm_tokens.cli import CommandError, call
from timm_tokens.cli.common import checks
from timm_tokens.cli.common.datasets import class_numbers
from timm_tokens.cli.common.models import make_model
from timm_tokens.cli.errors import explained
from timm_tokens.cli.options import ModelOptions
from timm_tokens.tables import markdown, write_csv


def main(argv: list[str] | None = None) -> int:
    return run_example("quickstart", run, parse(argv))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "quickstart", lr=None)
    folder = "folder with train/<class>/ and val/<class>/ (default: scikit-learn's digits)"
    parser.add_argument("--data-dir", type=Path, help=folder)
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="any timm ViT, with --data-dir")
    parser.add_argument("--checkpoint", type=Path, help="weights of the ViT (default: timm's pretrained ones)")
    parser.add_argument("--merger", type=Path, help="trained merger to measure instead of training one (default: none)")
    words = "numbers of tokens to merge in each block, one table row each (default: by the number of patches)"
    parser.add_argument("--r", type=positive, nargs="+", help=words)
    parser.add_argument("--train-r", type=positive, help="r to train with (default: the last but one of --r)")
    parser.add_argument("--epochs", type=positive, help="epochs that train the merging (default: 3; digits: 11)")
    parser.add_argument("--workers", type=int, default=0, help="number of worker processes that load images")
    parser.add_argument("--device", help="device to compute on (default: cuda if there is one, else cpu)")
    words = "number of rounds that measure the speed of a full-size ViT"
    parser.add_argument("--speed-rounds", type=positive, default=5, help=words)
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    checks.folder(args.out)
    args.device = checks.device(args.device)
    torch.manual_seed(args.seed)
    vit, data = folder_job(args) if args.data_dir else digits_job(args)
    with explained():
        learned = timm_tokens.apply_dtem_merging(vit, r=0, weights=args.merger).freeze_base()
    rs = sorted(set(args.r or default_rs(learned, samples(data, 1).to(args.device))))
    learned.merger.r = args.train_r or (rs[-2] if len(rs) > 1 else rs[0])
    training_free = timm_tokens.apply_dtem_merging(vit, metric="keys")
    if not args.merger:
        parameters = learned.merger.parameters()
        train(learned.train(), parameters, data, args, args.epochs, f"the merging, r={learned.merger.r}", args.lr)
    rows = report(learned.eval(), training_free.eval(), data, [0, *rs], args.batch_size, args.workers)
    print_table(rows, len(data.val))
    save(learned, rows, data, args)
    if not args.data_dir:
        print("\nThe digits' ViT is too small to gain speed. What merging gives a full-size one on this machine:\n")
        call(
            "bench", model="deit_small_patch16_224", r=(8, 12, 16), batch_size=(8,), rounds=args.speed_rounds,
            memory=False, dropped=False, device=args.device,
        )  # fmt: skip


def digits_job(args: argparse.Namespace) -> tuple[nn.Module, Data]:
    """A small ViT, trained from scratch on the digits."""
    if args.merger or args.checkpoint:
        raise CommandError("--merger and --checkpoint need --data-dir: the digits' ViT is trained anew each time")
    # Chosen on a third of train/, held out: embeddings that start as the keys need a large rate to leave them in few
    # steps, and have more to learn where more is merged, of digits that the ViT does not know by heart.
    args.lr, args.epochs = args.lr or 5e-3, args.epochs or 11
    args.r = args.r or [8, 12, 16, 20, 24]
    data = moving_digits(size=32)
    shape = dict(img_size=32, patch_size=4, in_chans=1, embed_dim=64, depth=4, num_heads=2, num_classes=10)
    # It averages its patches: a class token would have read them all before much is merged.
    vit = VisionTransformer(**shape, class_token=False, global_pool="avg").to(args.device)
    train(vit.train(), vit.parameters(), data, args, 45, "the digits' ViT", lr=2e-3)
    return vit, data


def folder_job(args: argparse.Namespace) -> tuple[nn.Module, Data]:
    """The user's ViT, with a head that fits the user's classes."""
    args.lr, args.epochs = args.lr or 1e-3, args.epochs or 3
    given = ModelOptions(model=args.model, checkpoint=args.checkpoint, pretrained=args.checkpoint is None)
    vit = make_model(given).to(args.device)
    with explained():
        timm_tokens.apply_dtem_merging(vit)  # refused now rather than after reading the images
    data = image_folder(args.data_dir, vit)
    numbers = class_numbers(data.train.classes, vit.num_classes)
    if numbers is None:
        fit_head(vit, data, args)
    elif vit.num_classes != len(data.train.classes):
        for images in data:
            images.dataset.target_transform = list(numbers.values()).__getitem__
        print(f"The folders are ImageNet classes: accuracy is among all {vit.num_classes} of them.")
    return vit, data


def fit_head(vit: nn.Module, data: Data, args: argparse.Namespace) -> None:
    classes = len(data.train.classes)
    print(f"The model has {vit.num_classes} classes, the folders are {classes}: a new linear head is trained first.")
    vit.requires_grad_(False).reset_classifier(classes)
    head = [p for name, p in vit.to(args.device).named_parameters() if name.startswith("head")]
    train(vit.eval(), head, data, args, args.epochs, "the new head")


def default_rs(model: TokenViT, image: Tensor) -> list[int]:
    """8, 12, 16 and 20 for 12 blocks of 196 patches; as large a part of the patches for other models."""
    most = model.token_groups(image).numel() / len(model.base.blocks)
    return [max(1, round(share * most)) for share in (0.5, 0.73, 0.98, 1.22)]


def train(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    data: Data,
    args: argparse.Namespace,
    epochs: int,
    what: str,
    lr: float = 1e-3,
) -> None:
    """Ordinary classification training of these parameters: AdamW, cosine schedule, cross entropy."""
    parameters = list(parameters)
    loader = DataLoader(data.train, args.batch_size, shuffle=True, num_workers=args.workers)
    steps = args.steps or epochs * len(loader)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    progress = tqdm(islice(endless(loader), steps), f"training {what}", steps)
    for images, labels in progress:
        loss = F.cross_entropy(model(images.to(args.device)), labels.to(args.device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def endless(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


def print_table(rows: Sequence[Row], images: int) -> None:
    head = ("r", "tokens left", "GFLOPs", "images/s", "speed-up", "share of ideal", "learned", "training-free")
    print(f"\n{markdown(head, rows, ('', '', '.3g', '.0f', '.2f', '.2f', '.1%', '.1%'))}")
    error = (rows[0].learned * (1 - rows[0].learned) / images) ** 0.5
    print(f"\nAccuracy on {images} images, standard error about {100 * error:.1f} points.")


def save(learned: TokenViT, rows: Sequence[Row], data: Data, args: argparse.Namespace) -> None:
    """Write merger.safetensors, table.csv, accuracy.png and groups.png."""
    images, groups = samples(data, 3), {}
    for row in sorted({rows[1], rows[len(rows) // 2], rows[-1]}):  # the fewest, the middle and the most
        learned.merger.r = row.r
        groups[f"r = {row.r}"] = learned.token_groups(images.to(args.device)).cpu()
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    lines = {
        "learned (DTEM)": [(row.gflops, 100 * row.learned) for row in rows],
        "training-free (attention keys)": [(row.gflops, 100 * row.training_free) for row in rows],
    }
    figures = {
        "accuracy.png": drawing.draw_accuracy(lines, [f"r = {row.r}" for row in rows]),
        "groups.png": drawing.draw_groups((images - low) / (high - low).clamp_min(1e-6), groups),
    }
    timm_tokens.save_merger(learned, args.out / "merger.safetensors")
    write_csv(args.out / "table.csv", Row._fields, rows)
    for name, figure in figures.items():
        drawing.save(figure, args.out / name)
    print(f"\nThe table, the plot, the picture of the groups and the merger are in {args.out}.")


if __name__ == "__main__":
    sys.exit(main())
