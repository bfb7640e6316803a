"""`--protocol`: a paper's linear evaluation, with crops that are augmented anew in each epoch."""

from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from timm_tokens import seeding
from timm_tokens.cli.common.datasets import class_names, tell
from timm_tokens.cli.common.features import Source
from timm_tokens.cli.errors import CommandError
from timm_tokens.data import Images, input_config, input_transform, unreadable
from timm_tokens.ops.finite import check_finite, check_weights
from timm_tokens.probing.protocols import PROTOCOLS, Protocol, Sweep
from timm_tokens.training import Settings
from timm_tokens.training.batches import plan, step_loader
from timm_tokens.training.evaluation import part_of
from timm_tokens.training.neighbours import features

Extract = Callable[[Tensor], Tensor]


class Evaluation(NamedTuple):
    """What a protocol gave."""

    name: str  # the protocol's
    features: str  # which were used, in words
    accuracy: dict[float, list[float]]  # of validation images by learning rate, after each epoch
    images: tuple[int, int]  # to train on, and to validate on
    notes: list[str]  # lines about images that were left out

    def best(self) -> tuple[float, int, float]:
        """The learning rate, the epoch from 1, and the accuracy of the best classifier, chosen on the same images."""
        found = ((value, -epoch, lr) for lr, values in self.accuracy.items() for epoch, value in enumerate(values, 1))
        value, epoch, lr = max(found)
        return lr, -epoch, value


def evaluate(source: Source, splits: tuple[Dataset, Dataset], options: Any, device: str) -> Evaluation:
    """Evaluate a model's features as the paper does."""
    protocol, net = PROTOCOLS[options.protocol], source.make()
    check_weights(net)
    net = net.to(device).eval().requires_grad_(False)
    train, val = splits
    if not (isinstance(train, Images) and isinstance(val, Images)):
        raise CommandError(f"--protocol {options.protocol} needs images by index, not a stream")
    train, val = (images.without(unreadable(images, options.workers)) for images in (train, val))
    config = input_config(net, source.img_size)
    train.transform = input_transform(config, is_training=True, scale=(0.08, 1.0), hflip=0.5, color_jitter=None)
    val.transform = input_transform(config)
    words, extract = features_of(net, protocol)
    with torch.no_grad():
        x, labels = features(extract, part_of(val, options.batch_size, options.workers), len(val), device)
    check_finite(features=x)
    settings = Settings(
        out=options.out, epochs=options.epochs or protocol.epochs, batch_size=min(options.batch_size, len(train)),
        seed=options.seed, workers=options.workers, device=device,
    )  # fmt: skip
    length, base = plan(train, settings), options.lrs or protocol.lrs
    batches, steps = step_loader(train, length, settings), length.steps_per_epoch
    lrs = [lr * settings.batch_size / protocol.base_size for lr in base]
    sweep = Sweep(protocol, x.shape[1], len(class_names(train) or ()) or 1 + int(labels.max()), lrs, settings.epochs,
                  steps, seeding.generator(options.seed), device)  # fmt: skip
    accuracy: dict[float, list[float]] = {lr: [] for lr in base}
    for _ in tqdm(range(settings.epochs), desc=f"{options.protocol} protocol", unit="epoch"):
        for ((images, truth),) in islice(batches, steps):
            with torch.no_grad():
                rows = extract(images.to(device))
            sweep.train(rows.float(), truth.to(device))
        for lr, value in zip(base, sweep.accuracies(x, labels), strict=True):
            accuracy[lr].append(value)
    notes = [f"{name}: {line}" for name, images in (("train", train), ("val", val)) for line in images.notes()]
    tell(notes)
    return Evaluation(options.protocol, words, accuracy, (len(train), len(val)), notes)


def features_of(net: Any, protocol: Protocol) -> tuple[str, Extract]:
    """Which features the protocol takes of this model, in words, and what computes them of images."""
    if protocol.features == "pooled" or not getattr(net, "num_prefix_tokens", 0) or not hasattr(net, "blocks"):
        return "the model's pooled features", net
    four = net.num_features < 768

    def extract(images: Tensor) -> Tensor:
        layers = net.forward_intermediates(
            images, indices=4 if four else 1, norm=True, return_prefix_tokens=True, output_fmt="NLC",
            intermediates_only=True,
        )  # fmt: skip
        if four:
            return torch.cat([prefix[:, 0] for _, prefix in layers], 1)
        patches, prefix = layers[-1]
        return torch.cat([prefix[:, 0], patches.mean(1)], 1)

    last = "class tokens of the last four blocks" if four else "the last class token and the mean of the patches"
    return last, extract
