"""Few-shot classifiers against loops over episodes and classes, and their laws."""

import pytest
import torch
from torch.nn import functional as F

from timm_tokens.fewshot import bd_cspn, cosine_centroid, nearest_centroid

ALL = [nearest_centroid, cosine_centroid, bd_cspn]


def episodes(t=6, ways=4, shots=3, queries=25, dim=8, noise=1.0):
    """support (T, S, D), labels (T, S) in any order, query (T, Q, D) without order either."""
    centres = torch.randn(t, ways, dim)
    labels = torch.stack([torch.arange(ways).repeat(shots)[torch.randperm(ways * shots)] for _ in range(t)])
    truth = torch.randint(ways, (t, queries))
    support, query = (
        centres.gather(1, k[..., None].expand(-1, -1, dim)) + noise * torch.randn(*k.shape, dim)
        for k in (labels, truth)
    )
    return support, labels, query, truth


def slow(classifier, support, labels, query):
    """One episode, class by class."""
    ways = int(labels.max()) + 1
    means = torch.stack([support[labels == k].mean(0) for k in range(ways)])
    if classifier is nearest_centroid:
        return torch.stack([-(query - mean).norm(dim=1) for mean in means], 1)
    cosine = torch.stack([F.normalize(query, dim=1) @ F.normalize(mean, dim=0) for mean in means], 1)
    if classifier is cosine_centroid:
        return cosine
    distance = torch.stack([(F.normalize(query, dim=1) - F.normalize(m, dim=0)).norm(dim=1) for m in means], 1)
    probability = (-(distance**2) / 0.2).softmax(1)
    moved = query + support.mean(0) - query.mean(0)
    rectified = []
    for k in range(ways):
        mine = cosine.argmax(1) == k
        weighted = (moved[mine] * probability[mine, k, None]).sum(0) + support[labels == k].sum(0)
        rectified.append(weighted / (probability[mine, k].sum() + (labels == k).sum()))
    return torch.stack([-(moved - mean).norm(dim=1) for mean in rectified], 1)


@pytest.mark.parametrize("classifier", ALL)
@pytest.mark.parametrize(("ways", "shots", "queries"), [(2, 1, 1), (5, 1, 75), (4, 3, 30), (20, 5, 7)])
def test_equals_the_loop(classifier, ways, shots, queries):
    support, labels, query, _ = episodes(ways=ways, shots=shots, queries=queries)
    scores = classifier(support, labels, query)
    expected = torch.stack([slow(classifier, *episode) for episode in zip(support, labels, query, strict=True)])
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


def published(support, labels, query, alpha=0.2):
    """BD-CSPN step by step as the code of ESFR's authors has it (algorithm.py, with shift), one episode."""
    ways = int(labels.max()) + 1
    means = F.normalize(torch.stack([support[labels == k].mean(0) for k in range(ways)]), dim=1)
    support, query = F.normalize(support, dim=1), F.normalize(query, dim=1)
    logits = -torch.stack([(query - mean).square().sum(1) for mean in means], 1)
    pseudo = torch.cat([F.one_hot(labels, ways).float(), (logits / alpha).softmax(1)])
    query = query - query.mean(0) + support.mean(0)
    weights = F.one_hot(pseudo.argmax(1), ways) * pseudo
    rectified = weights.T @ torch.cat([support, query]) / weights.sum(0)[:, None]
    return -torch.stack([(query - mean).square().sum(1) for mean in rectified], 1)


@pytest.mark.parametrize(("ways", "shots", "queries"), [(5, 1, 75), (5, 5, 75), (3, 2, 4)])
def test_bd_cspn_of_normalised_features_is_the_published_one(ways, shots, queries):
    support, labels, query, _ = episodes(ways=ways, shots=shots, queries=queries, noise=2.0)
    scores = bd_cspn(support, labels, query, normalized=True)
    expected = torch.stack([published(*episode) for episode in zip(support, labels, query, strict=True)])
    torch.testing.assert_close(-scores.square(), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(scores, bd_cspn(support, labels, query))


@pytest.mark.parametrize("classifier", ALL)
def test_finds_clear_classes(classifier):
    support, labels, query, truth = episodes(queries=60, dim=32, noise=0.3)
    assert (classifier(support, labels, query).argmax(-1) == truth).float().mean() > 0.98


@pytest.mark.parametrize("classifier", ALL)
def test_shared_labels(classifier):
    support, labels, query, _ = episodes()
    shared = labels[0].expand_as(labels)
    torch.testing.assert_close(classifier(support, labels[0], query), classifier(support, shared, query))


@pytest.mark.parametrize("classifier", ALL)
def test_all_zero_features_score_without_nan(classifier):
    support, labels, query, _ = episodes()
    assert classifier(support * 0, labels, query * 0).isfinite().all()
    assert classifier(support, labels, query * 0).isfinite().all()


def test_bd_cspn_forgets_where_the_queries_lie_only_after_labelling_them():
    support, labels, query, truth = episodes(t=50, ways=3, shots=1, queries=90, dim=16)
    gain = [
        ((f(support, labels, query).argmax(-1) == truth).float().mean()).item() for f in (nearest_centroid, bd_cspn)
    ]
    assert gain[1] > gain[0] + 0.02  # the queries tell where the classes are


@pytest.mark.parametrize("classifier", ALL)
def test_refuses_shapes_that_do_not_fit(classifier):
    support, labels, query, _ = episodes()
    with pytest.raises(ValueError, match=r"must share T and D; got \(6, 12, 8\) and \(6, 25, 7\)"):
        classifier(support, labels, query[..., :7])
    with pytest.raises(ValueError, match=r"labels must be \(6, 12\), one per support row; got \(6, 11\)"):
        classifier(support, labels[:, :11], query)
