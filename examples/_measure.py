"""What a merging model buys: its speed, its cost and its accuracy for each r."""

import time
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import torch
from _data import Data, samples
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from timm_tokens import TokenViT


class Row(NamedTuple):
    """What one r buys. Accuracies and the share of the ideal (speed-up over that of the FLOPs) are fractions."""

    r: int
    tokens_left: int
    gflops: float
    images_per_s: float
    speedup: float
    share_of_ideal: float
    learned: float
    training_free: float


def report(
    learned: TokenViT, training_free: TokenViT, data: Data, rs: Sequence[int], batch_size: int = 32, workers: int = 0
) -> list[Row]:
    """A Row for each r, of which the first is 0: nothing merged."""
    device = next(learned.parameters()).device
    right = accuracies([learned, training_free], rs, DataLoader(data.val, batch_size, num_workers=workers))
    images = samples(data, batch_size).to(device)
    times, full = batch_seconds(learned, rs, images), learned.flops(0)
    rows = []
    for i, r in enumerate(rs):
        learned.merger.r = r
        tokens = learned.num_prefix_tokens + 1 + learned.token_groups(images[:1]).max().item()
        speedup, flops = median(once[0] / once[i] for once in times), learned.flops()
        speed = len(images) / median(once[i] for once in times)
        rows.append(Row(r, tokens, flops / 1e9, speed, speedup, speedup * flops / full, *right[:, i].tolist()))
    return rows


@torch.inference_mode()
def accuracies(models: Sequence[TokenViT], rs: Sequence[int], loader: DataLoader) -> Tensor:
    """The share of the loader's images that each model gets right with each r: (models, rs)."""
    device = next(models[0].parameters()).device
    right = torch.zeros(len(models), len(rs))
    for images, labels in tqdm(loader, "measuring accuracy"):
        images, labels = images.to(device), labels.to(device)
        for i, model in enumerate(models):
            for j, r in enumerate(rs):
                model.merger.r = r
                right[i, j] += (model(images).argmax(1) == labels).sum().item()
    return right / len(loader.dataset)


@torch.inference_mode()
def batch_seconds(model: TokenViT, rs: Sequence[int], images: Tensor, rounds: int = 11) -> list[list[float]]:
    """Seconds for a batch with each r (0: the base as it was), in rounds: what slows the machine slows all r alike."""
    times = []
    for _ in tqdm(range(rounds + 1), "measuring speed"):
        times.append([])
        for r in rs:
            model.merger.r = r
            times[-1].append(seconds(model if r else model.base, images))
    return times[1:]  # the first round warmed up


def seconds(model: nn.Module, images: Tensor) -> float:
    start = time.perf_counter()
    model(images).sum().item()  # reading the result waits for a GPU
    return time.perf_counter() - start
