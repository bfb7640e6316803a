"""TokenTask and teachers: what a task's state is, what train() reaches, and the average by name."""

import copy
import random

import numpy as np
import pytest
import torch
from timm.task import TrainingTask
from torch import nn

from timm_tokens import seeding
from timm_tokens.tasks import TokenTask, cosine, frozen_copy, linear, update_teacher


class Distil(TokenTask):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout()))
        self.teacher = frozen_copy(self.student)
        self.register_buffer("centre", torch.zeros(4))

    def forward(self, input, target=None):
        return {"loss": (self.trainable_module(input) - self.teacher(input) - self.centre).square().mean()}


def test_is_a_task_of_timm():
    task = Distil()
    assert isinstance(task, TrainingTask) and task.product is task.student is task.trainable_module
    task.to(torch.float64)
    assert task(torch.randn(5, 3, dtype=torch.float64))["loss"].requires_grad


def test_train_reaches_the_trainable_module_alone():
    task = Distil().train()
    assert task.training and task.student[2].training and not task.teacher.training
    task.eval()
    assert not task.training and not task.student[2].training


def test_state_has_the_teacher_and_buffers_and_comes_back():
    task, other = Distil(), Distil()
    nn.init.normal_(task.centre)
    other.load_task_state(copy.deepcopy(task.get_task_state()))
    for name, value in task.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    with pytest.raises(RuntimeError, match=r"not one of this Distil: missing \['centre'\], unexpected \['queue'\]"):
        state = task.get_task_state()
        other.load_task_state({"queue": state.pop("centre")} | state)


def test_generators_differ_by_call_and_step_and_repeat():
    def draws(step, seed=0):
        task = TokenTask(nn.Identity(), seed=seed)
        task.start_step(step, 10, 5)
        return [torch.rand((), generator=task.generator()).item() for _ in range(2)]

    assert draws(3) == draws(3)
    assert len({*draws(3), *draws(4), *draws(3, seed=1)}) == 6


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_teacher_is_the_moving_average(momentum):
    student, before = Distil().student, Distil().student
    with torch.no_grad():
        student[1].running_mean.fill_(3.0)
        student[1].num_batches_tracked.fill_(7)
    teacher = frozen_copy(before)
    update_teacher(teacher, student, momentum)
    for name, value in teacher.state_dict().items():
        old, new = before.state_dict()[name], student.state_dict()[name]
        expected = momentum * old + (1 - momentum) * new if old.is_floating_point() else new
        torch.testing.assert_close(value, expected, msg=name)
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training


def test_teacher_is_matched_by_name():
    student = nn.ModuleDict({"predictor": nn.Linear(2, 2), "backbone": nn.Linear(3, 3)})
    teacher = frozen_copy(nn.ModuleDict({"backbone": nn.Linear(3, 3)}))
    update_teacher(teacher, student, 0.0)
    assert torch.equal(teacher["backbone"].weight, student["backbone"].weight)
    with pytest.raises(
        ValueError, match=r"'predictor.weight' has shape \(2, 2\), the student has nothing of this name"
    ):
        update_teacher(student, teacher, 0.5)
    with pytest.raises(ValueError, match=r"'weight' has shape \(3, 2\), the student has shape \(3, 3\)"):
        update_teacher(nn.Linear(2, 3), nn.Linear(3, 3), 0.5)


def test_schedules():
    assert [cosine(0.04, 0.4, step, 11) for step in (0, 5, 10, 20)] == pytest.approx([0.04, 0.22, 0.4, 0.4])
    assert [linear(0.04, 0.07, step, 4) for step in range(5)] == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07])
    assert cosine(1.0, 2.0, 0, 1) == linear(1.0, 2.0, 0, 1) == 2.0


def test_seeded_leaves_the_global_generators_as_they_were():
    def draw():
        return torch.rand(1).item(), random.random(), np.random.rand()

    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    expected = [draw(), draw()]
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    drawn = [draw()]
    with seeding.seeded(1, 2, 3):
        first = draw()
        with seeding.seeded(4):  # and those of another, which it stands in
            inner = draw()
        second = draw()
    drawn.append(draw())
    assert drawn == expected
    with seeding.seeded(1, 2, 3):
        assert (draw(), draw()) == (first, second)
    with pytest.raises(KeyError), seeding.seeded(4):
        assert draw() == inner
        raise KeyError
    assert len({*first, *second, *inner}) == 9
    assert seeding.derived_seed(1, 23) != seeding.derived_seed(12, 3)
