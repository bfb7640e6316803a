"""Two gloo processes with half of the batch each end with the weights of one that has it all, and so do two parts."""

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing
from gloo import on_two
from tiny import base

import timm_tokens
from timm_tokens import seeding
from timm_tokens.data import LabeledTarget
from timm_tokens.distributed import rank
from timm_tokens.models.lvvit_base import lvvit_base
from timm_tokens.ops import crop_maps
from timm_tokens.tasks import DTMTask, MIRATask, MTETask, TokenLabelTask

STEPS, BATCH = 3, 8


def dtm():
    student = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=0)
    return DTMTask(student, base())


def mira():
    backbone = base(num_classes=0, dynamic_img_size=True)  # features that differ: batch norm amplifies what is alike
    return MIRATask(backbone, num_prototypes=20, hidden=24, width=8, frozen_epochs=1 / STEPS)


def mira_conv():
    backbone = timm.create_model("test_resnet", num_classes=0)
    return MIRATask(backbone, num_prototypes=20, hidden=24, width=8, frozen_epochs=0)


def token_label(**options):
    return TokenLabelTask(timm_tokens.token_label_head(base(**options)))


def token_label_conv():
    """LV-ViT, whose stem has batch norm."""
    shape = dict(img_size=32, patch_size=8, stem_width=8, embed_dim=24, depth=2, num_heads=2, num_classes=10)
    return TokenLabelTask(timm_tokens.token_label_head(lvvit_base(**shape)))


def mte(objective, drop_path_rate=0.0, **options):
    vit = base(num_classes=0, dynamic_img_size=True, drop_path_rate=drop_path_rate)
    model = timm_tokens.add_aux_tokens(vit, 2, 1, kernel_size=3)
    return MTETask(model, objective, num_prototypes=20, hidden=24, width=8, queue_size=12, frozen_epochs=0, **options)


TASKS = {
    "dtm": dtm,
    "mira": mira,
    "mira, conv net": mira_conv,
    "token-label": token_label,
    "token-label, LV-ViT": token_label_conv,
    "dino": lambda: mte("dino"),
    "dino, batch norm": lambda: mte("dino", batch_norm=True),
    "ibot": lambda: mte("ibot"),
    "moby": lambda: mte("moby"),
    "dino, drop path": lambda: mte("dino", drop_path_rate=0.5),
    "moby, drop path": lambda: mte("moby", drop_path_rate=0.5),
    "token-label, drop path": lambda: token_label(drop_path_rate=0.5),
}
PARTS = ["dtm", "token-label"]  # whose losses have no term of the whole batch


def batch(name, step, part):
    """Images, or crops of them, and their targets: those of the global batch that are in part."""
    generator = torch.Generator().manual_seed(step)

    def draw(*shape):
        return torch.randn(BATCH, *shape, generator=generator)

    if name.startswith("token-label"):
        indices = draw(10, 6, 6).argsort(1)[:, :3].int()
        maps = crop_maps(draw(4).sigmoid() / 2)
        target = LabeledTarget(torch.arange(BATCH), draw(3, 6, 6).half(), indices, maps)
        return draw(3, 32, 32)[part], LabeledTarget(*(x[part] for x in target))
    if name == "dtm":
        return draw(3, 32, 32)[part], None
    sizes = (32, 32) if name.startswith("moby") else (32, 32, 16)
    return [draw(3, size, size)[part] for size in sizes], None


def trained(name, part, parts=1):
    """The task's state and its losses after a few steps with plain SGD, whose steps show the size of the gradients."""
    torch.manual_seed(0)
    task, losses = TASKS[name]().train(), []
    task = task.double() if "conv" in name else task  # float32 differs by the order of sums alone, but visibly
    if dist.is_initialized():
        task.prepare_distributed()
    optimizer = torch.optim.SGD(task.student.parameters(), lr=0.1)
    for step in range(STEPS):
        task.start_step(step, STEPS, STEPS)
        torch.manual_seed(seeding.derived_seed(0, step, rank()))  # as the trainer does
        optimizer.zero_grad()
        for some in torch.arange(BATCH)[part].chunk(parts):
            images, target = batch(name, step, some)
            out = task([x.double() for x in images] if "conv" in name else images, target)
            (out["loss"] / parts).backward()
            losses.append(out["loss"].detach())
        task.before_optimizer()
        optimizer.step()
        task.end_step()
    return {"losses": torch.stack(losses).unflatten(0, (STEPS, parts)).mean(1), **task.get_task_state()}


def work(rank, folder):
    half = slice(BATCH // 2 * rank, BATCH // 2 * (rank + 1))
    return {name: trained(name, half) for name in TASKS}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return on_two(work, tmp_path_factory.mktemp("gloo"))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=5e-6, rtol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", TASKS)
def test_two_processes_equal_one(two, name):
    first, second = (out[name] for out in two)
    losses = (first.pop("losses") + second.pop("losses")) / 2
    assert all(torch.equal(first[key], value) for key, value in second.items())
    assert_same(first | {"losses": losses}, trained(name, slice(None)))


@pytest.mark.parametrize("name", PARTS)
def test_accumulated_parts_equal_the_whole(name):
    assert_same(trained(name, slice(None), parts=2), trained(name, slice(None)))
