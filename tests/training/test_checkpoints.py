"""Two checkpoints: the one before the last is used where the last is corrupt, and what is corrupt is never resumed."""

import errno

import pytest
import torch
from killing import Killed
from runs import Follow, Points, run, settings
from safetensors.torch import load_file
from torch import nn

from timm_tokens.training import checkpoints, train
from timm_tokens.training.checkpoints import LAST, PREVIOUS

ONE_EPOCH = dict(epochs=1, batch_size=1, dataset=Points(15), warmup_epochs=0)  # of 15 steps
FILES = ("steps.csv", "summary.csv", "model.safetensors", LAST, PREVIOUS)


@pytest.fixture
def killed(tmp_path):
    """A run that was killed after 10 steps, with checkpoints after 9 and 6 of its 15."""
    with pytest.raises(Killed):
        run(tmp_path / "killed", kill=10, **ONE_EPOCH)
    return tmp_path / "killed"


def resume(folder, **changes):
    return run(folder, **ONE_EPOCH, resume=True, **changes)


def flip(path, place=0.5):
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)


def same_as_whole(folder, tmp_path):
    run(tmp_path / "whole", **ONE_EPOCH)
    return all((folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in FILES)


def steps(folder):
    return [torch.load(folder / name)["step"] for name in (LAST, PREVIOUS)]


def test_the_one_before_the_last_is_kept(killed, tmp_path, capsys):
    assert steps(killed) == [9, 6]
    resume(killed)
    assert steps(killed) == [15, 12] and same_as_whole(killed, tmp_path)
    assert "going on from" not in capsys.readouterr().err
    assert not list(killed.glob(".*"))


@pytest.mark.parametrize("harm", [flip, lambda path: path.write_bytes(b""), lambda path: path.unlink()])
def test_a_corrupt_last_checkpoint_gives_way_to_the_one_before(killed, tmp_path, capsys, harm):
    harm(killed / LAST)
    with pytest.raises(Killed):  # at once: the corrupt one must not take the place of the good one
        resume(killed, kill=7)
    assert f"going on from {killed / PREVIOUS}, after 6 steps" in capsys.readouterr().err
    assert checkpoints.load(killed).state["step"] == 6 and checkpoints.load(killed).warning is None
    resume(killed)
    assert same_as_whole(killed, tmp_path)


def test_two_corrupt_checkpoints_are_refused(killed):
    flip(killed / LAST)
    flip(killed / PREVIOUS, 0.99)
    for changes in ({}, {"resume": True}):
        with pytest.raises(ValueError, match=r"last.pth is corrupt, its digest .*previous.pth is corrupt.*remove them"):
            run(killed, **ONE_EPOCH, **changes)
    (killed / PREVIOUS).unlink()
    with pytest.raises(ValueError, match=r"last.pth is corrupt, .* To start anew, remove it"):
        resume(killed)
    for other in ([1, 2], {"task_state": {}}):
        torch.save(other, killed / LAST)
        with pytest.raises(ValueError, match=r"last.pth is not a checkpoint of a run"):
            resume(killed)
    (killed / LAST).write_bytes(b"half a che")
    with pytest.raises(ValueError, match=r"last.pth can't be read as a checkpoint"):
        resume(killed)


def test_a_full_disk_leaves_the_last_checkpoint(killed, tmp_path, monkeypatch):
    def full(state, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    before = (killed / LAST).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*last.pth'"):
            resume(killed)
    assert (killed / LAST).read_bytes() == before and steps(killed) == [9, 6]
    resume(killed)
    assert same_as_whole(killed, tmp_path)


def test_a_kill_between_two_names_loses_nothing(killed, tmp_path, capsys):
    (killed / PREVIOUS).unlink()
    (killed / LAST).rename(killed / PREVIOUS)  # the new one has not got its name yet
    with pytest.raises(FileExistsError, match="already, at step 9"):
        run(killed, **ONE_EPOCH)
    resume(killed)
    assert same_as_whole(killed, tmp_path)
    assert f"there is no last.pth; going on from {killed / PREVIOUS}, after 9 steps" in capsys.readouterr().err


def test_what_a_kill_left_half_written_goes(killed, tmp_path):
    (killed / ".last.4194305.partial.pth").write_bytes(b"half")  # of no process that there is
    resume(killed)
    assert same_as_whole(killed, tmp_path) and not list(killed.glob(".*"))


def test_a_row_that_a_kill_cut_short_goes(killed, tmp_path):
    with (killed / "steps.csv").open("a") as file:
        file.write("1")  # of "12, ...": not a row of step 1
    resume(killed)
    assert same_as_whole(killed, tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe\n", b"step,loss\n1,x\n", b"loss\n1\n", b"step,loss\n1,2,3\n"])
def test_a_corrupt_table_is_named(killed, content):
    (killed / "steps.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"steps.csv is corrupt \(.*\): move it away"):
        resume(killed)


# --- what is worth keeping ---


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    task = Follow()
    task.before_optimizer = lambda: task.step == 8 and task.student[0].weight.grad.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match=r"weights are infinite or NaN after step 8; .* after 6 steps"):
        run(tmp_path, task)  # the loss of step 8 was finite, and the next one is not looked at before the checkpoint
    assert steps(tmp_path)[0] == 6
    task = Follow()
    task.end_step = lambda: task.step == 8 and task.teacher[0].weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"weights are infinite or NaN after step 8"):
        run(tmp_path / "teacher", task)


def test_the_best_model_is_that_of_the_largest_first_metric(tmp_path):
    scores, seen = iter([3.0, 7.0, 5.0, 7.0]), []

    def evaluate(model):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"score": next(scores), "other": -len(seen)}

    run(tmp_path, epochs=4, evaluate=evaluate)
    best = load_file(tmp_path / "best.safetensors")
    assert all(torch.equal(best[name], value) for name, value in seen[1].items())
    assert not torch.equal(best["0.weight"], seen[3]["0.weight"])
    assert torch.load(tmp_path / LAST)["best"] == 7.0


def test_the_average_is_of_every_step(tmp_path):
    task, kept = Follow(), []

    def follow():
        kept.append({name: value.clone() for name, value in task.student.state_dict().items()})

    task.end_step = follow
    result = train(task, Points(), settings(tmp_path, epochs=2, ema=0.7))
    expected = kept[1]  # timm's averages start with the weights after two steps
    for weights in kept[2:]:
        expected = {name: 0.7 * value + 0.3 * weights[name] for name, value in expected.items()}
    for name, value in result.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)
    assert isinstance(result.model, nn.Module) and not torch.equal(value, weights[name])
