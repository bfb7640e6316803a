"""Linear classifiers on frozen features, one for each of several learning rates, trained at once."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from timm_tokens.ops.ranges import check_counts, check_positive, check_weights, check_within
from timm_tokens.probing._checks import check_pair

LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


class LinearResult(NamedTuple):
    """What a linear probe found.

    Attributes:
        accuracy: Top-1 between 0 and 1, of the classifier trained on the whole training set with `lr`.
        lr: The learning rate that did best on the held-out part of the training set.
        held_out: Accuracy on that part by learning rate. If the best is the first or last, try others beyond it.
    """

    accuracy: float
    lr: float
    held_out: dict[float, float]


class Classifiers(NamedTuple):
    """L linear classifiers over the same features: weight (D, L, K), bias (L, K)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (B, L, K) of features (B, D), all by one matrix product."""
        return (x @ self.weight.flatten(1)).unflatten(1, self.bias.shape) + self.bias


def linear_probe(
    train_features: Tensor, train_labels: Tensor, features: Tensor, labels: Tensor, *,
    lrs: Sequence[float] = LEARNING_RATES, epochs: int = 100, batch_size: int = 1024, momentum: float = 0.9,
    weight_decay: float = 0.0, held_out: float = 0.1, generator: torch.Generator | None = None,
) -> LinearResult:  # fmt: skip
    """Top-1 accuracy of a linear classifier on frozen features.

    Features are standardised by the training set's. All learning rates are trained together, by SGD with a cosine
    schedule, on the training set without a held-out part, which chooses among them; then the chosen one is trained on
    the whole training set. `features` and `labels` decide nothing: they are only scored, once.

    Args:
        train_features: (M, D), on the device that computes.
        train_labels: (M,) int64.
        features: (N, D) to score.
        labels: (N,) int64.
        lrs: Learning rates to choose from.
        epochs: Passes over the training set.
        batch_size: Rows in a batch.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD.
        held_out: Share of the training set that chooses the learning rate.
        generator: Random generator of the split and the order, on the CPU; None: one with seed 0, so results repeat.

    Raises:
        ValueError: Shapes do not fit, features are not finite, nothing is held out, or an argument is out of range.
    """
    check_pair(train_features, train_labels, features, labels)
    check_counts(epochs=epochs, batch_size=batch_size, **{"len(lrs)": len(lrs)})
    check_positive(**{f"lrs[{i}]": lr for i, lr in enumerate(lrs)})
    check_weights(weight_decay=weight_decay)
    check_within(momentum=momentum, held_out=held_out)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    num_classes = 1 + int(torch.cat([train_labels.cpu(), labels.cpu()]).max())
    x, target = _standardise(train_features.float(), features.to(train_features.device).float())
    y, truth = train_labels.to(x.device), labels.to(x.device)

    def fit(rows: Tensor, rates: Sequence[float]) -> Classifiers:
        return _sgd(x, y, _batches(rows, epochs, batch_size, generator), num_classes, rates, momentum, weight_decay)

    judges, rest = _split(len(x), held_out, generator, x.device)
    scores = _accuracy(fit(rest, lrs), x[judges], y[judges])
    best = max(range(len(lrs)), key=scores.__getitem__)
    accuracy = _accuracy(fit(torch.arange(len(x), device=x.device), [lrs[best]]), target, truth)[0]
    return LinearResult(accuracy, lrs[best], dict(zip(lrs, scores, strict=True)))


def _standardise(train: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Both less the training features' mean, over their deviation."""
    mean, std = train.mean(0), train.std(0, correction=0).clamp_min(1e-6)
    return (train - mean) / std, (features - mean) / std


def _split(count: int, share: float, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows that are held out, and the others."""
    held_out = round(share * count)
    if not 0 < held_out < count:
        raise ValueError(
            f"held_out must leave training features on both sides: {share} of {count} is {held_out}; "
            "give more features or another share"
        )
    order = torch.randperm(count, generator=generator).to(device)
    return order[:held_out], order[held_out:]


def _batches(rows: Tensor, epochs: int, size: int, generator: torch.Generator) -> Iterator[tuple[float, Tensor]]:
    """The batches of all epochs, each with the cosine schedule's share of the learning rate."""
    total, step = epochs * math.ceil(len(rows) / size), 0
    for _ in range(epochs):
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        for batch in rows[order].split(size):
            yield (1 + math.cos(math.pi * step / total)) / 2, batch
            step += 1


@torch.no_grad()
def _sgd(
    x: Tensor,
    labels: Tensor,
    batches: Iterable[tuple[float, Tensor]],
    num_classes: int,
    lrs: Sequence[float],
    momentum: float,
    weight_decay: float,
) -> Classifiers:
    """Classifiers trained from zero, one for each of the L learning rates; the gradient is written out."""
    rates = torch.tensor(lrs, device=x.device)[:, None]  # (L, 1)
    bias = x.new_zeros(len(lrs), num_classes)
    weight = x.new_zeros(x.shape[1], *bias.shape)
    classifiers, velocity = Classifiers(weight, bias), Classifiers(weight.clone(), bias.clone())
    for schedule, rows in batches:
        error = classifiers(x[rows]).softmax(-1)
        error -= one_hot(labels[rows], num_classes)[:, None]
        error /= len(rows)  # (B, L, K), d loss / d logits
        gradient = Classifiers((x[rows].mT @ error.flatten(1)).unflatten(1, bias.shape), error.sum(0))
        gradient.weight.add_(weight, alpha=weight_decay)
        for parameter, moving, step in zip(classifiers, velocity, gradient, strict=True):
            moving.mul_(momentum).add_(step)
            parameter.sub_(schedule * rates * moving)
    return classifiers


def _accuracy(classifiers: Classifiers, x: Tensor, labels: Tensor) -> list[float]:
    """Top-1 of each classifier."""
    right = sum(
        (classifiers(rows).argmax(-1) == truth[:, None]).sum(0)  # (B, L) -> (L,)
        for rows, truth in zip(x.split(1024), labels.split(1024), strict=True)
    )
    return (right.double() / len(x)).tolist()
