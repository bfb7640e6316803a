"""Linear classifiers on frozen features, one for each of several learning rates, trained at once."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from timm_tokens.ops.ranges import check_counts, check_not_negative, check_positive, check_within
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


class Classifiers:
    """L linear classifiers of the same features, one for each learning rate, trained side by side by SGD.

    The gradient is written out: autograd and torch.optim.SGD take half as long again on small sets.

    Args:
        weight: Where all of them start, (D, K); the biases start at zero.
        lrs: L learning rates.
        momentum: As of torch.optim.SGD, like `nesterov`.
        weight_decay: Decay of the weights; the biases have none.
        smoothing: Label smoothing.
    """

    def __init__(
        self, weight: Tensor, lrs: Sequence[float], *, momentum: float = 0.9, nesterov: bool = False,
        weight_decay: float = 0.0, smoothing: float = 0.0,
    ):  # fmt: skip
        check_positive(**{f"lrs[{i}]": lr for i, lr in enumerate(lrs)})
        check_not_negative(weight_decay=weight_decay)
        check_within(momentum=momentum)
        self.weight = weight[:, None].repeat(1, len(lrs), 1)  # (D, L, K)
        self.bias = weight.new_zeros(len(lrs), weight.shape[1])
        self.velocities = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self.rates = weight.new_tensor(lrs)[:, None]  # (L, 1)
        self.momentum, self.nesterov, self.weight_decay, self.smoothing = momentum, nesterov, weight_decay, smoothing

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (B, L, K) of features (B, D), all by one matrix product."""
        return (x @ self.weight.flatten(1)).unflatten(1, self.bias.shape) + self.bias

    @torch.no_grad()
    def step(self, x: Tensor, labels: Tensor, share: float) -> None:
        """Train on features (B, D) with classes (B,), by this share of the learning rates."""
        error, classes = self(x).softmax(-1), self.bias.shape[-1]
        error -= (1 - self.smoothing) * one_hot(labels, classes)[:, None] + self.smoothing / classes
        error /= len(x)  # (B, L, K), d loss / d logits
        gradient = (x.mT @ error.flatten(1)).unflatten(1, self.bias.shape).add_(self.weight, alpha=self.weight_decay)
        for parameter, velocity, step in zip(
            (self.weight, self.bias), self.velocities, (gradient, error.sum(0)), strict=True
        ):
            velocity.mul_(self.momentum).add_(step)
            moving = step + self.momentum * velocity if self.nesterov else velocity
            parameter.sub_(share * self.rates * moving)

    def fit(
        self, x: Tensor, labels: Tensor, rows: Tensor, epochs: int, batch_size: int, generator: torch.Generator
    ) -> "Classifiers":
        """Train on these rows of x (N, D) and labels (N,) for so many epochs, with a cosine schedule."""
        total, step = epochs * math.ceil(len(rows) / batch_size), 0
        for _ in range(epochs):
            order = torch.randperm(len(rows), generator=generator).to(rows.device)
            for batch in rows[order].split(batch_size):
                self.step(x[batch], labels[batch], (1 + math.cos(math.pi * step / total)) / 2)
                step += 1
        return self

    @torch.no_grad()
    def accuracies(self, x: Tensor, labels: Tensor) -> list[float]:
        """Top-1 accuracy of each classifier on features (N, D), between 0 and 1."""
        chunks = zip(x.split(1024), labels.to(x.device).split(1024), strict=True)
        right = torch.stack([(self(rows).argmax(-1) == truth[:, None]).sum(0) for rows, truth in chunks])
        return (right.sum(0).double() / len(x)).tolist()


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
    check_within(held_out=held_out)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    num_classes = 1 + int(torch.cat([train_labels.cpu(), labels.cpu()]).max())
    x, target = _standardise(train_features.float(), features.to(train_features.device).float())
    y = train_labels.to(x.device)

    def fit(rows: Tensor, rates: Sequence[float]) -> Classifiers:
        start = x.new_zeros(x.shape[1], num_classes)
        classifiers = Classifiers(start, rates, momentum=momentum, weight_decay=weight_decay)
        return classifiers.fit(x, y, rows, epochs, batch_size, generator)

    judges, rest = _split(len(x), held_out, generator, x.device)
    scores = dict(zip(lrs, fit(rest, lrs).accuracies(x[judges], y[judges]), strict=True))
    lr = max(scores, key=scores.__getitem__)
    everything = torch.arange(len(x), device=x.device)
    return LinearResult(fit(everything, [lr]).accuracies(target, labels)[0], lr, scores)


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
