import pytest
import torch
import torch.nn.functional as F

from timm_tokens.losses import DTMLoss
from timm_tokens.losses.dtm import DISTANCES
from timm_tokens.ops import kmeans_groups, morph, morph_groups

SLOW_DISTANCES = {
    "smooth_l1": lambda u, v: F.smooth_l1_loss(u, v, beta=2.0, reduction="none").mean(2),
    "cosine": lambda u, v: 1 - (F.normalize(u, dim=2) * F.normalize(v, dim=2)).sum(2),
    "l1": lambda u, v: (u - v).abs().mean(2),
    "l2": lambda u, v: ((u - v) ** 2).mean(2),
}


def slow_loss(student, teacher, schedules, distance, mask=None, prefix=0):
    """By the definition: both sides are morphed to all N tokens, and compared token by token."""
    losses = []
    for rounds in schedules:
        groups = morph_groups(teacher, rounds, num_prefix_tokens=prefix)
        tokens = SLOW_DISTANCES[distance](morph(student, groups), morph(teacher, groups))
        losses.append(tokens.mean() if mask is None else tokens[mask].mean())
    return sum(losses) / len(losses)


def dtm_loss(student, teacher, schedules, mask=None, **options):
    return DTMLoss(**options)(student, teacher, mask, schedules=schedules)


def loss_and_gradient(loss, student, *args, **kwargs):
    student = student.clone().requires_grad_()
    value = loss(student, *args, **kwargs)
    return value.detach(), *torch.autograd.grad(value, student)


@pytest.mark.parametrize(("distance", "name"), [("smooth_l1", "smoothl1"), ("cosine", "negcosine")])
@pytest.mark.parametrize("case", "012")
def test_golden(golden, case, distance, name):
    golden = golden("dtm")
    merged, counts = golden[f"{case}.r"].tolist(), golden[f"{case}.iterations"].tolist()
    schedules = [[r] * count for r, count in zip(merged, counts, strict=True)]
    criterion = DTMLoss(distance, num_prefix_tokens=1)
    value, gradient = loss_and_gradient(
        criterion, golden[f"{case}.online"], golden[f"{case}.target"], schedules=schedules
    )
    torch.testing.assert_close(value, golden[f"{case}.{name}"], atol=1e-5, rtol=0)
    torch.testing.assert_close(gradient, golden[f"{case}.{name}.grad"], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("schedules", [[[]], [[3, 3]], [[8, 4, 2], [0], [1] * 9]])
@pytest.mark.parametrize("distance", DISTANCES)
def test_equals_the_slow_form(distance, schedules, prefix, masked):
    student, teacher = 3 * torch.randn(2, 20, 6), 3 * torch.randn(2, 20, 6)
    mask = torch.rand(2, 20) < 0.4 if masked else None
    fast = loss_and_gradient(
        dtm_loss, student, teacher, schedules, distance=distance, mask=mask, num_prefix_tokens=prefix
    )
    slow = loss_and_gradient(slow_loss, student, teacher, schedules, distance, mask, prefix)
    torch.testing.assert_close(fast, slow)


def test_without_rounds_it_compares_tokens_and_with_one_group_images():
    student, teacher = torch.randn(3, 16, 5), torch.randn(3, 16, 5)
    criterion = DTMLoss("l2")
    torch.testing.assert_close(criterion(student, teacher, schedules=[[]]), F.mse_loss(student, teacher))
    torch.testing.assert_close(
        criterion(student, teacher, schedules=[[8, 4, 2, 1]]), F.mse_loss(student.mean(1), teacher.mean(1))
    )


@pytest.mark.parametrize("rounds", [(), [3, 2]])
def test_fixed_rounds_are_a_schedule(rounds):
    student, teacher = torch.randn(2, 9, 4), torch.randn(2, 9, 4)
    criterion = DTMLoss(rounds=rounds)
    assert criterion(student, teacher) == criterion(student, teacher, schedules=[rounds])
    with pytest.raises(ValueError, match=r"rounds\[0\] = 5.*half"):
        DTMLoss(rounds=(5,))(student, teacher)


def test_beta_of_smooth_l1():
    student, teacher = torch.randn(2, 9, 4), torch.randn(2, 9, 4)
    torch.testing.assert_close(
        DTMLoss(beta=0.3)(student, teacher, schedules=[[]]), F.smooth_l1_loss(student, teacher, beta=0.3)
    )


def test_the_generator_decides_the_draws():
    student, teacher = torch.randn(2, 30, 4), torch.randn(2, 30, 4)
    criterion = DTMLoss(draws=3)
    losses = [criterion(student, teacher, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_draws_keep_to_the_arguments():
    student, teacher = torch.randn(2, 30, 4), torch.randn(2, 30, 4)
    criterion = DTMLoss(min_tokens=30)  # no token may be lost: token-wise
    assert criterion(student, teacher) == criterion(student, teacher, schedules=[[]])


def test_the_teacher_gets_no_gradient():
    student, teacher = torch.randn(2, 8, 4, requires_grad=True), torch.randn(2, 8, 4, requires_grad=True)
    DTMLoss()(student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_nothing_masked_is_zero():
    value, gradient = loss_and_gradient(
        DTMLoss(), torch.randn(2, 8, 4), torch.randn(2, 8, 4), torch.zeros(2, 8, dtype=torch.bool)
    )
    assert value == 0 and not gradient.any()


def test_half_precision_is_averaged_in_float32():
    student, teacher = torch.randn(2, 32, 8).bfloat16(), torch.randn(2, 32, 8).bfloat16()
    expected = dtm_loss(student.float(), teacher.float(), [[8, 8]])
    with torch.autocast("cpu", torch.bfloat16):
        value, gradient = loss_and_gradient(dtm_loss, student, teacher, [[8, 8]])
    assert value.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(value, expected)


def test_compiles_without_breaks():
    student, teacher, mask = torch.randn(2, 16, 4), torch.randn(2, 16, 4), torch.rand(2, 16) < 0.5
    criterion = DTMLoss()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        loss_and_gradient(compiled, student, teacher, mask, schedules=[[4, 2], [3]]),
        loss_and_gradient(criterion, student, teacher, mask, schedules=[[4, 2], [3]]),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distance": "huber"}, "one of smooth_l1, cosine, l1, l2, got 'huber'"),
        ({"beta": 0.0}, "beta must be positive, got 0.0; .*'l1'"),
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"max_rounds": 0}, "max_rounds must be at least 1, got 0"),
        ({"min_tokens": -1}, "min_tokens must be at least 0, got -1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DTMLoss(**arguments)


def test_bad_tensors_are_refused():
    criterion, x = DTMLoss(), torch.randn(2, 9, 4)
    with pytest.raises(ValueError, match=r"got \(2, 9, 4\) and \(2, 9, 5\); .* project the student"):
        criterion(x, torch.randn(2, 9, 5))
    with pytest.raises(ValueError, match=r"\(B, N\) = \(2, 9\), got \(2, 8\)"):
        criterion(x, x, torch.ones(2, 8, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask must be bool.*torch\.float32"):
        criterion(x, x, torch.ones(2, 9))
    with pytest.raises(ValueError, match="at least one schedule"):
        criterion(x, x, schedules=[])
    with pytest.raises(ValueError, match=r"rounds\[0\] = 5"):
        criterion(x, x, schedules=[[5]])


def slow_normalised(tokens):
    return (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, keepdim=True) + 1e-6) ** 0.5


def test_normalised_targets_are_normalised_after_morphing():
    student, teacher, rounds = torch.randn(2, 12, 6), 3 * torch.randn(2, 12, 6), [4, 3]
    groups = morph_groups(teacher, rounds)
    expected = F.smooth_l1_loss(morph(student, groups), slow_normalised(morph(teacher, groups)), beta=2.0)
    torch.testing.assert_close(DTMLoss(normalize_target=True)(student, teacher, schedules=[rounds]), expected)


@pytest.mark.parametrize("grouping", ["kmeans", "superpixels"])
def test_groups_of_kmeans_are_as_many_as_the_rounds_would_leave(grouping):
    student, teacher, points, mask = *torch.randn(3, 2, 12, 6).unbind(), torch.rand(2, 12) < 0.5
    given = F.normalize(teacher, dim=-1) if grouping == "kmeans" else points
    groups = kmeans_groups(given, 12 - 7)
    tokens = F.smooth_l1_loss(morph(student, groups), morph(teacher, groups), beta=2.0, reduction="none").mean(2)
    loss = DTMLoss(grouping=grouping)
    options = {"points": points} if grouping == "superpixels" else {}
    found = loss(student, teacher, mask, schedules=[[4, 3]], **options)
    torch.testing.assert_close(found, tokens[mask].mean())
    with_all = loss(student, teacher, schedules=[[]], **options)
    torch.testing.assert_close(with_all, F.smooth_l1_loss(student, teacher, beta=2.0))


def test_groupings_are_refused():
    with pytest.raises(ValueError, match="grouping must be one of matching, kmeans, superpixels, got 'slic'"):
        DTMLoss(grouping="slic")
    with pytest.raises(ValueError, match="needs points: those that superpixel_features"):
        DTMLoss(grouping="superpixels")(torch.randn(1, 8, 4), torch.randn(1, 8, 4))
