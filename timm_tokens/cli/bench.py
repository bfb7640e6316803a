"""Measure what merging tokens saves: a model at several r against the model itself, in turns, in one run.

    timm-tokens bench deit_small_patch16_224 --r 8 12 16 --batch-size 16 1
    timm-tokens bench deit_small_patch16_224 --r 16 --batch-size 16 --train --out results

Every round times each setting once, the base first; a speed-up is the median of the rounds' ratios, so that a machine
that is slower for a while is slower for both. The ideal is the ratio of the FLOPs; the share is the speed-up over it.
"""

import csv
import statistics
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from timm_tokens.cli._checks import check_device, check_folder
from timm_tokens.cli._errors import CommandError
from timm_tokens.cli._timing import DTYPES, Machine, Setting, build, describe, make_step, peak_memory, timed
from timm_tokens.files import replacing
from timm_tokens.vit import TokenViT


class Row(NamedTuple):
    """One line of the table; times are medians over the rounds, memory is the peak in MiB, None if not measured."""

    step: str
    batch: int
    r: int | None
    tokens: int
    gflops: float
    milliseconds: float
    images_per_second: float
    speed_up: float
    ideal: float | None
    share: float | None
    peak_memory: float | None


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of the sub-command: the keyword arguments of `run`."""
    parser.add_argument("model", help="name of a ViT in timm, or of a model of this package")
    parser.add_argument("--r", type=int, nargs="+", default=[0, 8, 12, 16], help="tokens to merge in each block")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[16], help="images at a time")
    parser.add_argument("--image-size", type=int, help="side of the images (default: the model's)")
    parser.add_argument("--metric", choices=("learned", "keys"), default="learned", help="what tokens are compared by")
    parser.add_argument("--train", action="store_true", help="time training steps: full, modular and end to end")
    parser.add_argument("--compile", action="store_true", help="torch.compile every model")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights; autocast in training steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch on the CPU (default: torch's own choice)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds that count, after two that don't")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="don't measure peak memory")
    parser.add_argument("--out", type=Path, help="folder for bench.csv and bench.png")


def run(
    *,
    model: str,
    r: Sequence[int] = (0, 8, 12, 16),
    batch_size: Sequence[int] = (16,),
    image_size: int | None = None,
    metric: str = "learned",
    train: bool = False,
    compile: bool = False,
    dtype: str = "float32",
    device: str = "cpu",
    threads: int | None = None,
    rounds: int = 10,
    memory: bool = True,
    out: str | Path | None = None,
) -> list[Row]:
    """Measure, print the table, and write it with a plot under `out`; see the command's --help.

    Returns:
        The table's rows, for each batch size the base's first.

    Raises:
        CommandError: If a number makes no sense, or the model can't be made or driven.
    """
    counts = {"--batch-size": batch_size, "--rounds": [rounds], "--threads": [1 if threads is None else threads]}
    for name, values in (counts | {"--r": [value + 1 for value in r]}).items():
        if min(values) < 1:
            raise CommandError(f"{name} is too small: {min(values) - (name == '--r')}")
    check_device(device)
    if out is not None:
        check_folder(Path(out))
    if threads is not None:
        torch.set_num_threads(threads)
    machine = Machine(model, image_size, metric, compile, dtype, device, threads)
    print(describe(machine))
    rows: list[Row] = []
    for batch in batch_size:
        rows += _measure(machine, list(settings(r, batch, train)), rounds, memory)
    print(table(rows))
    if out is not None:
        _write(rows, Path(out))
    return rows


def settings(r: Sequence[int], batch: int, train: bool) -> Iterator[Setting]:
    """The base first, then every r; in training each r in both ways."""
    yield Setting("full" if train else "forward", batch, None)
    for value in r:
        for step in ("modular", "end-to-end") if train else ("forward",):
            yield Setting(step, batch, value)


def _measure(machine: Machine, chosen: list[Setting], rounds: int, memory: bool) -> list[Row]:
    models = [build(machine, setting) for setting in chosen]
    steps = [make_step(machine, setting, model) for setting, model in zip(chosen, models, strict=True)]
    seconds = [[] for _ in chosen]
    for count in _progress(range(-2, rounds), f"batch {chosen[0].batch}"):
        for i, step in enumerate(steps):
            elapsed = timed(step, machine.device)
            if count >= 0:
                seconds[i].append(elapsed)
    peaks = [peak_memory(machine, setting) if memory else None for setting in chosen]
    return [_row(*values, seconds[0]) for values in zip(chosen, models, seconds, peaks, strict=True)]


def _row(setting: Setting, model: nn.Module, seconds: list[float], peak: float | None, base: list[float]) -> Row:
    net = model if isinstance(model, TokenViT) else TokenViT(model)
    flops, full = net.flops(), net.flops(0)
    speed_up = statistics.median(b / s for b, s in zip(base, seconds, strict=True))
    ideal = full / flops if setting.step == "forward" else None  # a relaxed step removes no tokens
    tokens = net.token_counts()[-1]
    median = statistics.median(seconds)
    share = None if ideal is None else speed_up / ideal
    return Row(*setting, tokens, flops / 1e9, median * 1e3, setting.batch / median, speed_up, ideal, share, peak)


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    head = (
        "step",
        "batch",
        "r",
        "tokens",
        "GFLOPs",
        "ms",
        "images/s",
        "speed-up",
        "ideal",
        "share of ideal",
        "peak MiB",
    )
    kinds = ("", "", "", "", ".2f", ".1f", ".1f", ".2f", ".2f", ".2f", ".0f")

    def line(row: Row) -> str:
        row = row._replace(r="base" if row.r is None else row.r)
        return " | ".join("" if value is None else format(value, kind) for value, kind in zip(row, kinds, strict=True))

    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {line(row)} |" for row in rows)])


def _progress(rounds: range, what: str) -> Iterator[int]:
    try:
        from tqdm import tqdm
    except ImportError:  # an extra
        return iter(rounds)
    return iter(tqdm(rounds, desc=what, unit="round", leave=False))


def _write(rows: Sequence[Row], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "bench.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([Row._fields, *rows])
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise CommandError(
            "the plot needs matplotlib: pip install 'timm-tokens[viz]' (bench.csv is written)"
        ) from error
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for step, batch in dict.fromkeys((row.step, row.batch) for row in rows if row.r is not None):
        points = [row for row in rows if (row.step, row.batch) == (step, batch) and row.r is not None]
        axes.plot([p.r for p in points], [p.speed_up for p in points], "o-", label=f"{step}, batch {batch}")
    ideal = sorted({(row.r, row.ideal) for row in rows if row.r is not None and row.ideal})
    if ideal:
        axes.plot(*zip(*ideal, strict=True), "k--", label="ideal (FLOPs)")
    axes.set(xlabel="r, tokens merged in each block", ylabel="speed-up over the base")
    axes.legend()
    with replacing(folder / "bench.png") as partial:
        figure.savefig(partial, dpi=150)
    plt.close(figure)
