"""Evaluate a model's frozen features: nearest neighbours, a linear classifier, and the prototypes of MTE.

    timm-tokens probe --model vit_small_patch14_dinov2 --pretrained --data-dir images
    timm-tokens probe --model vit_small_mte --checkpoint run/model.safetensors --data-dir images
    timm-tokens probe --run run --data-dir images
    timm-tokens probe --run run --data-dir images --protocol ibot --batch-size 256

The last line takes the model of a run of `timm-tokens train`. For a run of MTE it also measures how well the prototype
assignments agree with the classes (NMI): by the global token alone, and as the other tokens are added one by one. The
folder has train/<class>/ and val/<class>/. Everything is fitted on the training images; the others are only scored.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset

from timm_tokens.cli.common import checks
from timm_tokens.cli.common.datasets import class_names, identity, open_split
from timm_tokens.cli.common.features import FeatureOptions, Features, cached_features, named
from timm_tokens.cli.common.runs import RunOptions, load_run
from timm_tokens.cli.config import write_config
from timm_tokens.cli.errors import CommandError
from timm_tokens.cli.options import LoadingOptions, SplitOptions
from timm_tokens.cli.probe.protocol import Evaluation, evaluate
from timm_tokens.cli.probe.prototypes import nmi_by_tokens
from timm_tokens.cli.probe.report import Report, draw, protocol_table, table, write, write_protocol
from timm_tokens.data.images import listed
from timm_tokens.options import option
from timm_tokens.probing import LEARNING_RATES, knn_accuracy, linear_probe
from timm_tokens.probing.protocols import PROTOCOLS


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions, FeatureOptions, SplitOptions, LoadingOptions):
    """What to measure."""

    neighbours: tuple[int, ...] = option(
        (10, 20, 100, 200), "numbers of nearest neighbours; those above the number of training images are left out",
        at_least=1,
    )  # fmt: skip
    protocol: str = option(
        "fast", "fast: features of centre crops are computed once; its results can't be compared with published ones; "
        "otherwise: the linear evaluation of the paper of this name, on crops that are augmented anew in each epoch",
        choices=("fast", *PROTOCOLS),
    )  # fmt: skip
    lrs: tuple[float, ...] | None = option(
        None, "learning rates of the linear classifier, which are all tried at once (default: 0.001 to 3, or the "
        "protocol's, scaled with --batch-size)", above=0,
    )  # fmt: skip
    epochs: int | None = option(
        None, "number of passes over the training images or their features (default: 100)", at_least=1
    )
    seed: int = option(0, "seed of the linear classifier", at_least=0, below=2**63)
    out: Path = option(Path("probe"), "folder for the report, the plot and the features", metavar="FOLDER")
    plot: bool = option(True, "draw no plot; plots need matplotlib")


def run(options: Options) -> Report | Evaluation:
    """Measure, print a table, and write `report.md`, `probe.csv` and, but for protocols, `probe.png` into `out`."""
    _check(options)
    device, splits = checks.device(options.device), _open(options)
    trained = load_run(options.run_dir) if options.run_dir else None
    source = trained.source if trained else named(options)
    if options.protocol != "fast":
        found = evaluate(source, splits, options, device)
        print(f"Weights: {source.weights}\n\n{protocol_table(found)}")
        write_config(options.out, "probe", options)
        write_protocol(options.out, source, found)
        return found
    train, val = (cached_features(options.out, split, source, options, device) for split in splits)
    report = _measure(train, val, options, device)
    if trained and trained.task:
        nmi = nmi_by_tokens(trained, splits[1], options, device)
        report = report._replace(nmi=nmi, tokens=tuple(trained.task.names))
    print(f"Weights: {source.weights}\n\n{table(report)}")
    write_config(options.out, "probe", options)
    if options.plot:
        draw(options.out / "probe.png", report)
    write(options.out, source, report, options.plot)
    return report


def _check(options: Options) -> None:
    """Before an hour of work, not after it."""
    checks.plot(options.plot, "or pass --no-plot")
    checks.folder(options.out)
    if bool(options.model) == bool(options.run_dir):
        raise CommandError("pass either --model NAME, or --run FOLDER")
    model = options.checkpoint, options.pretrained, options.random, options.r, options.img_size, options.in_chans
    if options.run_dir and any((*model, options.merger)):
        raise CommandError(
            "--run brings its model: leave out --checkpoint, --pretrained, --random, --r, --merger, --img-size and "
            "--in-chans"
        )


def _open(options: Options) -> tuple[Dataset, Dataset]:
    names = options.train_split, options.val_split
    train, val = (open_split(options, name) for name in names)
    if identity(train) == identity(val):
        raise CommandError(f"splits {' and '.join(names)} are the same images")
    known, other = class_names(train) or [], class_names(val) or []
    if len(known) == 1:
        raise CommandError(f"all images are of one class, {known[0]!r}: there is nothing to tell apart")
    if known != other:
        odd = sorted({*known} ^ {*other})
        raise CommandError(f"splits {' and '.join(names)} differ in their classes, only one has {listed(odd)}")
    return train, val


def _measure(train: Features, val: Features, options: Options, device: str) -> Report:
    known, scored = (train.features.to(device), train.labels), (val.features.to(device), val.labels)
    fitting = [k for k in options.neighbours if k <= len(train.labels)]
    if not fitting:
        raise CommandError(f"--neighbours must have a number up to {len(train.labels)}, the training images")
    knn = knn_accuracy(*known, *scored, fitting)
    generator = torch.Generator().manual_seed(options.seed)
    linear = linear_probe(*known, *scored, lrs=options.lrs or LEARNING_RATES, epochs=options.epochs or 100,
                          generator=generator)  # fmt: skip
    notes = [f"{name}: {line}" for name, split in (("train", train), ("val", val)) for line in split.notes]
    return Report((len(train.labels), len(val.labels)), knn, linear, notes=notes)
