import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from timm_tokens.losses import MIRALoss
from timm_tokens.ops import sinkhorn_assign
from timm_tokens.tasks import MIRATask

BACKBONES = {  # the smallest of timm: ViTs and conv nets
    "test_vit": {"dynamic_img_size": True},
    "test_resnet": {},
    "test_efficientnet": {},
    "test_convnext": {},
}


def make(name="test_vit", seed=0, **kwargs):
    torch.manual_seed(seed)
    backbone = timm.create_model(name, num_classes=0, **BACKBONES[name])
    return MIRATask(backbone, **{"num_prototypes": 20, "hidden": 24, "width": 8} | kwargs)


def crops(batch=4, seed=0):
    """Two global crops and two local ones."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, size, size, generator=generator) for size in (64, 64, 32, 32)]


def optimizer_of(task):
    return torch.optim.AdamW(task.student.parameters(), lr=1e-2, weight_decay=0.1)


def train(task, optimizer, steps, total=6, per_epoch=2):
    losses = []
    for step in steps:
        task.start_step(step, total, per_epoch)
        optimizer.zero_grad()
        out = task(crops(seed=step))
        out["loss"].backward()
        task.before_optimizer()
        optimizer.step()
        task.end_step()
        losses.append(out["loss"].item())
    return losses


def test_the_loss_by_hand():
    task = make()
    with torch.no_grad():
        for parameter in task.teacher.parameters():
            parameter.mul_(1.1)
    task.start_step(3, 6, 2)
    task.student.eval(), task.teacher.eval()  # batch norm of one crop at a time is then that of all together
    inputs = crops()

    def logits(encoder, crop):
        features = nn.Sequential.forward(encoder.projector, encoder.backbone(crop))
        return F.normalize(features, dim=1) @ F.normalize(task.student.prototypes.weight, dim=1).T

    student = [logits(task.student.encoder, crop) for crop in inputs]
    teacher = [logits(task.teacher, crop) for crop in inputs[:2]]
    out = task(inputs)
    torch.testing.assert_close(out, MIRALoss(beta=task.beta)(student, teacher)._asdict())
    assert 2 / 3 < task.beta < 0.75 and not torch.allclose(student[0], teacher[0])


def test_crop_by_crop_by_hand():
    """As the paper's code: backbone and projector on one crop after the other, batch norms and all."""
    task, inputs = make("test_resnet", crop_by_crop=True).train(), crops()
    student, teacher = copy.deepcopy(task.student), copy.deepcopy(task.teacher)

    def logits(encoder, crop):
        features = nn.Sequential.forward(encoder.projector, encoder.backbone(crop))
        return F.normalize(features, dim=1) @ F.normalize(student.prototypes.weight, dim=1).T

    expected = MIRALoss(beta=task.beta)(
        [logits(student.encoder, crop) for crop in inputs], [logits(teacher, crop) for crop in inputs[:2]]
    )
    torch.testing.assert_close(task(inputs), expected._asdict())
    for found, reference in ((task.student, student), (task.teacher, teacher)):
        torch.testing.assert_close(found.state_dict(), reference.state_dict())
    assert not torch.allclose(make("test_resnet").train()(inputs)["loss"], expected.loss)


def test_the_criterion_decides_the_pseudo_labels():
    losses = [make(criterion=MIRALoss(assign=assign))(crops())["loss"] for assign in (None, sinkhorn_assign)]
    assert losses[0] != losses[1]


def test_schedules():
    task = make()
    task.start_step(0, 10, 4)
    assert (task.beta, task.momentum, task.frozen) == (0.75, 0.99, True)
    task.start_step(4, 10, 4)
    assert not task.frozen
    task.start_step(9, 10, 4)
    assert (task.beta, task.momentum) == (pytest.approx(2 / 3), 1.0)


def test_prototypes_rest_for_the_first_epoch():
    task = make()
    optimizer, start = optimizer_of(task), task.student.prototypes.weight.clone()
    train(task, optimizer, [0, 1])
    assert torch.equal(task.student.prototypes.weight, start)
    train(task, optimizer, [2])
    assert not torch.equal(task.student.prototypes.weight, start)


def test_the_teacher_follows():
    task = make()
    before = copy.deepcopy(task.teacher.state_dict())
    train(task, optimizer_of(task), [0])
    assert task.momentum == 0.99
    for name, parameter in task.student.encoder.named_parameters():
        expected = 0.99 * before[name] + 0.01 * parameter
        torch.testing.assert_close(task.teacher.get_parameter(name), expected.detach())


@pytest.mark.parametrize("name", BACKBONES)
def test_any_backbone(name):
    task = make(name)
    train(task, optimizer_of(task), [2])
    assert all(parameter.grad is not None for parameter in task.student.parameters())  # so DDP needs no option
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in task.teacher.parameters())
    fresh = timm.create_model(name, num_classes=0, **BACKBONES[name])
    assert type(task.product) is type(fresh)
    fresh.load_state_dict(task.product.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(fresh.eval()(images), task.product.eval()(images))


def test_what_comes_out_is_the_student_or_the_teacher():
    for publish, wanted in (("student", "trainable_module.encoder."), ("teacher", "teacher.")):
        task = make(publish=publish)
        train(task, optimizer_of(task), range(3))
        state = task.state_dict()
        for name, value in task.product.state_dict().items():
            assert torch.equal(value, state[f"{wanted}backbone.{name}"]), name
    with pytest.raises(ValueError, match="publish must be 'student' or 'teacher', got 'both'"):
        make(publish="both")


def test_the_teacher_normalises_by_the_batch_and_drops_nothing():
    task = make("test_efficientnet").train()
    norms = {m for m in task.teacher.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert {m for m in task.teacher.modules() if m.training} == norms != set()


def test_it_learns_to_tell_images_apart():
    torch.manual_seed(0)
    task, images = make("test_resnet", momentum=(0.9, 1.0)), 2 * torch.randn(8, 3, 32, 32)
    optimizer = torch.optim.AdamW(task.student.parameters(), lr=2e-3)
    terms = []
    for step in range(24):
        task.start_step(step, 24, 4)
        views = [images + 0.1 * torch.randn(8, 3, 32, 32, generator=task.generator()) for _ in range(2)]
        optimizer.zero_grad()
        terms.append(task(views))
        terms[-1]["loss"].backward()
        task.before_optimizer()
        optimizer.step()
        task.end_step()
    assert terms[-1]["loss"] < 0.7 * terms[0]["loss"]
    assert terms[-1]["mutual_information"] > 1.5  # of log 8 = 2.08: no collapse


def test_resumed_equals_uninterrupted():
    whole = make()
    expected = train(whole, optimizer_of(whole), range(6))
    first = make()
    optimizer = optimizer_of(first)
    losses = train(first, optimizer, range(3))
    state = copy.deepcopy((first.get_task_state(), optimizer.state_dict()))
    second = make(seed=1)
    second.load_task_state(state[0])
    optimizer = optimizer_of(second)
    optimizer.load_state_dict(state[1])
    assert losses + train(second, optimizer, range(3, 6)) == expected
    torch.testing.assert_close(second.state_dict(), whole.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": (0.75, 1.0)}, r"beta must stay in \[0, 1\), got \(0.75, 1.0\)"),
        ({"beta": (-0.1, 0.5)}, r"beta must stay in \[0, 1\)"),
        ({"momentum": (0.9, 1.1)}, r"momentum must stay in \[0, 1\], got \(0.9, 1.1\)"),
        ({"num_prototypes": 0}, "num_prototypes must be at least 1, got 0"),
        ({"global_crops": 0}, "global_crops must be at least 1, got 0"),
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"width": -1}, "width must be at least 1, got -1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_a_classifier_is_refused():
    with pytest.raises(ValueError, match=r"classifier for 1000 classes.*num_classes=0"):
        MIRATask(timm.create_model("test_resnet"))


@pytest.mark.parametrize(("inputs", "got"), [(torch.randn(2, 3, 32, 32), "one tensor"), (crops()[:1], "1 crops")])
def test_too_few_crops_are_refused(inputs, got):
    with pytest.raises(ValueError, match=f"list of 2 crops or more, got {got}"):
        make()(inputs)
