"""A merging model compiles into one graph, exports with a dynamic batch, and is the same model afterwards."""

import copy
import pickle
import shutil

import pytest
import tiny
import torch

CLOSE = dict(atol=1e-4, rtol=1e-4)
FAMILIES = list(tiny.FAMILIES)
BATCH = torch.export.Dim("batch", max=1024)  # torch 2.6 can't export even a plain ViT without an upper bound


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, backend="eager"):
    return torch.compile(model, fullgraph=True, backend=backend)


def loss_and_gradients(function, model, images):
    model.zero_grad()
    loss = function(images).square().mean()
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def identity(model):
    """What must be the same after a model was used in any way."""
    x = tiny.images(4, seed=9)
    base = model.base
    facts = dict(
        model=type(model),
        base=type(base),
        base_forward=type(base).forward,
        block_forwards=[type(block).forward for block in base.blocks],
        own_attributes=sorted(vars(base)),
        names=list(model.state_dict()),
        modes=[module.training for module in model.modules()],
        hooks=sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
    )
    return facts, dict(model.state_dict(), logits=model(x), base_logits=base(x))


def assert_same(before, after):
    assert after[0] == before[0]
    torch.testing.assert_close(after[1], before[1], atol=0, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_compiled_evaluation_equals_eager(family):
    model = tiny.merging(family)
    torch.testing.assert_close(compiled(model)(tiny.images()), model(tiny.images()), **CLOSE)


@torch.no_grad()
def test_training_free_merging_compiles():
    model = tiny.merging(metric="keys")
    torch.testing.assert_close(compiled(model)(tiny.images()), model(tiny.images()), **CLOSE)


def test_compiled_training_equals_eager():
    model = tiny.merging("rope").train()  # a class token's: test_merging_composes.py
    before = identity(model)
    expected = loss_and_gradients(model, model, tiny.images())
    actual = loss_and_gradients(compiled(model, "aot_eager"), model, tiny.images())
    assert any(grad.abs().max() > 1e-4 for name, grad in actual[1].items() if name.startswith("merger."))
    torch.testing.assert_close(actual, expected, **CLOSE)
    assert_same(before, identity(model))


@torch.no_grad()
def test_r_can_be_set_after_compiling():
    model = tiny.merging()
    fast = compiled(model)
    for r in (3, [5, 1]):
        model.merger.r = r
        torch.testing.assert_close(fast(tiny.images()), model(tiny.images()), **CLOSE)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:Skipping serialization:UserWarning")  # of its own settings, by torch 2.6
@torch.no_grad()
def test_inductor_equals_eager():
    from torch._inductor import config  # not above: it takes time to import

    model = tiny.merging("average", depth=1)
    # AVX2, where the CPU has it, untried: to try out what the compiler knows takes a third of the test
    with config.patch({"cpp.simdlen": 256, "cpp.vec_isa_ok": True}):
        found = compiled(model, "inductor")(tiny.images())
    torch.testing.assert_close(found, model(tiny.images()), **CLOSE)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_shape_depends_on_data(family, training):
    """Meta tensors have a shape and no data: reading a value or leaving the input's device is an error there."""
    model = tiny.merging(family).to("meta").train(training)
    logits = model(torch.empty(3, 3, 32, 32, device="meta"))
    assert logits.shape == (3, 10)


@pytest.mark.parametrize("family", ["class_token", "rope"])
def test_export_with_a_dynamic_batch(family):
    model = tiny.merging(family)
    before = identity(model)
    program = torch.export.export(model, (tiny.images(),), dynamic_shapes=({0: BATCH},)).module()
    for batch in (1, 3, 5):
        x = tiny.images(batch, seed=batch)
        torch.testing.assert_close(program(x), model(x), **CLOSE)
    assert_same(before, identity(model))
    assert loss_and_gradients(model.train(), model, tiny.images())[1]


def test_onnx_with_a_dynamic_batch():
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = tiny.merging("rope")  # which averages its patches, too
    before = identity(model)
    program = torch.onnx.export(model, (tiny.images(),), dynamo=True, dynamic_shapes=({0: BATCH},), verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for batch in (1, 5):
        x = tiny.images(batch, seed=batch)
        (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(x).detach(), **CLOSE)
    assert_same(before, identity(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_is_the_same_model_and_independent(family, copied):
    model = tiny.merging(family)
    before, twin = identity(model), copied(model)
    assert_same(before, identity(twin))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    twin.merger.r = 1
    assert_same(before, identity(model))
    assert not torch.equal(twin(tiny.images()), model(tiny.images()))


def test_a_compiled_model_can_be_copied_and_pickled():
    model = tiny.merging()
    before = identity(model)
    compiled(model)(tiny.images())
    assert_same(before, identity(copy.deepcopy(model)))
    assert_same(before, identity(pickle.loads(pickle.dumps(model))))
