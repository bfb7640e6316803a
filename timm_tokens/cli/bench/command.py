"""Measure how much faster a model runs when its tokens merge, for several r in one run.

    timm-tokens bench deit_small_patch16_224 --r 8 12 16 --batch-size 16 1
    timm-tokens bench deit_small_patch16_224 --r 16 --batch-size 16 --train --out results

Every round times each setting once, the base first, and the speed-up is the median of the ratios within the rounds: a
machine that is slower for a while is slower for both. "ideal" is the ratio of the FLOPs, and "share of ideal" is the
speed-up over it. A row "dropped" is the speed of dropping as many tokens unseen, which no choice of tokens can beat.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from timm_tokens.cli.bench.timing import MachineOptions, Setting, build, describe, make_step, peak_memory, timed
from timm_tokens.cli.common import checks
from timm_tokens.cli.config import write_config
from timm_tokens.cli.errors import CommandError
from timm_tokens.merger_file import read_merger
from timm_tokens.options import option
from timm_tokens.tables import markdown, write_csv
from timm_tokens.vit import TokenViT


class Row(NamedTuple):
    """One line of the table; times are medians over the rounds, memory is the peak in MiB, None if not measured."""

    step: str
    batch: int
    r: int | tuple[int, ...] | None
    tokens: int
    gflops: float
    milliseconds: float
    images_per_second: float
    speed_up: float
    ideal: float | None
    share: float | None
    peak_memory: float | None


@dataclass(frozen=True, kw_only=True)
class Options(MachineOptions):
    """What to measure."""

    r: tuple[int, ...] = option(
        (0, 8, 12, 16),
        "numbers of tokens to merge in each block, one table row each; a --merger adds those it was saved with",
        at_least=0,
    )
    batch_size: tuple[int, ...] = option((16,), "batch sizes to measure", at_least=1)
    train: bool = option(False, "time training instead of inference: the base, the embeddings alone, and end to end")
    rounds: int = option(10, "number of timed rounds, after two that warm up", at_least=1)
    dropped: bool = option(
        True, "do not time dropping as many tokens without looking at them, which no choice of tokens can beat in speed"
    )
    memory: bool = option(True, "do not measure the peak memory")
    out: Path | None = option(
        None, "folder for bench.csv and bench.png (default: the table is only printed)", metavar="FOLDER"
    )


def run(options: Options) -> list[Row]:
    """Measure, print the table, and write it with a plot under `out`; of each batch size the base's row comes first."""
    options = replace(options, device=checks.device(options.device))
    saved = {} if options.merger is None else read_merger(options.merger).config
    if options.train and saved.get("metric", options.metric) == "keys":
        raise CommandError("--train times how embeddings learn, and merging by keys has none: leave out --train")
    if options.out is not None:
        checks.folder(options.out)
        checks.plot(True, "or leave --out out")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    print(describe(options))
    rows: list[Row] = []
    counts = _counts(options.r, saved.get("r"))
    for batch in options.batch_size:
        rows += _measure(options, list(settings(counts, batch, options.train, options.dropped)))
    print(table(rows))
    if options.out is not None:
        write_config(options.out, "bench", options)
        write(rows, options.out)
    return rows


def _counts(asked: Sequence[int], saved: Any) -> list[int | tuple[int, ...]]:
    """What the blocks merge in turn: as the merger was saved, if there is one, and what is asked for."""
    if saved is None or saved in asked:
        return [*asked]
    return [saved if isinstance(saved, int) else tuple(saved), *asked]


def settings(r: Sequence[int | tuple[int, ...]], batch: int, train: bool, dropped: bool = False) -> Iterator[Setting]:
    """The base first, then every r: in training in both ways, otherwise merged, and (dropped) with as many dropped."""
    yield Setting("full" if train else "forward", batch, None)
    steps = ("modular", "end-to-end") if train else ("forward", "dropped") if dropped else ("forward",)
    yield from (Setting(step, batch, value) for value in r for step in steps if value or step == "forward")


def _measure(options: Options, chosen: list[Setting]) -> list[Row]:
    models = [build(options, setting) for setting in chosen]
    steps = [make_step(options, setting, model) for setting, model in zip(chosen, models, strict=True)]
    seconds: list[list[float]] = [[] for _ in chosen]
    for count in tqdm(range(-2, options.rounds), desc=f"batch {chosen[0].batch}", unit="round", leave=False):
        for i, step in enumerate(steps):
            elapsed = timed(step, options.device)
            if count >= 0:
                seconds[i].append(elapsed)
    peaks = [peak_memory(options, s) if options.memory and s.step != "dropped" else None for s in chosen]
    if chosen[0].batch == options.batch_size[0]:
        _note_limits(models)
    return [_row(*values, seconds[0]) for values in zip(chosen, models, seconds, peaks, strict=True)]


def _note_limits(models: Sequence[nn.Module]) -> None:
    """Say where fewer tokens merge than r asks for."""
    nets = {str(net.merger.r): net for net in models if isinstance(net, TokenViT) and net.merger is not None}
    for r, net in nets.items():
        counts, asked = net.token_counts(), sum(net.merger.schedule)
        merged = counts[0] - counts[-1]
        if merged < asked:
            print(
                f"r = {r} asks for {asked} tokens in all, of which {merged} merge: "
                "a block merges at most half of its tokens after the prefix"
            )


def _row(setting: Setting, model: nn.Module, seconds: list[float], peak: float | None, base: list[float]) -> Row:
    net = model if isinstance(model, TokenViT) else TokenViT(model)
    full = net.costs().flops((0,) * len(net.base.blocks), features=True)  # what the plain model computes
    flops = full if setting.r is None else net.flops()
    speed_up = statistics.median(b / s for b, s in zip(base, seconds, strict=True))
    ideal = full / flops if setting.step in ("forward", "dropped") else None  # a relaxed step removes no tokens
    tokens = net.token_counts()[-1]
    median = statistics.median(seconds)
    share = None if ideal is None else speed_up / ideal
    return Row(*setting, tokens, flops / 1e9, median * 1e3, setting.batch / median, speed_up, ideal, share, peak)


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    head = ("step", "batch", "r", "tokens", "GFLOPs", "ms", "images/s", "speed-up", "ideal", "share of ideal",
            "peak MiB")  # fmt: skip
    kinds = ("", "", "", "", ".2f", ".1f", ".1f", ".2f", ".2f", ".2f", ".0f")
    return markdown(head, [(*row[:2], _name(row.r), *row[3:]) for row in rows], kinds)


def _name(r: int | tuple[int, ...] | None) -> str:
    return "base" if r is None else str(r) if isinstance(r, int) else " ".join(map(str, r))


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write bench.csv, and bench.png: the speed-up by r, beside what the FLOPs promise."""
    from timm_tokens.drawing import draw_speed, save  # not above: matplotlib is an extra

    write_csv(folder / "bench.csv", Row._fields, rows)
    lines: dict[str, list[tuple[float, float]]] = {}
    ideal: set[tuple[float, float]] = set()
    for row in rows:
        if isinstance(row.r, int):
            lines.setdefault(f"{row.step}, batch {row.batch}", []).append((row.r, row.speed_up))
            ideal |= {(row.r, row.ideal)} if row.ideal else set()
    save(draw_speed(lines, sorted(ideal)), folder / "bench.png")
