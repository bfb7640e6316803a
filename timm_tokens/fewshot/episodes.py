"""Few-shot episodes: which labelled images to learn from, and which to classify."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Episodes(NamedTuple):
    """T episodes as indices into the collection, so that `features[episodes.support]` is (T, S, D).

    support (T, S) and query (T, Q) are the indices, support_labels and query_labels the classes within the episode
    (0 to K - 1), classes (T, K) what these stand for in the collection. Support rows are in the order of their classes,
    and so are the queries.
    """

    support: Tensor
    query: Tensor
    support_labels: Tensor
    query_labels: Tensor
    classes: Tensor


def sample_episodes(
    labels: Tensor | Sequence[int] | Any,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    episodes: int = 1000,
    *,
    dirichlet: int | None = None,
    generator: torch.Generator | None = None,
) -> Episodes:
    """Draws episodes: K classes, for each of them labelled images and others to classify, no image twice.

    Args:
        labels: The class of every image, (N,), or a dataset of timm or torchvision that knows them.
        ways: K, classes in an episode.
        shots: Labelled images per class.
        queries: Images to classify per class.
        episodes: T.
        dirichlet: None for the same number of queries in every class. Otherwise the ways * queries queries of
            an episode follow class shares from a symmetric Dirichlet distribution with this whole concentration (2 in
            Veilleux et al., NeurIPS 2021, arXiv 2204.11181); a class may have none.
        generator: Source of the randomness (on the CPU); None: torch's default one.

    Returns:
        `Episodes`, on the CPU.

    Raises:
        ValueError: a number is too small, or there are fewer than `ways` classes with enough images.
        TypeError: The dataset does not tell its labels.
    """
    for name, value in {"ways": ways, "shots": shots, "queries": queries, "episodes": episodes}.items():
        if value < 1:
            raise ValueError(f"{name} = {value} must be at least 1")
    if dirichlet is not None and dirichlet < 1:
        raise ValueError(f"dirichlet = {dirichlet} must be a whole number from 1, or None for balanced queries")
    members = _members(_labels(labels), ways, shots + queries)
    draw = [_draw(members, ways, shots, queries, dirichlet, generator) for _ in range(episodes)]
    support, query, query_labels, classes = (torch.stack(parts) for parts in zip(*draw, strict=True))
    support_labels = torch.arange(ways).repeat_interleave(shots).expand(episodes, -1)
    return Episodes(support, query, support_labels, query_labels, classes)


def _labels(source: Any) -> Tensor:
    """Labels as (N,), from themselves or from a dataset, without opening an image."""
    source = getattr(source, "reader", source)  # of timm's ImageDataset
    if hasattr(source, "targets"):  # torchvision's datasets
        source = source.targets
    elif hasattr(source, "samples"):  # ImageFolder and timm's reader
        source = [label for _, label in source.samples]
    try:
        return torch.as_tensor(source).long()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"cannot read class labels from {type(source).__name__}: pass one integer per image, or a dataset with "
            "`targets`, `samples` or a timm reader"
        ) from error


def _members(labels: Tensor, ways: int, needed: int) -> dict[int, Tensor]:
    """The images of every class that has enough of them, by class."""
    sizes = {k: int(n) for k, n in zip(*(t.tolist() for t in labels.unique(return_counts=True)), strict=True)}
    members = {k: (labels == k).nonzero().squeeze(1) for k, size in sizes.items() if size >= needed}
    if len(members) < ways:
        raise ValueError(
            f"{len(members)} of {len(sizes)} classes have the {needed} images that shots + queries take, and an "
            f"episode has ways = {ways}: lower one of the three (class sizes: {sorted(sizes.values())[:8]} and up)"
        )
    return members


def _draw(
    members: dict[int, Tensor],
    ways: int,
    shots: int,
    queries: int,
    dirichlet: int | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One episode: support (S,), query (Q,), labels of the query (Q,), classes (K,)."""
    names = torch.tensor(list(members))
    classes = names[torch.randperm(len(names), generator=generator)[:ways]]
    pools = [members[k] for k in classes.tolist()]
    pools = [pool[torch.randperm(len(pool), generator=generator)] for pool in pools]
    support = torch.cat([pool[:shots] for pool in pools])
    rest = [pool[shots:] for pool in pools]
    counts = [queries] * ways if dirichlet is None else _unbalanced(rest, queries, dirichlet, generator)
    query = torch.cat([pool[:count] for pool, count in zip(rest, counts, strict=True)])
    return support, query, torch.arange(ways).repeat_interleave(torch.tensor(counts)), classes


def _unbalanced(rest: list[Tensor], queries: int, dirichlet: int, generator: torch.Generator | None) -> list[int]:
    """How many queries every class has, none more than it has images left.

    Weighted sampling of images without replacement, by the largest log weight + Gumbel noise (Efraimidis & Spirakis,
    2006): of every class as its share says, and where a class runs out the others fill up.
    """
    ways = len(rest)
    share = torch.empty(ways, dirichlet).exponential_(generator=generator).sum(1)  # Gamma(dirichlet); the scale is free
    sizes = torch.tensor([len(pool) for pool in rest])
    log_weight = (share / sizes).log().repeat_interleave(sizes)
    gumbel = -torch.empty_like(log_weight).exponential_(generator=generator).log()
    chosen = (log_weight + gumbel).topk(ways * queries).indices
    return torch.arange(ways).repeat_interleave(sizes)[chosen].bincount(minlength=ways).tolist()
