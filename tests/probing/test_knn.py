"""Nearest neighbours: against a vote written out, one image at a time."""

from collections import defaultdict

import pytest
import torch

from timm_tokens.probing import knn, knn_accuracy


def clusters(count, classes=6, noise=1.5, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (count,), generator=generator)
    return centres[labels] + noise * torch.randn(count, dim, generator=generator), labels


def slow(train, train_labels, features, labels, k, temperature):
    right = 0
    for x, label in zip(features, labels, strict=True):
        cosines = torch.stack([torch.cosine_similarity(x, other, dim=0) for other in train]).double()
        votes = defaultdict(float)
        for i in cosines.argsort(descending=True)[:k].tolist():
            votes[int(train_labels[i])] += float((cosines[i] / temperature).exp())
        right += max(votes, key=votes.get) == label
    return right / len(labels)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_equals_the_vote_written_out(temperature, monkeypatch):
    monkeypatch.setattr(knn, "_BUDGET", 7 * 120)  # many chunks, the last one short
    data = *clusters(120), *clusters(50, seed=1)
    got = knn_accuracy(*data, k=(1, 5, 20, 120), temperature=temperature)
    assert got == {k: pytest.approx(slow(*data, k, temperature)) for k in (1, 5, 20, 120)}
    assert len(set(got.values())) > 1 and min(got.values()) > 0.2


def test_a_sharp_temperature_does_not_overflow():
    data = *clusters(60), *clusters(40, seed=1)
    assert knn_accuracy(*data, k=(20,), temperature=1e-3)[20] == knn_accuracy(*data, k=(1,))[1]


def test_scale_and_order_change_nothing():
    train, train_labels, features, labels = *clusters(90), *clusters(40, seed=1)
    order = torch.randperm(90)
    expected = knn_accuracy(train, train_labels, features, labels, k=(10, 3))
    assert list(expected) == [10, 3]
    scaled = train * torch.rand(90, 1).add(0.1)
    assert knn_accuracy(scaled[order], train_labels[order], 5 * features, labels, k=(10, 3)) == expected


def test_classes_that_training_lacks_are_missed():
    train, labels = torch.eye(3), torch.tensor([0, 1, 2])
    assert knn_accuracy(train, labels, train, torch.tensor([0, 1, 7]), k=(1,)) == {1: pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (5, 31)}, r"k must lie in \[1, 30\], the number of training features, got \(5, 31\)"),
        ({"k": ()}, r"k must lie in \[1, 30\]"),
        ({"features": torch.zeros(4, 9)}, "train_features have 8 channels, features 9: take both from one model"),
        ({"train_labels": torch.zeros(4).long()}, r"train_features must be \(N, D\).* got \(30, 8\) and labels \(4,\)"),
        ({"labels": torch.zeros(4)}, "labels of the features must be classes from 0 up, got torch.float32"),
        ({"labels": torch.full((4,), -1)}, "classes from 0 up, got torch.int64, min -1"),
    ],
)
def test_refuses_in_words(change, message):
    train, train_labels = clusters(30)
    arguments = {"train_features": train, "train_labels": train_labels, "k": (1,)}
    arguments |= {"features": train[:4], "labels": train_labels[:4]}
    with pytest.raises(ValueError, match=message):
        knn_accuracy(**arguments | change)
