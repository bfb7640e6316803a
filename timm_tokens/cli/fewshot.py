"""Measure few-shot accuracy on a model's features, with and without ESFR (arXiv 2106.11486).

    timm-tokens fewshot --model vit_small_patch14_dinov2 --pretrained --data-dir images/train
    timm-tokens fewshot --features features.safetensors --shots 1 5 10
    timm-tokens fewshot --model resnet18 --pretrained --data-dir mini --split-file test.csv

The folder --out gets the tables (fewshot.csv, and methods.csv, laid out as in papers), a plot (fewshot.png) and the
features, which later runs reuse.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from timm_tokens.cli.common import checks
from timm_tokens.cli.common.datasets import open_dataset
from timm_tokens.cli.common.features import FeatureOptions, Source, cached_features, load_features, named
from timm_tokens.cli.config import write_config
from timm_tokens.cli.errors import CommandError
from timm_tokens.cli.options import ImageOptions, LoadingOptions
from timm_tokens.cli.parser import flag
from timm_tokens.data.split_file import open_split_file
from timm_tokens.fewshot import CLASSIFIERS, ESFR, Comparison, Interval, bd_cspn, compare
from timm_tokens.options import option
from timm_tokens.tables import markdown, write_csv

_ESFR = "ESFR"


@dataclass(frozen=True, kw_only=True)
class Options(FeatureOptions, ImageOptions, LoadingOptions):
    """What to measure."""

    features: Path | None = option(
        None, "file of precomputed features, instead of --model: safetensors, .npz or .pt with features (N, D) and "
        "labels (N,) (default: none)", metavar="FILE",
    )  # fmt: skip
    split_file: Path | None = option(
        None, "CSV file of filename,label lines: the images in --data-dir to use, and their classes, such as "
        "mini-ImageNet's test.csv (default: all images, by their folders)", metavar="FILE",
    )  # fmt: skip
    ways: int = option(5, "number of classes in an episode", at_least=1)
    shots: tuple[int, ...] = option((1, 5), "numbers of labelled images per class", at_least=1)
    queries: int = option(15, "number of images to classify per class in an episode", at_least=1)
    episodes: int = option(600, "number of episodes", at_least=1)
    classifiers: tuple[str, ...] = option(
        tuple(CLASSIFIERS), "classifiers to measure with and without ESFR", choices=tuple(CLASSIFIERS)
    )
    bd_temperature: float = option(0.2, "BD-CSPN: temperature of the pseudo-labels", above=0, rare=True)
    bd_normalized: bool = option(
        False, "BD-CSPN: rectify prototypes on features of unit length, as the code of ESFR's authors does", rare=True
    )
    nets: int = option(5, "number of networks whose outputs ESFR averages", at_least=1, at_most=1024, group=_ESFR)
    dropout: float = option(0.5, "share of the features that ESFR hides from the networks in each update", at_least=0,
                            below=1, group=_ESFR)  # fmt: skip
    support_weight: float = option(
        0.0, "weight of a classifier of the labelled images in ESFR's loss; 0 leaves the labels unused", at_least=0,
        group=_ESFR,
    )  # fmt: skip
    seed: int = option(0, "seed of the episodes and of ESFR", at_least=0, below=2**63)
    out: Path = option(Path("fewshot"), "folder for the table, the plot and the features", metavar="FOLDER")
    plot: bool = option(True, "draw no plot; plots need matplotlib")


def run(options: Options) -> list[Comparison]:
    """Measure every number of shots with every classifier, print a table, and write it and a plot into `out`."""
    checks.plot(options.plot, "or pass --no-plot")
    if bool(options.features) == bool(options.model and options.data_dir):
        raise CommandError("pass either --features FILE, or --model NAME with --data-dir FOLDER")
    for each in (*fields(FeatureOptions), *fields(ImageOptions)):
        if options.features and getattr(options, each.name) not in (each.default, {}):
            raise CommandError(f"--features takes precomputed features: leave out {flag(each)}")
    if options.split_file and (options.features or options.dataset):
        raise CommandError("--split-file lists images in --data-dir: leave out --features and --dataset")
    checks.folder(options.out)
    device = checks.device(options.device)
    if options.features:
        x, labels, _ = load_features(options.features)
        print(f"Features: {options.features}")
    else:
        source, dataset = _open(options)
        x, labels, _ = cached_features(options.out, dataset, source, options, device)
        print(f"Weights of {options.model}: {source.weights}")
    results = [row for shots in options.shots for row in _compare(x.to(device), labels, shots, options)]
    print(f"{table(results)}\n\n{methods(results)}")
    write_config(options.out, "fewshot", options)
    write(options.out / "fewshot.csv", results)
    write_methods(options.out / "methods.csv", results)
    if options.plot:
        draw(options.out / "fewshot.png", results)
    return results


def _open(options: Options) -> tuple[Source, Dataset]:
    """The model and the images, of which a list of them is part."""
    source, folder = named(options), options.data_dir or Path()
    if options.split_file is None:
        return source, open_dataset(options.dataset or folder, options.data_dir, split="")
    dataset = open_split_file(options.split_file, folder)
    digest = hashlib.sha256(options.split_file.read_bytes()).hexdigest()  # another list may give them other classes
    return source._replace(about=source.about | {"split_file": digest}), dataset


def _compare(x: Tensor, labels: Tensor, shots: int, options: Options) -> list[Comparison]:
    """Every number of shots starts from the seed, so that leaving one out does not change the others."""
    esfr = ESFR(options.nets, options.dropout, support_weight=options.support_weight)
    rectified = partial(bd_cspn, temperature=options.bd_temperature, normalized=options.bd_normalized)
    chosen = {name: rectified if name == "bd_cspn" else CLASSIFIERS[name] for name in options.classifiers}
    return compare(
        x, labels, ways=options.ways, shots=shots, queries=options.queries, episodes=options.episodes, esfr=esfr,
        generator=torch.Generator().manual_seed(options.seed), classifiers=chosen,
        progress=partial(tqdm, desc=f"{shots}-shot", unit="block"),
    )  # fmt: skip


def table(results: Sequence[Comparison]) -> str:
    """Accuracies in percent with their 95 % intervals, as Markdown."""
    rows = [(r.shots, r.classifier, *map(str, (r.plain, r.adapted, r.gain))) for r in results]
    return markdown(("shots", "classifier", "accuracy", "with ESFR", "gain"), rows)


def write(path: Path, results: Sequence[Comparison]) -> None:
    """Write a CSV file of accuracies as fractions, with the half-widths of their 95 % intervals."""
    head = ["shots", "classifier", *(f"{kind}{end}" for kind in ("plain", "adapted", "gain") for end in ("", "_ci95"))]
    write_csv(path, head, [(r.shots, r.classifier, *r.plain, *r.adapted, *r.gain) for r in results])


def methods(results: Sequence[Comparison]) -> str:
    """The same as papers have it, as Markdown: a row for each method, a column for each number of shots."""
    shots, rows = _by_method(results)
    cells = [(name, *(str(row[n]) for n in shots)) for name, row in rows.items()]
    return markdown(("method", *(f"{n}-shot" for n in shots)), cells)


def write_methods(path: Path, results: Sequence[Comparison]) -> None:
    """Write that table to a CSV file: in percent, with the half-widths of the 95 % intervals."""
    shots, rows = _by_method(results)
    head = ["method", *(f"{n}-shot{end}" for n in shots for end in ("", "_ci95"))]
    write_csv(path, head, [(name, *(100 * x for n in shots for x in row[n])) for name, row in rows.items()])


def _by_method(results: Sequence[Comparison]) -> tuple[list[int], dict[str, dict[int, Interval]]]:
    rows: dict[str, dict[int, Interval]] = {}
    for r in results:
        rows.setdefault(r.classifier, {})[r.shots] = r.plain
        rows.setdefault(f"{r.classifier} + ESFR", {})[r.shots] = r.adapted
    return sorted({r.shots for r in results}), rows


def draw(path: Path, results: Sequence[Comparison]) -> None:
    """Bars with 95 % intervals: every classifier without and with ESFR, one panel for each number of shots."""
    from timm_tokens.drawing import draw_bars, save  # not above: matplotlib is an extra

    panels: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    for r in sorted(results, key=lambda r: r.shots):
        found = {"without ESFR": r.plain, "with ESFR": r.adapted}
        bars = {name: (100 * value.mean, 100 * value.half_width) for name, value in found.items()}
        panels.setdefault(f"{r.shots} shot" + "s" * (r.shots > 1), {})[r.classifier] = bars
    save(draw_bars(panels, "accuracy (%)"), path)
