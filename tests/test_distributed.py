"""Two processes that hold parts of a batch, of different sizes, must give what one gives for the whole."""

import math

import pytest
import torch
from gloo import on_two

from timm_tokens import distributed
from timm_tokens.losses import DINOLoss, DTMLoss, IBOTPatchLoss, MIRALoss, MoBYLoss, MTELoss
from timm_tokens.ops import assignment_information, mira_assign, sinkhorn_assign

PARTS = [slice(0, 5), slice(5, 12)]
BETAS = [0.0, 0.75, 0.95, 0.995]


def batch():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    logits = 2 * draw(12, 20)
    logits[3:, 4] -= 200  # underflows in the second process alone
    return {
        "logits": logits,
        "views": draw(3, 12, 20),
        "student": draw(12, 16, 4),
        "teacher": draw(12, 16, 4),
        "mask": torch.rand(12, 16, generator=generator) < 0.4,
    }


def outcome(part):
    """All that depends on the batch; what is per sample is cut to part, what is not is the same everywhere."""
    data = {name: x[:, part] if name == "views" else x[part] for name, x in batch().items()}
    out = {f"assign {beta}": mira_assign(data["logits"], 0.2, beta) for beta in BETAS}
    out["sinkhorn"] = sinkhorn_assign(data["logits"], 0.5)
    out["information"] = torch.stack(assignment_information(out["assign 0.75"]))
    views = data["views"].clone().requires_grad_()
    terms = MIRALoss()(views, data["views"][:2] + 0.1)
    out["mira gradient"] = torch.autograd.grad(terms.loss, views)[0]
    out["mira loss"], out["mira information"] = terms.loss.detach(), torch.stack(terms[1:])
    for name, mask in [("dtm", None), ("dtm masked", data["mask"])]:
        student = data["student"].clone().requires_grad_()
        loss = DTMLoss()(student, data["teacher"], mask, schedules=[[4, 2], [7]])
        out[f"{name} gradient"], out[f"{name} loss"] = torch.autograd.grad(loss, student)[0], loss.detach()
    return out | view_losses(part)


def view_losses(part):
    """The losses between views after two steps, with their centres and queues."""
    generator, out = torch.Generator().manual_seed(1), {}
    mte, moby = MTELoss(DINOLoss(20, num_tokens=3)), MTELoss(MoBYLoss(20, 30))
    ibot = IBOTPatchLoss(20)
    for step in range(2):
        student, teacher = torch.randn(2, 2, 12, 3, 20, generator=generator)
        mask = torch.rand(2, 12, 3, generator=generator) < 0.4
        mask[:, 5:] &= step > 0  # in the first step the second process has nothing masked
        student.requires_grad_()
        views, targets, masks = student[:, part], teacher[:, part], mask[:, part]
        equal = slice(part.start, min(part.stop or 12, 10))  # all processes must give the queue as many keys
        losses = {
            "mte": (terms := mte(views, targets)).loss,
            "moby": moby(student[:, equal], teacher[:, equal]).loss,
            "ibot": ibot(views, targets, masks),
            "ibot rows": ibot([v[m] for v, m in zip(views, masks, strict=True)], targets, masks),
        }
        for name, loss in losses.items():
            out[f"{name} loss"], out[f"{name} gradient"] = loss.detach(), torch.autograd.grad(loss, student)[0]
    out["watched"] = torch.stack(terms[2:])
    out["centre"], out["patch centre"], out["queue"] = mte.baseline.center.value, ibot.center.value, moby.baseline.queue
    return out


def work(rank, folder):
    x = torch.tensor([1.0, -2.0]) * (rank + 1)
    out = outcome(PARTS[rank])
    out["size"] = torch.tensor(distributed.world_size())
    out["sum"], out["max"] = distributed.all_reduce_sum(x), distributed.all_reduce_max(x)
    out["mean"], out["batch mean"] = distributed.all_reduce_mean(x), distributed.batch_mean(x[: rank + 1])
    out["logmeanexp"] = distributed.batch_logmeanexp(1000 * x[: rank + 1])
    out["input"] = x
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return on_two(work, tmp_path_factory.mktemp("gloo"))


@pytest.fixture(scope="module")
def one():
    return outcome(slice(None))


@pytest.mark.parametrize("name", [*(f"assign {beta}" for beta in BETAS), "sinkhorn"])
def test_assignment(one, two, name):
    joined = torch.cat([out[name] for out in two])
    torch.testing.assert_close(joined, one[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["information", "mira information"])
def test_information(one, two, name):
    for out in two:
        torch.testing.assert_close(out[name], one[name])


@pytest.mark.parametrize(("name", "dim"), [("mira", 1), ("dtm", 0), ("dtm masked", 0)])
def test_losses_and_gradients(one, two, name, dim):
    average = (two[0][f"{name} loss"] + two[1][f"{name} loss"]) / 2
    torch.testing.assert_close(average, one[f"{name} loss"])
    joined = torch.cat([out[f"{name} gradient"] for out in two], dim) / 2  # as DistributedDataParallel averages
    torch.testing.assert_close(joined, one[f"{name} gradient"], atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("name", ["mte", "moby", "ibot", "ibot rows"])
def test_losses_between_views(one, two, name):
    """Each process has the gradients of its own samples, the others' are 0."""
    for what in ("loss", "gradient"):
        average = (two[0][f"{name} {what}"] + two[1][f"{name} {what}"]) / 2
        torch.testing.assert_close(average, one[f"{name} {what}"], atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("name", ["watched", "centre", "patch centre", "queue"])
def test_state_of_the_losses_between_views(one, two, name):
    for out in two:
        torch.testing.assert_close(out[name], one[name])


def test_reductions(two):
    expected = {"size": 2, "sum": [3.0, -6.0], "mean": [1.5, -3.0], "max": [2.0, -2.0], "batch mean": -1 / 3}
    expected["logmeanexp"] = 2000 - math.log(3)  # exp(2000) overflows
    for rank, out in enumerate(two):
        for name, value in expected.items():
            torch.testing.assert_close(out[name], torch.tensor(value))
        assert out["input"].tolist() == [1.0 * (rank + 1), -2.0 * (rank + 1)]  # not reduced in place


def test_one_process():
    x = torch.randn(3, 2, requires_grad=True)
    assert distributed.world_size() == 1
    for reduce in (distributed.all_reduce_sum, distributed.all_reduce_mean, distributed.all_reduce_max):
        assert torch.equal(reduce(x), x) and not reduce(x).requires_grad
    assert torch.equal(distributed.batch_mean(x), x.mean(0))
