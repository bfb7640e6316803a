import math

import pytest
import torch

from timm_tokens.ops import assignment_information, mira_assign
from timm_tokens.ops.assignment import _fits_float32


def slow_assign(logits, tau, beta, iterations=30):
    """The iteration of the paper in float64 and in logarithms, where nothing under- or overflows."""
    z = logits.double() / (tau * (1 - beta))
    k = z.log_softmax(1)
    log_b = math.log(len(logits))
    u = (1 - beta) * (k.logsumexp(0) - log_b)
    for _ in range(iterations):
        row = (k - beta / (1 - beta) * u).logsumexp(1, keepdim=True)
        u = (1 - beta) * ((k - row).logsumexp(0) - log_b)
    return (k - beta / (1 - beta) * u).softmax(1)


def objective(w, logits, tau, beta):
    """What MIRA maximises: closeness to the softmax, and mutual information."""
    divergence = (w * (w.clamp_min(1e-30).log() - (logits.double() / tau).log_softmax(1))).sum(1).mean()
    return beta * assignment_information(w).mutual_information - divergence


@pytest.mark.parametrize("beta", [0.0, 0.3, 2 / 3, 0.75, 0.85, 0.9, 0.99])
@pytest.mark.parametrize(("b", "k"), [(1, 5), (8, 1), (16, 7), (7, 40), (64, 300)])
def test_equals_the_slow_form(b, k, beta):
    # Logits are divided by tau (1 - beta), and float32 rounds the larger ones more; each iteration adds to the error.
    atol = 5e-6 if beta <= 0.9 else 5e-3
    for scale in (0.1, 1, 5):
        logits = scale * torch.randn(b, k)
        expected = slow_assign(logits, 0.225, beta).float()
        torch.testing.assert_close(mira_assign(logits, 0.225, beta), expected, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_few_iterations(iterations):
    logits = torch.randn(12, 6)
    torch.testing.assert_close(
        mira_assign(logits, 0.2, 0.7, iterations), slow_assign(logits, 0.2, 0.7, iterations).float()
    )


def test_golden(golden):
    golden = golden("mira")
    for case in "012":
        tau, beta, iterations = (golden[f"{case}.{name}"].item() for name in ("tau", "beta", "iterations"))
        assignment = mira_assign(golden[f"{case}.logits"], tau, beta, iterations)
        torch.testing.assert_close(assignment, golden[f"{case}.assignment"], atol=1e-6, rtol=0)


def test_beta_zero_is_the_softmax():
    logits = torch.randn(9, 11)
    torch.testing.assert_close(mira_assign(logits, 0.3, 0.0), (logits / 0.3).softmax(1))


@pytest.mark.parametrize("beta", [0.5, 0.95])
def test_no_other_assignment_is_better(beta):
    logits = torch.randn(10, 6, dtype=torch.float64)
    best = mira_assign(logits, 0.5, beta, iterations=1000)
    value = objective(best, logits, 0.5, beta)
    for _ in range(50):
        other = (best.log() + 0.1 * torch.randn_like(best)).softmax(1)
        assert objective(other, logits, 0.5, beta) < value


def test_more_beta_more_information():
    logits = torch.randn(40, 10) + torch.linspace(0, 3, 10)
    information = [assignment_information(mira_assign(logits, 1.0, beta)) for beta in (0.0, 0.3, 0.6, 0.9)]
    values = [float(i.mutual_information) for i in information]
    assert values == sorted(values) and values[-1] > 2 * values[0]


EXTREMES = {
    "huge": lambda: 1e4 * torch.randn(16, 50),
    "all of float32": lambda: torch.rand(16, 50).sub(0.5).sign() * torch.finfo(torch.float32).max,
    "tiny": lambda: 1e-30 * torch.randn(16, 50),
    "subnormal": lambda: 1e-42 * torch.randn(16, 50),
    "equal": lambda: torch.zeros(16, 50),
    "unused": lambda: torch.randn(16, 50) - 1e4 * (torch.arange(50) > 25),
    "unused beyond float32": lambda: torch.randn(16, 50) - torch.finfo(torch.float32).max * (torch.arange(50) > 25),
    "one for all": lambda: torch.randn(16, 50) + 1e6 * (torch.arange(50) == 3),
    "one sample": lambda: 1e3 * torch.randn(1, 50),
    "one dissenter": lambda: 30 * torch.eye(1024, 40).roll(1, 0).sub(torch.eye(40)[0] * -1),
}


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.75, 0.87, 0.9, 0.999])
@pytest.mark.parametrize("tau", [1e-6, 0.225, 1e6])
@pytest.mark.parametrize("name", EXTREMES)
def test_finite_for_any_logits(name, tau, beta):
    logits = EXTREMES[name]()
    assignment = mira_assign(logits, tau, beta)
    assert assignment.isfinite().all() and (assignment >= 0).all()
    torch.testing.assert_close(assignment.sum(1), torch.ones(len(logits)))


@pytest.mark.parametrize("beta", [0.75, 0.86, 0.95])
def test_a_prototype_that_underflows_everywhere_is_not_lost(beta):
    logits = torch.randn(32, 8)
    logits[:, 5:] -= 10.0  # exp(-10 / (0.225 * 0.25)) is far below float32; its share of the labels is not
    expected = slow_assign(logits, 0.225, beta)
    assert expected[:, 5:].max() > 1e-20
    torch.testing.assert_close(mira_assign(logits, 0.225, beta).double(), expected, atol=1e-25, rtol=2e-3)


def test_the_bound_of_float32_holds_where_it_is_reached():
    """One prototype takes all samples but one: weights spread the most. Just within the bound, the answer is exact."""
    logits = torch.zeros(1024, 64)
    logits[:, 0] = 20.0
    logits[0, 0], logits[0, 1] = 0.0, 20.0
    betas = [beta / 100 for beta in range(100) if _fits_float32(beta / 100, 64)]
    assert 0.8 < betas[-1] < 0.95
    expected = slow_assign(logits, 0.225, betas[-1], 60).float()
    torch.testing.assert_close(mira_assign(logits, 0.225, betas[-1], 60), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    logits = torch.randn(16, 30).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assignment = mira_assign(logits, 0.225, 0.75)
    assert assignment.dtype == torch.float32
    assert torch.equal(assignment, mira_assign(logits.float(), 0.225, 0.75))


def test_the_logits_are_left_alone_and_get_no_gradient():
    logits = torch.randn(8, 5, requires_grad=True)
    before = logits.detach().clone()
    assert not mira_assign(logits, 0.2, 0.75).requires_grad
    assert torch.equal(logits, before)


def test_information_of_known_assignments():
    certain = assignment_information(torch.eye(4))  # each sample its own prototype
    assert [v.item() for v in certain] == pytest.approx([0, math.log(4), math.log(4)], abs=1e-6)
    collapsed = assignment_information(torch.eye(4)[:1].expand(6, 4))
    assert [v.item() for v in collapsed] == [0, 0, 0]
    undecided = assignment_information(torch.full((6, 4), 0.25))
    assert [v.item() for v in undecided] == pytest.approx([math.log(4), math.log(4), 0], abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"beta": 1.0}, ValueError, r"beta must be in \[0, 1\), got 1.0"),
        ({"beta": -0.1}, ValueError, r"got -0\.1"),
        ({"beta": math.nan}, ValueError, "got nan"),
        ({"tau": 0.0}, ValueError, "tau must be a positive number.*got tau=0.0"),
        ({"tau": -1.0}, ValueError, "got tau=-1.0"),
        ({"tau": math.nan}, ValueError, "got tau=nan"),
        ({"iterations": -1}, ValueError, "must not be negative, got -1"),
        ({"iterations": 2.5}, TypeError, r"must be an int, got 2\.5"),
        ({"logits": torch.zeros(3)}, ValueError, r"\(B, K\), got \(3,\)"),
        ({"logits": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, r"floating-point, got torch\.int64"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        mira_assign(**{"logits": torch.randn(4, 3), "tau": 0.2, "beta": 0.5, **arguments})


@pytest.mark.parametrize("beta", [0.75, 0.95])
def test_compiles_without_breaks(beta):
    compiled = torch.compile(mira_assign, fullgraph=True, backend="aot_eager")
    logits = torch.randn(16, 6)
    torch.testing.assert_close(compiled(logits, 0.2, beta, 3), mira_assign(logits, 0.2, beta, 3))
