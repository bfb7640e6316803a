"""What the examples that compare ways of pre-training share: images in memory, features, and a table with spread."""

import argparse
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import _data
import _example
import torch
import torch.nn.functional as F
from _example import normalised
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from timm_tokens import drawing
from timm_tokens.data import read_image
from timm_tokens.tables import markdown, write_csv
from timm_tokens.tasks import TokenTask
from timm_tokens.training import Settings, train


class Part(NamedTuple):
    """Images (N, C, size, size) of uint8, and their classes (N,)."""

    images: Tensor
    labels: Tensor


class Images(NamedTuple):
    """What is learned from, and what is reported on."""

    train: Part
    val: Part


class Score(NamedTuple):
    """One number of one run."""

    method: str
    seed: int
    measure: str
    value: float


def make_parser(doc: str | None, name: str, img_size: int, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with the options of every comparison."""
    parser = _example.make_parser(doc, name, **defaults)
    parser.add_argument(
        "--data-dir", type=Path, help="folder with train/<class>/ and val/<class>/ (default: scikit-learn's digits)"
    )
    parser.add_argument("--hold-out", action="store_true", help="report on a fifth of train/ instead of val/")
    parser.add_argument("--img-size", type=int, default=img_size, help="side of the images in pixels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to train each method from")
    return parser


def open_images(args: argparse.Namespace, size: int | None = None) -> Images:
    """The images that the options ask for; `size`: the side of those of a folder, if it is not --img-size."""
    images = folders(args.data_dir, size or args.img_size) if args.data_dir else digits(args.img_size)
    return hold_out(images.train) if args.hold_out else images


def pretrain(task: TokenTask, images: Tensor, args: argparse.Namespace, seed: int, **settings: Any) -> None:
    """Train a task on (image, number of the image), without keeping checkpoints."""
    settings |= {"steps": args.steps, "batch_size": args.batch_size, "lr": args.lr, "seed": seed}
    with TemporaryDirectory() as out:
        settings = Settings(out=Path(out), workers=0, log_every=50, **settings)
        train(task, TensorDataset(images, torch.arange(len(images))), settings)


def digits(size: int) -> Images:
    """scikit-learn's 1797 handwritten digits, grey; a quarter of each class is to report on."""
    parts = _data.digits(size, test_size=0.25)
    return Images(*(Part((255 * images[:, None]).round().byte(), labels) for images, labels in parts))


def folders(root: Path, size: int) -> Images:
    """The images in root/train/<class>/ and root/val/<class>/, cut to squares and resized once.

    Raises:
        CommandError: If a folder is missing, or has no images.
    """
    return Images(*(_read_folder(root / name, size) for name in ("train", "val")))


def hold_out(part: Part) -> Images:
    """A fifth of the images to report on, the others to learn from: to choose settings by."""
    order = torch.randperm(len(part.labels), generator=torch.Generator().manual_seed(0))
    held, rest = order.tensor_split([len(order) // 5])
    return Images(Part(part.images[rest], part.labels[rest]), Part(part.images[held], part.labels[held]))


def _read_folder(path: Path, size: int) -> Part:
    images = _data.open_images(path)

    def read(row: int) -> Tensor:
        image, _ = read_image(images, row, draft=size)
        side = min(image.size)
        box = [(length - side) / 2 for length in image.size]
        box += [start + side for start in box]
        return pil_to_tensor(image.resize((size, size), Image.Resampling.BICUBIC, box))

    with ThreadPoolExecutor() as pool:
        pixels = list(tqdm(pool.map(read, range(len(images))), f"reading {path}", len(images)))
    return Part(torch.stack(pixels), torch.tensor(images.targets))


@torch.inference_mode()
def outputs(
    model: nn.Module, images: Tensor, batch_size: int = 256, dtype: torch.dtype = torch.float32, amp: bool = False
) -> Tensor:
    """What the model, in evaluation mode, gives for uint8 images, in batches; with `amp` computed in bfloat16."""
    model.eval()

    def of(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            return model(normalised(batch))

    return torch.cat([of(batch).to(dtype) for batch in images.split(batch_size)])


def table(scores: Sequence[Score]) -> str:
    """Mean and standard deviation over the seeds, as Markdown: one row per method, one column per measure."""
    methods, measures = (list(dict.fromkeys(getattr(s, name) for s in scores)) for name in ("method", "measure"))

    def cell(method: str, measure: str) -> str:
        return _cell([s.value for s in scores if (s.method, s.measure) == (method, measure)])

    return markdown(["", *measures], [[method, *(cell(method, m) for m in measures)] for method in methods])


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def finish(scores: Sequence[Score], out: Path) -> None:
    """Draw the scores, and print them."""
    by_measure: dict[str, dict[str, list[float]]] = {}
    for score in scores:
        by_measure.setdefault(score.measure, {}).setdefault(score.method, []).append(score.value)
    drawing.save(drawing.draw_scores(by_measure), out / "scores.png")
    print(f"\n{table(scores)}\n\nThe numbers and a plot are in {out}.")


def note(scores: list[Score], method: str, seed: int, measures: dict[str, float], out: Path) -> None:
    """Add what a run gave to the scores, and write them down."""
    scores += [Score(method, seed, name, value) for name, value in measures.items()]
    print(f"seed {seed}, {method}: " + ", ".join(f"{name} {value:.1f}" for name, value in measures.items()), flush=True)
    write_csv(out / "scores.csv", Score._fields, scores)


def supervised(
    model: nn.Module, part: Part, epochs: int, *, lr: float = 2e-3, batch_size: int = 32, generator: torch.Generator
) -> nn.Module:
    """Ordinary classification training: AdamW, cosine schedule, cross entropy."""
    rows = [batch for _ in range(epochs) for batch in _order(len(part.images), batch_size, generator)]
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, len(rows), pct_start=0.1)
    model.train()
    for batch in tqdm(rows, "supervised training", leave=False):
        loss = F.cross_entropy(model(normalised(part.images[batch])), part.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def _order(count: int, batch_size: int, generator: torch.Generator) -> Iterable[Tensor]:
    return torch.randperm(count, generator=generator).split(batch_size)
