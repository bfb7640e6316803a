"""Read checkpoint files of any origin without running any code in them."""

from collections import OrderedDict
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file

from timm_tokens.digests import is_whole


def read_checkpoint(path: str | PathLike[str]) -> Any:
    """What a file of torch.save or of safetensors holds, on the CPU.

    Objects of classes that are no part of weights, such as the options of a training script, are left empty.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It can't be read, or its digest says that it is corrupt.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a checkpoint in it, .safetensors or .pth")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file {path}")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty: copy it again")
    try:
        whole = is_whole(path)
        checkpoint = load_file(path) if path.suffix == ".safetensors" else _load(path)
    except Exception as error:  # torch.load raises many kinds
        raise ValueError(f"{path} can't be read as a checkpoint (.safetensors, .pth): {_reason(error)}") from error
    if whole is False:
        raise ValueError(f"{path} is corrupt, its digest is not that of its content: copy it again")
    return checkpoint


def pickled(thing: Any) -> str | None:
    """The name of the class that an object was of when it was pickled, where `read_checkpoint` left it empty."""
    return getattr(thing, "_pickled", None)


def _load(path: Path) -> Any:
    """torch.load, which makes nothing but tensors and plain data, with empty stand-ins for everything else."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except ValueError:  # of a time before zip archives
        names = ["argparse.Namespace"]
    stands_in: list[Any] = [(_stand_in(name, _Array if name.startswith("numpy.") else _Record), name) for name in names]
    with torch.serialization.safe_globals(stands_in):
        return torch.load(path, map_location="cpu", weights_only=True)


def _reason(error: Exception) -> str:
    if isinstance(error, UnpicklingError):  # whose message is advice to run the code in it
        return "it is not one, or needs code of its own to be run, which is refused"
    return (str(error).splitlines() or [type(error).__name__])[0]


def _stand_in(name: str, kind: type) -> type:
    return type(name.rpartition(".")[2], (kind,), {"full_name": name})


class _Record:
    """Stands in for a class: what is called or made is an OrderedDict, since torch fills no other mapping."""

    full_name = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        empty: Any = OrderedDict()
        empty._pickled = cls.full_name  # of this one instance
        return empty


class _Array:
    """Stands in for NumPy's scalars, which set their state by tuples."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass
