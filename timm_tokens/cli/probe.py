"""Measure what a model's frozen features are worth: nearest neighbours, a linear classifier, and prototypes.

    timm-tokens probe --model vit_small_patch14_dinov2 --pretrained --data-dir images
    timm-tokens probe --model vit_small_mte --checkpoint run/model.safetensors --data-dir images
    timm-tokens probe --run run --data-dir images

The last takes the model of a run of `timm-tokens train`. Of MTE it also measures how well its prototype assignments
agree with the classes (NMI), by the global token alone and as the others are added one by one. The folder has
train/<class>/ and val/<class>/. Everything is fitted on the training images; the others are only scored.
"""

import csv
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from timm_tokens.cli._checks import check_device, check_folder
from timm_tokens.cli._data import class_names, identity
from timm_tokens.cli._errors import CommandError
from timm_tokens.cli._features import Features, Source, cached_features, named
from timm_tokens.cli._probe_plot import draw
from timm_tokens.cli._prototypes import load_run, nmi_by_tokens
from timm_tokens.cli._sources import open_split
from timm_tokens.files import replacing
from timm_tokens.probing import LEARNING_RATES, LinearResult, knn_accuracy, linear_probe

NEIGHBOURS = (10, 20, 100, 200)


class Report(NamedTuple):
    """What was measured.

    Attributes:
        images: of training and of validation.
        knn: accuracy by number of neighbours.
        linear: the linear probe's result.
        nmi: of prototype assignments by the first token, the first two, and so on; None without a run of MTE.
        tokens: their names.
    """

    images: tuple[int, int]
    knn: dict[int, float]
    linear: LinearResult
    nmi: list[float] | None = None
    tokens: tuple[str, ...] = ()


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of the sub-command: the keyword arguments of `run`."""
    source = parser.add_argument_group("the model")
    source.add_argument("--model", help="name of a model in timm, or of this package")
    source.add_argument("--checkpoint", type=Path, help="weights of the model (.safetensors, .pth)")
    source.add_argument("--pretrained", action="store_true", help="timm's own weights of the model")
    source.add_argument("--run", dest="run_dir", type=Path, help="instead: folder of a run of timm-tokens train")
    source.add_argument("--merge-r", type=int, default=0, help="tokens that each block merges away (a timm ViT)")
    source.add_argument("--img-size", type=int, help="side of the images (default: the model's)")
    images = parser.add_argument_group("the images")
    images.add_argument("--data-dir", type=Path, help="folder with train/<class>/ and val/<class>/")
    images.add_argument("--dataset", default="", help="instead of folders: a data set of timm, such as torch/cifar10")
    images.add_argument("--train-split", default="train", help="folder, or split, to fit on (default: %(default)s)")
    images.add_argument("--val-split", default="val", help="to score (default: %(default)s)")
    images.add_argument("--batch-size", type=int, default=64)
    images.add_argument("--workers", type=int, default=0, help="processes that load images")
    images.add_argument("--device", default="cpu")
    what = parser.add_argument_group("what to measure")
    what.add_argument("--neighbours", type=int, nargs="+", default=NEIGHBOURS, help="those that fit are used")
    what.add_argument("--lrs", type=float, nargs="+", default=LEARNING_RATES, help="of the linear classifier")
    what.add_argument("--epochs", type=int, default=100, help="of the linear classifier (default: %(default)s)")
    what.add_argument("--seed", type=int, default=0, help="of the linear classifier")
    what.add_argument("--out", type=Path, default=Path("probe"), help="folder for the report, the plot and features")
    what.add_argument("--no-plot", dest="plot", action="store_false", help="leave the plot out (it takes matplotlib)")


def run(
    *,
    model: str | None = None,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    run_dir: str | Path | None = None,
    merge_r: int = 0,
    img_size: int | None = None,
    data_dir: str | Path | None = None,
    dataset: str = "",
    train_split: str = "train",
    val_split: str = "val",
    batch_size: int = 64,
    workers: int = 0,
    device: str = "cpu",
    neighbours: Sequence[int] = NEIGHBOURS,
    lrs: Sequence[float] = LEARNING_RATES,
    epochs: int = 100,
    seed: int = 0,
    out: str | Path = "probe",
    plot: bool = True,
) -> Report:
    """Measure, print a table, and write `report.md`, `probe.csv` and `probe.png` into `out`; see --help.

    Raises:
        CommandError: something is missing or does not fit.
    """
    _check(plot, model, run_dir, other=bool(checkpoint or pretrained or merge_r or img_size))
    images = Namespace(data_dir=data_dir and Path(data_dir), dataset=dataset, train_split=train_split)
    check_folder(Path(out))
    check_device(device)
    splits, out = _open(images, val_split), Path(out)
    trained = load_run(Path(run_dir)) if run_dir else None
    source = trained.source if trained else named(model, checkpoint and Path(checkpoint), pretrained, merge_r, img_size)
    how = {"batch_size": batch_size, "workers": workers, "device": device}
    train, val = (cached_features(out, split, source, **how) for split in splits)
    fit = {"lrs": lrs, "epochs": epochs, "generator": torch.Generator().manual_seed(seed)}
    report = _measure(train, val, neighbours, device, fit)
    if trained and trained.task:
        report = report._replace(nmi=nmi_by_tokens(trained, splits[1], **how), tokens=tuple(trained.task.names))
    print(table(report))
    _write(out, source, report, plot)
    return report


def _check(plot: bool, model: str | None, run_dir: str | Path | None, other: bool) -> None:
    """Before an hour of work, not after it."""
    if plot and find_spec("matplotlib") is None:
        raise CommandError("the plot takes matplotlib: pip install 'timm-tokens[viz]', or pass --no-plot")
    if bool(model) == bool(run_dir):
        raise CommandError("pass either --model NAME, or --run FOLDER")
    if run_dir and other:
        raise CommandError("--run brings its model: leave out --checkpoint, --pretrained, --merge-r and --img-size")


def table(report: Report) -> str:
    """All numbers in percent, as Markdown."""
    rows = [(f"{k} nearest neighbours", f"{accuracy:.2%}") for k, accuracy in report.knn.items()]
    rows += [(f"linear classifier, learning rate {report.linear.lr:g}", f"{report.linear.accuracy:.2%}")]
    for count, nmi in enumerate(report.nmi or (), start=1):
        names = report.tokens[0] if count == 1 else f"{report.tokens[0]} to {report.tokens[count - 1]}"
        rows.append((f"NMI of prototypes, {names}", f"{nmi:.4f}"))
    return "\n".join(["| measure | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _open(images: Namespace, val_split: str) -> tuple[Dataset, Dataset]:
    train, val = open_split(images, images.train_split), open_split(images, val_split)
    if identity(train) == identity(val):
        raise CommandError(f"splits {images.train_split} and {val_split} are the same images")
    if class_names(train) != class_names(val):
        raise CommandError(f"splits {images.train_split} and {val_split} have other classes than each other")
    return train, val


def _measure(train: Features, val: Features, neighbours: Sequence[int], device: str, fit: dict[str, Any]) -> Report:
    known, scored = (train.features.to(device), train.labels), (val.features.to(device), val.labels)
    fitting = [k for k in neighbours if k <= len(train.labels)]
    try:
        knn = knn_accuracy(*known, *scored, fitting)
        return Report((len(train.labels), len(val.labels)), knn, linear_probe(*known, *scored, **fit))
    except ValueError as error:
        raise CommandError(str(error)) from error


def _write(out: Path, source: Source, report: Report, plot: bool) -> None:
    """The report, its numbers, and the plot."""
    rows = [("knn", k, value) for k, value in report.knn.items()]
    rows += [("linear", report.linear.lr, report.linear.accuracy)]
    rows += [("linear held out", lr, value) for lr, value in report.linear.held_out.items()]
    rows += [("nmi", count, value) for count, value in enumerate(report.nmi or (), start=1)]
    with replacing(out / "probe.csv") as partial, partial.open("w", newline="") as file:
        csv.writer(file).writerows([("measure", "setting", "value"), *rows])
    if plot:
        draw(out / "probe.png", report)
    train, val = report.images
    lines = [
        f"# {source.about['model']}",
        f"Top-1 accuracy on {val} images (standard error up to {50 / val**0.5:.1f} points) of features of {train} "
        "training images, on which everything was fitted.",
        f"Weights: {source.weights}; tokens merged in each block: {source.about['merge_r']}.",
        table(report),
        "![k-NN, the linear classifier and prototypes](probe.png)" if plot else "",
    ]
    with replacing(out / "report.md") as partial:
        partial.write_text("\n\n".join(lines).rstrip() + "\n")
