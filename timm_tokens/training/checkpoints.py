"""Checkpoints that are there whole or not at all, and the model that comes out.

timm's CheckpointSaver is not used: it deletes the last checkpoint before it puts the new one there, which a kill can
hit, and it knows epochs, not steps. The files have its keys, though, so timm loads a model from any of them.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from timm_tokens.files import replacing

LAST, BEST, FINAL = "last.pth", "best.safetensors", "model.safetensors"


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write the checkpoint to resume from."""
    with replacing(folder / LAST) as path:
        torch.save(state, path)


def load(folder: Path) -> dict[str, Any] | None:
    """The checkpoint to resume from; None if there is none.

    Raises:
        ValueError: It can't be read.
    """
    path = folder / LAST
    if not path.is_file():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever zip files and pickles raise
        raise ValueError(f"{path} can't be read as a checkpoint ({error}): remove it to start anew") from error


def export(path: Path, model: nn.Module) -> None:
    """Write a model's weights for `timm.create_model(name, checkpoint_path=path)`."""
    with replacing(path) as partial:
        save_file({name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}, partial)


def check_same(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to continue a run with other settings than it was started with.

    Raises:
        ValueError: Names what differs.
    """
    odd = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if odd:
        what = ", ".join(f"{name} {found.get(name)} -> {wanted.get(name)}" for name in odd)
        raise ValueError(f"the run in {folder} was started with other settings ({what}): use those, or another --out")


def all_finite(module: nn.Module) -> bool:
    """Whether no parameter has become infinite or NaN."""
    finite = [parameter.isfinite().all() for parameter in module.parameters()]
    return not finite or bool(torch.stack(finite).all())
