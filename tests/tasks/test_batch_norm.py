"""Batch norm over all processes; that several give what one gives is tested with the tasks."""

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from timm_tokens.tasks.batch_norm import GlobalBatchNorm, GlobalBatchNormAct, make_batch_norms_global


def test_on_one_process_it_is_torchs():
    own, torchs = GlobalBatchNorm(4), nn.BatchNorm1d(4)
    for x in torch.randn(3, 6, 4):
        torch.testing.assert_close(own(x), torchs(x))
    torch.testing.assert_close(own.state_dict(), torchs.state_dict())


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (3, 4, 5, 2)])
def test_its_own_statistics_are_torchs(shape, momentum, monkeypatch):
    """What it computes with the sums over processes, of which there is one."""
    monkeypatch.setattr("timm_tokens.tasks.batch_norm.world_size", lambda: 2)
    torchs = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](4, momentum=momentum)
    nn.init.normal_(torchs.weight), nn.init.normal_(torchs.bias)
    own = GlobalBatchNorm(4, momentum=momentum)
    own.load_state_dict(torchs.state_dict())
    for _ in range(3):
        x, gradient = torch.randn(shape), torch.randn(shape)
        results = []
        for norm in (own, torchs):
            given = x.clone().requires_grad_()
            results.append((y := norm(given), *torch.autograd.grad(y, (given, norm.weight, norm.bias), gradient)))
        torch.testing.assert_close(*results)
    torch.testing.assert_close(own.state_dict(), torchs.state_dict())
    torch.testing.assert_close(own.eval()(x), torchs.eval()(x))


def test_one_value_per_channel_is_refused():
    norm = GlobalBatchNorm(4)
    with pytest.raises(ValueError, match=r"more than one value per channel, got a batch of shape \(1, 4\)"):
        norm(torch.randn(1, 4))
    assert norm(torch.randn(1, 4, 2)).shape == (1, 4, 2) and norm.eval()(torch.randn(1, 4)).shape == (1, 4)


def test_a_models_batch_norms_are_replaced_and_shared():
    model = timm.create_model("test_resnet", num_classes=3)
    images, state = torch.randn(2, 3, 64, 64), {name: x.data_ptr() for name, x in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    model.layer1.eval()
    expected = model(images)
    assert make_batch_norms_global(model) is model
    torch.testing.assert_close(model(images), expected)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(m, GlobalBatchNorm) for m in norms) and not model.layer1[0].bn1.training
    assert {name: x.data_ptr() for name, x in model.state_dict().items()} == state
    assert all(parameters[name] is x for name, x in model.named_parameters())
    active = make_batch_norms_global(BatchNormAct2d(4).train())
    assert isinstance(active, GlobalBatchNormAct) and active(torch.randn(2, 4, 3, 3)).min() == 0
