"""`timm-tokens fewshot`: how well few labelled images do on a model's features, without and with ESFR."""

import csv
from argparse import ArgumentParser
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from timm_tokens.cli._checks import check_device, check_folder
from timm_tokens.cli._data import open_dataset
from timm_tokens.cli._errors import CommandError
from timm_tokens.cli._features import cached_features, load_features, named
from timm_tokens.fewshot import CLASSIFIERS, ESFR, Comparison, compare


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the options of the sub-command: the keyword arguments of `run`."""
    source = parser.add_argument_group("where the features come from")
    source.add_argument("--model", help="name of a model in timm")
    source.add_argument("--checkpoint", type=Path, help="weights of the model (.safetensors, .pth)")
    source.add_argument("--pretrained", action="store_true", help="timm's own weights of the model")
    source.add_argument("--data-dir", type=Path, help="folder with one folder of images a class")
    source.add_argument("--merge-r", type=int, default=0, help="tokens that each block merges away (a timm ViT)")
    source.add_argument("--features", type=Path, help="ready-made instead: safetensors, features (N, D), labels (N,)")
    source.add_argument("--batch-size", type=int, default=64)
    source.add_argument("--workers", type=int, default=0, help="processes that load images")
    source.add_argument("--device", default="cpu")
    what = parser.add_argument_group("what to measure")
    what.add_argument("--ways", type=int, default=5, help="classes an episode")
    what.add_argument("--shots", type=int, nargs="+", default=[1, 5], help="labelled images a class")
    what.add_argument("--queries", type=int, default=15, help="images to classify a class")
    what.add_argument("--episodes", type=int, default=1000)
    what.add_argument("--classifiers", nargs="+", default=list(CLASSIFIERS), help=f"out of {', '.join(CLASSIFIERS)}")
    what.add_argument("--seed", type=int, default=0)
    what.add_argument("--out", type=Path, default=Path("fewshot"), help="folder for the table, the plot and features")
    what.add_argument("--no-plot", dest="plot", action="store_false", help="leave the plot out (it takes matplotlib)")


def run(
    *,
    model: str | None = None,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    data_dir: str | Path | None = None,
    merge_r: int = 0,
    features: str | Path | None = None,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "cpu",
    ways: int = 5,
    shots: Sequence[int] = (1, 5),
    queries: int = 15,
    episodes: int = 1000,
    classifiers: Sequence[str] = tuple(CLASSIFIERS),
    seed: int = 0,
    out: str | Path = "fewshot",
    plot: bool = True,
) -> list[Comparison]:
    """Measures, prints a table, and writes `fewshot.csv` and `fewshot.png` into `out`; see the command's --help.

    Returns:
        A `Comparison` for every number of shots and every classifier.

    Raises:
        CommandError: something is missing or does not fit.
    """
    _check(classifiers, plot, ready=bool(features), source=bool(model and data_dir))
    out = Path(out)
    check_folder(out)
    check_device(device)
    if features:
        x, labels, _ = load_features(Path(features))
    else:
        how = {"batch_size": batch_size, "workers": workers, "device": device}
        source = named(model, checkpoint and Path(checkpoint), pretrained, merge_r)
        x, labels, _ = cached_features(out, open_dataset(data_dir, split=""), source, **how)
    what = {"ways": ways, "queries": queries, "episodes": episodes, "classifiers": classifiers}
    results = [row for shot in shots for row in _compare(x.to(device), labels, shot, seed, **what)]
    print(table(results))
    _write_csv(out / "fewshot.csv", results)
    if plot:
        _draw(out / "fewshot.png", results)
    return results


def _check(classifiers: Sequence[str], plot: bool, ready: bool, source: bool) -> None:
    """Before an hour of work, not after it."""
    unknown = [name for name in classifiers if name not in CLASSIFIERS]
    if unknown:
        raise CommandError(f"unknown classifiers {', '.join(unknown)}: choose from {', '.join(CLASSIFIERS)}")
    if plot and find_spec("matplotlib") is None:
        raise CommandError("the plot takes matplotlib: pip install 'timm-tokens[viz]', or pass --no-plot")
    if ready == source:
        raise CommandError("pass either --features FILE, or --model NAME with --data-dir FOLDER")


def _compare(x: Tensor, labels: Tensor, shots: int, seed: int, **what: Any) -> list[Comparison]:
    """Every number of shots starts from the seed, so that leaving one out does not change the others."""
    generator = torch.Generator().manual_seed(seed)
    progress = partial(tqdm, desc=f"{shots}-shot", unit="block")
    try:
        return compare(x, labels, shots=shots, esfr=ESFR(), generator=generator, progress=progress, **what)
    except ValueError as error:
        raise CommandError(str(error)) from error


def table(results: Sequence[Comparison]) -> str:
    """Accuracies in percent with their 95 % intervals, as Markdown."""
    lines = ["| shots | classifier | accuracy | with ESFR | gain |", "|---|---|---|---|---|"]
    lines += [f"| {r.shots} | {r.classifier} | {r.plain} | {r.adapted} | {r.gain} |" for r in results]
    return "\n".join(lines)


def _write_csv(path: Path, results: Sequence[Comparison]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = ("plain", "adapted", "gain")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["shots", "classifier", *(f"{kind}{suffix}" for kind in kinds for suffix in ("", "_ci95"))])
        writer.writerows([r.shots, r.classifier, *r.plain, *r.adapted, *r.gain] for r in results)


def _draw(path: Path, results: Sequence[Comparison]) -> None:
    """Bars with intervals: every classifier without and with ESFR, one panel for each number of shots."""
    from matplotlib.figure import Figure  # not pyplot, which would need a display and keep state

    shots = sorted({r.shots for r in results})
    figure = Figure(figsize=(1 + 4 * len(shots), 4), layout="constrained")
    for axes, shot in zip(figure.subplots(1, len(shots), squeeze=False)[0], shots, strict=True):
        rows = [r for r in results if r.shots == shot]
        for offset, kind in ((-0.2, "plain"), (0.2, "adapted")):
            values = [getattr(r, kind) for r in rows]
            heights, errors = [100 * v.mean for v in values], [100 * v.half_width for v in values]
            label = "with ESFR" if kind == "adapted" else "without"
            axes.bar([i + offset for i in range(len(rows))], heights, 0.4, yerr=errors, capsize=3, label=label)
        axes.set_xticks(range(len(rows)), [r.classifier.replace("_", "\n") for r in rows])
        axes.set(title=f"{shot}-shot", ylabel="accuracy (%)")
        axes.set_ylim(bottom=max(0, axes.get_ylim()[0], min(100 * r.plain.mean for r in rows) - 15))
    axes.legend()
    figure.savefig(path, dpi=150)
