"""What the user has to change: the one place that knows which errors are such, and how the command words them."""

import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_SINGLE = r"(?= must| needs| takes| has to| is missing)"  # a name of one word is one where it starts such a phrase


class CommandError(ValueError):
    """A message for the user, printed as one line; the command ends with exit code 2."""


@contextmanager
def explained(flags: Mapping[str, str] | None = None) -> Iterator[None]:
    """Turn the errors that are the user's to mend into CommandErrors, which name options instead of arguments.

    Args:
        flags: How the command line writes the options, by their names in Python.
    """
    try:
        yield
    except CommandError:
        raise
    except mendable() as error:
        raise CommandError(_in_options(_message(error), flags or {})) from error


def mendable() -> tuple[type[Exception], ...]:
    """Errors that are the user's to mend: of the operating system, of values and types that do not fit, of files that
    are no checkpoints, of memory that does not suffice, of losses that are not finite."""
    import torch  # not above: the command's own help does without it
    from safetensors import SafetensorError

    memory = (MemoryError, torch.OutOfMemoryError)
    return (OSError, ValueError, TypeError, FloatingPointError, SafetensorError, pickle.UnpicklingError, *memory)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _in_options(message: str, flags: Mapping[str, str]) -> str:
    """The message with options in the place of Python's names: `batch_size must be` becomes `--batch-size must be`."""
    for name, flag in flags.items():
        pattern = rf"(?<![\w./-]){name}(?![\w./-])" if "_" in name else rf"^{name}{_SINGLE}"
        message = re.sub(pattern, flag, message)
    return message
