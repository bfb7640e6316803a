"""torch.compile for the student's forward and backward passes."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from timm_tokens.tasks import TokenTask

BACKEND = "inductor"


@contextmanager
def compiled(task: TokenTask, wanted: bool) -> Iterator[None]:
    """Let the task's student run compiled while the block runs, if wanted; afterwards it is the plain module again."""
    if not wanted:
        yield
        return
    task.student.compile(backend=BACKEND)
    for drop_path in task.drop_paths:
        drop_path.outside = True
    try:
        with warnings.catch_warnings():  # of the compiler, which looks at all attributes of what comes between graphs
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            yield
    finally:
        task.student._compiled_call_impl = None


def check(device: torch.device) -> None:
    """Refuse to compile, and say why, where a trivial function can't be compiled."""
    try:
        torch.compile(lambda x: x + 1, backend=BACKEND)(torch.zeros(2, device=device))
    except Exception as error:  # a missing compiler, a Python that is too new, a GPU that is too old: each has its own
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"compile can't be used on {device}: {reason.strip()}; leave it out") from error
