"""Two processes train as one does with the joined batch, and resume after a kill as one does."""

import signal

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from gloo import on_two
from killing import Killed
from PIL import Image
from runs import Follow, Points, run
from safetensors.torch import load_file
from timm.layers import DropPath
from torch import nn

from timm_tokens.cli import call
from timm_tokens.stopping import Stopped
from timm_tokens.training import Accuracy, compiling
from timm_tokens.training.history import read

OPTIONS = dict(epochs=2, clip_grad=0.5, weight_decay_end=0.4, ema=0.7)


# Plain SGD: Adam would make large steps of gradients that are zero but for rounding.
COMMAND = dict(command="train token-label", model="test_vit", img_size=32, steps=3, workers=0, device="cpu")
COMMAND |= dict(opt="momentum", lr=0.1)


def accuracy(model):
    data = Points(7)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        items = [data[i] for i in range(7)]
    return {"top1": Accuracy(items, batch_size=2, topk=(1,))(model)["top1"]}


def dropping():
    """A task with stochastic depth, for which one process draws as many do together."""
    task = Follow(dropout=0, noise=0)
    task.student[2] = DropPath(0.5)
    forward = task.forward
    task.forward = lambda x, y: task.place_in_order(len(x)) or forward(x, y)
    return task


def work(rank, folder):
    parts = OPTIONS | dict(batch_size=1, accumulate=2)
    result, task = run(folder / "two", Follow(dropout=0, noise=0), evaluate=accuracy, **parts)
    torch.save((result.model.state_dict(), task.get_task_state()), folder / f"{rank}.pt")
    call(**COMMAND, data_dir=folder / "images", out=folder / "command", batch_size=2)
    compiling.BACKEND = "eager"
    run(folder / "compiled", dropping(), compile=True, batch_size=2, **OPTIONS)
    run(folder / "whole", Follow(), **OPTIONS)
    try:
        run(folder / "killed", Follow(), kill=3, **OPTIONS)
    except Killed:
        dist.barrier()
    run(folder / "killed", Follow(), resume=True, **OPTIONS)
    stopped = stop_in_step_0(rank, folder / "stopped")
    run(folder / "stopped", Follow(), resume=True, **OPTIONS)
    return stopped


def stop_in_step_0(rank, out):
    """The second process alone gets a signal: where each of them then stops."""
    task = Follow()
    task.before_optimizer = lambda: rank == 1 and task.step == 0 and signal.raise_signal(signal.SIGTERM)
    try:
        run(out, task, **OPTIONS | dict(log_every=10, save_every=100))
    except Stopped as stopped:
        return task.step, stopped.code, torch.load(out / "last.pth")["step"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    for i in range(12):
        path = folder / "images" / ("train", "val")[i // 8] / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (20 * i, 100, 200)).save(path)
    on_two(work, folder)
    return folder


def test_joined_batch(folder, tmp_path):
    one, task = run(tmp_path, Follow(dropout=0, noise=0), evaluate=accuracy, batch_size=2, accumulate=2, **OPTIONS)
    for rank in range(2):
        model, state = torch.load(folder / f"{rank}.pt")
        for found, expected in ((model, one.model.state_dict()), (state, task.get_task_state())):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5, msg=name)
    for table in ("steps.csv", "summary.csv"):
        for found, expected in zip(read(folder / "two" / table), read(tmp_path / table), strict=True):
            assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm's ImageDataset leaves that to the collector
def test_command(folder, tmp_path):
    call(**COMMAND, data_dir=folder / "images", out=tmp_path, batch_size=4)
    for table in ("steps.csv", "summary.csv"):
        for found, expected in zip(read(folder / "command" / table), read(tmp_path / table), strict=True):
            assert found == pytest.approx(expected, rel=1e-4)
    weights = load_file(folder / "command" / "model.safetensors")
    for name, value in load_file(tmp_path / "model.safetensors").items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_compiled_they_train_as_one_that_is_not(folder, tmp_path):
    run(tmp_path, dropping(), batch_size=4, **OPTIONS)
    for found, expected in zip(read(folder / "compiled/steps.csv"), read(tmp_path / "steps.csv"), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_killed_and_resumed(folder):
    for table in ("steps.csv", "summary.csv"):
        assert (folder / "killed" / table).read_text() == (folder / "whole" / table).read_text()
    assert len(read(folder / "whole" / "steps.csv")) == 4


def test_stopped_by_a_signal_on_one_and_resumed(folder):
    assert [torch.load(folder / f"returned{rank}.pt") for rank in range(2)] == [(1, 143, 2)] * 2  # where they look
    for table in ("steps.csv", "summary.csv"):
        assert (folder / "stopped" / table).read_text() == (folder / "whole" / table).read_text()


def test_a_task_with_unused_parameters(tmp_path):
    task = Follow()
    task.trainable_module = nn.ModuleDict({"a": nn.Linear(1, 1)})
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        task.find_unused_parameters = True
        task.prepare_distributed()
        assert task.trainable_module.find_unused_parameters
        assert task.student is task.trainable_module.module
        assert {name.partition(".")[0] for name in task.get_task_state()} == {"trainable_module", "teacher", "seen"}
        assert "trainable_module.a.weight" in task.get_task_state()
        with task.no_sync():
            assert not task.trainable_module.require_backward_grad_sync
    finally:
        dist.destroy_process_group()
