"""Checkpoint files: read, and loaded into models that they fit, with one clear line for what can't be."""

from pathlib import Path
from typing import Any

import timm
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from timm_tokens.cli.errors import CommandError
from timm_tokens.vit import TokenViT


def read(path: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint file.

    Raises:
        CommandError: If there is no such file, or it holds no weights.
    """
    if not path.is_file():
        raise CommandError(f"no checkpoint file {path}")
    try:
        state = timm.models.load_state_dict(str(path))
    except Exception as error:  # whatever zip files, pickles and other content raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CommandError(f"{path} can't be read as a checkpoint (.safetensors, .pth): {reason}") from error
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CommandError(f"{path} is no checkpoint: it holds {type(state).__name__} and not named weights")
    return state


def identity(path: Path) -> str:
    """A file's path, size and time: enough to tell that it was replaced."""
    if not path.is_file():
        raise CommandError(f"no checkpoint file {path}")
    stat = path.stat()
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"


def load_merged(model: TokenViT, path: Path) -> None:
    """Load a checkpoint of the plain ViT or of the whole TokenViT, whose classifier is of no matter here.

    Raises:
        CommandError: If there is no such file, it holds no weights, or they don't fit.
    """
    state = read(path)
    whole = any(name.startswith("base.") for name in state)
    target = model if whole else model.base
    ignored = tuple(f"{name}." for name in _names(target.pretrained_cfg.get("classifier")))
    ignored += ("merger.",) if model.merger.embed is None else ()
    missing, unexpected = _fill(target, state, path, strict=False)
    unexpected = [name for name in unexpected if not name.startswith(ignored)]
    for names, verb in ((missing, "lacks"), (unexpected, "has unknown")):
        if names:
            raise CommandError(f"{path} doesn't fit the model: it {verb} {len(names)} weights, such as {names[0]}")
    if not whole:  # embeddings that start as the keys start as those that were loaded
        model.merger.reset_parameters(model.base)


def load_whole(model: TokenViT, path: Path) -> None:
    """Load a checkpoint of the whole TokenViT, strictly.

    Raises:
        CommandError: If there is no such file, it holds no weights, those of the base alone, or they don't fit.
    """
    state = read(path)
    if not any(name.startswith("base.") for name in state):
        raise CommandError(f"{path} holds a plain model, not one with the parts that are to be drawn")
    _fill(model, state, path)


def load_all(model: nn.Module, path: Path) -> None:
    """Load a checkpoint that has every weight of the model, its classifier's too, and no others.

    Raises:
        CommandError: If there is no such file, it holds no weights, or they don't fit.
    """
    _fill(model, read(path), path)


def load_features(model: nn.Module, name: str, path: Path) -> None:
    """Load a checkpoint into a model without a classifier: what else it holds is left out, but nothing may be missing.

    Raises:
        CommandError: If it holds no weights, or they don't fit.
    """
    missing, _ = _fill(model, read(path), path, strict=False)
    if missing:
        raise CommandError(f"{path} lacks {len(missing)} weights of {name}, such as {missing[0]}")


def as_pretrained(name: str, path: Path | None, state: dict[str, Tensor]) -> dict[str, Any]:
    """The checkpoint in the place of timm's own weights: timm then resizes position embeddings, and leaves out a
    classifier of another number of classes, or makes do without."""
    cfg = get_pretrained_cfg(name)
    keys = [f"{c}.weight" for c in _names(cfg.classifier if cfg is not None else None)]
    rows = {len(state[key]) for key in keys if key in state} or ({0} if keys else set())  # 0: trained without labels
    overlay = {"file": str(path), "custom_load": False, "source": "file"}
    return overlay | ({"num_classes": rows.pop()} if len(rows) == 1 else {})


def _fill(model: nn.Module, state: dict[str, Tensor], path: Path, strict: bool = True) -> tuple[list[str], list[str]]:
    """Load a state dict that was read from `path`: the names that it lacks, and those that are unknown."""
    try:
        return model.load_state_dict(state, strict=strict)
    except RuntimeError as error:
        detail = str(error).splitlines()[1:2] or [str(error)]
        raise CommandError(f"{path} doesn't fit the model: {detail[0].strip()}") from error


def _names(classifier: Any) -> tuple[str, ...]:
    return (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
