"""A run that is killed at any step and resumed has the same losses, weights and tables as one that was not."""

import pytest
import timm
import torch
from killing import Killed
from runs import Follow, run

from timm_tokens.tasks import MIRATask, MTETask, TokenLabelTask
from timm_tokens.training.history import read


def outcome(out):
    return {name: (out / name).read_text() for name in ("steps.csv", "summary.csv")}


def evaluate(model):
    return {"size": sum(p.square().sum() for p in model.parameters()).item()}


CHANGES = dict(weight_decay_end=0.4, clip_grad=0.5, clip_mode="parameter", ema=0.8, accumulate=2, batch_size=2)


@pytest.mark.parametrize("kill", [0, 1, 4, 5, 7, 14])
def test_killed_and_resumed(kill, tmp_path):
    whole, _ = run(tmp_path / "whole", evaluate=evaluate, **CHANGES)
    with pytest.raises(Killed):
        run(tmp_path / "killed", kill=kill, evaluate=evaluate, **CHANGES)
    resumed, _ = run(tmp_path / "killed", evaluate=evaluate, resume=True, **CHANGES)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value)
    assert resumed.epochs == whole.epochs
    assert [row["step"] for row in read(tmp_path / "killed" / "steps.csv")] == list(range(15))


def test_killed_twice_with_workers_and_other_intervals(tmp_path):
    _, whole = run(tmp_path / "whole")
    for kill, workers in ((4, 0), (8, 2)):
        with pytest.raises(Killed):
            run(tmp_path / "killed", kill=kill, workers=workers, resume=True, save_every=2, log_every=1)
    _, resumed = run(tmp_path / "killed", resume=True)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


def test_a_finished_run_resumes_to_itself(tmp_path):
    first, _ = run(tmp_path, steps=12, evaluate=evaluate, eval_every=2)
    before = outcome(tmp_path)
    again, _ = run(tmp_path, steps=12, evaluate=evaluate, eval_every=2, resume=True)
    assert outcome(tmp_path) == before
    assert again.epochs == first.epochs and len(again.epochs) == 3
    assert [set(row) >= {"eval_size"} for row in first.epochs] == [False, True, True]


def test_will_not_mix_two_runs(tmp_path):
    run(tmp_path, steps=2, warmup_epochs=0)
    with pytest.raises(FileExistsError, match=r"there is a run in .* already, at step 2: resume it"):
        run(tmp_path, steps=2, warmup_epochs=0)
    with pytest.raises(ValueError, match=r"other settings \(lr 0.05 -> 0.1, steps 2 -> 4\): use those, or another"):
        run(tmp_path, steps=4, warmup_epochs=0, lr=0.1, resume=True)


# --- another length ---

CONSTANT = dict(sched="none", warmup_epochs=None)


class Constant(Follow):
    """Its teacher's momentum does not depend on the length of the run."""

    def start_step(self, step, total_steps, steps_per_epoch):
        super().start_step(step, total_steps, steps_per_epoch)
        self.momentum = 0.95

    def bound_to_length(self):
        return []


def test_a_run_of_constant_schedules_may_become_longer(tmp_path):
    whole, _ = run(tmp_path / "whole", Constant(), epochs=3, evaluate=evaluate, **CONSTANT)
    run(tmp_path / "longer", Constant(), epochs=1, evaluate=evaluate, **CONSTANT)
    longer, _ = run(tmp_path / "longer", Constant(), epochs=3, evaluate=evaluate, resume=True, **CONSTANT)
    assert outcome(tmp_path / "longer") == outcome(tmp_path / "whole")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(longer.model.state_dict()[name], value)
    with pytest.raises(ValueError, match="has done 15 steps: it can't end after 10"):
        run(tmp_path / "longer", Constant(), epochs=2, resume=True, **CONSTANT)


def test_what_is_scheduled_over_the_run_forbids_another_length(tmp_path):
    changes = dict(epochs=2, weight_decay_end=0.1)
    run(tmp_path, Follow(), **changes)
    reasons = (
        r"the cosine schedule .*rate ends with it, and the schedule of the weight decay ends with it, and what Follow"
    )
    with pytest.raises(
        ValueError, match=rf"can't get another length \(epochs 2 -> 4\): {reasons} schedules may depend"
    ):
        run(tmp_path, Follow(), resume=True, **changes | dict(epochs=4))


def test_tasks_say_what_they_schedule_over_the_run():
    conv = timm.create_model("test_resnet", num_classes=0)
    shape = dict(num_prototypes=4, hidden=4, width=4)
    assert MIRATask(conv, **shape).bound_to_length() == [
        "the beta goes from 0.75 at its start to 0.666667 at its end",
        "the teacher's momentum goes from 0.99 at its start to 1 at its end",
    ]
    assert MIRATask(conv, beta=(0.7, 0.7), momentum=(0.9, 0.9), **shape).bound_to_length() == []
    vit = timm.create_model("test_vit", num_classes=0)
    assert MTETask(vit, **shape).bound_to_length() == [
        "the teacher's momentum goes from 0.996 at its start to 1 at its end"
    ]
    assert MTETask(vit, momentum=(0.9, 0.9), **shape).bound_to_length() == []
    assert TokenLabelTask(timm.create_model("test_vit")).bound_to_length() == []
