"""DTEM: golden numbers of whole models, the dial, the schedules, and the words for what makes no sense."""

import pytest
import torch
import torch.nn.functional as F
from families import MERGEABLE, create, images
from timm.models import VisionTransformer

from timm_tokens import apply_dtem_merging
from timm_tokens.keys import mean_keys


@pytest.fixture
def golden_vit(golden):
    def build(name):
        numbers = golden(name)
        vit = VisionTransformer(img_size=32, patch_size=4, embed_dim=48, depth=4, num_heads=3, num_classes=10).eval()
        vit.load_state_dict({k.removeprefix("vit."): v for k, v in numbers.items() if k.startswith("vit.")})
        return vit, numbers

    return build


@pytest.mark.parametrize("r", [3, 8, 20])
@torch.no_grad()
def test_golden_training_free(golden_vit, r):
    vit, numbers = golden_vit("tome_vit")
    torch.testing.assert_close(vit(numbers["images"]), numbers["logits"], atol=1e-5, rtol=1e-5)
    model = apply_dtem_merging(vit, r=r, metric="keys").eval()
    torch.testing.assert_close(model(numbers["images"]), numbers[f"tome.logits.r{r}"], atol=1e-5, rtol=1e-5)
    left = model.token_groups(numbers["images"]).amax() + 2  # ids count from 0, and the class token
    assert left == numbers[f"tome.tokens.r{r}"]


@torch.no_grad()
def test_golden_groups(golden_vit):
    vit, numbers = golden_vit("tome_vit")
    groups = apply_dtem_merging(vit, r=8, metric="keys").token_groups(numbers["images"]).flatten(1)
    source = numbers["tome.source.r8"][:, 1:, 1:]  # (B, tokens left, patches)
    assert torch.equal(groups, source.argmax(dim=1))


@pytest.mark.parametrize("r", [3, 8])
def test_golden_learned(golden_vit, r):
    vit, numbers = golden_vit("dtem")
    model = apply_dtem_merging(vit, r=r)
    model.merger.load_state_dict({k: v for k, v in numbers.items() if k.startswith("embed.")})
    with torch.no_grad():
        logits = model.eval()(numbers["images"])
    torch.testing.assert_close(logits, numbers[f"eval.logits.r{r}"], atol=1e-5, rtol=1e-5)
    logits = model.train()(numbers["images"])
    torch.testing.assert_close(logits, numbers[f"train.logits.r{r}"], atol=1e-5, rtol=1e-5)
    loss = F.cross_entropy(logits, numbers["labels"])
    torch.testing.assert_close(loss, numbers[f"train.loss.r{r}"], atol=1e-5, rtol=1e-5)
    loss.backward()
    for i, embed in enumerate(model.merger.embed):
        expected = numbers[f"train.grad.r{r}.embed.{i}.weight"]
        scale = expected.abs().max().clamp(min=1e-12)  # the class token can't see the last block's merge: gradient 0
        assert (embed.weight.grad - expected).abs().max() / scale <= 1e-3


@pytest.mark.parametrize("family", MERGEABLE)
@torch.no_grad()
def test_embeddings_start_as_the_average_keys(family):
    """So the untrained learned metric merges as the training-free one does, where keys have no norm of their own."""
    base, x = create(family), images()
    learned, keys = (apply_dtem_merging(base, r=6, metric=m).eval() for m in ("learned", "keys"))
    for block, embed in zip(base.blocks, learned.merger.embed, strict=True):
        y = torch.randn(2, 7, 48)
        if isinstance(block.attn.k_norm, torch.nn.Identity):
            torch.testing.assert_close(embed(y), mean_keys(block.attn, y), atol=1e-5, rtol=1e-5)
    if family != "vit_qk_norm":
        torch.testing.assert_close(learned(x), keys(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["vit", "vit_qk_norm", "eva", "eva02", "differential"])
@torch.no_grad()
def test_keys_are_those_of_the_attention(family, monkeypatch):
    """Read off the attention itself: what scaled_dot_product_attention is given."""
    block, y, seen, attention = create(family).blocks[0], torch.randn(2, 7, 48), [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, **kw: seen.append(k) or attention(q, k, v, **kw)
    )
    block.attn(y)
    expected = torch.cat(seen, dim=1).mean(dim=1)
    torch.testing.assert_close(mean_keys(block.attn, y), expected, atol=1e-5, rtol=1e-5)


def test_the_default_width_is_a_head_and_twice_that_for_wide_models():
    assert apply_dtem_merging(create("vit")).merger.embed_dim == 16
    wide = VisionTransformer(img_size=32, patch_size=16, embed_dim=1024, depth=1, num_heads=16, num_classes=2)
    merger = apply_dtem_merging(wide).merger
    assert merger.embed_dim == 128
    weight = wide.blocks[0].attn.qkv.weight.chunk(3)[1].unflatten(0, (2, 8, 64)).mean(1).flatten(0, 1)
    torch.testing.assert_close(merger.embed[0].weight, weight)
    assert apply_dtem_merging(create("vit"), embed_dim=20).merger.embed[0].out_features == 20


@torch.no_grad()
def test_r_is_a_dial():
    model, x = apply_dtem_merging(create("vit"), r=4).eval(), images()
    for r, tokens in ((0, 36), (4, 24), ([10], 26), ((4, -1.0), 24), (100, 5)):
        model.merger.r = r
        assert len(model.token_groups(x)[0].unique()) == tokens
        torch.testing.assert_close(model(x), apply_dtem_merging(model.base, r=r).eval()(x))


@torch.no_grad()
def test_one_image_equals_the_same_image_in_a_batch():
    model, x = apply_dtem_merging(create("vit"), r=5).eval(), images(3)
    torch.testing.assert_close(torch.cat([model(x[i : i + 1]) for i in range(3)]), model(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_without_proportional_attention_sizes_do_not_weigh():
    base, x = create("vit"), images()
    with_sizes, without = (apply_dtem_merging(base, r=8, prop_attn=p).eval() for p in (True, False))
    assert (with_sizes(x) - without(x)).abs().max() > 1e-3


def test_freeze_base_trains_the_merger_alone_and_thaws():
    model = apply_dtem_merging(create("vit", drop_path_rate=0.5), r=4).freeze_base().train()
    assert model.training and model.merger.training and not model.base.training
    assert [n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("merger.")] == []
    model.freeze_base(False)
    assert model.base.training and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(metric="values"), ValueError, "'learned', 'keys', got 'values'"),
        (dict(r=-1), ValueError, "must not be negative, got -1"),
        (dict(r=2.5), TypeError, r"got 2\.5"),
        (dict(r=[1, 2, 3, 4]), ValueError, "4 numbers for 3 blocks"),
        (dict(tau1=0), ValueError, "tau1 must be greater than 0, got 0"),
        (dict(tau2=-0.1), ValueError, r"tau2 must be greater than 0, got -0\.1"),
        (dict(tau2="cold"), TypeError, "tau2 must be a number, got 'cold'"),
        (dict(candidates=0), ValueError, "candidates must be greater than 0, got 0"),
        (dict(candidates=1.5), TypeError, r"candidates must be an int, got 1\.5"),
        (dict(embed_dim=0), ValueError, "embed_dim must be greater than 0, got 0"),
        (dict(r=4, flops_ratio=0.5), ValueError, "r or flops_ratio, not both, got r=4 and flops_ratio=0.5"),
        (dict(flops_ratio=1.5), ValueError, r"flops_ratio must lie in \(0, 1\], got 1\.5"),
        (dict(flops_ratio=0.01), ValueError, r"flops_ratio=0\.01 can't be reached: .* leaves 0\.\d+ of the FLOPs"),
    ],
)
def test_refuses(options, error, words):
    with pytest.raises(error, match=words):
        apply_dtem_merging(create("vit"), **options)


def test_refuses_what_is_no_model():
    with pytest.raises(TypeError, match=r"builtins\.str can't be driven"):
        apply_dtem_merging("deit_small_patch16_224")


@pytest.mark.parametrize("r", [-2, 1.5, "many"])
def test_the_dial_refuses_and_keeps_its_value(r):
    merger = apply_dtem_merging(create("vit"), r=4).merger
    with pytest.raises((TypeError, ValueError)):
        merger.r = r
    assert merger.r == 4 and merger.schedule == (4, 4, 4)
