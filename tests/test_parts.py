"""Auxiliary tokens, the token-label head and the mask token, alone and together, for every family."""

import itertools

import pytest
import timm
import torch
from families import DRIVABLE, MERGEABLE, create, images
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import timm_tokens
from timm_tokens import TokenViT, add_aux_tokens, apply_dtem_merging, blocks, rotary, token_label_head
from timm_tokens.ops import aux_attention_mask, mix_tokens, size_bias
from timm_tokens.parts import AdaptivePool
from timm_tokens.wrap import add_mask_token

every_family = pytest.mark.parametrize("family", DRIVABLE)
every_mergeable = pytest.mark.parametrize("family", MERGEABLE)
BOX = (1, 2, 4, 5)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def with_aux(model, num_cls=5, num_pooled=2, **options):
    """Auxiliary tokens that differ clearly."""
    model = add_aux_tokens(model, num_cls, num_pooled, kernel_size=5, **options)
    with torch.no_grad():
        model.aux.tokens.normal_()
    return model.eval()


# ---------------------------------------------------------------------------------------------- auxiliary tokens


@every_family
@torch.no_grad()
def test_auxiliary_tokens_change_nothing(family):
    base, x = create(family), images()
    plain, model = TokenViT(base).eval(), with_aux(base)
    without, tokens = plain(x, tokens=True), model(x, tokens=True)
    close(tokens.cls, without.cls)
    close(tokens.prefix, without.prefix)
    close(tokens.patches, without.patches)
    assert tokens.aux_cls.shape == (2, 5, 48) and tokens.pooled.shape == (2, 2, 48)
    assert without.aux_cls is None and without.pooled is None
    assert model(x, tokens=True, aux=False).aux_cls is None
    torch.testing.assert_close(model(x), base(x), rtol=0, atol=1e-6)
    assert set(model.base.state_dict()) == set(base.state_dict())


@every_mergeable
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_auxiliary_tokens_change_no_merging(family, training):
    base, x = create(family), images()
    mixed = "mixed" in family  # timm 1.0.26 has their rotary embeddings in float32 only
    if training and not mixed:  # relaxed merging's low temperatures make 1e-4 of float32's rounding
        base, x = base.double(), x.double()
    merging = apply_dtem_merging(base, r=7).train(training)
    model = with_aux(merging).train(training)
    tolerance = 1e-3 if training and mixed else 1e-5
    close(model(x, tokens=True).patches, merging(x, tokens=True).patches, tolerance)
    close(model(x, tokens=True).cls, merging(x, tokens=True).cls, tolerance)


@pytest.mark.parametrize("sees", [{}, dict(aux_sees_cls=True), dict(aux_sees_aux=True)])
@pytest.mark.parametrize("family", ["vit", "dinov2_registers", "dinov3", "rope_mixed", "respost"])
@torch.no_grad()
def test_masked_attention_equals_two_streams(family, sees):
    """An auxiliary token by itself: a sequence of what it may see and itself, through the same blocks."""
    base, x = create(family), images()
    model = with_aux(base, **sees)
    p, k = base.num_prefix_tokens, 5
    tokens, ropes = blocks.embed(base, x)
    aux = model.aux.tokens.expand(len(x), -1, -1)
    for i, block in enumerate(base.blocks):
        rope = {} if ropes is None else {"rope": ropes[i]}
        context = torch.cat([tokens, aux], dim=1)
        seen = torch.ones(context.shape[1], context.shape[1], dtype=torch.bool)
        n = tokens.shape[1]
        for q, key in itertools.product(range(n, n + k), range(n + k)):
            seen[q, key] = (
                key == q
                or p <= key < n
                or (key < p and "aux_sees_cls" in sees)
                or (key >= n and "aux_sees_aux" in sees)
            )
        full = {} if ropes is None else {"rope": rotary.unrotated(ropes[i], k)}
        # the model's own tokens see everything here: only the auxiliary rows are read
        aux = block(context, attn_mask=torch.zeros(1, 1, *seen.shape).masked_fill(~seen, -1e9), **full)[:, n:]
        tokens = block(tokens, **rope)
    close(model(x, tokens=True).aux_cls, base.norm(aux))


def test_the_mask():
    seen = aux_attention_mask(3, 1, 2)[0, 0] == 0
    assert seen.tolist() == [
        [True, True, True, False, False],
        [True, True, True, False, False],
        [True, True, True, False, False],
        [False, True, True, True, False],
        [False, True, True, False, True],
    ]
    everything = aux_attention_mask(3, 1, 2, sees_prefix=True, sees_aux=True)[0, 0] == 0
    assert everything[3:].all() and not everything[:3, 3:].any()


def test_auxiliary_tokens_differ_and_learn():
    model = add_aux_tokens(create("vit"), 3, 3).train()
    tokens = model(images(), tokens=True)
    for kind in (tokens.aux_cls, tokens.pooled):
        assert (kind[:, 0] - kind[:, 1]).abs().max() > 1e-4
    (tokens.aux_cls.square().sum() + tokens.pooled[..., :7].sum()).backward()
    assert model.aux.tokens.grad.abs().sum() > 0 and model.aux.pool.conv.weight.grad.abs().sum() > 0


def test_the_cls_token_learns_nothing_into_the_auxiliary_tokens():
    model = add_aux_tokens(create("vit"))
    model(images(), tokens=True).cls.square().sum().backward()
    assert model.aux.tokens.grad is None or not model.aux.tokens.grad.any()
    assert all(p.grad is None for p in model.aux.pool.parameters())


@pytest.mark.parametrize("num_cls, num_pooled", [(0, 0), (3, 0), (0, 2)])
def test_counts(num_cls, num_pooled):
    tokens = add_aux_tokens(create("vit"), num_cls, num_pooled)(images(), tokens=True)
    assert (tokens.aux_cls is None) == (num_cls == 0) and (tokens.pooled is None) == (num_pooled == 0)


@pytest.mark.parametrize("size", [(64, 40), (16, 16)])
def test_auxiliary_tokens_on_other_image_sizes(size):
    model = with_aux(create("vit", dynamic_img_size=True))
    tokens = model(torch.randn(2, 3, *size), tokens=True)
    assert tokens.aux_cls.shape == (2, 5, 48) and tokens.pooled.shape == (2, 2, 48)


@pytest.mark.parametrize("weight", ["channel", "spatial"])
@torch.no_grad()
def test_the_pooling(weight):
    pool = AdaptivePool(6, 4, kernel_size=3, pool_weight=weight)
    x = torch.randn(2, 6, 5, 7)
    u = torch.nn.functional.layer_norm(x.permute(0, 2, 3, 1), (6,), eps=1e-6).permute(0, 3, 1, 2)
    weights = pool.weights(u)
    close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    scores = pool.conv(u)
    expected = torch.zeros(2, 4, 6)
    for b, i, c in itertools.product(range(2), range(4), range(6)):
        w = scores[b, c * 4 + i if weight == "channel" else i].flatten().softmax(0)
        expected[b, i, c] = (w * u[b, c].flatten()).sum()
    close(pool(x), pool.out_norm(expected))
    constant = torch.randn(1, 6, 1, 1).expand(2, 6, 5, 7)
    pooled = pool(constant)
    normed = torch.nn.functional.layer_norm(constant[:, :, 0, 0], (6,), eps=1e-6)
    close(pooled, pool.out_norm(normed)[:, None].expand(-1, 4, -1))
    assert AdaptivePool(6, 4, kernel_size=3, pool_weight=weight, pool_norm="none")(x).shape == (2, 4, 6)


@pytest.mark.parametrize("dim", [8, 200])
@torch.no_grad()
def test_pooled_tokens_start_different(dim):
    """One map a token is neither even nor a single position at first, however wide the model is."""
    logits = AdaptivePool(dim, 50).conv(torch.randn(1, dim, 12, 12))[0, :, 6, 6]
    assert 0.5 < logits.std() < 2
    pooled = torch.nn.functional.normalize(AdaptivePool(dim, 6)(torch.randn(4, dim, 12, 12)), dim=-1)
    assert ((pooled @ pooled.mT).sum((1, 2)) - 6).mean() / 30 < 0.9


@torch.no_grad()
def test_pooling_serves_conv_nets():
    net = timm.create_model("test_resnet", num_classes=0).eval()
    pool = AdaptivePool(net.num_features, 3)
    assert pool(net.forward_features(torch.randn(2, 3, 96, 96))).shape == (2, 3, net.num_features)


# ---------------------------------------------------------------------------------------------- token-label head


@every_family
@torch.no_grad()
def test_the_head_adds_the_strongest_token(family):
    base, x = create(family), images()
    model = token_label_head(base).eval()
    logits = model(x, dense=True)
    assert logits.cls.shape == (2, 5) and logits.tokens.shape == (2, 36, 5)
    close(logits.cls, base(x))
    close(model(x), logits.cls + 0.5 * logits.tokens.amax(dim=1))
    average = token_label_head(base, pool="avg", pool_weight=2).eval()
    average.head.load_state_dict(model.head.state_dict())
    close(average(x), logits.cls + 2 * logits.tokens.mean(dim=1))
    close(model.forward_head(model.forward_features(x)), model(x))


@every_family
@torch.no_grad()
def test_mixtoken_gives_every_token_back_to_its_image(family):
    """The slow way: mix the embedded patches by hand, run the blocks, swap the outputs back."""
    base, x = create(family), images(4)
    model = token_label_head(base).eval()
    mixed = model(x, dense=True, box=torch.tensor(BOX))
    tokens, ropes = blocks.embed(base, x)
    p = base.num_prefix_tokens
    tokens = torch.cat([tokens[:, :p], mix_tokens(tokens[:, p:], BOX, (6, 6))], dim=1)
    for i, block in enumerate(base.blocks):
        tokens = block(tokens) if ropes is None else block(tokens, rope=ropes[i])
    tokens = base.norm(tokens)
    close(mixed.cls, base.forward_head(tokens))
    close(mixed.tokens, mix_tokens(model.head.tokens(base.fc_norm(tokens[:, p:])), BOX, (6, 6)))
    close(model(x, dense=True, box=(0, 0, 0, 0)).tokens, model(x, dense=True).tokens)
    whole = model(x, dense=True, box=(0, 0, 6, 6))  # every image is another one, and gets its own logits back
    close(whole.tokens, model(x, dense=True).tokens)


@every_mergeable
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_merged_patches_share_their_groups_logits(family, training):
    base, x = create(family), images()
    model = token_label_head(apply_dtem_merging(base, r=7)).train(training)
    logits = model(x, dense=True)
    features = model.forward_features(x)
    close(logits.tokens, model.head.tokens(base.fc_norm(features[:, base.num_prefix_tokens :])))
    close(model(x), logits.cls + 0.5 * logits.tokens.amax(dim=1), 1e-4)
    model.head.pool = "avg"
    close(model(x), logits.cls + 0.5 * logits.tokens.mean(dim=1), 1e-4)
    if not training:
        groups = model.token_groups(x).flatten(1)
        same = groups[:, :, None] == groups[:, None, :]
        close(
            logits.tokens[:, :, None].expand(-1, -1, 36, -1)[same], logits.tokens[:, None].expand(-1, 36, -1, -1)[same]
        )


def test_a_head_for_other_classes_leaves_the_base_alone():
    base, x = create("vit"), images()
    model = token_label_head(base, 11).eval()
    assert model.num_classes == 11 and base.num_classes == 5 and base(x).shape == (2, 5)
    assert model(x).shape == (2, 11) and model(x, dense=True).tokens.shape == (2, 36, 11)
    assert model.get_classifier() is model.head.cls
    featureless = create("vit")
    featureless.reset_classifier(0)
    featureless = token_label_head(featureless, 4)
    assert featureless(x).shape == (2, 4)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and model.head.cls is None and base.num_classes == 7
    model.reset_classifier(0)
    assert model.head is None and model(x).shape == (2, 48)


@every_family
def test_flops_with_a_head(family):
    def counted(x):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(x)
        return counter.get_total_flops()

    for classes in (None, 11):
        model = token_label_head(create(family), classes).eval()
        x = images(1)
        assert model.flops(image_size=(48, 48)) == (counted(torch.cat([x, x])) - counted(x)) // 2


# ---------------------------------------------------------------------------------------------- mask token


@every_family
@torch.no_grad()
def test_masked_patches_get_the_mask_token_and_keep_their_place(family):
    base, x = create(family), images()
    model = add_mask_token(base).eval()
    model.mask_token.normal_()
    mask = torch.zeros(2, 36, dtype=torch.bool)
    close(model(x, tokens=True, mask=mask).patches, model(x, tokens=True).patches, 1e-5)
    mask[:, :20] = True
    masked = model(x, tokens=True, mask=mask).patches
    other = images()
    other[:, :, :16] = 0  # all of it under masked patches, as far as a convolutional stem looks, too
    close(model(other, tokens=True, mask=mask).patches, masked, 1e-4)
    assert (masked - model(x, tokens=True).patches).abs().max() > 1e-2
    zeros = TokenViT(base).eval()(x, tokens=True, mask=mask).patches
    model.mask_token.zero_()
    close(model(x, tokens=True, mask=mask).patches, zeros)


# ---------------------------------------------------------------------------------------------- together


VERBS = {
    "merger": lambda model: apply_dtem_merging(model, r=5),
    "aux": lambda model: with_aux(model),
    "head": lambda model: token_label_head(model),
    "mask_token": add_mask_token,
}


@pytest.mark.parametrize("order", list(itertools.permutations(VERBS, 2)) + list(itertools.permutations(VERBS, 4)))
@torch.no_grad()
def test_parts_compose_in_any_order(order):
    base, x = create("dinov3"), images()
    torch.manual_seed(0)
    model = base
    for part in order:
        model = VERBS[part](model)
        assert isinstance(model, TokenViT) and model.base is base
    model = model.eval()
    assert {name for name in VERBS if getattr(model, name) is not None} == set(order)
    tokens = model(x, tokens=True)
    reference = apply_dtem_merging(base, r=5).eval() if "merger" in order else TokenViT(base).eval()
    close(tokens.patches, reference(x, tokens=True).patches)
    if "aux" in order:
        assert tokens.aux_cls.shape == (2, 5, 48)
    if "head" in order:
        logits = model(x, dense=True)
        close(logits.cls, reference(x))
        close(model(x), logits.cls + 0.5 * logits.tokens.amax(dim=1))


@pytest.mark.parametrize("part", VERBS)
def test_a_part_added_twice_is_refused(part):
    model = VERBS[part](create("vit"))
    with pytest.raises(ValueError, match=r"already.*wrap model\.base to start again"):
        VERBS[part](model)


def test_sizes_reach_the_auxiliary_tokens():
    """With merging, an auxiliary token counts a merged token as often as it has members."""
    base, x = create("vit"), images()
    model = with_aux(apply_dtem_merging(base, r=9)).eval()
    seen = []
    handles = [
        b.attn.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["attn_mask"]), with_kwargs=True)
        for b in base.blocks
    ]
    model(x, tokens=True)
    for handle in handles:
        handle.remove()
    n = 37 - 9
    bias = seen[1]
    assert bias.shape == (2, 1, n + 5, n + 5)
    sizes = bias[:, 0, -1, 1:n].exp()
    close(sizes.sum(1), torch.full((2,), 36.0), 1e-3)
    close(bias[:, 0, 0, :n], bias[:, 0, -1, :n].masked_fill(torch.arange(n) < 1, 0), 1e-4)


# ---------------------------------------------------------------------------------------------- timm's protocol


def create_with_parts(**more):
    return timm.create_model(
        "token_vit",
        base="test_vit",
        num_classes=6,
        aux=dict(num_cls=2, num_pooled=1),
        merger=dict(r=3),
        head=dict(num_classes=9),
        mask_token=True,
        **more,
    )


@torch.no_grad()
def test_saved_with_all_parts_it_comes_back(tmp_path):
    model = create_with_parts().eval()
    x = torch.randn(2, 3, 160, 160)
    timm.models.save_for_hf(model, tmp_path, model_args=model.model_args)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.head.num_classes == 9 and again.base.num_classes == 6
    close(again(x), model(x))
    for a, b in zip(again(x, tokens=True), model(x, tokens=True), strict=True):
        close(a, b)


def test_layer_decay_treats_new_tokens_as_the_stem():
    model = create_with_parts()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert scale["aux.tokens"] == scale["mask_token"] == scale["base.cls_token"] < scale["head.tokens.weight"] == 1
    groups = create_optimizer_v2(model, opt="adamw", weight_decay=0.1).param_groups
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert decay["aux.tokens"] == decay["mask_token"] == 0 < decay["head.tokens.weight"]


@pytest.mark.parametrize("name", ["vit_tiny_mte", "vit_small_mte", "vit_base_mte"])
def test_registered_models(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=3)
    assert model.aux.num_cls == model.aux.num_pooled == 6 and model.num_classes == 3
    assert timm.models.get_pretrained_cfg(name).classifier == "base.head"


@torch.no_grad()
def test_compiled_whole():
    torch._dynamo.reset()
    model, x = create_with_parts(depth=3).eval(), torch.randn(2, 3, 160, 160)
    close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    mask = torch.rand(2, 100) < 0.5
    for a, b in zip(compiled(x, tokens=True, mask=mask), model(x, tokens=True, mask=mask), strict=True):
        close(a, b)
    box = torch.tensor([1, 2, 5, 6])
    for a, b in zip(compiled(x, dense=True, box=box), model(x, dense=True, box=box), strict=True):
        close(a, b)


def test_gradient_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    model, x = token_label_head(with_aux(apply_dtem_merging(create("vit"), r=4))).train(), images()

    def gradients():
        model.zero_grad()
        tokens, logits = model(x, tokens=True), model(x, dense=True, box=BOX)
        sum(t.square().mean() for t in (*tokens, *logits)).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.set_grad_checkpointing()
    for a, b in zip(gradients(), plain, strict=True):
        close(a, b, 1e-4)


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "verb, options, error, message",
    [
        (add_aux_tokens, dict(num_cls=-1), ValueError, "num_cls must be at least 0, got -1"),
        (add_aux_tokens, dict(num_pooled=1.5), TypeError, "num_pooled must be an int, got 1.5"),
        (add_aux_tokens, dict(kernel_size=4), ValueError, "kernel_size must be odd, got 4"),
        (add_aux_tokens, dict(pool_weight="token"), ValueError, "pool_weight must be one of 'spatial', 'channel'"),
        (add_aux_tokens, dict(pool_norm="sum"), ValueError, "pool_norm must be one of 'softmax', 'none', got 'sum'"),
        (token_label_head, dict(num_classes=0), ValueError, "num_classes must be at least 1, got 0"),
        (token_label_head, dict(num_classes="5"), TypeError, "num_classes must be an int, got '5'"),
        (token_label_head, dict(pool="mean"), ValueError, "pool must be 'max' or 'avg', got 'mean'"),
        (token_label_head, dict(pool_weight="1"), TypeError, "pool_weight must be a number, got '1'"),
    ],
)
def test_bad_arguments(verb, options, error, message):
    with pytest.raises(error, match=message):
        verb(create("vit"), **options)


def test_no_classes_and_none_given():
    base = create("vit")
    base.reset_classifier(0)
    with pytest.raises(ValueError, match=r"has no classes .*give num_classes"):
        token_label_head(base)


@pytest.mark.parametrize("verb", [add_aux_tokens, token_label_head, add_mask_token])
def test_other_models_are_refused(verb):
    with pytest.raises(TypeError, match=r"ResNet can't be driven from outside; supported are timm's VisionTransformer"):
        verb(timm.create_model("test_resnet"))


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(dense=True), r"dense=True needs a token-label head; .* token_label_head\(model\)"),
        (dict(box=BOX), "need dense=True"),
        (dict(tokens=True, mask=torch.ones(2, 7, dtype=torch.bool)), r"\(B, N\) = \(2, 36\) .*6 x 6 .*\(2, 7\)"),
        (dict(tokens=True, mask=torch.ones(2, 36)), "mask must be bool .* got torch.float32"),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        TokenViT(create("vit"))(images(), **call)


def test_dense_and_tokens_together():
    with pytest.raises(ValueError, match="dense=True or tokens=True, not both"):
        token_label_head(create("vit"))(images(), dense=True, tokens=True)


def test_pooled_tokens_need_every_patch():
    model = add_aux_tokens(create("vit", patch_drop_rate=0.5)).train()
    with pytest.raises(ValueError, match=r"18 patches don't fill the grid of 6 x 6.*without patch dropout"):
        model(images(), tokens=True)


def test_naflex_with_dropout_in_its_stem_refuses_masks():
    model = TokenViT(create("naflex"))
    model.base.embeds.pos_drop = torch.nn.Dropout(0.5)
    with pytest.raises(ValueError, match=r"NaFlexVit with .*position dropout"):
        model.train()(images(), tokens=True, mask=torch.ones(2, 36, dtype=torch.bool))


def test_distilled_training_and_the_head_exclude_each_other():
    with pytest.raises(ValueError, match="one set of logits"):
        token_label_head(create("deit_distilled")).set_distilled_training()


def test_size_bias_and_mask_share_a_file_but_not_a_shape():
    assert size_bias(torch.ones(2, 3)).shape == (2, 1, 1, 3)
    assert timm_tokens.ops.aux_attention_mask(3, 1, 2).shape == (1, 1, 5, 5)
