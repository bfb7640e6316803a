"""Activation checkpointing, DDP and FSDP2 train a merging model to what one plain process trains it to."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from gloo import on_two
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from timm_tokens import add_aux_tokens
from timm_tokens.tasks import TokenLabelTask

WORLD, STEPS, BATCH = 2, 3, 4  # BATCH images on each process
CLOSE = dict(atol=5e-5, rtol=1e-4)
FSDP_ON_CPU = hasattr(torch.cpu.Stream, "record_event")
needs_fsdp = pytest.mark.skipif(not FSDP_ON_CPU, reason="FSDP2 of torch 2.6 needs a GPU")
PARALLEL = ["ddp", pytest.param("fsdp", marks=needs_fsdp)]


def prepared(training, r=3, metric="learned"):
    family = "class_token" if training == "modular" else "average"
    model = tiny.merging(
        family, depth=3, r=r, metric=metric, tau1=0.5, tau2=0.5
    ).train()  # low temperatures amplify rounding
    return model.freeze_base(training == "modular")


def with_aux():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return add_aux_tokens(tiny.base("average", depth=2), 2, 2).train()


class Classified(torch.nn.Module):
    """What a task trains a model to, through the task."""

    def __init__(self, model):
        super().__init__()
        self.task = TokenLabelTask(model).prepare_distributed()

    def forward(self, images):
        return self.task.trainable_module(images)

    def state_dict(self):
        return self.task.student.state_dict()


def batches(rank=0, world=1):
    """STEPS batches; the same images in total for any number of processes."""
    for step in range(STEPS):
        images = tiny.images(WORLD * BATCH, seed=step)
        yield images.chunk(world)[rank], torch.arange(WORLD * BATCH).chunk(world)[rank]


def trained(model, rank=0, world=1):
    """Train in place, then the whole state as plain tensors.

    A large epsilon, so that AdamW neither blows rounding errors up nor hides a wrong scale of the gradients.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, eps=0.01)
    for images, labels in batches(rank, world):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    state = {name.removeprefix("module."): value.detach() for name, value in model.state_dict().items()}
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


def sharded(model, names=("attn", "mlp")):
    """Wrap these modules of every block ("" is the block itself), then the whole model."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in model.base.blocks:
        for name in names:
            fully_shard(block.get_submodule(name), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sharded_base(model):
    fully_shard(model.base, mesh=init_device_mesh("cpu", (WORLD,)))
    return model


SCENARIOS = {
    "ddp-end_to_end": lambda: DistributedDataParallel(prepared("end_to_end")),
    "ddp-modular": lambda: DistributedDataParallel(prepared("modular")),
    "fsdp-end_to_end": lambda: sharded(prepared("end_to_end")),
    "fsdp-modular": lambda: sharded(prepared("modular")),
    "fsdp-keys": lambda: sharded(prepared("end_to_end", metric="keys"), ["mlp"]),
    "fsdp-keys_of_wrapped": lambda: sharded(prepared("end_to_end", metric="keys")),
    "fsdp-keys_of_layers": lambda: sharded(prepared("end_to_end", metric="keys"), ["attn.qkv", "mlp"]),
    "fsdp-whole_blocks_learned": lambda: sharded(prepared("end_to_end"), [""]),
    "fsdp-whole_blocks_keys": lambda: sharded(prepared("end_to_end", metric="keys"), [""]),
    "fsdp-base": lambda: sharded_base(prepared("end_to_end")),
    "ddp-unused": lambda: DistributedDataParallel(prepared("modular", r=[3])),
    "ddp-find_unused": lambda: DistributedDataParallel(prepared("modular", r=[3]), find_unused_parameters=True),
    "ddp-aux_unused": lambda: DistributedDataParallel(with_aux()),
    "ddp-aux_find_unused": lambda: DistributedDataParallel(with_aux(), find_unused_parameters=True),
    "ddp-aux_static_graph": lambda: DistributedDataParallel(with_aux(), static_graph=True),
    "ddp-aux_base": lambda: DistributedDataParallel(with_aux().base),
    "ddp-aux_task": lambda: Classified(with_aux()),
    "ddp-merging_task": lambda: Classified(prepared("modular", r=[3])),
    "ddp-static_graph": lambda: DistributedDataParallel(prepared("modular", r=[3]), static_graph=True),
}


def work(rank, folder):
    """Run every scenario; a state, or the error's text, for each."""
    results = {}
    for name in SCENARIOS:
        if name.startswith("fsdp") and not FSDP_ON_CPU:
            continue
        try:
            results[name] = trained(SCENARIOS[name](), rank, WORLD)
        except (RuntimeError, TypeError) as error:
            results[name] = f"{type(error).__name__}: {error}"
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of the processes made of each scenario."""
    return on_two(work, tmp_path_factory.mktemp("gloo"))


def assert_trained(states, expected):
    for state in states:
        assert not isinstance(state, str), state
        torch.testing.assert_close(state, expected, **CLOSE)


@pytest.mark.parametrize("training", ["end_to_end", "modular"])
@pytest.mark.parametrize("parallel", PARALLEL)
def test_two_processes_train_what_one_trains(results, parallel, training):
    start, expected = prepared(training).state_dict(), trained(prepared(training))
    moved = {name: (value - start[name]).abs().max() for name, value in expected.items()}
    if training == "modular":  # a class token can't teach the embedding of the last block
        assert all(moved.pop(name) == 0 for name in start if name.startswith("base."))
        assert moved.pop("merger.embed.2.bias") == 0 < moved.pop("merger.embed.2.weight") < 1e-3  # weight decay
    assert min(moved.values()) > 1e-3  # far more than the tolerance
    assert_trained([result[f"{parallel}-{training}"] for result in results], expected)


@pytest.mark.parametrize("option", ["find_unused", "static_graph"])
def test_ddp_with_blocks_that_merge_nothing(results, option):
    """The embedding of a block that merges nothing gets no gradient, which DDP must be told."""
    assert all("find_unused_parameters=True" in result["ddp-unused"] for result in results)
    assert_trained([result[f"ddp-{option}"] for result in results], trained(prepared("modular", r=[3])))


def test_ddp_with_auxiliary_tokens_that_class_logits_do_not_need(results):
    """They get no gradient, which DDP must be told: the package's tasks do, and the base has none."""
    start, expected = with_aux().state_dict(), trained(with_aux())
    assert all(torch.equal(start[name], value) for name, value in expected.items() if name.startswith("aux."))
    assert not torch.equal(start["base.blocks.0.attn.qkv.weight"], expected["base.blocks.0.attn.qkv.weight"])
    assert all("find_unused_parameters=True" in result["ddp-aux_unused"] for result in results)
    for option in ("find_unused", "static_graph", "task"):
        assert_trained([result[f"ddp-aux_{option}"] for result in results], expected)
    plain = {name.removeprefix("base."): value for name, value in expected.items() if name.startswith("base.")}
    assert_trained([result["ddp-aux_base"] for result in results], plain)
    assert_trained([result["ddp-merging_task"] for result in results], trained(prepared("modular", r=[3])))


@needs_fsdp
@pytest.mark.parametrize("scenario", ["keys", "keys_of_wrapped", "keys_of_layers"])
def test_fsdp_trains_with_keys(results, scenario):
    expected = trained(prepared("end_to_end", metric="keys"))
    assert_trained([result[f"fsdp-{scenario}"] for result in results], expected)


@needs_fsdp
@pytest.mark.parametrize("metric", ["learned", "keys"])
def test_fsdp_trains_whole_blocks(results, metric):
    """FSDP2 works by the block's hooks, which fire also where its tokens merge."""
    expected = trained(prepared("end_to_end", metric=metric))
    assert_trained([result[f"fsdp-whole_blocks_{metric}"] for result in results], expected)


@needs_fsdp
def test_fsdp_around_the_base_alone_is_an_error_that_says_what_to_wrap(results):
    for result in results:
        assert result["fsdp-base"].startswith("TypeError")
        assert "wrap or compile the TokenViT instead of its base" in result["fsdp-base"]


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, torch.compile], ids=["checkpoint_wrapper", "compile"])
def test_a_wrapped_block_is_an_error_that_says_what_to_wrap(wrap):
    model = tiny.merging()
    model.base.blocks[0] = wrap(model.base.blocks[0])
    with pytest.raises(TypeError, match=r"is a wrapped block.*wrap its attn and mlp, or the whole model"):
        model(tiny.images())


def gradients(model, checkpointing):
    """Loss, gradients, and how often each block's attention ran."""
    calls = []
    for block in model.base.blocks:
        block.attn.register_forward_hook(lambda *_: calls.append(1))
    model.set_grad_checkpointing(checkpointing)
    loss = F.cross_entropy(model(tiny.images()), torch.arange(3))
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, len(calls)


@pytest.mark.parametrize("mode", ["relaxed", "hard", "keys", "modular", "dropout"])
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_activation_checkpointing_changes_no_gradient(family, mode):
    def run(checkpointing):
        torch.manual_seed(0)
        arguments = dict(drop_path_rate=0.3) if mode == "dropout" else {}
        model = tiny.merging(family, 3, base_args=arguments, metric="keys" if mode == "keys" else "learned")
        return gradients(model.train(mode != "hard").freeze_base(mode == "modular"), checkpointing)

    (loss, expected, calls), (checkpointed_loss, actual, checkpointed_calls) = run(False), run(True)
    assert torch.equal(checkpointed_loss, loss)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
    assert any(grad.abs().max() > 1e-4 for grad in expected.values())
    assert (calls, checkpointed_calls) == (3, 6)


def test_activation_checkpointing_compiles():
    model = tiny.merging().train()
    model.set_grad_checkpointing()
    images = tiny.images()
    torch._dynamo.reset()
    try:
        logits = torch.compile(model, fullgraph=True, backend="eager")(images)
    except torch._dynamo.exc.Unsupported as cause:
        if "must consist of tensors only" not in str(cause):
            raise
        pytest.skip("torch 2.6 compiles only checkpointed functions that return nothing but tensors")
    torch.testing.assert_close(logits, model(images))
