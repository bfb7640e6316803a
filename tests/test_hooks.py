"""Hooks of a block whose tokens merge fire as on the plain ViT, and what can't be honoured is refused in words."""

import pytest
import tiny
import torch
from timm.models import create_model
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from timm_tokens import add_aux_tokens, token_label_head

EVERY_FAMILY = pytest.mark.parametrize("family", list(tiny.FAMILIES))


def record(module):
    """A list that gets, in order, what every kind of forward hook of the module is given, and by which module."""
    seen = []

    def note(kind):
        return lambda *given, **named: seen.append((kind, given, named))

    module.register_forward_pre_hook(note("before"))
    module.register_forward_pre_hook(note("before with kwargs"), with_kwargs=True)
    module.register_forward_hook(note("after"))
    module.register_forward_hook(note("after with kwargs"), with_kwargs=True)
    return seen


@EVERY_FAMILY
@pytest.mark.parametrize("training", [False, True])
def test_hooks_see_the_blocks_inputs_and_outputs(family, training):
    model, x = tiny.merging(family, depth=3).train(training), tiny.images()
    outputs, seen = [], [record(block) for block in model.base.blocks]
    for block in model.base.blocks:  # what enters the first half and leaves the second
        block.norm1.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    model.base.norm.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    model(x)
    for block, calls, entered, left in zip(model.base.blocks, seen, outputs, outputs[1:], strict=False):
        kinds = ["before", "before with kwargs", "after", "after with kwargs"]
        assert [kind for kind, *_ in calls] == kinds
        for kind, (module, args, *rest), _ in calls:
            assert module is block and len(args) == 1 and args[0] is entered
            if kind.startswith("after"):
                assert rest[-1] is left
            if kind.endswith("kwargs"):
                assert set(rest[0]) <= {"attn_mask", "rope"}


def test_hooks_fire_as_often_as_on_the_plain_model():
    plain, merging, x = tiny.base(depth=3), tiny.merging(depth=3), tiny.images()
    logs = [[record(block) for block in vit.blocks] for vit in (plain, merging.base)]
    plain(x)
    merging(x)
    merging(x)
    for once, twice in zip(*logs, strict=True):
        assert [kind for kind, *_ in once] * 2 == [kind for kind, *_ in twice]


@EVERY_FAMILY
@torch.no_grad()
def test_hooks_may_change_values(family):
    """As a block that is called whole does, with the same numbers in the end."""
    model, x = tiny.merging(family, depth=3, r=[3, 0, 0]), tiny.images()
    before = model(x)
    first, second = model.base.blocks[:2]
    handles = [
        first.register_forward_hook(lambda _, args, output: output * 0.5),
        second.register_forward_pre_hook(lambda _, args: args[0] * 2),
    ]
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
    handles.pop().remove()
    assert (model(x) - before).abs().max() > 1e-2
    handles.pop().remove()
    handles.append(first.register_forward_pre_hook(lambda _, args, kw: ((args[0] * 2,), kw), with_kwargs=True))
    handles.append(model.base.patch_embed.register_forward_hook(lambda _, args, output: output))
    changed = model(x)
    handles.pop(0).remove()
    assert (changed - before).abs().max() > 1e-2
    assert torch.equal(model(x), before)


@torch.no_grad()
def test_hooks_of_merging_with_auxiliary_tokens():
    model, x = add_aux_tokens(tiny.merging(depth=2), num_cls=2, num_pooled=0).eval(), tiny.images()
    seen = [record(block) for block in model.base.blocks]
    model(x, tokens=True)
    assert [calls[-1][1][-1].shape[1] for calls in seen] == [14 + 2, 11 + 2]


def test_hooks_of_what_holds_the_blocks():
    """timm's VisionTransformer calls it; what its hooks change goes on, and its backward hooks see the gradients."""
    plain, model, x = tiny.base("average"), tiny.merging("average"), tiny.images()
    logs = [record(vit.blocks) for vit in (plain, model.base)]
    plain(x)
    model(x)
    model.forward_features(x)
    once, twice = ([kind for kind, *_ in log] for log in logs)
    assert len(once) == 4 and twice == once * 2
    (entered,), left = logs[1][0][1][1], logs[1][-1][1][-1]
    assert entered.shape == (3, 17, 48) and left.shape == (3, 11, 48)
    seen = []
    model.base.blocks.register_full_backward_hook(lambda _, inputs, outputs: seen.append((inputs[0], outputs[0])))
    model.base.blocks.register_forward_hook(lambda _, args, output: torch.zeros_like(output) + output.mean())
    zeros = model(x)
    zeros.sum().backward()
    assert (zeros - zeros[:1]).abs().max() < 1e-6
    assert seen[0][0].shape == entered.shape and seen[0][1].shape == left.shape


def test_hooks_of_what_holds_the_blocks_see_all_tokens_of_the_last():
    model, seen = tiny.merging(), []
    model.base.blocks.register_forward_hook(lambda _, args, output: seen.append(output.shape))
    model(tiny.images())
    assert seen == [(3, 11, 48)]  # and not the class token alone, which the logits need


@torch.no_grad()
def test_hooks_of_all_modules_see_merging_blocks():
    model, seen = tiny.merging(depth=2), []
    handles = [
        register_module_forward_pre_hook(lambda module, args: seen.append(("before", module))),
        register_module_forward_hook(lambda module, args, output: seen.append(("after", module))),
    ]
    try:
        model(tiny.images())
    finally:
        for handle in handles:
            handle.remove()
    for block in model.base.blocks:
        assert [kind for kind, module in seen if module is block] == ["before", "after"]


class Failure(Exception):
    pass


def fail(*_):
    raise Failure


@torch.no_grad()
def test_hooks_that_are_always_called():
    """After an error of the block, or of another hook; an error of their own is a warning."""
    model, seen = tiny.merging(), []
    block = model.base.blocks[0]
    block.register_forward_hook(lambda _, args, output: seen.append(output), always_call=True)
    block.register_forward_hook(
        lambda _, args, kw, output: seen.append(output), always_call=True, with_kwargs=True, prepend=True
    )
    block.register_forward_hook(lambda *_: seen.append("never"))
    handle = block.mlp.register_forward_pre_hook(fail)
    with pytest.raises(Failure):
        model(tiny.images())
    assert seen == [None, None]
    handle.remove()
    seen.clear()
    handle = block.register_forward_hook(fail, prepend=True)
    with pytest.raises(Failure):
        model(tiny.images())
    assert len(seen) == 2 and all(output.shape[1] == 14 for output in seen)
    handle.remove()
    block.register_forward_hook(lambda *_: 1 / 0, always_call=True)
    block.mlp.register_forward_pre_hook(fail)
    with pytest.raises(Failure), pytest.warns(UserWarning, match="always_call=True raised"):
        model(tiny.images())


@pytest.mark.parametrize("training", [False, True])
def test_full_backward_hooks_see_the_blocks_gradients(training):
    model, x, seen = tiny.merging("average").train(training), tiny.images(), {}
    block, tensors = model.base.blocks[0], []
    block.register_forward_hook(lambda _, args, output: tensors.append(output))
    block.register_full_backward_pre_hook(lambda module, grads: seen.update(before=(module, grads)))
    block.register_full_backward_hook(lambda module, inputs, outputs: seen.update(after=(module, inputs, outputs)))
    model.base.norm_pre.register_forward_hook(lambda _, args, output: output.retain_grad() or tensors.append(output))
    model(x).square().mean().backward()
    (module, inputs, outputs), entered = seen["after"], tensors[0]
    assert module is block and seen["before"][0] is block
    assert outputs[0] is seen["before"][1][0] and outputs[0].shape == tensors[1].shape
    torch.testing.assert_close(inputs[0], entered.grad)
    assert inputs[0].abs().max() > 0


def test_full_backward_hooks_may_change_gradients():
    model = tiny.merging("average")
    model(tiny.images()).square().mean().backward()
    expected = model.base.patch_embed.proj.weight.grad.clone()
    model.zero_grad()
    model.base.blocks[0].register_full_backward_hook(lambda _, inputs, outputs: (inputs[0] * 2,))
    model(tiny.images()).square().mean().backward()
    torch.testing.assert_close(model.base.patch_embed.proj.weight.grad, 2 * expected)


def deprecated_backward_hook(block):
    block.register_backward_hook(lambda *_: None)


def compiled(block):
    block.compile(backend="eager")


def patched(block):
    block.forward = block.forward


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (deprecated_backward_hook, r"Block has a backward hook .* use register_full_backward_hook"),
        (compiled, r"Block\.compile\(\) was called.*compile its attn and mlp, or the whole model"),
        (patched, r"Block is a wrapped block.*wrap its attn and mlp, or the whole model"),
    ],
)
def test_what_would_be_bypassed_is_refused(change, message):
    model = tiny.merging()
    change(model.base.blocks[0])
    with pytest.raises(TypeError, match=message):
        model(tiny.images())
    model.merger.r = 0  # blocks that merge nothing are called whole
    with torch.no_grad():
        torch.testing.assert_close(model(tiny.images()), model.base(tiny.images()), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_hooks_compile():
    model, shapes = tiny.merging(depth=2), []
    for block in model.base.blocks:
        block.register_forward_pre_hook(lambda _, args, kw: ((args[0] * 1.1,), kw), with_kwargs=True)
        block.register_forward_hook(lambda _, args, output: shapes.append(output.shape[1]) or output + 0.1)
    expected = model(tiny.images())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tiny.images()), expected, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()
    assert shapes == [14, 11] * 2


@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_features_by_hooks_are_unmerged(training):
    """They are what timm gives of the plain ViT, which is equal where nothing merges; and what the getter gives."""
    options = dict(img_size=32, features_only=True)
    plain = create_model("test_vit", feature_cls="hook", **options).eval()
    x = torch.randn(2, 3, 32, 32)
    for r in (0, 2):
        arguments = dict(base="test_vit", merger=dict(r=r), **options)
        hooked, getter = (create_model("token_vit", feature_cls=cls, **arguments) for cls in ("hook", "getter"))
        weights = plain["body"].state_dict()
        hooked["body"].base.load_state_dict(weights)
        getter.model.load_state_dict(hooked["body"].state_dict(), strict=False)
        tokens, maps = hooked.train(training)(x), getter.train(training)(x)
        assert [t.shape for t in tokens] == [t.shape for t in plain(x)]
        for t, m in zip(tokens, maps, strict=True):
            torch.testing.assert_close(t[:, 1:].transpose(1, 2).unflatten(2, m.shape[2:]), m)
        if not r:
            torch.testing.assert_close(tokens, plain(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_hooks_of_the_base_itself():
    """Before anything that is asked for, and after logits, which the base gives; forward_features fires none."""
    model, x = tiny.merging(), tiny.images()
    expected, tokens, features = model(2 * x), model(2 * x, tokens=True), model.forward_features(x)
    seen = record(model.base)
    model.base.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    model.base.register_forward_hook(lambda _, args, output: output + 1)
    torch.testing.assert_close(model(x), expected + 1)
    assert [kind for kind, *_ in seen] == ["before", "before with kwargs", "after", "after with kwargs"]
    torch.testing.assert_close(model(x, tokens=True).patches, tokens.patches)
    torch.testing.assert_close(model.forward_features(x), features)
    labelled = token_label_head(model).eval()
    with_pool = labelled(x)
    model.base.register_forward_hook(lambda _, args, output: 0 * output)
    assert torch.equal(labelled(x), with_pool) and not model(x).any()


def patched_features(base):
    base.forward_features = base.forward_features


@pytest.mark.parametrize("change", [compiled, patched, patched_features])
def test_what_would_be_bypassed_of_the_base_is_refused(change):
    model = tiny.merging(r=0)
    change(model.base)
    with pytest.raises(TypeError, match=r"VisionTransformer was wrapped by FSDP, compiled .*; wrap or compile the Tok"):
        model(tiny.images())
