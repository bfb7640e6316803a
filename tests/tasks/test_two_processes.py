"""Two gloo processes with half of the batch each must end with the weights of one that has it all."""

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing
from gloo import on_two
from tiny import base

from timm_tokens.tasks import DTMTask, MIRATask

STEPS = 3


def dtm():
    student = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=0)
    return DTMTask(student, base())


def mira():
    backbone = base(num_classes=0, dynamic_img_size=True)  # features that differ: batch norm amplifies what is alike
    return MIRATask(backbone, num_prototypes=20, hidden=24, width=8, frozen_epochs=1 / STEPS)


TASKS = {"dtm": dtm, "mira": mira}


def batch(name, step, part):
    generator = torch.Generator().manual_seed(step)
    if name == "mira":
        return [torch.randn(8, 3, size, size, generator=generator)[part] for size in (32, 32, 16)]
    return [torch.randn(8, 3, 32, 32, generator=generator)[part], (torch.rand(8, 16, generator=generator) < 0.4)[part]]


def trained(name, part):
    """The task's state and its losses after a few steps with plain SGD, whose steps show the size of the gradients."""
    torch.manual_seed(0)
    task, losses = TASKS[name](), []
    if dist.is_initialized():
        task.prepare_distributed()
    optimizer = torch.optim.SGD(task.student.parameters(), lr=0.5)
    for step in range(STEPS):
        task.start_step(step, STEPS, STEPS)
        optimizer.zero_grad()
        out = task(batch(name, step, part))
        out["loss"].backward()
        task.before_optimizer()
        optimizer.step()
        task.end_step()
        losses.append(out["loss"].detach())
    return {"losses": torch.stack(losses), **task.get_task_state()}


def work(rank, folder):
    return {name: trained(name, slice(4 * rank, 4 * rank + 4)) for name in TASKS}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return on_two(work, tmp_path_factory.mktemp("gloo"))


@pytest.mark.parametrize("name", TASKS)
def test_two_processes_equal_one(two, name):
    one = trained(name, slice(None))
    first, second = (out[name] for out in two)
    losses = one.pop("losses")
    torch.testing.assert_close((first.pop("losses") + second.pop("losses")) / 2, losses)
    assert first.keys() == one.keys()
    for key, value in one.items():
        torch.testing.assert_close(first[key], value, atol=5e-6, rtol=1e-4, msg=lambda m, key=key: f"{key}: {m}")
        assert torch.equal(first[key], second[key]), key
