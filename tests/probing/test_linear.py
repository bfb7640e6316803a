"""The linear probe: against torch's own SGD, one learning rate at a time; and what may not leak into it."""

import pytest
import torch
from torch import nn

from timm_tokens.probing import LEARNING_RATES, linear, linear_probe


def data(count, classes=4, dim=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % classes
    return centres[labels] * 3 + 20 + 3 * torch.randn(count, dim, generator=generator), labels


def torch_sgd(x, labels, lr, epochs, size, momentum, weight_decay, seed):
    """torch.optim.SGD on nn.Linear, over the same batches."""
    net = nn.Linear(x.shape[1], int(labels.max()) + 1)
    nn.init.zeros_(net.weight), nn.init.zeros_(net.bias)
    groups = [{"params": net.weight, "weight_decay": weight_decay}, {"params": net.bias, "weight_decay": 0}]
    optimizer = torch.optim.SGD(groups, lr, momentum)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(x) // size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return net


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_learning_rates_trained_at_once_equal_torchs_one_by_one(weight_decay):
    x, labels = data(50)
    x = (x - x.mean(0)) / x.std(0)
    rates = [0.01, 0.1, 1.0]
    classifiers = linear.Classifiers(torch.zeros(10, 4), rates, momentum=0.9, weight_decay=weight_decay)
    classifiers.fit(x, labels, torch.arange(50), 5, 16, torch.Generator().manual_seed(3))
    for i, lr in enumerate(rates):
        net = torch_sgd(x, labels, lr, 5, 16, 0.9, weight_decay, seed=3)
        torch.testing.assert_close(classifiers.weight[:, i].mT, net.weight.detach(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(classifiers.bias[i], net.bias.detach(), atol=1e-5, rtol=1e-4)


def test_learns_what_is_linear_and_picks_a_rate_that_can():
    train, labels = data(400)
    test, truth = data(200, seed=1)
    # Noise that all channels share: a step of gradient descent does not cancel it, many do.
    train, test = train + 10 * torch.randn(400, 1), test + 10 * torch.randn(200, 1)
    result = linear_probe(train, labels, test, truth, epochs=60, lrs=(1e-6, 0.1))
    assert result.accuracy > 0.9 and result.lr == 0.1
    assert list(result.held_out) == [1e-6, 0.1] and result.held_out[1e-6] < 0.93 < 0.97 < result.held_out[0.1]
    assert linear_probe(train, labels, test, truth, epochs=60, lrs=(1e-6, 0.1)) == result  # repeats
    other = torch.Generator().manual_seed(5)
    assert linear_probe(train, labels, test, truth, epochs=1, lrs=LEARNING_RATES, generator=other) != result


def test_the_scored_set_decides_nothing():
    train, labels = data(200)
    test, truth = data(100, seed=1)
    honest = linear_probe(train, labels, test, truth, epochs=5)
    shuffled = linear_probe(train, labels, 100 * test, truth.roll(1), epochs=5)
    assert (shuffled.lr, shuffled.held_out) == (honest.lr, honest.held_out)
    assert shuffled.accuracy < 0.5 < honest.accuracy


def test_the_held_out_part_is_held_out():
    labels = torch.arange(100) % 2
    noise = torch.randn(100, 300)  # more channels than images: training images are always separable
    result = linear_probe(noise, labels, noise, labels, epochs=30, lrs=(0.1,), held_out=0.5)
    assert result.accuracy == 1 and result.held_out[0.1] < 0.75


def test_a_constant_channel_and_half_precision_do_no_harm():
    x, labels = data(80)
    x[:, 3] = 7
    result = linear_probe(x.half(), labels, x.half(), labels, epochs=20, batch_size=32, lrs=(0.1,))
    assert result.accuracy > 0.8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lrs": ()}, r"len\(lrs\) must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"held_out": 0.01}, "leave training features on both sides: 0.01 of 20 is 0; give more features"),
        ({"held_out": 1.0}, "1.0 of 20 is 20"),
        ({"features": torch.zeros(20, 3)}, "train_features have 10 channels, features 3"),
        ({"labels": torch.zeros(3).long()}, r"features must be \(N, D\)"),
    ],
)
def test_refuses_in_words(change, message):
    x, labels = data(20)
    arguments = {"train_features": x, "train_labels": labels, "features": x, "labels": labels}
    with pytest.raises(ValueError, match=message):
        linear_probe(**arguments | change)
