"""Episodes: what they contain, from what they are drawn, and how they are seeded."""

from types import SimpleNamespace

import pytest
import torch

from timm_tokens.fewshot import sample_episodes

LABELS = torch.arange(8).repeat_interleave(torch.tensor([30, 25, 40, 22, 21, 20, 19, 60]))[torch.randperm(237)] * 3


def draw(seed=0, **arguments):
    arguments = {"ways": 5, "shots": 2, "queries": 18, "episodes": 40} | arguments
    return sample_episodes(LABELS, generator=torch.Generator().manual_seed(seed), **arguments)


@pytest.mark.parametrize("dirichlet", [None, 1, 2])
def test_labels_are_those_of_the_images_and_no_image_comes_twice(dirichlet):
    episodes = draw(dirichlet=dirichlet)
    assert episodes.support.shape == (40, 10) and episodes.query.shape == (40, 90)
    assert LABELS[episodes.support].equal(episodes.classes.gather(1, episodes.support_labels))
    assert LABELS[episodes.query].equal(episodes.classes.gather(1, episodes.query_labels))
    assert episodes.support_labels.eq(torch.arange(5).repeat_interleave(2)).all()
    for support, query, classes in zip(episodes.support, episodes.query, episodes.classes, strict=True):
        assert len(torch.cat([support, query]).unique()) == 100
        assert len(classes.unique()) == 5


def test_balanced_queries():
    assert draw().query_labels.eq(torch.arange(5).repeat_interleave(18)).all()


def test_unbalanced_queries_follow_a_dirichlet_distribution():
    labels = torch.arange(4).repeat_interleave(500)
    generator = torch.Generator().manual_seed(0)
    episodes = sample_episodes(labels, 4, 1, 25, 800, dirichlet=2, generator=generator)
    shares = torch.nn.functional.one_hot(episodes.query_labels).double().mean(1)  # (T, K)
    assert shares.sum(1).allclose(torch.ones(800, dtype=torch.double))
    assert shares.mean(0).tolist() == pytest.approx([0.25] * 4, abs=0.02)
    # variance of a Dirichlet(2, 2, 2, 2) share, 1/48, and of a multinomial draw of 100 from it
    assert shares.var().item() == pytest.approx(1 / 48 + (3 / 16 - 1 / 48) / 100, rel=0.1)


def test_unbalanced_queries_never_ask_for_more_images_than_there_are():
    episodes = sample_episodes(torch.arange(3).repeat_interleave(11), 3, 1, 10, 20, dirichlet=1)
    assert episodes.query_labels.eq(torch.arange(3).repeat_interleave(10)).all()  # every image is needed


def test_small_classes_are_left_out():
    assert 18 not in draw().classes  # class 6 has 19 images, of 20 that an episode takes
    assert set(draw().classes.unique().tolist()) == {0, 3, 6, 9, 12, 15, 21}


def test_seed_decides():
    same, other = draw(1), draw(2)
    assert all(a.equal(b) for a, b in zip(draw(1), same, strict=True))
    assert not same.query.equal(other.query)
    assert not same.query[0].equal(same.query[1])


@pytest.mark.parametrize(
    "source",
    [
        LABELS.tolist(),
        LABELS.numpy(),
        SimpleNamespace(targets=LABELS.tolist()),
        SimpleNamespace(samples=[(f"{i}.jpg", k) for i, k in enumerate(LABELS.tolist())]),
        SimpleNamespace(reader=SimpleNamespace(samples=[(f"{i}.jpg", k) for i, k in enumerate(LABELS.tolist())])),
    ],
)
def test_labels_from_lists_and_datasets(source):
    episodes = sample_episodes(source, 5, 2, 18, 40, generator=torch.Generator().manual_seed(0))
    assert episodes.query.equal(draw().query)


def test_indexes_features():
    episodes = draw()
    features = torch.randn(237, 6)
    assert features[episodes.support].shape == (40, 10, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ways": 0}, "ways = 0 must be at least 1"),
        ({"shots": 0}, "shots = 0 must be at least 1"),
        ({"queries": 0}, "queries = 0 must be at least 1"),
        ({"episodes": 0}, "episodes = 0 must be at least 1"),
        ({"dirichlet": 0}, "dirichlet = 0 must be a whole number from 1"),
        ({"queries": 30}, "2 of 8 classes have the 32 images .* ways = 5"),
    ],
)
def test_refuses_what_cannot_be_drawn(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(**arguments)


def test_refuses_a_dataset_without_labels():
    with pytest.raises(TypeError, match="cannot read class labels from object"):
        sample_episodes(object())


def test_every_image_has_its_turn():
    episodes = draw(ways=2, shots=1, queries=1, episodes=2000)
    assert len(episodes.support.unique()) == len(episodes.query.unique()) == 237


def test_unbalanced_queries_do_not_favour_large_classes():
    labels = torch.arange(2).repeat_interleave(torch.tensor([400, 4000]))
    generator = torch.Generator().manual_seed(0)
    episodes = sample_episodes(labels, 2, 1, 10, 400, dirichlet=2, generator=generator)
    large = episodes.classes.gather(1, episodes.query_labels).double().mean().item()
    assert large == pytest.approx(0.5, abs=0.04)
