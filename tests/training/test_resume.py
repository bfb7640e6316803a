"""A run that is killed at any step and resumed has the same losses, weights and tables as one that was not."""

import pytest
import torch
from runs import Killed, run

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
    with pytest.raises(FileExistsError, match=r"there is a run in .* already, at step 2: --resume to go on"):
        run(tmp_path, steps=2, warmup_epochs=0)
    with pytest.raises(ValueError, match=r"other settings \(lr 0.05 -> 0.1, steps 2 -> 4\): use those, or another"):
        run(tmp_path, steps=4, warmup_epochs=0, lr=0.1, resume=True)
    (tmp_path / "last.pth").write_bytes(b"half a che")
    with pytest.raises(ValueError, match=r"last.pth can't be read as a checkpoint"):
        run(tmp_path, steps=2, warmup_epochs=0, resume=True)
