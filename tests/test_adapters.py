"""Merging by keys compares the keys that the attention uses, whatever makes them: modules are called."""

import copy

import pytest
import torch
import torch.nn.functional as F
from families import create, images
from timm.layers import AttentionRope
from torch import nn
from torch.nn.utils import parametrizations

from timm_tokens import add_aux_tokens, apply_dtem_merging, token_label_head
from timm_tokens.keys import mean_keys
from timm_tokens.parts import AdaptivePool

FAMILIES = ("vit", "vit_qk_norm", "eva", "eva_apart", "eva02", "differential", "rope_axial", "lvvit")


class Wrapping(nn.Module):
    """An adapter that holds the layer, whose own weights it does not show."""

    def __init__(self, layer):
        super().__init__()
        self.layer, (out, width) = layer, layer.weight.shape
        self.down = nn.Linear(width, 4, bias=False)
        self.up = nn.Linear(4, out)
        nn.init.normal_(self.down.weight, std=0.3)
        nn.init.normal_(self.up.weight, std=0.3)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


class Showing(Wrapping):
    """An adapter that shows the layer's weights as its own."""

    weight = property(lambda self: self.layer.weight)
    bias = property(lambda self: self.layer.bias)
    in_features = property(lambda self: self.layer.in_features)
    out_features = property(lambda self: self.layer.out_features)


class Subclass(nn.Linear):
    """A linear layer with an adapter inside."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.load_state_dict(layer.state_dict())
        self.scale = nn.Parameter(torch.linspace(0.5, 2, layer.out_features))

    def forward(self, x):
        return super().forward(x) * self.scale


def hooked(layer):
    layer.register_forward_hook(lambda _, args, output: output * torch.linspace(0.5, 2, output.shape[-1]))
    return layer


def hooked_before(layer):
    layer.register_forward_pre_hook(lambda _, args: (args[0] * torch.linspace(0.5, 2, args[0].shape[-1]),))
    return layer


def patched(layer):
    layer.forward = lambda x, own=layer.forward: own(x) * torch.linspace(0.5, 2, layer.out_features)
    return layer


def normed(layer):
    layer = parametrizations.weight_norm(layer)
    layer.parametrizations.weight.original0.data *= torch.linspace(0.5, 2, layer.out_features).unsqueeze(1)
    return layer


def normed_before(layer):
    layer = nn.utils.weight_norm(layer)
    layer.weight_g.data *= torch.linspace(0.5, 2, layer.out_features).unsqueeze(1)
    return layer


def plain(layer):
    return layer


ADAPTERS = (Wrapping, Showing, Subclass, hooked, hooked_before, patched, normed, normed_before, plain)


def family(name):
    if name != "eva_apart":
        return create(name)
    base = create("eva")
    for block in base.blocks:
        block.attn.qkv_bias_separate = True  # the layer is called, and the biases are added to what it gives
    return base


def adapt(base, adapter):
    for block in base.blocks:
        name = "k_proj" if block.attn.qkv is None else "qkv"
        setattr(block.attn, name, adapter(getattr(block.attn, name)))
    return base


def used_keys(attn, y, monkeypatch):
    """The keys that the attention compares, averaged over heads."""
    seen, attention = [], F.scaled_dot_product_attention
    with monkeypatch.context() as patch:
        patch.setattr(
            F, "scaled_dot_product_attention", lambda q, k, v, **kw: seen.append(k) or attention(q, k, v, **kw)
        )
        attn(y)
    return torch.cat(seen, dim=1).mean(dim=1)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_keys_are_those_of_the_attention(name, monkeypatch):
    y = torch.randn(2, 7, 48)
    for adapter in ADAPTERS:
        if name == "eva" and adapter in (Wrapping, patched):
            continue  # timm reads the weight itself here, past the module
        attn = adapt(family(name), adapter).blocks[0].attn
        torch.testing.assert_close(mean_keys(attn, y), used_keys(attn, y, monkeypatch), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_keys_of_grouped_queries(monkeypatch):
    if "num_kv_heads" not in AttentionRope.__init__.__annotations__:
        pytest.skip("this timm has no grouped queries")
    attn, y = AttentionRope(48, 6, num_kv_heads=2, qkv_fused=False).eval(), torch.randn(2, 7, 48)
    for adapter in (plain, Wrapping, hooked):
        attn.k_proj = adapter(attn.k_proj)
        torch.testing.assert_close(mean_keys(attn, y), used_keys(attn, y, monkeypatch), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_keys_after_hooks_of_the_attention_and_the_norm(monkeypatch):
    attn, y = create("vit_qk_norm").blocks[0].attn, torch.randn(2, 7, 48)
    attn.register_forward_pre_hook(lambda _, args: (args[0] * torch.linspace(0.5, 2, 48),))
    attn.k_norm.register_forward_hook(lambda _, args, output: output + torch.linspace(0, 1, 16))
    torch.testing.assert_close(mean_keys(attn, y), used_keys(attn, y, monkeypatch), atol=1e-5, rtol=1e-5)
    attn.k_norm = nn.Identity()
    attn.k_norm.register_forward_hook(lambda _, args, output: output**2)
    torch.testing.assert_close(mean_keys(attn, y), used_keys(attn, y, monkeypatch), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", ["vit", "eva_apart", "eva02", "differential", "lvvit"])
@torch.no_grad()
def test_embeddings_start_as_the_keys(name):
    y = torch.randn(2, 7, 48)
    for adapter in ADAPTERS:
        base = adapt(family(name), adapter).train()
        merger = apply_dtem_merging(base, 4).merger
        assert all(module.training for module in base.modules())
        for embed, block in zip(merger.embed, base.eval().blocks, strict=True):
            torch.testing.assert_close(embed(y), mean_keys(block.attn, y), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("metric", ["keys", "learned"])
@torch.no_grad()
def test_an_adapted_model_merges_as_the_folded_one(metric):
    base = create("vit")
    folded = copy.deepcopy(base)
    adapt(base, Showing)
    for block, own in zip(base.blocks, folded.blocks, strict=True):
        adapter = block.attn.qkv
        own.attn.qkv.weight += adapter.up.weight @ adapter.down.weight
        own.attn.qkv.bias += adapter.up.bias
    models = [apply_dtem_merging(vit, 6, metric=metric).eval() for vit in (base, folded)]
    x = images(4)
    torch.testing.assert_close(models[0](x), models[1](x), atol=1e-4, rtol=1e-4)
    assert torch.equal(models[0].token_groups(x), models[1].token_groups(x))
    plainly = apply_dtem_merging(create("vit"), 6, metric=metric).eval().token_groups(x)
    assert (models[0].token_groups(x) == plainly).float().mean() < 0.9  # the adapters matter


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@torch.no_grad()
def test_adapters_compile():
    for adapter in (Wrapping, Subclass, hooked, normed):
        base = create("vit")
        base.blocks = base.blocks[:1]
        model = apply_dtem_merging(adapt(base, adapter), 6, metric="keys").eval()
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images()), model(images()), atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*quantization.*:DeprecationWarning", "ignore:.*quantiz.*:UserWarning")
@torch.no_grad()
def test_dynamic_int8(monkeypatch):
    """Quantised before or after it is wrapped, a model merges by its own keys, and costs as much."""
    x, y, quantize = images(4), torch.randn(2, 7, 48), torch.ao.quantization.quantize_dynamic
    before = apply_dtem_merging(quantize(create("vit"), {nn.Linear}), 6, metric="keys").eval()
    after = quantize(apply_dtem_merging(create("vit"), 6, metric="keys").eval(), {nn.Linear})
    torch.testing.assert_close(after(x), before(x), atol=0, rtol=0)
    attn = after.base.blocks[0].attn
    torch.testing.assert_close(mean_keys(attn, y), used_keys(attn, y, monkeypatch), atol=1e-5, rtol=1e-5)
    whole = apply_dtem_merging(after.base, 6)
    keys = mean_keys(attn, y)
    assert (whole.merger.embed[0](y) - keys).abs().max() < 0.05 * keys.abs().max()
    whole = quantize(token_label_head(add_aux_tokens(whole, 2, 2)).eval(), {nn.Linear})
    assert whole(x, dense=True).tokens.shape == (4, 36, 5) and whole(x, tokens=True).aux_cls.shape == (4, 2, 48)
    assert whole.flops() == token_label_head(apply_dtem_merging(create("vit"), 6)).flops()
    whole.reset_classifier(7)
    assert whole(x).shape == (4, 7)


def test_flops_count_adapters():
    model = apply_dtem_merging(create("vit"), 6, metric="keys")
    base, token, tokens = model.flops(0), 4 * (48 + 3 * 48), 37
    adapt(model.base, Showing)
    assert model.flops(0) - base == 3 * token * tokens
    assert model.flops() > apply_dtem_merging(create("vit"), 6, metric="keys").flops() + 3 * token * 25


@torch.no_grad()
def test_pooling_respects_what_changes_its_convolution():
    """For weights per channel, too, which a plain convolution gives faster from its kernels."""
    for weight in ("spatial", "channel"):
        pool, u = AdaptivePool(8, 2, kernel_size=3, pool_weight=weight), torch.randn(2, 8, 4, 4)
        plainly = pool.weights(u)
        handle = pool.conv.register_forward_hook(lambda _, args, output: output)
        torch.testing.assert_close(pool.weights(u), plainly)  # by the convolution as a whole
        handle.remove()
        pool.conv.register_forward_hook(lambda _, args, output: 0 * output)
        torch.testing.assert_close(pool.weights(u), torch.full_like(plainly, 1 / 16))
