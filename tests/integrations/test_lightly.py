"""lightly's losses take what `tokens=True` gives."""

import pytest
import timm
import torch

import timm_tokens

loss = pytest.importorskip("lightly.loss")


def test_losses_reach_the_auxiliary_tokens():
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", img_size=64, num_classes=0)
    model = timm_tokens.add_aux_tokens(vit, num_cls=2, num_pooled=2)
    tokens = model(torch.randn(4, 3, 64, 64), tokens=True)
    contrast = loss.NTXentLoss()(tokens.cls, tokens.pooled[:, 0])
    distil = loss.DINOLoss(output_dim=vit.embed_dim)([tokens.cls.detach()], list(tokens.aux_cls.unbind(1)), epoch=1)
    (contrast + distil).backward()
    assert model.aux.tokens.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.aux.pool.parameters())
