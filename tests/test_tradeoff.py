"""The table of what merging costs: every number against a plain computation of it."""

import pytest
import tiny
import torch
import torch.nn.functional as F

import timm_tokens
from timm_tokens import TokenViT, apply_dtem_merging
from timm_tokens.tradeoff import table, tradeoff


def spread(model):
    with torch.no_grad():
        for parameter in model.merger.parameters():
            parameter.normal_(std=0.5)
    return model


@torch.no_grad()
def test_numbers():
    model, images, labels = spread(tiny.merging(r=2)), tiny.images(10), torch.arange(10)
    batches = [(images[:6], labels[:6]), (images[6:], labels[6:])]
    rows = tradeoff(model.train(), batches, r=(4, [1, 7]), labelled=True)
    assert [(row.merging, row.r, row.tokens) for row in rows] == [
        ("none", "0", 17), ("learned", "4", 9), ("learned", "1 7", 9), ("keys", "4", 9), ("keys", "1 7", 9),
    ]  # fmt: skip
    assert model.merger.r == 2
    plain = model.base(images)
    expected = TokenViT(model.base).eval()(images, tokens=True)
    keys = apply_dtem_merging(tiny.base(), metric="keys").eval()
    for row, (net, r) in zip(rows[1:], ((model, 4), (model, [1, 7]), (keys, 4), (keys, [1, 7])), strict=True):
        net.eval().merger.r = r
        logits, tokens = net(images), net(images, tokens=True)
        assert row.accuracy == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
        assert row.agreement == pytest.approx(100 * (logits.argmax(1) == plain.argmax(1)).float().mean().item())
        assert row.cls_cosine == pytest.approx(F.cosine_similarity(tokens.cls, expected.cls, dim=1).mean().item())
        cosine = F.cosine_similarity(tokens.patches, expected.patches, dim=2).mean().item()
        assert row.patch_cosine == pytest.approx(cosine) and cosine < 0.99
        assert row.gflops == net.flops(r) / 1e9 and row.images_per_second > 0
    assert rows[0][3] == model.flops(0) / 1e9 and rows[0][6:] == pytest.approx((100, 1, 1))
    assert rows[1].agreement != rows[3].agreement


def test_models_without_classes_and_the_head():
    model = tiny.merging("attention_pool", r=2, metric="keys", base_args={"num_classes": 0})
    rows = tradeoff(model, [tiny.images()], r=[3])
    assert [(row.merging, row.accuracy, row.agreement) for row in rows] == [("none", None, None), ("keys", None, None)]
    assert "top class" not in table(rows) and "accuracy" not in table(rows)
    head = timm_tokens.token_label_head(tiny.merging(r=2), 4)
    assert len(tradeoff(head, [tiny.images()], r=[3])) == 3


def test_table():
    rows = tradeoff(tiny.merging(r=2), [tiny.images()], r=[3])
    lines = table(rows).splitlines()
    assert lines[0].split(" | ")[0] == "| merging" and "accuracy" not in lines[0] and len(lines) == 5
    assert lines[2].startswith(f"| none | 0 | 17 | {rows[0].gflops:.2f} |") and lines[2].endswith("| 1.0000 | 1.0000 |")


def test_what_can_not_be_measured_is_refused():
    with pytest.raises(ValueError, match="there are no images"):
        tradeoff(tiny.merging(), [])
    with pytest.raises(ValueError, match="merges no tokens"):
        tradeoff(TokenViT(tiny.base()), [tiny.images()])
