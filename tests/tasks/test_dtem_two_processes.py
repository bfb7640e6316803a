"""Two gloo processes with half of the batch each must train merging as one does that has it all."""

import pytest
import torch
import torch.distributed as dist
from gloo import on_two
from timm.data import Mixup
from tiny import merging

from timm_tokens.tasks import DTEMTask

STEPS = 3
TASKS = {
    "logits": lambda: DTEMTask(merging(r=3), r=(1, 8)),
    "features": lambda: DTEMTask(merging("average", r=3, base_args={"num_classes": 0}), r=(1, 8)),
    "labels": lambda: DTEMTask(merging(r=[4, 0]), target="labels"),
    "mixup": lambda: DTEMTask(
        merging(r=3), target="labels", mixup=Mixup(cutmix_alpha=1.0, num_classes=10, label_smoothing=0.0)
    ),
    "all": lambda: DTEMTask(merging(r=3), train="all"),
}


def trained(name, part):
    """The task's state, its losses and the r of its steps."""
    torch.manual_seed(0)
    task, losses, drawn = TASKS[name](), [], []
    if dist.is_initialized():
        task.prepare_distributed()
    trainable = [p for p in task.student.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.02)  # small: choices of tokens amplify what rounds differently
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x, target = torch.randn(8, 3, 32, 32, generator=generator), torch.rand(8, 10, generator=generator).softmax(1)
        target = target.argmax(1) if name == "mixup" else target
        task.train().start_step(step, STEPS, STEPS)
        drawn.append(task.product.merger.schedule[0])
        optimizer.zero_grad()
        out = task(x[part], target[part])
        out["loss"].backward()
        optimizer.step()
        task.end_step()
        losses.append(out["loss"].detach())
    return {"losses": torch.stack(losses), "r": torch.tensor(drawn), **task.get_task_state()}


def work(rank, folder):
    return {name: trained(name, slice(4 * rank, 4 * rank + 4)) for name in TASKS}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return on_two(work, tmp_path_factory.mktemp("gloo"))


@pytest.mark.parametrize("name", TASKS)
def test_two_processes_equal_one(two, name):
    one = trained(name, slice(None))
    first, second = (out[name] for out in two)
    torch.testing.assert_close((first.pop("losses") + second.pop("losses")) / 2, one.pop("losses"))
    assert first.keys() == one.keys()
    for key, value in one.items():
        torch.testing.assert_close(first[key], value, atol=2e-5, rtol=1e-4, msg=lambda m, key=key: f"{key}: {m}")
        assert torch.equal(first[key], second[key]), key
    start = TASKS[name]().get_task_state()
    assert any((one[key] - value).abs().max() > 1e-4 for key, value in start.items())
    if name in ("logits", "features"):
        assert len(set(one["r"].tolist())) > 1
