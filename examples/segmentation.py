"""How far can tokens be merged before segmentation suffers?

    python examples/segmentation.py                     # digits scattered over a canvas: nothing to download
    python examples/segmentation.py --data-dir DIR --model vit_tiny_patch16_224 --checkpoint FILE

A ViT gets two decoders: a linear classifier of each patch, and Segmenter's mask transformer (arXiv 2105.05633), whose
queries, one per class, attend to the patches. They are trained once, on the features of the plain ViT. Then everything
is frozen, and mIoU is measured on val/ for each r: merged by the attention's keys, and by embeddings that were trained
through the frozen decoder with the task's own loss. For the r that they were trained with, three other schedules with
the same FLOPs are measured, too: later blocks merge more, every second block merges, and what `calibrate` finds with
training images. The mask transformer also reads the merged tokens themselves, with the logarithm of their sizes as a
bias, which makes it cheaper, too.

DIR has images/train, masks/train, images/val and masks/val: a mask is a PNG of the image's name whose pixels are class
numbers, 255 where nothing is known. Digits take about ten minutes on one core. --hold-out reports on the last fifth
of train/ instead of val/: use it to choose settings.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from _data import digits
from _example import averaging_vit, fit, make_parser, normalised, run_example, start_positions
from _scenes import VOID, Scenes, scatter_digits, scene_folders
from _segmenter import Segmenter, decoder_loss, full_size, patches, to_grid
from torch import Tensor
from tqdm import tqdm

import timm_tokens
from timm_tokens import TokenViT, drawing
from timm_tokens.cli.common.models import make_model
from timm_tokens.cli.options import ModelOptions
from timm_tokens.tables import markdown, write_csv


class Row(NamedTuple):
    """What one r gives: mIoU in percent by decoder and by what tokens are compared by, and the time per image."""

    r: str
    tokens: int
    gflops: float
    metric: str
    linear: float
    mask: float
    mask_on_merged: float
    ms: float


def main(argv: list[str] | None = None) -> int:
    return run_example("segmentation", run, parse(argv))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "segmentation", batch_size=None, lr=None)
    parser.add_argument("--data-dir", type=Path, help="folder with images/ and masks/ (default: scattered digits)")
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="any timm ViT, with --data-dir")
    parser.add_argument("--checkpoint", type=Path, help="weights of the ViT (default: timm's pretrained ones)")
    parser.add_argument("--hold-out", action="store_true", help="report on the last fifth of train/ instead of val/")
    parser.add_argument("--r", type=int, nargs="+", help="tokens to merge in each block (default: by the patches)")
    parser.add_argument("--merge-steps", type=int, default=150, help="number of steps that train the embeddings")
    parser.add_argument("--calibrate", type=int, default=64, help="number of images to calibrate with, 0 for none")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> list[Row]:
    torch.manual_seed(args.seed)
    train, val, model = folder_job(args) if args.data_dir else digits_job(args)
    model.requires_grad_(False).eval()
    n = model.vit.patch_embed.num_patches
    rs = args.r or [round(share * n / len(model.vit.blocks)) for share in (0.25, 0.5, 0.75, 0.95)]
    keys = timm_tokens.apply_dtem_merging(model.vit, r=0, metric="keys").eval()
    learned = timm_tokens.apply_dtem_merging(model.vit, r=rs[len(rs) // 2])
    train_merging(learned, model, train, args)
    rows = []
    images = normalised(train.images[:: len(train.images) // args.calibrate + 1]) if args.calibrate else None
    for metric, vit in (("keys", keys), ("learned", learned.eval())):
        schedules = {str(r): r for r in [0, *rs]} | alternatives(vit, rs[len(rs) // 2], images)
        for name, r in tqdm(schedules.items(), f"measuring mIoU, {metric}"):
            vit.merger.r = r
            rows.append(report(model, vit, val, name, metric))
    save(rows, args.out)
    return rows


def alternatives(vit: TokenViT, r: int, images: Tensor | None) -> dict[str, tuple[int, ...]]:
    """Schedules of the FLOPs of r in each block, by name; those that can't save as much are left out."""
    depth, costs, patches = len(vit.base.blocks), vit.costs(), vit.base.patch_embed.num_patches
    goal = costs.flops([r] * depth, True)

    def smallest(schedule: Callable[[int], tuple[int, ...]]) -> tuple[int, ...] | None:
        return next((found for n in range(patches) if costs.flops(found := schedule(n), True) <= goal), None)

    found = {
        "late": smallest(lambda n: timm_tokens.ops.schedule((n, 1.0), depth)),
        "every second": smallest(lambda n: timm_tokens.ops.schedule([0, n] * (depth // 2), depth)),
    }
    if images is not None:
        share = goal / costs.flops([0] * depth, True)
        found["calibrated"] = timm_tokens.calibrate(vit, images, share)
    return {f"{name}, as {r}": schedule for name, schedule in found.items() if schedule is not None}


def digits_job(args: argparse.Namespace) -> tuple[Scenes, Scenes, Segmenter]:
    """A small ViT, trained together with its decoders."""
    generator = torch.Generator().manual_seed(args.seed)
    (glyphs, labels), (val_glyphs, val_labels) = digits(8)
    if args.hold_out:
        held = len(glyphs) // 5
        val_glyphs, val_labels, glyphs, labels = glyphs[:held], labels[:held], glyphs[held:], labels[held:]
    train = scatter_digits(glyphs, labels, 3000, 48, generator)
    val = scatter_digits(val_glyphs, val_labels, 200, 48, generator)
    vit = averaging_vit(48, 4, in_chans=1, dim=96, depth=4, num_heads=3)
    start_positions(vit)
    model = Segmenter(vit, num_classes=11)
    steps = args.steps or 1500
    args.batch_size, args.lr = args.batch_size or 32, args.lr or 2e-3

    def loss(images: Tensor, masks: Tensor) -> Tensor:
        return decoder_loss(model, patches(vit, images), masks)

    fit(model.parameters(), loss, batches(train, args.batch_size, steps), steps, "the ViT and its decoders", args.lr)
    return train, val, model


def folder_job(args: argparse.Namespace) -> tuple[Scenes, Scenes, Segmenter]:
    """The user's ViT, frozen, with decoders trained on its features."""
    args.batch_size, args.lr = args.batch_size or 8, args.lr or 1e-3
    train, val = scene_folders(args.data_dir, args.hold_out)
    size = tuple(train.images.shape[-2:])
    given = ModelOptions(model=args.model, checkpoint=args.checkpoint, pretrained=args.checkpoint is None)
    vit = make_model(given, num_classes=0, img_size=size)
    num_classes = int(train.masks[train.masks != VOID].max()) + 1
    model = Segmenter(vit.requires_grad_(False).eval(), num_classes)
    # The frozen features of each image and of its mirror image are computed once.
    both = Scenes(*(torch.cat([x, x.flip(-1)]) for x in train))
    with torch.inference_mode():
        parts = tqdm(both.images.split(8), "features")
        features = torch.cat([patches(vit, normalised(part)) for part in parts]).clone()
    steps = args.steps or 600
    rows = index_batches(len(features), args.batch_size, steps)

    def loss(rows: Tensor) -> Tensor:
        return decoder_loss(model, features[rows], both.masks[rows].long())

    fit(model.decoders.parameters(), loss, ((row,) for row in rows), steps, "the decoders", args.lr)
    return train, val, model


def train_merging(learned: TokenViT, model: Segmenter, train: Scenes, args: argparse.Namespace) -> None:
    """Train the embeddings through the frozen ViT and decoders, by the task's own loss."""
    learned.freeze_base().train()

    def loss(images: Tensor, masks: Tensor) -> Tensor:
        return decoder_loss(model, learned(images, tokens=True).patches, masks)

    data = batches(train, args.batch_size, args.merge_steps)
    fit(learned.merger.parameters(), loss, data, args.merge_steps, f"the merging, r = {learned.merger.r}", args.lr)


def index_batches(count: int, batch_size: int, steps: int) -> Iterator[Tensor]:
    order = torch.cat([torch.randperm(count) for _ in range(-(-steps * batch_size // count))])
    return iter(order[: steps * batch_size].split(batch_size))


def batches(scenes: Scenes, batch_size: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    for rows in index_batches(len(scenes.images), batch_size, steps):
        yield normalised(scenes.images[rows]), scenes.masks[rows].long()


@torch.inference_mode()
def report(model: Segmenter, vit: TokenViT, val: Scenes, r: str, metric: str) -> Row:
    k, seconds = model.num_classes, []
    confusion = {name: torch.zeros(k, k, dtype=torch.long) for name in ("linear", "mask", "mask_on_merged")}
    for images, masks in zip(val.images.split(1), val.masks.split(1), strict=True):
        images = normalised(images)
        start = time.perf_counter()
        merged = vit(images, tokens="merged")
        logits = {"linear": model.decoders["linear"](merged.patches)}
        logits["mask_on_merged"] = model.decoders["mask"](merged.patches, merged.size)
        seconds.append(time.perf_counter() - start)
        logits = {name: to_grid(x, merged.groups) for name, x in logits.items()}
        logits["mask"] = model.decoders["mask"](to_grid(merged.patches, merged.groups))
        for name, x in logits.items():
            found = full_size(model.vit, x, masks.shape[1:]).argmax(1)
            known = masks != VOID
            confusion[name] += (masks[known].long() * k + found[known]).bincount(minlength=k * k).view(k, k)
    scores = {name: 100 * mean_iou(c) for name, c in confusion.items()}
    ms = 1000 * sorted(seconds)[len(seconds) // 2]
    return Row(r, merged.patches.shape[1] + vit.num_prefix_tokens, vit.flops() / 1e9, metric, **scores, ms=ms)


def mean_iou(confusion: Tensor) -> float:
    """The mean, over the classes that occur, of intersection over union; rows of the matrix are the truth."""
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    occurs = confusion.sum(1) > 0
    return (confusion.diagonal()[occurs] / union[occurs]).mean().item()


def save(rows: list[Row], out: Path) -> None:
    """Print the table, and write table.csv and miou.png."""
    head = ("r", "tokens", "GFLOPs", "compared by", "linear", "mask decoder", "on merged tokens", "ms")
    print(f"\n{markdown(head, rows, ('', '', '.3f', '', '.1f', '.1f', '.1f', '.1f'))}")
    write_csv(out / "table.csv", Row._fields, rows)
    constant = [row for row in rows if row.r.isdigit()]
    lines = {
        f"{name}, {metric}": [(row.gflops, getattr(row, field)) for row in constant if row.metric == metric]
        for metric in ("keys", "learned")
        for name, field in (("linear", "linear"), ("mask decoder", "mask"))
    }
    figure = drawing.draw_accuracy(lines, [f"r = {row.r}" for row in constant if row.metric == "keys"], "mIoU (%)")
    drawing.save(figure, out / "miou.png")
    print(f"\nmIoU in percent; ms per image for the ViT and both decoders on merged tokens. Results are in {out}.")


if __name__ == "__main__":
    sys.exit(main())
