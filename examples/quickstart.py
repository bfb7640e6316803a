"""Learn which tokens of a Vision Transformer to merge, and see what that buys.

    python examples/quickstart.py                          # handwritten digits, nothing to download, a few minutes
    python examples/quickstart.py --data-dir DIR --model vit_tiny_patch16_224 [--checkpoint FILE]

The ViT is frozen; only the merging embeddings learn, on train/ (DTEM's modular training, arXiv 2412.10569). The report is
on images that took no part in that: for each r, the tokens merged in every block, the speed, and the accuracy with the
learned merging and with the training-free one (attention keys, arXiv 2210.09461). A table, a plot, a picture of what was
merged, and the trained merger go to --out.
"""

import argparse
import csv
import difflib
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median

import timm
import torch
import torch.nn.functional as F
from _data import Data, InputError, digits, image_folder, imagenet_indices
from _pictures import draw_groups, plot_accuracy
from safetensors.torch import load_file, save_file
from timm.models import load_state_dict
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import timm_tokens
from timm_tokens import TokenViT

COLUMNS = ("r", "tokens", "gflops", "images_per_s", "speedup", "share_of_ideal", "learned", "keys")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="train/<class>/ and val/<class>/ with images; default: digits")
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="any timm ViT (with --data-dir)")
    parser.add_argument("--checkpoint", type=Path, help="its weights (.safetensors, .pth); default: timm's pretrained")
    parser.add_argument("--merger", type=Path, help="a merger.safetensors of an earlier run: measure it, don't train")
    parser.add_argument("--out", type=Path, default=Path("output/quickstart"))
    parser.add_argument("--r", type=int, nargs="+", help="tokens merged per block, to report on; default: by the model")
    parser.add_argument("--train-r", type=int, help="the same for training; default: the last but one of --r")
    parser.add_argument("--epochs", type=int, default=4, help="of training the merger")
    parser.add_argument("--steps", type=int, help="instead of --epochs")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0, help="processes that load images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        run(args)
    except InputError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out {args.out} is a file: give a folder")
    torch.manual_seed(args.seed)
    vit, data = folder_job(args) if args.data_dir else digits_job(args)
    rs = args.r or default_rs(vit)
    learned = timm_tokens.apply_dtem_merging(vit, r=args.train_r or rs[-2:][0]).freeze_base()
    keys = timm_tokens.apply_dtem_merging(vit, metric="keys").freeze_base()
    if args.merger:
        learned.merger.load_state_dict(load_file(args.merger))
    else:
        train(learned.train(), learned.merger.parameters(), data, args, f"merging, r={learned.merger.r}")
    rows = report(learned.eval(), keys.eval(), data, [0, *rs], args)
    print_table(rows)
    save(learned, rows, data, rs, args.out)


def digits_job(args: argparse.Namespace) -> tuple[nn.Module, Data]:
    """A small ViT, trained from scratch on the digits."""
    data = digits(size=32)
    vit = timm.models.VisionTransformer(
        img_size=32, patch_size=4, in_chans=1, num_classes=10, embed_dim=96, depth=6, num_heads=3
    ).to(args.device)
    train(vit.train(), vit.parameters(), data, args, "digits ViT")
    return vit, data


def folder_job(args: argparse.Namespace) -> tuple[nn.Module, Data]:
    """The user's ViT, with a head that fits the user's classes."""
    vit = create_model(args.model, args.checkpoint).to(args.device)
    data = image_folder(args.data_dir, vit)
    indices = imagenet_indices(vit, data.train.classes)
    if indices is not None:
        data.train.target_transform = data.val.target_transform = indices.__getitem__
        print(f"the folders are ImageNet classes: accuracy among all {vit.num_classes}")
    elif vit.num_classes != data.num_classes:
        print(f"{args.model} has {vit.num_classes} classes, the folders are {data.num_classes}: training a new head")
        vit.requires_grad_(False).reset_classifier(data.num_classes)
        head = [p for name, p in vit.to(args.device).named_parameters() if name.startswith("head")]
        train(vit.eval(), head, data, args, "linear head")
    return vit, data


def create_model(name: str, checkpoint: Path | None) -> nn.Module:
    """timm's model of this name; with a checkpoint its weights and its number of classes, else timm's weights."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise InputError(f"timm has no model {name!r}" + (f"; near it: {', '.join(near)}" if near else ""))
    if checkpoint and not checkpoint.is_file():
        raise InputError(f"no file {checkpoint}: --checkpoint must be a .safetensors or .pth file")
    try:
        state = load_state_dict(str(checkpoint)) if checkpoint else {}
        head = {"num_classes": len(state["head.weight"])} if "head.weight" in state else {}
        vit = timm.create_model(name, pretrained=checkpoint is None, **head)
        if checkpoint:
            vit.load_state_dict(state)
        TokenViT(vit)
    except Exception as error:  # torch, safetensors and the hub each have their own
        where = f"{checkpoint} as {name}" if checkpoint else f"{name} (--checkpoint FILE takes weights from a file)"
        raise InputError(f"can't load {where}: {' '.join(str(error).split())[:300]}") from None
    return vit


def train(
    model: nn.Module, parameters: Iterable[nn.Parameter], data: Data, args: argparse.Namespace, label: str
) -> None:
    """Ordinary classification training of these parameters: AdamW, cosine schedule, cross entropy."""
    parameters = list(parameters)
    loader = DataLoader(data.train, args.batch_size, shuffle=True, num_workers=args.workers)
    steps = args.steps or args.epochs * len(loader)
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    progress = tqdm(islice(endless(loader), steps), f"training the {label}", steps)
    for images, labels in progress:
        loss = F.cross_entropy(model(images.to(args.device)), labels.to(args.device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")


def endless(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


def default_rs(vit: nn.Module) -> list[int]:
    """For 12 blocks of 196 patches 8, 12, 16 and 20; the same shares of the patches for other models."""
    per_block = vit.patch_embed.num_patches / len(vit.blocks)
    return sorted({max(1, round(share * per_block)) for share in (0.49, 0.73, 0.98, 1.22)})


@torch.inference_mode()
def accuracies(models: list[TokenViT], data: Data, rs: list[int], args: argparse.Namespace) -> Tensor:
    """The share of the report images that each model gets right with each r: (models, rs)."""
    correct = torch.zeros(len(models), len(rs))
    loader = DataLoader(data.val, args.batch_size, num_workers=args.workers)
    for images, labels in tqdm(loader, "measuring accuracy"):
        images, labels = images.to(args.device), labels.to(args.device)
        for i, model in enumerate(models):
            for j, r in enumerate(rs):
                model.merger.r = r
                correct[i, j] += (model(images).argmax(1) == labels).sum().item()
    return correct / len(data.val)


@torch.inference_mode()
def batch_seconds(model: TokenViT, images: Tensor, rs: list[int], rounds: int = 7) -> list[list[float]]:
    """Seconds a batch for each r (0: the base itself), once a round: what slows the machine slows all r alike."""
    times = []
    for _ in tqdm(range(rounds + 1), "measuring speed"):
        times.append([])
        for r in rs:
            model.merger.r = r
            times[-1].append(seconds(model if r else model.base, images))
    return times[1:]  # the first round warms up


def seconds(model: nn.Module, images: Tensor) -> float:
    start = time.perf_counter()
    model(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def report(learned: TokenViT, keys: TokenViT, data: Data, rs: list[int], args: argparse.Namespace) -> list[dict]:
    """One row for each r, the first of which must be 0."""
    images = torch.stack([data.val[i][0] for i in range(min(args.batch_size, len(data.val)))]).to(args.device)
    times = batch_seconds(learned, images, rs)
    accuracy = accuracies([learned, keys], data, rs, args)
    rows = []
    for i, r in enumerate(rs):
        learned.merger.r = r
        speedup = median(once[0] / once[i] for once in times)
        gflops = learned.flops() / 1e9
        tokens = learned.num_prefix_tokens + int(learned.token_groups(images[:1]).max()) + 1
        per_second = len(images) / median(once[i] for once in times)
        share = speedup * gflops / (learned.flops(0) / 1e9)
        rows.append(
            dict(zip(COLUMNS, (r, tokens, gflops, per_second, speedup, share, *accuracy[:, i].tolist()), strict=True))
        )
    return rows


def print_table(rows: list[dict]) -> None:
    print("r per block | tokens left | GFLOPs | images/s | speed-up | share of ideal | learned % | training-free %")
    for row in rows:
        print(
            f"{row['r']:11} | {row['tokens']:11} | {row['gflops']:6.3f} | {row['images_per_s']:8.1f} | {row['speedup']:7.2f}x | "
            f"{row['share_of_ideal']:14.2f} | {100 * row['learned']:9.1f} | {100 * row['keys']:15.1f}"
        )


def save(learned: TokenViT, rows: list[dict], data: Data, rs: list[int], out: Path) -> None:
    """merger.safetensors, table.csv, accuracy.png and groups.png."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(learned.merger.state_dict(), out / "merger.safetensors")
    with (out / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
