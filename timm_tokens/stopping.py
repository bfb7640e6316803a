"""Stop in good order when the system or the user asks for it: by SIGTERM, or by Ctrl-C, which is SIGINT."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class Stopped(SystemExit):
    """What was going on has ended in good order because of a signal; the process ends with exit code 128 + signal.

    Args:
        number: The signal's.
        message: How to go on, in one line.
    """

    def __init__(self, number: int, message: str):
        super().__init__(128 + number)
        self.message = f"stopped by {signal.Signals(number).name}: {message}"

    def __str__(self) -> str:
        return self.message


@dataclass
class Requests:
    """What `listening` heard: the number of the first signal; 0: none came yet."""

    received: int = 0


@contextmanager
def listening() -> Iterator[Requests]:
    """Note the first SIGTERM or SIGINT instead of ending at once; a second one ends the process as it always would.

    Signals that the process ignores stay ignored. Only the main thread can listen: in others nothing is noted.
    """
    heard = Requests()
    if threading.current_thread() is not threading.main_thread():
        yield heard
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    caught = [number for number, handler in before.items() if handler is not signal.SIG_IGN]

    def note(number: int, frame: object) -> None:
        heard.received = number
        for each in caught:
            signal.signal(each, signal.SIG_DFL)

    for number in caught:
        signal.signal(number, note)
    try:
        yield heard
    finally:
        for number in caught:
            signal.signal(number, before[number])
    if heard.received:
        signal.raise_signal(heard.received)  # nobody stopped for it, because it came at the very end


def outlast_signals(worker: int = 0) -> None:
    """For processes that load images (`worker_init_fn`): schedulers and Ctrl-C signal them, too, but the step that is
    to be ended may need them. They end when their parent ends or terminates them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # on Linux; elsewhere nothing tells who sent a SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
