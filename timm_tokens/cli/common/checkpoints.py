"""Checkpoint files: found in, and loaded into models that they fit, with one clear line for what can't be."""

from pathlib import Path

from torch import Tensor, nn

from timm_tokens.cli.errors import CommandError
from timm_tokens.filling import fill
from timm_tokens.vit import TokenViT
from timm_tokens.weights import read_weights


def load(model: nn.Module, path: Path, key: str | None = None, *, classifier: bool = False) -> None:
    """Load a checkpoint that has every weight of the model; a classifier of other classes is left out, unless
    `classifier` wants it to fit, too.
    """
    _fill(model, read_weights(path, model, key), path, classifier)


def identity(path: Path) -> str:
    """A file's path, size and time: enough to tell that it was replaced."""
    if not path.is_file():
        raise CommandError(f"no checkpoint file {path}")
    stat = path.stat()
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"


def load_merged(model: TokenViT, path: Path, key: str | None = None) -> None:
    """Load a checkpoint of the plain ViT or of the whole TokenViT that merges; its classifier is of no matter here."""
    weights = read_weights(path, model, key)
    if model.merger.embed is None:
        weights = {name: value for name, value in weights.items() if not name.startswith("merger.")}
    _fill(model, weights, path)
    if not _whole(weights):
        model.merger.reset_parameters(model.base)  # to start as the keys that were loaded


def load_whole(model: TokenViT, path: Path, key: str | None = None) -> None:
    """Load a checkpoint of the whole TokenViT."""
    weights = read_weights(path, model, key)
    if not _whole(weights):
        raise CommandError(f"{path} holds a plain model, not one with the parts that are to be drawn")
    _fill(model, weights, path)


def _whole(weights: dict[str, Tensor]) -> bool:
    return any(name.startswith("base.") for name in weights)


def _fill(model: nn.Module, weights: dict[str, Tensor], path: Path, classifier: bool = False) -> None:
    try:
        fill(model, weights, classifier=classifier)
    except ValueError as error:
        raise CommandError(f"{path}: {error}") from error
