"""Accuracy of few-shot classifiers over many episodes, on features as they are and adapted by ESFR."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from timm_tokens.fewshot.classifiers import bd_cspn, cosine_centroid, nearest_centroid
from timm_tokens.fewshot.episodes import Episodes, sample_episodes
from timm_tokens.fewshot.esfr import ESFR, prepare
from timm_tokens.ops.finite import check_finite

Classifier = Callable[[Tensor, Tensor, Tensor], Tensor]
CLASSIFIERS: Mapping[str, Classifier] = {
    "nearest_centroid": nearest_centroid,
    "cosine_centroid": cosine_centroid,
    "bd_cspn": bd_cspn,
}


class Interval(NamedTuple):
    """A mean over episodes, and the half-width of its 95 % interval."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.2f} ± {100 * self.half_width:.2f}"


class Comparison(NamedTuple):
    """Accuracy of one classifier without and with ESFR, and the gain, paired over the same episodes."""

    shots: int
    classifier: str
    plain: Interval
    adapted: Interval
    gain: Interval


def interval(values: Tensor) -> Interval:
    """Mean of (T,) and 1.96 standard errors."""
    spread = values.std().item() if len(values) > 1 else float("nan")
    return Interval(values.mean().item(), 1.96 * spread / len(values) ** 0.5)


def compare(
    features: Tensor,
    labels: Tensor,
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    episodes: int = 1000,
    classifiers: Iterable[str] | Mapping[str, Classifier] = tuple(CLASSIFIERS),
    esfr: ESFR | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[Comparison]:
    """Draws episodes and classifies each with every classifier, without and with ESFR.

    Args:
        features: (N, D), one row per image.
        labels: (N,).
        ways: Classes in an episode.
        shots: Labelled samples of each class.
        queries: Samples of each class to classify.
        episodes: Number of episodes.
        classifiers: Names out of CLASSIFIERS, or classifiers of your own by name.
        esfr: None: with the published settings.
        generator: Random generator of the episodes and of ESFR.
        progress: Wraps the iterable of episode blocks, as tqdm does.

    Returns:
        One `Comparison` for each classifier.

    Raises:
        ValueError: Features are not finite, or there are too few images for the episodes.
    """
    check_finite(features=features)
    esfr = ESFR() if esfr is None else esfr
    drawn = sample_episodes(labels, ways, shots, queries, episodes, generator=generator)
    chosen = classifiers if isinstance(classifiers, Mapping) else {name: CLASSIFIERS[name] for name in classifiers}
    size = esfr.episodes_at_once(features)
    blocks = progress([Episodes(*block) for block in zip(*(t.split(size) for t in drawn), strict=True)])
    parts = [_accuracies(features, block, chosen, esfr, generator) for block in blocks]
    plain, adapted = torch.cat(parts, dim=-1)  # (2, classifiers, T)
    return [
        Comparison(shots, name, interval(plain[i]), interval(adapted[i]), interval(adapted[i] - plain[i]))
        for i, name in enumerate(chosen)
    ]


def _accuracies(
    features: Tensor, block: Episodes, chosen: Mapping[str, Classifier], esfr: ESFR, generator: torch.Generator | None
) -> Tensor:
    """Accuracy of every episode of a block: (2, classifiers, T), without and with ESFR."""
    index = torch.cat([block.support, block.query], dim=1)
    num_support, labels = block.support.shape[1], block.support_labels.to(features.device)
    points = features[index.to(features.device)]
    adapted = esfr.adapt(points, support=labels, generator=generator).features
    accuracies = []
    for x in (prepare(points, num_support), adapted):
        scores = [classify(x[:, :num_support], labels, x[:, num_support:]) for classify in chosen.values()]
        right = torch.stack(scores).argmax(-1).cpu() == block.query_labels  # (classifiers, T, Q)
        accuracies.append(right.double().mean(-1))
    return torch.stack(accuracies)
