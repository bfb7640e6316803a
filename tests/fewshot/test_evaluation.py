"""Comparisons with and without ESFR."""

import pytest
import torch

from timm_tokens.fewshot import ESFR, bd_cspn, compare, prepare, sample_episodes
from timm_tokens.fewshot.evaluation import interval


def collection():
    labels = torch.arange(6).repeat_interleave(20)
    return torch.randn(6, 16)[labels] + 0.8 * torch.randn(120, 16), labels


def test_interval_is_1_96_standard_errors():
    values = torch.randn(50, dtype=torch.double)
    mean, half_width = interval(values)
    assert mean == pytest.approx(values.mean().item())
    assert half_width == pytest.approx(1.96 * values.std().item() / 50**0.5)
    assert str(interval(torch.tensor([0.5, 0.7]))) == "60.00 ± 19.60"


def test_compare_equals_one_episode_after_the_other():
    features, labels = collection()
    esfr = ESFR(num_nets=2, max_updates=4, chunk_size=3)
    setting = {"ways": 3, "shots": 2, "queries": 6, "episodes": 7}
    (result,) = compare(
        features, labels, classifiers=["bd_cspn"], esfr=esfr, generator=torch.Generator().manual_seed(1), **setting
    )
    generator = torch.Generator().manual_seed(1)
    episodes = sample_episodes(labels, generator=generator, **setting)
    plain, adapted = [], []
    for i in range(7):
        points = features[torch.cat([episodes.support[i], episodes.query[i]])][None]
        both = prepare(points, 6), esfr.adapt(points, support=6, generator=generator).features
        for x, accuracies in zip(both, (plain, adapted), strict=True):
            guess = bd_cspn(x[:, :6], episodes.support_labels[i], x[:, 6:]).argmax(-1)[0]
            accuracies.append((guess == episodes.query_labels[i]).double().mean())
    plain, adapted = torch.stack(plain), torch.stack(adapted)
    assert (result.shots, result.classifier) == (2, "bd_cspn")
    assert result.plain == pytest.approx(interval(plain))
    assert result.adapted == pytest.approx(interval(adapted))
    assert result.gain == pytest.approx(interval(adapted - plain))


def test_compare_reports_progress_block_by_block():
    features, labels = collection()
    seen = []
    esfr = ESFR(num_nets=1, max_updates=1, chunk_size=2)
    results = compare(
        features,
        labels,
        ways=2,
        queries=3,
        episodes=5,
        esfr=esfr,
        progress=lambda blocks: seen.append(len(blocks)) or blocks,
    )
    assert seen == [3]
    assert [r.classifier for r in results] == ["nearest_centroid", "cosine_centroid", "bd_cspn"]
