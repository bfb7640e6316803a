"""The files of a run: two checkpoints to go on from, each there whole or not at all, and the model that comes out.

timm's CheckpointSaver is not used: it deletes the last checkpoint before it puts the new one there, which a kill can
hit, and it knows epochs, not steps. The files have its keys, though, so timm loads a model from any of them.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from timm_tokens.checkpoint_file import read_checkpoint
from timm_tokens.digests import save_checkpoint, save_tensors
from timm_tokens.distributed import all_reduce_max, local
from timm_tokens.files import replacing

_PARTS = {"step", "best", "settings", "state_dict", "task_state", "optimizer", "scaler"}
LAST, PREVIOUS, BEST, FINAL = "last.pth", "previous.pth", "best.safetensors", "model.safetensors"


class Checkpoint(NamedTuple):
    """What to go on from: where it was, and why it isn't the last one, if it isn't."""

    state: dict[str, Any]
    path: Path
    warning: str | None


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write the checkpoint to resume from, and keep the one before it."""
    with replacing(folder / LAST, keep=folder / PREVIOUS) as path:
        save_checkpoint(path, state)


def load(folder: Path) -> Checkpoint | None:
    """The last checkpoint, or the one before it where the last one is corrupt; None if there is none.

    Raises:
        ValueError: None of those that are there can be read.
    """
    errors = []
    for path in filter(Path.is_file, (folder / LAST, folder / PREVIOUS)):
        try:
            state = read_checkpoint(path)
            if not isinstance(state, dict) or not state.keys() >= _PARTS:
                raise ValueError(f"{path} is not a checkpoint of a run")
        except ValueError as error:
            errors.append(str(error))
            continue
        reason = errors[0] if errors else f"there is no {LAST}"
        warning = f"{reason}; going on from {path}, after {state['step']} steps"
        return Checkpoint(state, path, None if path.name == LAST else warning)
    if errors:
        raise ValueError(f"{'; '.join(errors)}. To start anew, remove {'them' if errors[1:] else 'it'}")
    return None


def exists(folder: Path) -> bool:
    """Whether a run has got as far as a checkpoint."""
    return any((folder / name).is_file() for name in (LAST, PREVIOUS))


def export(path: Path, model: nn.Module) -> None:
    """Write a model's weights for `timm.create_model(name, checkpoint_path=path)`."""
    with replacing(path) as partial:
        save_tensors(partial, model.state_dict())


def all_finite(module: nn.Module) -> bool:
    """Whether on no process a parameter has become infinite or NaN."""
    finite = [local(parameter).isfinite().all() for parameter in module.parameters()]
    return not finite or not bool(all_reduce_max(~torch.stack(finite).all()))
