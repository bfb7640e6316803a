"""What must always hold, for every family of Vision Transformers that can be driven."""

import pytest
import timm
import torch
from families import DRIVABLE, MERGEABLE, WHOLE_BLOCKS, create, images
from timm.models.vision_transformer import Attention, Block

import timm_tokens
from timm_tokens import TokenViT, apply_dtem_merging, blocks, rotary
from timm_tokens.classification import pool_and_classify, pools_by_size
from timm_tokens.ops import size_bias

every_family = pytest.mark.parametrize("family", DRIVABLE)
every_mergeable = pytest.mark.parametrize("family", MERGEABLE)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def merges(model, x):
    """The model's output and what its merger gave in each block."""
    taken = []
    handle = model.merger.register_forward_hook(lambda module, args, output: taken.append(output))
    with torch.no_grad():
        logits = model(x)
    handle.remove()
    return logits, taken


@every_family
def test_without_parts_everything_is_the_bases(family):
    base, x = create(family), images()
    model = TokenViT(base).eval()
    with torch.no_grad():
        close(model(x), base(x))
        close(model.forward_features(x), base.forward_features(x))
        close(
            model.forward_head(model.forward_features(x), pre_logits=True),
            base.forward_head(base.forward_features(x), pre_logits=True),
        )
        for ours, theirs in zip(model.forward_intermediates(x)[1], base.forward_intermediates(x)[1], strict=True):
            close(ours, theirs)


@every_mergeable
@pytest.mark.parametrize("metric", ["learned", "keys"])
def test_merging_nothing_changes_nothing(family, metric):
    base, x = create(family), images()
    model = apply_dtem_merging(base, r=0, metric=metric).eval()
    with torch.no_grad():
        close(model(x), base(x))
        close(model.train()(x), base.train()(x))


@every_mergeable
@torch.no_grad()
def test_a_token_of_size_two_equals_the_token_twice(family):
    base, x = create(family), images()
    p = base.num_prefix_tokens
    tokens, ropes = blocks.embed(base, x)
    rows = torch.arange(tokens.shape[1] - p).expand(len(x), -1)
    twice, twice_rows = torch.cat([tokens, tokens[:, -1:]], dim=1), torch.cat([rows, rows[:, -1:]], dim=1)
    size = torch.ones(tokens.shape[:2])
    size[:, -1] = 2
    for i, block in enumerate(base.blocks):
        rope = {} if ropes is None else {"rope": rotary.rope_rows(ropes[i], rows)}
        twice_rope = {} if ropes is None else {"rope": rotary.rope_rows(ropes[i], twice_rows)}
        halves = blocks.halves(block)
        tokens = halves.attend(block, tokens, halves.read(block, tokens), attn_mask=size_bias(size), **rope)
        tokens = halves.feed(block, tokens)
        twice = block(twice, **twice_rope)
    close(tokens, twice[:, :-1])
    if pools_by_size(base):
        close(pool_and_classify(base, base.norm(tokens), size), base.forward_head(base.norm(twice)))


@every_mergeable
@pytest.mark.parametrize("training", [False, True])
def test_sizes_are_conserved_and_prefix_tokens_never_merge(family, training):
    base, x = create(family), images()
    model = apply_dtem_merging(base, r=7).train(training)
    _, taken = merges(model, x)
    p, n = base.num_prefix_tokens, base.num_prefix_tokens + 36
    assert len(taken) == 3
    for merged in taken:
        close(merged.size.sum(dim=1), torch.full((2,), float(n)), tolerance=1e-4)
        assert torch.equal(merged.size[:, :p], torch.ones(2, p))
        assert torch.equal(merged.matching.order[:, :p], torch.arange(p).expand(2, -1))
    assert taken[-1].effective == n - 21
    assert taken[-1].x.shape[1] == (n if training else n - 21)


@every_mergeable
@pytest.mark.parametrize("r", [5, 100])
@torch.no_grad()
def test_groups_sizes_and_unmerged_features_agree(family, r):
    base, x = create(family), images()
    model = apply_dtem_merging(base, r=r).eval()
    _, taken = merges(model, x)
    p, size = base.num_prefix_tokens, taken[-1].size
    groups = model.token_groups(x)
    assert groups.shape == (2, 6, 6) and groups.dtype == torch.int64
    left = size.shape[1] - p
    for image in range(2):
        assert torch.equal(groups[image].flatten().bincount(minlength=left).float(), size[image, p:])
    features = model.forward_features(x)
    first = torch.stack([(groups[i].flatten()[:, None] == groups[i].flatten()).int().argmax(1) for i in range(2)])
    close(features[:, p:], features[:, p:].gather(1, first[..., None].expand(-1, -1, features.shape[-1])), tolerance=0)


@every_mergeable
@torch.no_grad()
def test_the_head_on_unmerged_features_gives_the_models_logits(family):
    model, x = apply_dtem_merging(create(family), r=8).eval(), images()
    close(model.forward_head(model.forward_features(x)), model(x))


@every_mergeable
def test_the_base_stays_what_it_is(family):
    base, x = create(family), images()
    before, forward, keys = base(x).detach(), base.forward, set(base.state_dict())
    kinds, statistics = [type(m) for m in base.modules()], [buffer.clone() for buffer in base.buffers()]
    model = apply_dtem_merging(base, r=6)
    model.train()(x).sum().backward()
    model.zero_grad()
    model.eval()(x)
    assert model.base is base and base.forward == forward
    assert [type(m) for m in base.modules()] == kinds
    assert set(base.state_dict()) == keys
    for buffer, was in zip(base.buffers(), statistics, strict=True):
        buffer.copy_(was)  # batch norms of a convolutional stem have counted the training batch
    close(base.eval()(x), before, tolerance=0)


@every_mergeable
def test_relaxed_training_reaches_every_embedding_that_matters(family):
    """Every embedding whose merges later layers or the pooling can see gets a gradient; the frozen base gets none."""
    base, x = create(family), images()
    model = apply_dtem_merging(base, r=4).freeze_base().train()
    model(x).square().sum().backward()
    gradients = [embed.weight.grad for embed in model.merger.embed]
    assert all(g is not None and g.isfinite().all() and g.abs().max() > 0 for g in gradients[:-1])
    assert all(parameter.grad is None for parameter in base.parameters())


@pytest.mark.parametrize("family", WHOLE_BLOCKS)
def test_parallel_blocks_are_driven_whole_and_refuse_merging(family):
    base = create(family)
    TokenViT(base)
    with pytest.raises(
        TypeError, match=r"block 0, timm\.models\.vision_transformer\.\w+, runs attention and MLP in parallel"
    ):
        apply_dtem_merging(base)


REFUSED = """vit_relpos_small_patch16_224 beit_base_patch16_224 swin_tiny_patch4_window7_224 cait_xxs24_224
xcit_nano_12_p16_224 hiera_tiny_224 pit_ti_224 tnt_s_legacy_patch16_224 crossvit_tiny_240
samvit_base_patch16 test_resnet"""


@pytest.mark.parametrize("name", REFUSED.split())
def test_other_models_are_refused_in_words(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    for wrap in (TokenViT, apply_dtem_merging):
        with pytest.raises(
            TypeError, match=rf"{type(model).__module__}\.{type(model).__name__}.*supported are timm's VisionTr"
        ):
            wrap(model)


def test_a_block_or_attention_with_a_forward_of_its_own_is_refused():
    class MyBlock(Block):
        def forward(self, x, attn_mask=None, is_causal=False):
            return x

    class MyAttention(Attention):
        def forward(self, x, attn_mask=None, is_causal=False):
            return x

    with pytest.raises(TypeError, match=r"block 0, .*MyBlock with .*Attention, is not known"):
        TokenViT(MERGEABLE["vit"](block_fn=MyBlock))
    with pytest.raises(TypeError, match=r"block 0, .*Block with .*MyAttention, is not known"):
        TokenViT(MERGEABLE["vit"](attn_layer=MyAttention))


def test_a_part_added_twice_is_refused():
    model = apply_dtem_merging(create("vit"), r=2)
    with pytest.raises(ValueError, match=r"merges tokens already; set model\.merger\.r"):
        apply_dtem_merging(model)
    assert timm_tokens.apply_dtem_merging(TokenViT(create("vit")), r=3).merger.r == 3
