import pytest
import torch
import torch.nn.functional as F

from timm_tokens.losses import MoBYLoss


def info_nce(queries, keys, queue, tau):
    """By the definition, query by query: the positive is the first of the logits."""
    losses = []
    for q, k in zip(F.normalize(queries, dim=1), F.normalize(keys, dim=1), strict=True):
        logits = torch.cat([(q * k).sum()[None], queue @ q]) / tau
        losses.append(-logits.log_softmax(0)[0])
    return sum(losses) / len(losses)


def test_equals_the_slow_form():
    criterion = MoBYLoss(8, 10, tau=0.3)
    queues = list(criterion.queue.clone())
    for _ in range(4):  # the queues overflow
        queries = [torch.randn(4, 8, requires_grad=True) for _ in range(2)]
        keys = [torch.randn(4, 8) for _ in range(2)]
        fast = criterion(queries, keys)
        slow = info_nce(queries[0], keys[1], queues[1], 0.3) + info_nce(queries[1], keys[0], queues[0], 0.3)
        torch.testing.assert_close(fast, slow)
        torch.testing.assert_close(torch.autograd.grad(fast, queries), torch.autograd.grad(slow, queries))
        queues = [torch.cat([F.normalize(k, dim=1), q])[:10] for k, q in zip(keys, queues, strict=True)]
        torch.testing.assert_close(criterion.queue, torch.stack(queues))


def test_queues_are_state_of_unit_length_and_the_same_everywhere():
    torch.manual_seed(3)
    first = MoBYLoss(8, 10).queue
    torch.manual_seed(4)
    assert torch.equal(first, MoBYLoss(8, 10).queue) and "queue" in MoBYLoss(8, 10).state_dict()
    torch.testing.assert_close(first.norm(dim=-1), torch.ones(2, 10))
    assert not torch.equal(first[0], first[1])


def test_the_queues_rest_in_evaluation():
    criterion = MoBYLoss(8, 10).eval()
    before, views = criterion.queue.clone(), [torch.randn(4, 8)] * 2
    criterion(views, views)
    assert torch.equal(criterion.queue, before)


def test_the_keys_get_no_gradient():
    queries = [torch.randn(4, 8, requires_grad=True) for _ in range(2)]
    keys = [torch.randn(4, 8, requires_grad=True) for _ in range(2)]
    criterion = MoBYLoss(8, 10)
    criterion(queries, keys).backward()
    assert all(k.grad is None for k in keys) and all(q.grad.abs().sum() > 0 for q in queries)
    assert not criterion.queue.requires_grad


def test_half_precision_is_computed_in_float32():
    queries, keys = torch.randn(2, 4, 8).bfloat16(), torch.randn(2, 4, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = MoBYLoss(8, 10)(queries, keys)
    torch.testing.assert_close(loss, MoBYLoss(8, 10)(queries.float(), keys.float()))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="queue_size must be positive, got 0"):
        MoBYLoss(8, 0)
    with pytest.raises(ValueError, match=r"2 queues of keys with 8 channels, got keys \[\(4, 1, 7\)"):
        MoBYLoss(8)([torch.randn(4, 7)] * 2, [torch.randn(4, 7)] * 2)
    with pytest.raises(ValueError, match="2 queues"):
        MoBYLoss(8)([torch.randn(4, 8)] * 3, [torch.randn(4, 8)] * 3)
