"""What can be refused before any work is done: devices, names of files, plots without matplotlib."""

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from timm_tokens.cli.errors import CommandError


def device(name: str | None) -> str:
    """The device to compute on: a GPU if there is one and none is named."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=name).item()
    except Exception as error:  # torch raises many kinds, for one a missing module
        raise CommandError(f"can't use --device {name}: {(str(error).splitlines() or [''])[0]}") from error
    return name


def folder(path: Path) -> None:
    """Refuse a folder of results that can't be made or written to, before any work is done for it."""
    if path.exists() and not path.is_dir():
        raise CommandError(f"--out {path} is a file: give a folder")
    existing = next(above for above in (path, *path.absolute().parents) if above.exists())
    try:
        TemporaryDirectory(dir=existing).cleanup()
    except OSError as error:
        raise CommandError(f"can't write to --out {path}: {error.strerror}") from error


def plot(wanted: bool, remedy: str = "or leave --plot out") -> None:
    """Refuse to draw without matplotlib, before an hour of work and not after it."""
    if wanted and find_spec("matplotlib") is None:
        raise CommandError(f"the plot takes matplotlib: pip install 'timm-tokens[viz]', {remedy}")
