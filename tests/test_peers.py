"""When a process of several dies, the others end soon, with one line."""

import os
import signal
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from timm_tokens import distributed, peers
from timm_tokens.peers import PeerLost, together
from timm_tokens.stopping import Requests, Stopped

# Python 3.12 warns of threads that a forked process doesn't have; these don't need them
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
LOST = "another process of the job has ended, so this one ends, too"


def on_two(work, folder):
    """Run work(rank) on two processes: their exit codes, and what they wrote to stderr."""
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            _process(work, rank, folder)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return codes, [(folder / f"{rank}.err").read_text() for rank in range(2)]


def _process(work, rank, folder):
    code = 99
    try:
        sys.stderr = (folder / f"{rank}.err").open("w", buffering=1)
        timeout = timedelta(seconds=60)
        dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timeout)
        peers.INTERVAL, peers.GRACE = 0.05, 0.5
        work(rank)
        code = 0
        distributed.leave()
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        code = getattr(error, "code", 1)
    finally:
        os._exit(code)


def reduce_for(rounds, rank, what):
    """Work together for a while; what(round) happens on the second process."""
    for i in range(rounds):
        if rank == 1:
            what(i)
        dist.all_reduce(torch.ones(1))
        time.sleep(0.01)


def die(i):
    if i == 20:
        os.kill(os.getpid(), signal.SIGKILL)


def stumble(i):
    if i == 20:
        raise ValueError("an image is corrupt")


def test_a_killed_process_ends_the_others(tmp_path):
    def work(rank):
        with together():
            reduce_for(10_000, rank, die)

    begin = time.monotonic()
    codes, errors = on_two(work, tmp_path)
    assert codes == [1, -signal.SIGKILL] and errors[0].startswith(f"PeerLost: {LOST}") and time.monotonic() - begin < 20


@pytest.mark.parametrize(("end", "code"), [(die, -signal.SIGKILL), (stumble, 1)])
def test_also_where_they_wait_for_a_device(end, code, tmp_path):
    def work(rank):
        with together():
            time.sleep(0.3)
            end(20) if rank else time.sleep(60)

    begin = time.monotonic()
    codes, errors = on_two(work, tmp_path)
    assert codes == [1, code] and time.monotonic() - begin < 20
    assert errors[0].splitlines()[-1].startswith(LOST)


def test_an_error_on_one_is_told_there_alone(tmp_path):
    def work(rank):
        with together():
            reduce_for(10_000, rank, stumble)

    codes, errors = on_two(work, tmp_path)
    assert codes == [1, 1] and errors[1] == "ValueError: an image is corrupt\n" and errors[0].startswith("PeerLost: ")


def test_an_error_on_all_is_their_own(tmp_path):
    def work(rank):
        with together():
            dist.all_reduce(torch.ones(1))
            raise FloatingPointError("the loss is nan")

    codes, errors = on_two(work, tmp_path)
    assert codes == [1, 1] and errors == ["FloatingPointError: the loss is nan\n"] * 2


def test_a_process_that_gives_no_sign_of_life_is_taken_for_dead(tmp_path):
    def work(rank):
        with together(patience=1.0):
            time.sleep(0.2)
            if rank == 1:
                stop = os.getpid()
                if os.fork() == 0:  # lets it go on when all is over
                    time.sleep(4)
                    os.kill(stop, signal.SIGKILL)
                    os._exit(0)
                os.kill(stop, signal.SIGSTOP)
            time.sleep(60)

    codes, errors = on_two(work, tmp_path)
    assert codes == [1, -signal.SIGKILL] and errors[0].splitlines()[-1].startswith(LOST)


def test_the_end_waits_for_all_and_signals_are_shared(tmp_path):
    def work(rank):
        requests = Requests()
        begin = time.monotonic()
        with together(requests):
            if rank == 1:
                requests.received = signal.SIGTERM
                time.sleep(0.5)
            while not requests.received:
                time.sleep(0.01)
        assert requests.received == signal.SIGTERM and time.monotonic() - begin >= 0.4
        with together():
            raise Stopped(signal.SIGTERM, "go on")

    assert on_two(work, tmp_path)[0] == [143, 143]


def test_one_process_alone_watches_nobody():
    with pytest.raises(RuntimeError, match="gloo"), together():
        raise RuntimeError("gloo")
    assert issubclass(PeerLost, OSError)
