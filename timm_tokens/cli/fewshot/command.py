"""Measure few-shot accuracy on a model's features, with and without ESFR (arXiv 2106.11486).

    timm-tokens fewshot --model vit_small_patch14_dinov2 --pretrained --data-dir images
    timm-tokens fewshot --features features.safetensors --shots 1 5 10

The folder --out gets the table (fewshot.csv), a plot (fewshot.png) and the features, which later runs reuse.
"""

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from timm_tokens.cli.common import checks
from timm_tokens.cli.common.datasets import open_dataset
from timm_tokens.cli.common.features import FeatureOptions, cached_features, load_features, named
from timm_tokens.cli.config import write_config
from timm_tokens.cli.errors import CommandError
from timm_tokens.cli.fewshot.report import draw, table, write
from timm_tokens.cli.options import ImageOptions, LoadingOptions
from timm_tokens.cli.parser import flag
from timm_tokens.fewshot import CLASSIFIERS, ESFR, Comparison, compare
from timm_tokens.options import option


@dataclass(frozen=True, kw_only=True)
class Options(FeatureOptions, ImageOptions, LoadingOptions):
    """What to measure."""

    features: Path | None = option(
        None, "file of precomputed features, instead of --model: safetensors with features (N, D) and labels (N,) "
        "(default: none)", metavar="FILE",
    )  # fmt: skip
    ways: int = option(5, "number of classes in an episode", at_least=1)
    shots: tuple[int, ...] = option((1, 5), "numbers of labelled images per class", at_least=1)
    queries: int = option(15, "number of images to classify per class in an episode", at_least=1)
    episodes: int = option(1000, "number of episodes", at_least=1)
    classifiers: tuple[str, ...] = option(
        tuple(CLASSIFIERS), "classifiers to measure with and without ESFR", choices=tuple(CLASSIFIERS)
    )
    seed: int = option(0, "seed of the episodes and of ESFR", at_least=0, below=2**63)
    out: Path = option(Path("fewshot"), "folder for the table, the plot and the features", metavar="FOLDER")
    plot: bool = option(True, "draw no plot; plots need matplotlib")


def run(options: Options) -> list[Comparison]:
    """Measure, print a table, and write `fewshot.csv` and `fewshot.png` into `out`.

    Returns:
        A `Comparison` for every number of shots and every classifier.

    Raises:
        CommandError: Something is missing or does not fit.
        ValueError: The data set has too few classes or images.
    """
    checks.plot(options.plot, "or pass --no-plot")
    if bool(options.features) == bool(options.model and options.data_dir):
        raise CommandError("pass either --features FILE, or --model NAME with --data-dir FOLDER")
    for each in (*fields(FeatureOptions), *fields(ImageOptions)):
        if options.features and getattr(options, each.name) not in (each.default, {}):
            raise CommandError(f"--features takes precomputed features: leave out {flag(each)}")
    checks.folder(options.out)
    device = checks.device(options.device)
    if options.features:
        x, labels, _ = load_features(options.features)
        print(f"Features: {options.features}")
    else:
        source = named(options)
        dataset = open_dataset(options.dataset or options.data_dir, options.data_dir, split="")
        x, labels, _ = cached_features(options.out, dataset, source, options, device)
        print(f"Weights of {options.model}: {source.weights}")
    results = [row for shots in options.shots for row in _compare(x.to(device), labels, shots, options)]
    print(table(results))
    write_config(options.out, "fewshot", options)
    write(options.out / "fewshot.csv", results)
    if options.plot:
        draw(options.out / "fewshot.png", results)
    return results


def _compare(x: Tensor, labels: Tensor, shots: int, options: Options) -> list[Comparison]:
    """Every number of shots starts from the seed, so that leaving one out does not change the others."""
    what = {"ways": options.ways, "queries": options.queries, "episodes": options.episodes}
    return compare(
        x, labels, shots=shots, esfr=ESFR(), generator=torch.Generator().manual_seed(options.seed),
        progress=partial(tqdm, desc=f"{shots}-shot", unit="block"), classifiers=options.classifiers, **what,
    )  # fmt: skip
