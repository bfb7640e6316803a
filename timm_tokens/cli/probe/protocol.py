"""`--protocol`: a paper's linear evaluation, with crops that are augmented anew in each epoch."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from timm_tokens import seeding
from timm_tokens.cli.common.datasets import class_names, tell
from timm_tokens.cli.common.features import Source
from timm_tokens.cli.errors import CommandError
from timm_tokens.data import Images, input_config, input_transform, unreadable
from timm_tokens.ops.finite import check_finite, check_weights
from timm_tokens.probing.protocols import PROTOCOLS, Protocol, Sweep
from timm_tokens.stopping import outlast_signals
from timm_tokens.training.batches import SeededDataset

Extract = Callable[[Tensor], Tensor]


class Evaluation(NamedTuple):
    """What a protocol gave.

    Attributes:
        name: The protocol's.
        features: Which features were used, in words.
        accuracy: By learning rate, after each epoch, of the validation images.
        images: How many there were to train on, and to validate on.
        notes: Lines about images that were left out.
    """

    name: str
    features: str
    accuracy: dict[float, list[float]]
    images: tuple[int, int]
    notes: list[str]

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
    x, labels = _whole(val, extract, options, device)
    batch = min(options.batch_size, len(train))
    base = options.lrs or protocol.lrs
    epochs = options.epochs or protocol.epochs
    lrs = [lr * batch / protocol.base_size for lr in base]
    generator, steps = seeding.generator(options.seed), len(train) // batch
    sweep = Sweep(protocol, x.shape[1], len(class_names(train) or ()) or 1 + int(labels.max()), lrs, epochs, steps,
                  generator, device)  # fmt: skip
    accuracy: dict[float, list[float]] = {lr: [] for lr in base}
    for epoch in tqdm(range(epochs), desc=f"{options.protocol} protocol", unit="epoch"):
        for images, truth in _batches(train, epoch, batch, options):
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


@torch.no_grad()
def _whole(val: Images, extract: Extract, options: Any, device: str) -> tuple[Tensor, Tensor]:
    """Features (N, D) on the device, and classes (N,), of the validation images."""
    loader = DataLoader(val, options.batch_size, num_workers=options.workers, worker_init_fn=outlast_signals)
    parts = [(extract(images.to(device)).float(), labels) for images, labels in loader]
    x, labels = (torch.cat(each) for each in zip(*parts, strict=True))
    check_finite(features=x)
    return x, labels


def _batches(train: Images, epoch: int, batch: int, options: Any) -> Iterator[Any]:
    """The batches of an epoch, whose order and crops depend on the seed and the epoch alone."""
    order = torch.randperm(len(train), generator=seeding.generator(options.seed, epoch)).tolist()
    keys = [[(epoch, row) for row in order[i : i + batch]] for i in range(0, len(order) - batch + 1, batch)]
    images: Any = SeededDataset(train, options.seed)
    loader: DataLoader[nn.Module] = DataLoader(
        images, batch_sampler=keys, num_workers=options.workers, worker_init_fn=outlast_signals
    )
    yield from loader
