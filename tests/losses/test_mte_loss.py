import itertools

import pytest
import torch
import torch.nn.functional as F

from timm_tokens.losses import DINOLoss, MoBYLoss, MTELoss

B, T, K = 5, 4, 9


def slow_dino(student, teacher, centers, aux_target, include_global, weight=0.5, tau_s=0.1, tau_t=0.04):
    """By the definition, token by token and pair by pair; centers (T, K)."""
    distil, aux = [], []
    for u, v in itertools.product(range(len(teacher)), range(len(student))):
        if u == v:
            continue
        p = [((teacher[u][:, i] - centers[i]) / tau_t).softmax(1) for i in range(T)]
        members = p if include_global else p[1:]
        ensemble = sum(members) / len(members)

        def cross_entropy(target, i, v=v):
            return -(target * (student[v][:, i] / tau_s).log_softmax(1)).sum(1).mean()

        distil.append(cross_entropy(ensemble, 0))
        if student[v].shape[1] > 1:
            each = [cross_entropy(ensemble if aux_target == "ensemble" else p[i], i) for i in range(1, T)]
            aux.append(sum(each) / len(each))
    return weight * sum(distil) / len(distil) + (1 - weight) * sum(aux) / len(aux)


def slow_moby(queries, keys, queues, aux_target, tau=0.2):
    """1/2 [InfoNCE(q_0, kbar) + mean_i InfoNCE(q_i, k)], summed over the two directions."""

    def info_nce(q, k, queue):
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / tau
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))

    total = 0
    for u, v in ((0, 1), (1, 0)):
        k, q = F.normalize(keys[u], dim=-1), F.normalize(queries[v], dim=-1)
        mean = F.normalize(k.mean(1), dim=-1)
        own = [mean if aux_target == "ensemble" else k[:, i] for i in range(T)]
        aux = sum(info_nce(q[:, i], own[i], queues[u]) for i in range(1, T)) / (T - 1)
        total += (info_nce(q[:, 0], mean, queues[u]) + aux) / 2
    return total


def views(count, tokens=T, channels=K, grad=False):
    return [torch.randn(B, tokens, channels, requires_grad=grad) for _ in range(count)]


@pytest.mark.parametrize("aux_target", ["ensemble", "own"])
@pytest.mark.parametrize("include_global", [True, False])
@pytest.mark.parametrize(("local_tokens", "weight"), [(T, 0.5), (1, 0.5), (T, 0.8), (1, 1.0)])
def test_dino_equals_the_slow_form(aux_target, include_global, local_tokens, weight):
    options = dict(aux_target=aux_target, include_global=include_global, global_weight=weight)
    criterion = MTELoss(DINOLoss(K, num_tokens=T), **options)
    centers = torch.zeros(T, K)
    for _ in range(2):
        student, teacher = views(2, grad=True) + views(3, local_tokens, grad=True), views(2)
        fast = criterion(student, teacher).loss
        slow = slow_dino(student, teacher, centers, aux_target, include_global, weight)
        torch.testing.assert_close(fast, slow)
        torch.testing.assert_close(torch.autograd.grad(fast, student), torch.autograd.grad(slow, student))
        centers = 0.9 * centers + 0.1 * torch.cat(teacher).mean(0)
        torch.testing.assert_close(criterion.baseline.center.value, centers)  # one a token


@pytest.mark.parametrize("aux_target", ["ensemble", "own"])
def test_moby_equals_the_slow_form(aux_target):
    criterion = MTELoss(MoBYLoss(8, 12), aux_target=aux_target)
    for _ in range(2):
        queues = criterion.baseline.queue.clone()
        queries, keys = views(2, channels=8, grad=True), views(2, channels=8)
        fast, slow = criterion(queries, keys).loss, slow_moby(queries, keys, queues, aux_target)
        torch.testing.assert_close(fast, slow)
        torch.testing.assert_close(torch.autograd.grad(fast, queries), torch.autograd.grad(slow, queries))
        ensemble = F.normalize(F.normalize(keys[1], dim=-1).mean(1), dim=-1)
        torch.testing.assert_close(criterion.baseline.queue[1, :B], ensemble)


@pytest.mark.parametrize("aux_target", ["ensemble", "own"])
@pytest.mark.parametrize("baseline", [lambda: DINOLoss(K), lambda: MoBYLoss(K, 12)])
def test_without_auxiliary_tokens_it_is_the_baseline(baseline, aux_target):
    plain, criterion = baseline(), MTELoss(baseline(), aux_target=aux_target, global_weight=0.3)
    for _ in range(3):
        student, teacher = views(2, tokens=1, grad=True), views(2, tokens=1)
        expected = plain([x.squeeze(1) for x in student], [x.squeeze(1) for x in teacher])
        found = criterion(student, teacher).loss
        assert torch.equal(found, expected)
        gradients = [torch.autograd.grad(x, student) for x in (found, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_distillation_reaches_the_global_token_alone():
    """Gradients of the loss split: the global token's come from L_distil, the others' from L_aux."""
    student, teacher = views(2, grad=True), views(2)
    other = [x.detach().clone() for x in student]
    for x in other:
        x[:, 1:] += torch.randn(B, T - 1, K)
        x.requires_grad_()
    gradients = [torch.autograd.grad(MTELoss(DINOLoss(K, num_tokens=T))(x, teacher).loss, x) for x in (student, other)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a[:, 0], b[:, 0])
        assert (a[:, 1:] - b[:, 1:]).abs().max() > 1e-4


def test_the_teacher_gets_no_gradient():
    student, teacher = views(2, grad=True), views(2, grad=True)
    terms = MTELoss(DINOLoss(K, num_tokens=T))(student, teacher)
    assert [term.requires_grad for term in terms] == [True, False, False, False, False]
    terms.loss.backward()
    assert all(x.grad is None for x in teacher)


def test_what_is_watched():
    teacher = views(2)
    teacher[0][:, 2], teacher[1][:, 2] = teacher[0][:, 1], teacher[1][:, 1]  # two tokens have become the same
    terms = MTELoss(DINOLoss(K, num_tokens=T))(views(2), teacher)
    p = (torch.cat(teacher) / 0.04).softmax(-1)
    torch.testing.assert_close(terms.entropy, torch.special.entr(p).sum(-1).mean(0))
    torch.testing.assert_close(terms.marginal_entropy, torch.special.entr(p.mean(0)).sum(-1))
    first = p.argmax(-1)
    for i in range(T):
        expected = sum((first[:, i] == first[:, j]).float().mean() for j in range(T) if j != i) / (T - 1)
        torch.testing.assert_close(terms.agreement[i], expected)
    assert terms.agreement[1] > 1 / 3 and terms.agreement[2] > 1 / 3


def test_token_losses():
    terms = MTELoss(DINOLoss(K, num_tokens=T))(views(2) + views(1, 1), views(2))
    torch.testing.assert_close(terms.loss, (terms.token_losses[0] + terms.token_losses[1:].mean()) / 2)
    assert terms.token_losses.shape == (T,)


def test_watching_can_be_left():
    terms = MTELoss(DINOLoss(K, num_tokens=T))(views(2), views(2), watch=False)
    assert terms.loss > 0 and terms.entropy is None


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="must be 'ensemble' or 'own', got 'none'"):
        MTELoss(DINOLoss(K), aux_target="none")
    for weight in (0, 1.1):
        with pytest.raises(ValueError, match=rf"global_weight must be in \(0, 1\], got {weight}"):
            MTELoss(DINOLoss(K), global_weight=weight)
    criterion = MTELoss(DINOLoss(K, num_tokens=T))
    with pytest.raises(ValueError, match=r"\(T, K\) = \(4, 9\), got \(5, 3, 9\); build the loss"):
        criterion(views(2, 3), views(2, 3))
    for student, teacher in [(views(2), views(2, 3)), (views(2) + views(1, T + 1), views(2)), ([], [])]:
        with pytest.raises(ValueError, match=r"views must be \(B, T, K\)"):
            criterion(student, teacher)
