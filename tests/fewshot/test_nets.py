"""The networks with a written-out gradient against autograd and plain modules."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from timm_tokens.fewshot.nets import Nets, close_gaps, reconstruction_gradient, unit


class PublishedAdam:
    """Adam with epsilon before the bias correction, from its formulas."""

    def __init__(self, params):
        self.params = list(params)
        self.state = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.params]
        self.t = 0

    @torch.no_grad()
    def step(self):
        self.t += 1
        rate = 1e-3 * (1 - 0.999**self.t) ** 0.5 / (1 - 0.9**self.t)
        for p, (mean, square) in zip(self.params, self.state, strict=True):
            mean.mul_(0.9).add_(p.grad, alpha=0.1)
            square.mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
            p -= rate * mean / (square.sqrt() + 1e-7)
            p.grad = None


def plain_training(weights, inputs, target, updates, labels=None, label_weight=0.0):
    """One network of nn.Linear layers trained by autograd; returns its modules."""
    dim = inputs.shape[-1]
    net = nn.Sequential(*[m for _ in weights for m in (nn.Linear(dim, dim), nn.ReLU())]).to(inputs.dtype)
    head = nn.Linear(dim, 3).to(inputs.dtype)
    for parameter in (*head.parameters(), *(layer.bias for layer in net[::2])):
        nn.init.zeros_(parameter)
    for layer, weight in zip(net[::2], weights, strict=True):
        layer.weight.data.copy_(weight)
    optimizer = PublishedAdam([*net.parameters(), *(head.parameters() if labels is not None else ())])
    for _ in range(updates):
        output = net(inputs)
        loss = -F.cosine_similarity(target, output - output.mean(0), dim=-1).mean()
        if labels is not None:
            loss = loss + label_weight * F.cross_entropy(head(output[: len(labels)]), labels)
        loss.backward()
        optimizer.step()
    return net, head


def test_gradient_of_the_loss_is_that_of_autograd():
    output = torch.rand(3, 20, 8, dtype=torch.float64, requires_grad=True)
    target = unit(torch.randn(3, 20, 8, dtype=torch.float64))
    loss = -F.cosine_similarity(target, output - output.mean(1, keepdim=True), dim=-1).mean(1).sum()
    expected = torch.autograd.grad(loss, output)[0]
    torch.testing.assert_close(reconstruction_gradient(output.detach(), target), expected)


def test_gradient_stays_finite_where_there_is_nothing_to_reconstruct():
    zero = torch.zeros(1, 5, 4)
    assert reconstruction_gradient(zero, zero).eq(0).all()
    assert reconstruction_gradient(torch.rand(1, 1, 4).expand(1, 5, 4), unit(torch.randn(1, 5, 4))).isfinite().all()


@pytest.mark.parametrize("label_weight", [0.0, 0.7])
def test_training_equals_plain_modules(label_weight):
    # float64: in float32 two right answers drift apart, because a ReLU at the edge of firing remembers rounding.
    n, m, dim, updates = 3, 12, 10, 12
    weights = [torch.randn(n, dim, dim, dtype=torch.float64) / 3 for _ in range(4)]
    target = unit(torch.randn(n, m, dim, dtype=torch.float64))
    inputs = target + 0.1 * torch.randn(n, m, dim, dtype=torch.float64)
    labels = torch.randint(3, (n, 6)) if label_weight else torch.empty(n, 0, dtype=torch.long)
    nets = Nets([w.clone() for w in weights], m, ways=3 if label_weight else 0)
    for _ in range(updates):
        nets.update(inputs, target, labels, label_weight)
    for i in range(n):
        known = labels[i] if label_weight else None
        net, head = plain_training([w[i] for w in weights], inputs[i], target[i], updates, known, label_weight)
        for layer, weight, bias in zip(net[::2], nets.weights, nets.biases, strict=False):
            torch.testing.assert_close(weight[i], layer.weight.data, atol=1e-6, rtol=0)
            torch.testing.assert_close(bias[i, 0], layer.bias.data, atol=1e-6, rtol=0)
        if label_weight:
            torch.testing.assert_close(nets.weights[4][i], head.weight.data, atol=1e-6, rtol=0)
            torch.testing.assert_close(nets.biases[4][i, 0], head.bias.data, atol=1e-6, rtol=0)
            assert head.weight.abs().max() > 1e-3  # it was trained


def test_dropping_networks_leaves_the_others_as_they_were():
    weights = [torch.randn(6, 4, 4) for _ in range(4)]
    target, labels = unit(torch.randn(6, 9, 4)), torch.empty(6, 0, dtype=torch.long)
    whole, part = (Nets([w.clone() for w in weights], 9) for _ in range(2))
    order = torch.arange(6)
    for nets in (whole, part):
        nets.update(target, target, labels, 0.0)
    holes, movers = torch.tensor([0, 2]), torch.tensor([4, 5])
    part.drop(holes, movers, 4)
    order = close_gaps(order, holes, movers, 4)
    assert order.tolist() == [4, 1, 5, 3]
    whole.update(target, target, labels, 0.0)
    part.update(target[order], target[order], labels[:4], 0.0)
    torch.testing.assert_close(part.forward(target[order]), whole.forward(target)[order])
    torch.testing.assert_close(
        part.forward(target[order][:1], nets=torch.tensor([2])),
        whole.forward(target[order][:1], nets=torch.tensor([5])),
    )


@pytest.mark.parametrize("label_weight", [0.0, 0.5])
def test_rounding_errors_do_not_become_biases(label_weight):
    """A bias that moves an output on all points alike has the classifier's gradient alone, or exactly none."""
    weights = [torch.eye(16)[None] + 0.01 * torch.rand(1, 16, 16) for _ in range(4)]
    nets = Nets(weights, 9, ways=3 if label_weight else 0)
    inputs, target, labels = torch.rand(1, 9, 16) + 1, unit(torch.randn(1, 9, 16)), torch.arange(3)[None]
    silent = 5  # at some of the points
    nets.biases[3][..., silent] = -nets.forward(inputs)[..., silent].median()
    start = nets.biases[3].clone()
    for _ in range(3):
        nets.update(inputs, target, labels if label_weight else labels[:, :0], label_weight)
    moved = (nets.biases[3] != start).flatten()
    assert moved[silent]  # a gradient like any other
    assert moved.sum() == (16 if label_weight else 1)
