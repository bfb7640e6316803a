"""What a run has beside its losses: other logs, compilation, and what it says of its pace."""

import sys
from types import SimpleNamespace

import pytest
import torch
from killing import Killed
from runs import Follow, run

from timm_tokens.training import compiling, logs, pace
from timm_tokens.training.history import read


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    torch._dynamo.reset()


def scalars(folder, name):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(name)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_shows_the_tables_and_goes_on(tmp_path):
    pytest.importorskip("tensorboard")
    changes = dict(log=("tensorboard",), evaluate=lambda model: {"size": 2.5})
    with pytest.raises(Killed):
        run(tmp_path, kill=8, **changes)
    run(tmp_path, resume=True, **changes)
    table = [(row["step"], row["loss"]) for row in read(tmp_path / "steps.csv")]
    assert scalars(tmp_path, "loss") == [(step, pytest.approx(loss)) for step, loss in table]
    assert scalars(tmp_path, "epoch/eval_size") == [(4, 2.5), (9, 2.5), (14, 2.5)]


def test_weights_and_biases(tmp_path, monkeypatch):
    seen = []
    handle = SimpleNamespace(log=lambda row, step: seen.append((step, row)), finish=lambda: seen.append("finished"))
    module = SimpleNamespace(init=lambda **given: seen.append(given) or handle, __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(logs, "find_spec", lambda name: module)
    run(tmp_path, log=("wandb",), epochs=2)
    first = seen[0]
    assert first["project"] == "timm-tokens" and first["config"]["lr"] == 0.05 and first["resume"] == "allow"
    assert [each[0] for each in seen[1:-1]] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 9] and seen[-1] == "finished"
    assert seen[1][1]["loss"] == read(tmp_path / "steps.csv")[0]["loss"]
    run(tmp_path, log=("wandb",), epochs=2, resume=True)
    assert seen[len(seen) - 2]["id"] == first["id"]


def test_what_is_not_installed_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"log wandb needs a package .*: pip install 'timm-tokens\[wandb\]'"):
        run(tmp_path / "out", log=("wandb",))
    assert not (tmp_path / "out").exists()


def test_compiled_and_resumed_it_trains_the_same(tmp_path):
    plain, _ = run(tmp_path / "plain", Follow(dropout=0))
    calls, compile = [], torch.nn.Module.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", lambda self, **how: calls.append(how) or compile(self, **how))
        with pytest.raises(Killed):
            run(tmp_path / "out", Follow(dropout=0), kill=7, compile=True)
        result, task = run(tmp_path / "out", Follow(dropout=0), compile=True, resume=True)
    assert calls == [{"backend": "aot_eager"}] * 2 and torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert task.student._compiled_call_impl is None  # what comes out is a plain module
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(result.model.state_dict()[name], value)


def test_a_machine_that_can_not_compile_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "no_such_backend")
    with pytest.raises(ValueError, match=r"compile can't be used on cpu: .*no_such_backend.*; leave it out"):
        run(tmp_path / "out", compile=True)
    assert not (tmp_path / "out").exists()


def test_who_waits_for_whom(monkeypatch, capsys, tmp_path):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(pace, "perf_counter", lambda: clock.now)

    def batches(seconds):
        for _ in range(5):
            clock.now += seconds
            yield None

    def watched(load, step):
        watch = pace.Pace(images=8, workers=2)
        watch.work.done += torch.tensor([[8 * load, 8.0]])  # each of the two workers
        for count, _ in enumerate(watch.watch(batches(max(0, load / 2 - step)))):
            clock.now += step if count else 100.0  # the first compiles
        return watch.first_line()

    assert watched(load=1.0, step=0.1) == (
        "loader 2 images/s (2 workers), steps 80 images/s: the loader is slower, and the steps wait for images "
        "80% of the time: more workers may help"
    )
    assert watched(load=0.1, step=0.8) == (
        "loader 20 images/s (2 workers), steps 10 images/s: the steps are slower, and wait for images 0% of the time"
    )
    assert pace.Pace(8, 0).first_line() is None
    monkeypatch.setattr(pace, "world_size", lambda: 3)
    assert watched(load=1.0, step=0.1).startswith("loader 6 images/s (2 workers), steps 240 images/s")  # of all
    monkeypatch.undo()
    run(tmp_path)
    assert capsys.readouterr().out.count("images/s (no workers), steps") == 1
