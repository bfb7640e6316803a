import pytest
import torch

from timm_tokens.losses import Center


def test_moves_towards_the_batch():
    center, first, second = Center(3, 5, momentum=0.9), torch.randn(7, 3, 5), torch.randn(4, 3, 5)
    torch.testing.assert_close(center(first), first)
    center.update(first)
    torch.testing.assert_close(center(second), second - 0.1 * first.mean(0))
    center.update(second)
    torch.testing.assert_close(center.value, 0.09 * first.mean(0) + 0.1 * second.mean(0))
    assert not center.value.requires_grad and list(center.state_dict()) == ["value"]


def test_an_empty_batch_moves_nothing():
    center = Center(5)
    center.update(torch.randn(2, 5))
    before = center.value.clone()
    center.update(torch.empty(0, 5))
    assert torch.equal(center.value, before)


def test_half_precision():
    center = Center(5, momentum=0.0)
    logits = torch.randn(2, 5).bfloat16()
    center.update(logits)
    assert center(logits).dtype == torch.float32
    torch.testing.assert_close(center.value, logits.float().mean(0))


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_impossible_momentum_is_refused(momentum):
    with pytest.raises(ValueError, match=rf"must be in \[0, 1\), got {momentum}"):
        Center(3, momentum=momentum)
