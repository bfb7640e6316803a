"""FSDP2 through the training loop: two processes that share a model out train what one does, and resume alike."""

import sys
from pathlib import Path

import pytest
import tiny
import torch
from gloo import on_two
from killing import Killed, dies_before
from safetensors.torch import load_file
from torch.utils.data import Dataset

from timm_tokens.distributed import is_sharded, whole
from timm_tokens.tasks import DTEMTask, update_teacher
from timm_tokens.training import Settings, compiling, train
from timm_tokens.training.history import read

sys.path.append(str(Path(__file__).parents[1] / "tasks"))
from test_two_processes import TASKS, batch

FSDP_ON_CPU = hasattr(torch.cpu.Stream, "record_event")  # not so in torch 2.6
needs_fsdp = pytest.mark.skipif(not FSDP_ON_CPU, reason="FSDP2 of torch 2.6 needs a GPU")


def dtem(train):
    return DTEMTask(tiny.merging("class_token", depth=3, r=4), r=(2, 5), train=train)


MORE = {"dtem": lambda: dtem("embeddings"), "dtem, all": lambda: dtem("all")}
KINDS = {  # what is trained, and settings that shall not change it
    "dino, drop path": dict(ema=0.5, clip_grad=0.5),
    "ibot": dict(accumulate=2, batch_size=2, clip_grad=0.1, clip_mode="parameter"),
    "moby": dict(clip_grad=0.01, clip_mode="value"),
    "mira": dict(momentum=0.5),
    "dtm": dict(opt="adamw", lr=0.001, ema=0.9, steps=3),  # an average begins with the third
    "token-label, drop path": dict(layer_decay=0.5),
    "dtem": dict(weight_decay_end=0.4),
    "dtem, all": dict(lr=0.001),
}


class Batch(Dataset):
    """The images of `test_two_processes.batch`, one by one."""

    def __init__(self, name):
        self.images, self.target = batch("dtm" if "dtem" in name else name, 0, torch.arange(8))

    def __len__(self):
        return 8

    def __getitem__(self, index):
        target = 0 if self.target is None else type(self.target)(*(x[index] for x in self.target))
        one = [x[index] for x in self.images] if isinstance(self.images, list) else self.images[index]
        return one, target


GOES_ON = dict(batch_size=4, opt="adamw", ema=0.5, steps=3, save_every=1, evaluate=lambda model: size(model))


def run(name, out, kill=None, evaluate=None, **changes):
    """Train for two steps; with `kill` the process dies, so to say, before that step's optimizer."""
    torch.manual_seed(0)
    task = dies_before((TASKS | MORE)[name](), kill)
    options = dict(out=out, steps=2, batch_size=8, workers=0, log_every=1, warmup_epochs=0)
    options |= dict(opt="sgd", lr=0.05)  # whose steps show the size of the gradients
    return train(task, Batch(name), Settings(**options | changes), evaluate=evaluate), task


def size(model):
    return {"size": sum(float(p.norm()) for p in model.parameters())}


def resumed(name, out, kill, **options):
    """Killed before a step, and run again."""
    try:
        run(name, out, kill=kill, **options)
    except Killed:
        torch.distributed.barrier()
    return run(name, out, **options | dict(resume=True))[1]


def work(number, folder):
    found = {}
    compiling.BACKEND = "eager"
    for name, changes in KINDS.items():
        half = {"batch_size": changes.get("batch_size", 8) // 2, "compile": name == "token-label, drop path"}
        result, task = run(name, folder / name, fsdp=True, evaluate=size, **changes | half)
        assert sum(p.to_local().numel() for p in task.student.parameters()) < 0.7 * count(task.student)
        assert not any(is_sharded(p) for p in result.model.parameters())
        found[name] = whole(task.get_task_state()), dict(result.model.state_dict())
    run("mira", folder / "whole", fsdp=True, **GOES_ON)
    resumed("mira", folder / "killed", 2, fsdp=True, **GOES_ON)
    for before, after in ((True, False), (False, True)):
        out = folder / f"{before}{after}"
        run("dtm", out, batch_size=4, steps=1, sched="none", fsdp=before)
        task = run("dtm", out, batch_size=4, steps=3, sched="none", fsdp=after, resume=True)[1]
        found[before, after] = whole(task.get_task_state())
    found["plain"] = run("dtm", folder / "plain", batch_size=4, steps=3, sched="none")[1].get_task_state()
    return found


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    return folder, on_two(work, folder)


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=5e-6, rtol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


@needs_fsdp
@pytest.mark.parametrize("name", KINDS)
def test_two_sharded_processes_are_one_that_is_not(name, two, tmp_path):
    folder, results = two
    result, task = run(name, tmp_path, evaluate=size, **KINDS[name])
    for found in results:
        assert_close(found[name][0], task.get_task_state())
        assert_close(found[name][1], result.model.state_dict())
    for table in ("steps.csv", "summary.csv"):
        for ours, reference in zip(read(folder / name / table), read(tmp_path / table), strict=True):
            assert ours == pytest.approx(reference, rel=1e-3, abs=1e-5)
    for file in ("model.safetensors", "best.safetensors"):
        assert_close(load_file(folder / name / file), load_file(tmp_path / file))


@needs_fsdp
def test_killed_and_resumed_to_the_same_bytes(two):
    ours, reference = (two[0] / name for name in ("killed", "whole"))
    for file in ("last.pth", "model.safetensors", "best.safetensors", "steps.csv", "summary.csv"):
        assert (ours / file).read_bytes() == (reference / file).read_bytes(), file


@needs_fsdp
@pytest.mark.parametrize("before", [True, False])
def test_a_sharded_run_goes_on_unsharded_and_back(before, two):
    for found in two[1]:
        assert_close(found[before, not before], found["plain"])


@needs_fsdp
def test_checkpoints_hold_whole_tensors(two):
    state = torch.load(two[0] / "mira" / "last.pth")
    moments = [x for values in state["optimizer"]["state"].values() for x in values.values()]
    for tensors in (state["task_state"].values(), state["state_dict"].values(), moments):
        assert {type(x) for x in tensors} == {torch.Tensor}


def test_what_does_not_work_is_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"fsdp needs several processes .* start them with torchrun"):
        run("dtm", tmp_path, fsdp=True)
    monkeypatch.setattr("timm_tokens.training.sharding.world_size", lambda: 2)
    for changes, message in (
        (dict(clip_grad=1.0, clip_mode="agc"), "takes a clip_mode of norm, parameter or value, got agc"),
        (dict(opt="muon"), "fsdp takes the optimizers adamw, .* got opt muon"),
        (dict(amp="float16", device="cuda"), "takes no amp float16, .* use bfloat16"),
    ):
        with pytest.raises(ValueError, match=message if FSDP_ON_CPU or "device" in changes else "needs torch 2.7"):
            run("dtm", tmp_path, fsdp=True, **changes)


def test_a_teacher_must_be_sharded_as_its_student_is(monkeypatch):
    student, teacher = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    monkeypatch.setattr("timm_tokens.tasks.teacher.is_sharded", lambda x: x.data_ptr() == student.weight.data_ptr())
    with pytest.raises(ValueError, match="'weight' is sharded in the teacher or the student alone"):
        update_teacher(teacher, student, 0.5)
