"""What can be said to be wrong before any work is done."""

from pathlib import Path

import torch

from timm_tokens.cli._errors import CommandError


def check_device(name: str) -> None:
    """Refuse a device that torch can't compute on.

    Raises:
        CommandError: There is no such device.
    """
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # torch says "not compiled with" by an assertion
        raise CommandError(f"can't use --device {name}: {(str(error).splitlines() or [''])[0]}") from error


def check_folder(path: Path) -> None:
    """Refuse a file's name for the folder of results.

    Raises:
        CommandError: There is a file of this name.
    """
    if path.exists() and not path.is_dir():
        raise CommandError(f"--out {path} is a file: give a folder")
