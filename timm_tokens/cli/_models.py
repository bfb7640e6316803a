"""Models for the sub-commands: made by name, merged, and loaded, with one clear line for what can't be."""

import pickle
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from safetensors import SafetensorError
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from timm_tokens.cli._errors import CommandError
from timm_tokens.vit import TokenViT
from timm_tokens.wrap import apply_dtem_merging


def create(name: str, **kwargs: Any) -> nn.Module:
    """timm.create_model, whose refusals become one line.

    Raises:
        CommandError: If timm doesn't know the name, or can't make it so.
    """
    known = timm.is_model(name) or ":" in name  # "hf-hub:..." and "local-dir:..." are for timm to judge
    if not known:
        close = get_close_matches(name, timm.list_models(), n=3)
        raise CommandError(f"timm has no model {name!r}{f'; close are {chr(44).join(close)}' if close else ''}")
    try:
        return timm.create_model(name, **kwargs)
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise CommandError(f"timm can't make {name!r}: {error}") from error


def merged(model: nn.Module, r: int, metric: str | None = None) -> TokenViT:
    """The model with r tokens merged in each block: by its own merger if it has one for this metric.

    Raises:
        CommandError: If the model can't be driven, or r is negative.
    """
    try:
        if isinstance(model, TokenViT) and model.merger is not None and metric in (None, model.merger.metric):
            model.merger.r = r
            return model
        return apply_dtem_merging(plain(model), r=r, metric=metric or "learned")
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error


def plain(model: nn.Module) -> nn.Module:
    """The timm ViT inside, if it is wrapped."""
    return model.base if isinstance(model, TokenViT) else model


def load(model: TokenViT, path: Path) -> None:
    """Load a checkpoint of the plain ViT or of the whole TokenViT, whose classifier is of no matter here.

    Raises:
        CommandError: If there is no such file, it holds no weights, or they don't fit.
    """
    state = read(path)
    whole = any(name.startswith("base.") for name in state)
    target = model if whole else model.base
    ignored = _classifier(target) + (("merger.",) if model.merger.embed is None else ())
    missing, unexpected = _fill(target, state, path, strict=False)
    unexpected = [name for name in unexpected if not name.startswith(ignored)]
    for names, verb in ((missing, "lacks"), (unexpected, "has unknown")):
        if names:
            raise CommandError(f"{path} doesn't fit the model: it {verb} {len(names)} weights, such as {names[0]}")
    if not whole:  # embeddings that start as the keys start as those that were loaded
        model.merger.reset_parameters(model.base)


def as_seen(model: nn.Module, photo: Image.Image) -> tuple[Tensor, Tensor]:
    """The image (1, 3, h, w) as the model takes it, and (3, h, w) in colours from 0 to 1."""
    config = resolve_model_data_config(model)
    if isinstance(model, TokenViT):
        config["input_size"] = (config["input_size"][0], *model.image_size)
    pixels = create_transform(**config)(photo)
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return pixels[None], (pixels * std + mean).clamp(0, 1)


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


def _fill(model: nn.Module, state: dict[str, Tensor], path: Path, strict: bool = True) -> tuple[list[str], list[str]]:
    """Load a state dict that was read from `path`: the names that it lacks, and those that are unknown."""
    try:
        return model.load_state_dict(state, strict=strict)
    except RuntimeError as error:
        detail = str(error).splitlines()[1:2] or [str(error)]
        raise CommandError(f"{path} doesn't fit the model: {detail[0].strip()}") from error


def read(path: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint file.

    Raises:
        CommandError: If there is no such file, or it holds no weights.
    """
    if not path.is_file():
        raise CommandError(f"no checkpoint file {path}")
    try:
        return timm.models.load_state_dict(str(path))
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CommandError(f"{path} can't be read as a checkpoint (.safetensors, .pth): {reason}") from error


def _classifier(model: nn.Module) -> tuple[str, ...]:
    """Where the names of the classifier's weights start."""
    names = model.pretrained_cfg.get("classifier") or ()
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
