"""Training the merging: it learns, the frozen base does not, and odd shapes and schedules are harmless."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

FAMILIES = list(tiny.FAMILIES)


@torch.enable_grad()
def train(model, images, labels, steps, lr=0.01):
    """The loss before each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def learn(family, seed):
    """Loss of relaxed and of outright merging, before and after training the embeddings from a random start.

    The labels are the frozen base's own answers, so all there is to learn is which tokens to keep apart.
    """
    torch.manual_seed(seed)
    model = tiny.merging(family, r=[6, 0], embed_dim=24).freeze_base()
    nn.init.normal_(model.merger.embed[0].weight, std=0.1)
    images = tiny.images(64)
    with torch.no_grad():
        labels = model.base(images).softmax(dim=1)
        outright = [F.cross_entropy(model.eval()(images), labels)]
        relaxed = train(model.train(), images, labels, 40, lr=0.003)
        outright.append(F.cross_entropy(model.eval()(images), labels))
    best = -(labels * labels.log()).sum(dim=1).mean()
    return torch.tensor([[relaxed[0], relaxed[-1]], outright]) - best


@pytest.mark.parametrize("family", ["class_token", "average"])
def test_the_embeddings_learn_what_to_merge(family):
    (relaxed, relaxed_after), (outright, outright_after) = sum(learn(family, seed) for seed in range(3))
    assert relaxed_after < 0.75 * relaxed
    assert outright_after < 0.97 * outright


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_base_learns_nothing_and_stays_in_evaluation_mode(family):
    model = tiny.merging(family, base_args=dict(drop_path_rate=0.5)).train().freeze_base()
    assert model.training and model.merger.training
    assert not any(module.training for module in model.base.modules())
    before = {name: value.clone() for name, value in model.base.state_dict().items()}
    embeddings = [embed.weight.clone() for embed in model.merger.embed]
    train(model, tiny.images(), torch.arange(3), 2)
    assert all(parameter.grad is None for parameter in model.base.parameters())
    torch.testing.assert_close(dict(model.base.state_dict()), before, atol=0, rtol=0)
    assert not torch.equal(model.merger.embed[0].weight, embeddings[0])
    assert not any(module.training for module in model.train().base.modules())


def test_unfreezing_restores_the_bases_training():
    model = tiny.merging().train().freeze_base().freeze_base(False)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    before = model.base.blocks[0].mlp.fc1.weight.clone()
    train(model, tiny.images(), torch.arange(3), 1)
    assert not torch.equal(model.base.blocks[0].mlp.fc1.weight, before)
    assert not any(module.training for module in model.eval().modules())


@torch.no_grad()
def test_evaluation_uses_the_trained_embeddings():
    model = tiny.merging().freeze_base().train()
    images, before = tiny.images(16), model.eval()(tiny.images(16))
    for embed in model.merger.embed:
        embed.weight.normal_()
    assert not torch.allclose(model(images), before)
    model.merger.r = 0
    torch.testing.assert_close(model(images), model.base(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("r", [0, 3, 100, [100, 0, 2], [0, 3], (4, -0.5)], ids=str)
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (8, 24), (8, 8)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("training", [False, True])
def test_odd_shapes_and_schedules_give_finite_gradients(training, batch, size, r):
    model = tiny.merging("average", 3, r=r, base_args=dict(dynamic_img_size=True)).train(training)
    logits = model(torch.randn(batch, 3, *size))
    assert logits.shape == (batch, 10)
    F.cross_entropy(logits, torch.arange(batch)).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in (logits, *gradients))


@pytest.mark.parametrize("training", [False, True])
def test_equal_tokens_give_finite_gradients(training):
    model = tiny.merging("average", 3, r=6).train(training)
    with torch.no_grad():
        model.base.pos_embed.zero_()
    model(torch.zeros(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("family", ["class_token", "average", "attention_pool", "rope"])
def test_gradients_equal_finite_differences(family):
    """One merge, chosen among all pairs: there the relaxed merge is smooth and its gradient is the derivative.

    The model is in float64, matching stays in float32, so the step and the tolerance are those of float32.
    """
    model = tiny.merging(family, 2, r=[1], tau1=1.0, tau2=1.0, candidates=99).double().train()
    images, labels = tiny.images().double(), torch.arange(3)
    weight = model.merger.embed[0].weight

    def loss():
        return F.cross_entropy(model(images), labels)

    (gradient,) = torch.autograd.grad(loss(), weight)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        start, step = weight.clone(), 0.01 * weight.norm()
        weight.copy_(start + step * direction)
        ahead = loss()
        weight.copy_(start - step * direction)
    numeric = (ahead - loss().detach()) / (2 * step)
    assert gradient.norm() > 1e-5
    torch.testing.assert_close(numeric, gradient.norm(), rtol=0.02, atol=0)
