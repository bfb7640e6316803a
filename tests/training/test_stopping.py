"""SIGTERM and Ctrl-C end a run in good order, and it goes on from there as if nothing had happened."""

import multiprocessing
import os
import signal
import subprocess
import threading
import time

import pytest
import torch
from runs import Follow, run

from timm_tokens.stopping import Stopped, listening, outlast_signals
from timm_tokens.training.history import read

# Python 3.12 warns of threads that a forked process doesn't have; these don't need them
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
FILES = ("steps.csv", "summary.csv", "model.safetensors")


def signalled(step, *numbers, also=lambda: None):
    """A task in whose step the process gets these signals, before the weights are new."""
    task = Follow()

    def send():
        if task.step == step:
            also()
            for number in numbers:
                signal.raise_signal(number)

    task.before_optimizer = send
    return task


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_step_ends_and_is_saved(number, code, tmp_path, capfd):
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    run(tmp_path / "whole")
    capfd.readouterr()
    with pytest.raises(
        Stopped, match=f"stopped by {number.name}: .*last.pth has 8 of 15 steps; .* --resume"
    ) as stopped:
        run(tmp_path / "stopped", signalled(7, number), log_every=100, save_every=100)
    assert stopped.value.code == code and isinstance(stopped.value, SystemExit)
    assert capfd.readouterr().err.splitlines()[-1] == str(stopped.value)
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    assert torch.load(tmp_path / "stopped" / "last.pth")["step"] == 8
    assert len(read(tmp_path / "stopped" / "steps.csv")) == 8 and not (tmp_path / "stopped" / FILES[2]).exists()
    run(tmp_path / "stopped", resume=True)
    for name in FILES:
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_in_the_last_step_the_model_is_written(tmp_path):
    with pytest.raises(Stopped, match=r"all 15 steps are done, and the model is in .*model.safetensors"):
        run(tmp_path, signalled(14, signal.SIGTERM))
    assert (tmp_path / "model.safetensors").exists() and len(read(tmp_path / "summary.csv")) == 3


def test_workers_stay_until_the_step_is_done(tmp_path):
    """Schedulers and terminals signal the whole group of processes."""

    def all_children():
        children = multiprocessing.active_children()
        assert len(children) == 2
        for child in children:
            subprocess.run(["kill", "-TERM", str(child.pid)], check=True)  # not by their parent, whom they obey
            os.kill(child.pid, signal.SIGINT)
        time.sleep(0.1)
        assert all(child.is_alive() for child in children)

    with pytest.raises(Stopped, match="6 of 15 steps"):
        run(tmp_path, signalled(5, signal.SIGTERM, also=all_children), workers=2)
    assert not multiprocessing.active_children()


def test_a_second_signal_ends_at_once(tmp_path):
    child = os.fork()
    if child == 0:
        run(tmp_path, signalled(7, signal.SIGTERM, signal.SIGTERM))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGTERM
    assert torch.load(tmp_path / "last.pth")["step"] == 6
    run(tmp_path, resume=True)
    assert len(read(tmp_path / "steps.csv")) == 15 and not list(tmp_path.glob(".*"))


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup does, and shells for what runs in the background
    try:
        with listening() as requests:
            signal.raise_signal(signal.SIGINT)
        assert requests.received == 0 and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_at_the_very_end_is_not_lost():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt), listening() as requests:
            signal.raise_signal(signal.SIGINT)
            assert requests.received == signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_train_without_listening(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path, steps=2, warmup_epochs=0)))
    thread.start()
    thread.join()
    assert len(results) == 1


def test_workers_obey_their_parent_alone():
    ready = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        outlast_signals()
        signal.raise_signal(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        os.write(ready[1], b"1")
        time.sleep(60)
        os._exit(7)
    os.close(ready[1])
    assert os.read(ready[0], 1) == b"1"
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
