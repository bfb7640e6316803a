"""ESFR: the published numbers, equality of batched and single episodes, stopping, and degenerate episodes."""

import pytest
import torch
from torch.nn import functional as F

from timm_tokens.fewshot import ESFR, bd_cspn, cosine_centroid, nearest_centroid, prepare
from timm_tokens.fewshot.nets import Nets, Run, drop_out, glorot_uniform
from timm_tokens.ops import local_intrinsic_dimensionality


def episodes(t=4, ways=3, each=10, dim=12):
    """Clustered features (T, M, D)."""
    return (torch.randn(t, ways, 1, dim) + 0.5 * torch.randn(t, ways, each, dim)).flatten(1, 2)


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def golden_run(data, case):
    weights = [data[f"{case}.weight.{layer}"][None] for layer in range(4)]
    return ESFR(num_nets=1, dropout=0.0).adapt(data[f"{case}.preprocessed"][None], weights)


@pytest.mark.parametrize("case", [0, 1])
def test_golden_preparation_and_start(golden, case):
    data = golden("esfr")
    features, shot = data[f"{case}.features"], int(data[f"{case}.shot"])  # (K, shot + query, D)
    rows = torch.cat([features[:, :shot].flatten(0, 1), features[:, shot:].flatten(0, 1)])
    prepared = data[f"{case}.preprocessed"].view_as(features)
    expected = torch.cat([prepared[:, :shot].flatten(0, 1), prepared[:, shot:].flatten(0, 1)])
    torch.testing.assert_close(prepare(rows, len(features) * shot), expected, atol=1e-6, rtol=0)
    nets = Nets([data[f"{case}.weight.{layer}"][None].clone() for layer in range(4)], len(rows))
    points = data[f"{case}.preprocessed"][None]
    torch.testing.assert_close(nets.forward(points)[0], data[f"{case}.initial_recon"], atol=1e-4, rtol=0)
    lid = local_intrinsic_dimensionality(nets.forward(points, stop=2)).mean()
    torch.testing.assert_close(lid, data[f"{case}.initial_lid"][0], atol=1e-4, rtol=0)


CLASSIFIERS = {"nearest_centroid": nearest_centroid, "cosine_centroid": cosine_centroid, "bdcspn": bd_cspn}


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("kind", ["raw", "adapted"])
def test_golden_accuracies(golden, case, name, kind):
    data = golden("esfr")
    rows = golden_run(data, case).features if kind == "adapted" else data[f"{case}.preprocessed"]
    ways, shot = len(data[f"{case}.features"]), int(data[f"{case}.shot"])
    rows = rows.view(ways, -1, rows.shape[-1])  # class by class: its support, then its queries
    support, query = rows[None, :, :shot].flatten(1, 2), rows[None, :, shot:].flatten(1, 2)
    scores = CLASSIFIERS[name](support, torch.arange(ways).repeat_interleave(shot), query)
    right = scores.argmax(-1)[0] == torch.arange(ways).repeat_interleave(query.shape[1] // ways)
    torch.testing.assert_close(right.float().mean(), data[f"{case}.accuracy.{name}.{kind}"][0], atol=1e-4, rtol=0)


# Case 0, by output: what the biases of two outputs drift by in the reference's twenty updates. These outputs fire on
# all points most of the time, so that their biases have no gradient, only rounding errors, which Adam magnifies. The
# two numbers, fitted by least squares, account for all that the reference does otherwise. Exact arithmetic is at most
# 3.1e-4 off, 1.7 % of the numbers by more than 1e-4; the loss by torch's autograd in float32, 4 to 7e-4.
DRIFT = {40: 2.4074e-5, 50: 5.1913e-5}


def test_golden_adaptation_of_twenty_updates(golden, monkeypatch):
    class Drifting(Nets):
        def update(self, *arguments):
            super().update(*arguments)
            for output, drift in DRIFT.items():
                self.biases[3][0, 0, output] += drift / 20

    data = golden("esfr")
    adapted, updates = golden_run(data, 0)
    assert updates.item() == data["0.updates"].item() == 20
    error = (adapted - data["0.adapted"]).abs()  # without that drift, and with rounding errors of its own
    assert error.mean() < 2e-5
    assert error.gt(1e-4).double().mean() < 0.03
    assert error.max() < 5e-4
    monkeypatch.setattr("timm_tokens.fewshot.nets.Nets", Drifting)
    data = {name: tensor.double() for name, tensor in data.items()}
    adapted, updates = golden_run(data, 0)
    assert updates.item() == 20
    torch.testing.assert_close(adapted, data["0.adapted"], atol=1e-5, rtol=0)


def test_golden_adaptation_of_two_updates(golden):
    data = golden("esfr")
    adapted, updates = golden_run(data, 1)
    assert updates.item() == data["1.updates"].item() == 2
    torch.testing.assert_close(adapted, data["1.adapted"], atol=1e-4, rtol=0)


def plain_esfr(features, weights, max_updates):
    """One episode and one net, without dropout, by autograd: the obvious implementation in float64."""
    params = [w.clone().requires_grad_() for w in weights] + [torch.zeros_like(w[0]).requires_grad_() for w in weights]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]

    def net(x, depth=4):
        for weight, bias in zip(params[:depth], params[4:], strict=False):
            x = F.relu(F.linear(x, weight, bias))
        return x

    def lid():
        return local_intrinsic_dimensionality(net(features, 2), min(21, len(features))).mean()

    last = lid()
    for t in range(1, max_updates + 1):
        output = net(features)
        loss = -F.cosine_similarity(features, output - output.mean(0), dim=-1).mean()
        with torch.no_grad():
            rate = 1e-3 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
            for p, (m, v), g in zip(params, moments, torch.autograd.grad(loss, params), strict=True):
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.999).addcmul_(g, g, value=0.001)
                p -= rate * m / (v.sqrt() + 1e-7)
            if t % 2 == 0:
                now = lid()
                if now > last:
                    break
                last = now
    return F.normalize(net(features).detach(), dim=-1), t


def test_equals_the_obvious_implementation():
    features = prepare(episodes(t=5).double())
    weights = [torch.randn(3, 12, 12, dtype=torch.float64) / 3 for _ in range(4)]
    adapted, updates = ESFR(num_nets=3, dropout=0.0, max_updates=16).adapt(features, weights)
    for episode in range(5):
        single = [plain_esfr(features[episode], [w[net] for w in weights], 16) for net in range(3)]
        assert updates[episode].tolist() == [count for _, count in single]
        torch.testing.assert_close(adapted[episode], torch.stack([x for x, _ in single]).mean(0), atol=1e-5, rtol=0)
    assert len(updates.unique()) > 2  # some stop early, at different times


@pytest.mark.parametrize("support_weight", [0.0, 0.5])
def test_batched_equals_one_at_a_time(support_weight):
    features, labels = episodes(t=7), torch.arange(3).repeat(2)
    esfr = ESFR(num_nets=3, max_updates=12, support_weight=support_weight, chunk_size=7)
    adapted, updates = esfr.adapt(features, generator=seeded(), support=labels)
    generator = seeded()
    singles = [esfr.adapt(episode[None], generator=generator, support=labels) for episode in features]
    assert updates.tolist() == torch.cat([single.updates for single in singles]).tolist()
    torch.testing.assert_close(adapted, torch.cat([single.features for single in singles]), atol=1e-5, rtol=0)
    assert len(updates.unique()) > 2


def test_chunks_bound_the_batch_and_do_not_change_the_result(monkeypatch):
    features, sizes = episodes(t=5), []

    class Counted(Run):
        def __init__(self, features, *rest):
            sizes.append(len(features))
            super().__init__(features, *rest)

    monkeypatch.setattr("timm_tokens.fewshot.esfr.Run", Counted)
    whole, parts = (ESFR(max_updates=8, chunk_size=size).adapt(features, generator=seeded()) for size in (5, 2))
    assert sizes == [5, 2, 2, 1]
    assert whole.updates.equal(parts.updates)
    torch.testing.assert_close(whole.features, parts.features, atol=1e-5, rtol=0)


def test_generator_decides_everything():
    features = prepare(episodes())
    first, again, other = (ESFR(max_updates=4).adapt(features, generator=seeded(s)).features for s in (1, 1, 2))
    assert first.equal(again)
    assert not first.allclose(other)
    torch.manual_seed(3)
    default = ESFR(max_updates=4).adapt(features).features
    torch.manual_seed(3)
    assert default.equal(ESFR(max_updates=4).adapt(features).features)


def test_support_labels_count_but_not_their_names():
    features, labels = episodes(t=3), torch.arange(3).repeat(3)

    def adapt(labels, support_weight=1.0):
        esfr = ESFR(num_nets=2, period=4, max_updates=8, support_weight=support_weight)
        return esfr.adapt(features, generator=seeded(), support=labels).features

    torch.testing.assert_close(adapt(labels), adapt((labels + 1) % 3), atol=1e-5, rtol=0)
    assert not adapt(labels).allclose(adapt(labels.sort().values), atol=1e-3)
    assert not adapt(labels).allclose(adapt(labels, 0.0), atol=1e-3)
    assert adapt(labels, 0.0).equal(adapt(9, 0.0))


def test_arguments_are_left_alone():
    features, weights = prepare(episodes()), [torch.randn(2, 12, 12) / 3 for _ in range(4)]
    copies = [t.clone() for t in (features, *weights)]
    ESFR(num_nets=2, max_updates=4).adapt(features, weights)
    assert all(a.equal(b) for a, b in zip((features, *weights), copies, strict=True))


def test_last_update_and_period():
    features = prepare(episodes())
    assert ESFR(max_updates=1).adapt(features).updates.eq(1).all()
    updates = ESFR(max_updates=7, period=3).adapt(features).updates
    assert set(updates.flatten().tolist()) <= {3, 6, 7}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precisions(dtype):
    adapted = ESFR(max_updates=4).adapt(episodes().to(dtype), support=3).features
    assert adapted.dtype == torch.promote_types(dtype, torch.float32)
    assert adapted.isfinite().all()


@pytest.mark.parametrize(
    "kind", ["zeros", "identical", "duplicates", "some zero rows", "tiny episode", "one dimension"]
)
@pytest.mark.parametrize("support", [None, 2])
def test_degenerate_episodes_give_finite_features(kind, support):
    x = episodes()
    if kind == "zeros":
        x = torch.zeros_like(x)
    elif kind == "identical":
        x = x[:, :1].expand_as(x)
    elif kind == "duplicates":
        x = x[:, :6].repeat(1, 5, 1)
    elif kind == "some zero rows":
        x[:, ::2] = 0
    elif kind == "tiny episode":
        x = x[:, :3]
    else:
        x = x[..., :1]
    adapted, updates = ESFR(num_nets=2, max_updates=20).adapt(x, support=support)
    assert adapted.isfinite().all()
    assert updates.ge(1).all() and updates.le(20).all()


def test_no_episodes():
    adapted, updates = ESFR().adapt(torch.empty(0, 10, 4))
    assert adapted.shape == (0, 10, 4) and updates.shape == (0, 5)


def test_centred_outputs():
    features = prepare(episodes())
    plain, centred = (
        ESFR(num_nets=1, max_updates=2, center=c).adapt(features, generator=seeded()).features for c in (False, True)
    )
    assert plain.ge(0).all()  # a ReLU comes last
    assert centred.lt(0).any()
    torch.testing.assert_close(centred.norm(dim=-1), torch.ones(4, 30))


def test_prepare_shifts_centres_and_scales():
    x = episodes() + 4
    prepared = prepare(x, 6)
    torch.testing.assert_close(prepared.norm(dim=-1), torch.ones(4, 30))
    moved = torch.cat([x[:, :6], x[:, 6:] + torch.randn(4, 1, 12)], 1)
    torch.testing.assert_close(prepare(moved, 6), prepared, atol=1e-5, rtol=0)  # where the queries lie is forgotten
    assert not prepare(moved).allclose(prepare(x), atol=1e-2)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9])
def test_dropout_keeps_its_share_and_the_mean(share):
    ones = torch.ones(3, 101, 99)
    dropped = drop_out(ones, share, [seeded(s) for s in (1, 1, 2)], torch.empty_like(ones))
    assert dropped.unique().tolist() == pytest.approx([0, 1 / (1 - share)] if share else [1])
    assert (dropped == 0).float().mean().item() == pytest.approx(share, abs=0.01)
    assert dropped[0].equal(dropped[1])
    assert not share or not dropped[0].equal(dropped[2])


def test_initial_weights_are_glorot_uniform():
    weights = glorot_uniform(torch.empty(0), 200, [seeded(1), seeded(2)])
    limit = (6 / 400) ** 0.5
    for weight in weights:
        assert weight.abs().max() <= limit
        assert weight.std(dim=(1, 2)).tolist() == pytest.approx([limit / 3**0.5] * 2, rel=0.01)
    assert not weights[0][0].allclose(weights[0][1])
    assert not weights[0][0].allclose(weights[1][0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_nets": 0}, "num_nets = 0 must be at least 1"),
        ({"period": 0}, "period = 0 must be at least 1"),
        ({"max_updates": 0}, "max_updates = 0 must be at least 1"),
        ({"chunk_size": 0}, "chunk_size = 0 must be at least 1"),
        ({"dropout": 1.0}, r"dropout = 1.0 must lie in \[0, 1\)"),
        ({"neighbours": 2}, "neighbours = 2 must be at least 3"),
        ({"support_weight": -1.0}, "support_weight must not be negative, got -1.0"),
    ],
)
def test_refuses_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        ESFR(**arguments)


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((10, 4), {}, r"must be floats \(T, M, D\); got torch.float32 \(10, 4\)"),
        ((1, 2, 4), {}, "an episode of 2 points is too small"),
        ((1, 9, 4), {"weights": [torch.ones(5, 4, 4)] * 3}, r"weights must be 4 tensors \(5, 4, 4\); got"),
        ((1, 9, 4), {"support": 9}, "9 support rows do not fit an episode of 9 points: pass 1 to 8"),
        ((1, 9, 4), {"support": torch.zeros(0, dtype=torch.long)}, "0 support rows do not fit"),
    ],
)
def test_refuses_shapes_that_do_not_fit(shape, arguments, message):
    with pytest.raises(ValueError, match=message):
        ESFR().adapt(torch.randn(shape), **arguments)


def test_support_loss_needs_labels():
    with pytest.raises(ValueError, match=r"support_weight = 0.1 needs labels: pass support=labels"):
        ESFR(support_weight=0.1).adapt(episodes(), support=3)
