"""What the user has to change: the one place that knows which errors are such, and how the command words them.

All functions of the command refuse what the user can change, by a CommandError or by what the library raises; so their
docstrings name other errors alone.
"""

import os
import re
import sys
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
    except (CommandError, BrokenPipeError):
        raise
    except Exception as error:
        if not isinstance(error, _mendable()):
            raise
        raise CommandError(_in_options(_message(error), flags or {})) from error


def flush() -> None:
    """Write out what was printed, so that a full disk is an error and not a remark of Python's at its exit.

    Raises:
        CommandError: It can't be written; what is left of it is dropped.
        BrokenPipeError: Whoever read it, such as `head`, has enough.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise CommandError(f"can't print: {error.strerror}") from error


def _mendable() -> tuple[type[Exception], ...]:
    """Errors that the user can correct: of the operating system, values, types and sizes that do not fit, a loss that
    is not finite, too little memory. timm and torch raise all of these; other errors are bugs."""
    from safetensors import SafetensorError  # not above: `--help` does without it

    return OSError, ValueError, TypeError, ArithmeticError, MemoryError, RuntimeError, AssertionError, SafetensorError


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
