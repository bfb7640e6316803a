"""The weighted nearest-neighbour classifier: nothing to train, one number to watch while pre-training."""

from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.nn.functional import normalize

from timm_tokens.ops.ranges import check_positive
from timm_tokens.probing._checks import check_pair

# Cosines held at a time: 256 MB in float32.
_BUDGET = 2**26


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    k: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
) -> dict[int, float]:
    """Top-1 accuracy of a vote among the k training features with the largest cosine, each with exp(cosine / tau).

    Args:
        train_features: (M, D), on the device that computes.
        train_labels: (M,) int64.
        features: (N, D), what is classified.
        labels: (N,) int64.
        k: Numbers of neighbours, answered together.
        temperature: tau.

    Returns:
        Accuracy between 0 and 1 by k.

    Raises:
        ValueError: Shapes do not fit, features are not finite, or a k is not in [1, M].

    Source: Wu et al. (arXiv 1805.01978), section 3.4; k and tau as DINO (arXiv 2104.14294) evaluates.
    """
    check_pair(train_features, train_labels, features, labels)
    check_positive(temperature=temperature)
    if not k or min(k) < 1 or max(k) > len(train_features):
        raise ValueError(f"k must lie in [1, {len(train_features)}], the number of training features, got {tuple(k)}")
    right = dict.fromkeys(k, 0)
    size = max(1, _BUDGET // len(train_features))
    for chunk, truth in zip(features.split(size), labels.split(size), strict=True):
        for count, votes in _votes(train_features, train_labels, chunk, sorted(set(k)), temperature):
            right[count] += int((votes.argmax(-1).cpu() == truth.cpu()).sum())
    return {count: hits / len(features) for count, hits in right.items()}


def _votes(
    train: Tensor, labels: Tensor, features: Tensor, k: Sequence[int], temperature: float
) -> Iterator[tuple[int, Tensor]]:
    """For each k, ascending, the votes (B, K) of the k nearest."""
    cosine = normalize(features.to(train).float(), dim=-1) @ normalize(train.float(), dim=-1).mT  # (B, M)
    near, index = cosine.topk(k[-1], dim=-1)  # (B, k), nearest first
    weight = ((near - near[:, :1]) / temperature).exp()  # by the nearest's, which cancels in the vote: no overflow
    voters = labels.to(train.device)[index]
    votes = weight.new_zeros(len(features), int(labels.max()) + 1)
    for start, end in zip([0, *k], k, strict=False):
        votes.scatter_add_(1, voters[:, start:end], weight[:, start:end])
        yield end, votes
