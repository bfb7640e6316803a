"""Classifiers for batches of few-shot episodes: each returns scores whose largest is the predicted class.

The features are those of `prepare` or of `ESFR.adapt`, split into support and query.
"""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize, one_hot

from timm_tokens.ops.finite import check_finite
from timm_tokens.ops.ranges import check_positive


def nearest_centroid(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
    """Minus the distances (T, Q, K) of the queries to the mean support feature of every class.

    Args:
        support: (T, S, D).
        labels: Classes of the support points, 0 to K - 1, (T, S) or (S,).
        query: (T, Q, D).

    Raises:
        ValueError: The shapes do not fit, or features are not finite.
    """
    return -_distance(query, _centroids(support, _one_hot(support, labels, query)))


def cosine_centroid(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
    """Cosines of the queries with the mean support feature of every class; for the rest as `nearest_centroid`."""
    return _cosine(query, _centroids(support, _one_hot(support, labels, query)))


def bd_cspn(
    support: Tensor, labels: Tensor, query: Tensor, temperature: float = 0.2, *, normalized: bool = False
) -> Tensor:
    """Prototype rectification: the queries join the class means, and are compared with these once more.

    Liu et al., "Prototype Rectification for Few-Shot Learning", ECCV 2020, arXiv 1911.10713. Every query is
    pseudo-labelled with the class whose mean has the largest cosine, and weighted by its softmax probability
    exp(-d^2 / temperature), d the distance on the unit sphere. The queries are shifted so that their mean equals that
    of the support; then the weighted means of both are the classes. It sees all the queries at once (transductive).

    Args:
        support: (T, S, D).
        labels: (T, S) or (S,).
        query: (T, Q, D).
        temperature: Temperature of the softmax.
        normalized: Scale each feature to unit length before the shift and the weighted means, as the code of ESFR's
            authors does. The class means that label the queries are those of the features as they come.

    Returns:
        Minus the distances to the rectified class means, (T, Q, K).
    """
    check_positive(temperature=temperature)
    known = _one_hot(support, labels, query)
    cosine = _cosine(query, _centroids(support, known))
    probability, best = (2 * cosine / temperature).softmax(-1).max(-1)  # |u - v|^2 = 2 - 2 cos on the unit sphere
    guessed = one_hot(best, known.shape[-1]) * probability[..., None]
    if normalized:
        support, query = normalize(support, dim=-1), normalize(query, dim=-1)
    query = query + support.mean(-2, keepdim=True) - query.mean(-2, keepdim=True)
    rectified = _centroids(torch.cat([support, query], dim=-2), torch.cat([known, guessed], dim=-2))
    return -_distance(query, rectified)


def _one_hot(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
    """Checks shapes and features, and turns labels into (T, S, K)."""
    if support.ndim != 3 or query.ndim != 3 or query.shape[::2] != support.shape[::2]:
        raise ValueError(
            f"support (T, S, D) and query (T, Q, D) must share T and D; "
            f"got {tuple(support.shape)} and {tuple(query.shape)}"
        )
    if labels.shape not in (support.shape[:2], support.shape[1:2]):
        raise ValueError(f"labels must be {tuple(support.shape[:2])}, one per support row; got {tuple(labels.shape)}")
    check_finite(support=support, query=query)
    return one_hot(labels.long(), int(labels.max()) + 1).expand(len(support), -1, -1).to(support)


def _centroids(points: Tensor, weights: Tensor) -> Tensor:
    """Weighted means: (T, M, D) and (T, M, K) -> (T, K, D); an absent class would have the zero vector."""
    return weights.mT @ points / weights.sum(-2)[..., None].clamp_min(torch.finfo(points.dtype).tiny)


def _cosine(query: Tensor, centroids: Tensor) -> Tensor:
    return cosine_similarity(query[:, :, None], centroids[:, None], dim=-1)  # (T, Q, 1, D), (T, 1, K, D) -> (T, Q, K)


def _distance(query: Tensor, centroids: Tensor) -> Tensor:
    return torch.cdist(query, centroids, compute_mode="donot_use_mm_for_euclid_dist")
