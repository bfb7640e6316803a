from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from timm_tokens.losses import TokenLabelLoss
from timm_tokens.ops import SparseLabels, crop_token_labels, sparse_cross_entropy

# torch 2.6 warns about its own tracing of autograd functions
quiet_dynamo = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


class Logits(NamedTuple):
    cls: Tensor
    tokens: Tensor


def example(batch=3, num_classes=11, size=4, top=5, scale=3.0):
    logits = Logits(torch.randn(batch, num_classes) * scale, torch.randn(batch, size * size, num_classes) * scale)
    values = torch.randn(batch, top, 6, 6) * 4 + 3
    indices = torch.rand(batch, num_classes, 6, 6).argsort(1)[:, :top]
    boxes = torch.tensor([[0.1, 0.2, 0.7, 0.5]]).expand(batch, 4)
    labels = torch.randint(num_classes, (batch,))
    return (
        Logits(*(x.requires_grad_() for x in logits)),
        crop_token_labels(values, indices, boxes, num_classes, size),
        labels,
    )


def slow_loss(logits, target, labels, box, ground_truth, smoothing, dense_weight=0.5, cls_weight=1.0):
    """The paper's loss, image by image and token by token, in float64."""
    cls, tokens, target = logits.cls.double(), logits.tokens.double(), target.double()
    (B, N, K), loss = tokens.shape, 0
    off = smoothing / K
    on = 1 - smoothing + off
    mixed = []
    for b in range(B):
        t = target[b, :, 0] * on + off
        if ground_truth:
            y = torch.full((K,), off, dtype=torch.float64)
            y[labels[b]] = on
            rho = 0.5 if int(t.argmax()) == int(labels[b]) else 0.9
            t = rho * t + (1 - rho) * y
        mixed.append(t)
    lam = 1 - (box[2] - box[0]) * (box[3] - box[1]) / N
    for b in range(B):
        t = lam * mixed[b] + (1 - lam) * mixed[B - 1 - b]
        loss = loss - cls_weight * (t * cls[b].log_softmax(0)).sum() / B
        for n in range(N):
            t = target[b, :, 1 + n] * on + off
            loss = loss - dense_weight * (t * tokens[b, n].log_softmax(0)).sum() / (B * N)
    return loss


def gradients(loss, logits):
    return torch.autograd.grad(loss, tuple(logits))


@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize("box", [(0, 0, 0, 0), (1, 0, 3, 2), (0, 0, 4, 4)])
@pytest.mark.parametrize("ground_truth", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_the_obvious_loop(smoothing, ground_truth, box, form):
    logits, target, labels = example()
    labels[0] = target.cls[0].argmax()  # one image where the annotator agrees with the truth
    expected = slow_loss(logits, target.dense(), labels, box, ground_truth, smoothing)
    loss_fn = TokenLabelLoss(ground_truth=ground_truth, smoothing=smoothing)
    loss = loss_fn(logits, target if form == "sparse" else target.dense(), labels, box)
    torch.testing.assert_close(loss.double(), expected, atol=2e-6, rtol=1e-6)
    for got, want in zip(gradients(loss, logits), gradients(expected, logits), strict=True):
        torch.testing.assert_close(got, want, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("weights", [(0.5, 1.0), (1.0, 0.0), (0.0, 2.0)])
def test_weights(weights):
    logits, target, labels = example()
    expected = slow_loss(logits, target.dense(), labels, (0, 0, 0, 0), False, 0.0, *weights)
    torch.testing.assert_close(TokenLabelLoss(*weights)(logits, target).double(), expected, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("case", ["0", "1"])
@pytest.mark.parametrize("ground_truth", [0, 1])
@pytest.mark.parametrize("box", ["0000", "1032"])
@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_golden(golden, form, box, ground_truth, case):
    data = {k[2:]: v for k, v in golden("token_label").items() if k.startswith(case)}
    classes, smoothing = int(data["num_classes"]), float(data["smoothing"])
    logits = Logits(data["logits_cls"], data["logits_aux"].requires_grad_())
    if form == "sparse":
        boxes = data["crop_ijhw"][:, [1, 0, 3, 2]]  # the reference exchanges the axes of its boxes
        target = crop_token_labels(data["values"], data["indices"], boxes, classes, int(data["label_size"]))
        loss_fn, labels = TokenLabelLoss(ground_truth=bool(ground_truth), smoothing=smoothing), data["ground_truth"]
    else:  # smoothed already
        loss_fn, target, labels = TokenLabelLoss(ground_truth=bool(ground_truth)), data["target"][:, :, 1:], None
        labels = data["target"][:, :, 0]
    loss = loss_fn(logits, target, labels, [int(x) for x in box])
    torch.testing.assert_close(loss, data[f"loss.gt{ground_truth}.bb{box}"], atol=1e-5, rtol=0)
    if f"grad_aux.gt{ground_truth}.bb{box}" in data:
        (grad,) = torch.autograd.grad(loss, logits.tokens)
        torch.testing.assert_close(grad, data[f"grad_aux.gt{ground_truth}.bb{box}"], atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_image_targets_go_to_every_token(smoothing):
    logits, _, labels = example()
    spread = labels[:, None].expand(3, 16)
    expected = F.cross_entropy(logits.cls, labels, label_smoothing=smoothing)
    tokens = F.cross_entropy(logits.tokens.flatten(0, 1), spread.flatten(), label_smoothing=smoothing)
    expected = expected + 0.5 * tokens
    expected_gradients = gradients(expected, logits)
    loss_fn = TokenLabelLoss(smoothing=smoothing, ground_truth=True)  # the target is the truth: no labels needed
    for target in (labels, F.one_hot(labels, 11).float()):
        loss = loss_fn(logits, target)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients(loss, logits), expected_gradients)


def test_mixing_with_a_box_for_image_targets():
    logits, _, labels = example(batch=4)
    own, other = (F.cross_entropy(logits.cls, y) for y in (labels, labels.flip(0)))
    loss = TokenLabelLoss(dense_weight=0.0)(logits, labels, box=torch.tensor([0, 0, 2, 2]))
    torch.testing.assert_close(loss, 0.75 * own + 0.25 * other)


def test_labels_as_classes_or_probabilities():
    logits, target, labels = example()
    loss_fn = TokenLabelLoss(ground_truth=True, smoothing=0.1)
    assert loss_fn(logits, target, labels) == loss_fn(logits, target, F.one_hot(labels, 11))
    assert loss_fn(logits, target, labels) != loss_fn(logits, target, (labels + 1) % 11)


@pytest.mark.parametrize(("num_classes", "slots"), [(5, 1), (40, 12), (1000, 45)])
def test_sparse_cross_entropy_with_repeated_classes(num_classes, slots):
    logits = (torch.randn(2, 9, num_classes) * 10).requires_grad_()
    classes, background = torch.randint(num_classes, (2, 9, slots)), torch.rand(2, 9) / num_classes
    excess = torch.rand(2, 9, slots)
    target = background[..., None].expand(2, 9, num_classes).scatter_add(2, classes, excess)
    weight = torch.randn(2, 9)
    got = sparse_cross_entropy(logits, classes, excess, background)
    want = -(target.double() * logits.double().log_softmax(-1)).sum(-1)
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-6)
    got, want = (torch.autograd.grad((x * weight).sum(), logits)[0] for x in (got, want))
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 7, 50])
def test_sparse_cross_entropy_in_parts_is_the_same(rows, monkeypatch):
    logits, target, _ = example()
    weight = torch.randn(3, 16)

    def loss_and_gradient():
        loss = sparse_cross_entropy(logits.tokens, *target[1:])
        return loss, *torch.autograd.grad((loss * weight).sum(), logits.tokens)

    whole = loss_and_gradient()
    monkeypatch.setattr("timm_tokens.ops.chunking._CPU", rows * 11)
    for got, want in zip(loss_and_gradient(), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_extreme_logits():
    logits = torch.tensor([[[1e4, -1e4, 0.0]]]).requires_grad_()
    target = torch.tensor([[[2]]]), torch.tensor([[[0.4]]]), torch.tensor([[0.2]])
    loss = sparse_cross_entropy(logits, *target)
    torch.testing.assert_close(loss, torch.tensor([[0.2 * 2e4 + 0.6 * 1e4]]))
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(grad, torch.tensor([[[0.8, -0.2, -0.6]]]))


@pytest.mark.parametrize("shift", [-30, -3000, 3000])
@pytest.mark.parametrize("top", [3, 5])
def test_targets_of_scores_far_from_zero(top, shift):
    """A loss by sparse targets is that by dense ones, where every one of the 5 classes is listed and where not."""
    values = (torch.randn(2, top, 4, 4) + shift).half()
    indices = torch.rand(2, 5, 4, 4).argsort(1)[:, :top]
    target = crop_token_labels(values, indices, torch.tensor([[0.0, 0, 1, 1]]).expand(2, 4), 5, 4)
    full = torch.zeros(2, 5, 4, 4).scatter(1, indices, values.float())
    expected = full.flatten(2).softmax(1)
    logits = Logits(torch.randn(2, 5), torch.randn(2, 16, 5).requires_grad_())
    loss = TokenLabelLoss(cls_weight=0.0, dense_weight=1.0)(logits, target)
    want = F.cross_entropy(logits.tokens.mT, expected)
    torch.testing.assert_close(loss, want)
    got, want = (torch.autograd.grad(x, logits.tokens)[0] for x in (loss, want))
    torch.testing.assert_close(got, want, atol=1e-7, rtol=1e-5)


def test_a_retained_graph_gives_the_same_gradient_again():
    logits, target, labels = example()
    loss = TokenLabelLoss(ground_truth=True)(logits, target, labels)
    first = torch.autograd.grad(loss, tuple(logits), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, tuple(logits))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(list(first), kept, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["sparse", "dense", "classes"])
def test_autocast_and_half_logits_are_computed_in_float32(form):
    logits, target, labels = example(num_classes=50, scale=8.0)
    target = {"sparse": target, "dense": target.dense(), "classes": labels}[form]
    loss_fn = TokenLabelLoss(ground_truth=True, smoothing=0.1)
    half = Logits(*(x.detach().bfloat16().requires_grad_() for x in logits))
    exact = Logits(*(x.detach().float().requires_grad_() for x in half))
    expected = loss_fn(exact, target, labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_fn(half, target, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for got, want in zip(gradients(loss, half), gradients(expected, exact), strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), want, rtol=1e-2, atol=1e-6)


@quiet_dynamo
@pytest.mark.parametrize("form", ["sparse", "dense", "classes"])
def test_compiles(form):
    logits, target, labels = example()
    target = {"sparse": target, "dense": target.dense(), "classes": labels}[form]
    loss_fn = TokenLabelLoss(ground_truth=True, smoothing=0.1)
    box = torch.tensor([1, 0, 3, 2])
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    losses = loss_fn(logits, target, labels, box), compiled(logits, target, labels, box)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(gradients(loss, logits) for loss in losses))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.zeros(3, 11, 16), r"got \(3, 11, 16\)"),
        (torch.zeros(3, 10), r"got \(3, 10\)"),
        (torch.zeros(3), r"classes \(B,\) must be int64, got torch.float32"),
        (SparseLabels(*(torch.zeros(s) for s in ((3, 9), (3, 16, 2), (3, 16, 2), (3, 16)))), r"for \(3, 16, 9\)"),
    ],
)
def test_targets_that_do_not_fit(target, message):
    with pytest.raises(ValueError, match=message):
        TokenLabelLoss()(example()[0], target)


def test_other_bad_arguments():
    logits, target, labels = example()
    with pytest.raises(ValueError, match=r"smoothing must be in \[0, 1\), got 1.5"):
        TokenLabelLoss(smoothing=1.5)
    with pytest.raises(ValueError, match="ground_truth=True needs the true labels"):
        TokenLabelLoss(ground_truth=True)(logits, target)
    with pytest.raises(ValueError, match=r"labels must have one row per image, 3, got \(2,\)"):
        TokenLabelLoss(ground_truth=True)(logits, target, labels[:2])
    with pytest.raises(ValueError, match=r"logits.cls must be \(B, K\) = \(3, 11\)"):
        TokenLabelLoss()(Logits(logits.cls[:, :5], logits.tokens), target)
