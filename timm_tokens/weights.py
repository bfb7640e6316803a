"""Weights in the checkpoints of others, found by the names of the model.

Training code wraps a model in layers of its own: DINO keeps `teacher` and `student` with `backbone.` and
`module.backbone.` before each name, MAE `model`, Lightning `state_dict` with the attribute's name in front, OpenCLIP
`visual.trunk.`, DDP `module.`. None of these is listed here: wherever in the checkpoint the model's own names are,
after whatever prefix, there are its weights.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from timm_tokens.checkpoint_file import pickled, read_checkpoint
from timm_tokens.loading import classifiers

_SHARE = 0.75  # of the model's weights that must be there: a position embedding may have another size
_AVERAGES = {"state_dict": "state_dict_ema", "model": "model_ema"}  # taken instead of what they average, as timm does
_OWN = ("task_state", "optimizer")  # of this package's runs: their state, teachers included
_LEFT_OVER = ("decoder", "mask_token", "masked_embed")  # what MAE, DINOv2 and iBOT train beside the model
_CHUNKS = re.compile(r"(^|\.)blocks\.\d+\.(?=\d+\.)")  # DINOv2 keeps blocks in groups: blocks.0.11.norm1


def read_weights(path: str | PathLike[str], model: nn.Module, key: str | None = None) -> dict[str, Tensor]:
    """`find_weights` in a file that `read_checkpoint` reads; its errors name the file."""
    checkpoint = read_checkpoint(path)
    try:
        return find_weights(checkpoint, model, key)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def find_weights(checkpoint: Any, model: nn.Module, key: str | None = None) -> dict[str, Tensor]:
    """The weights of a model in a checkpoint, by the model's own names.

    What timm converts in the checkpoints of others is converted: position embeddings of other sizes, OpenAI's names.
    Entries with the same prefix that are not the model's are kept, so that a strict load reports them; but not the
    decoders and mask tokens of pre-training.

    Args:
        checkpoint: A state dict, or whatever holds one, as `read_checkpoint` gives it.
        model: A timm model, or a TokenViT, for which it may be the plain ViT's.
        key: Where the weights are, if there are several that fit: "teacher", "teacher.backbone", or, where no place
            starts so, the middle of its name.

    Raises:
        ValueError: There are no weights that fit the model, or several and no key; says what there is.
    """
    if not isinstance(checkpoint, Mapping) or pickled(checkpoint):
        raise ValueError(_not_weights(checkpoint))
    target = _Target(model)
    found = list(target.places(checkpoint, () if key else _OWN))
    if key is not None:
        under = [place for place in found if f"{place.name}.".startswith(f"{key}.")]
        found = under or [place for place in found if f".{key}." in f".{place.name}."]
    best = max(found, key=lambda place: place.share, default=None)
    if best is None:
        raise ValueError(_nothing(checkpoint, key))
    if best.share < _SHARE:
        raise ValueError(target.misfit(best))
    fitting = _preferred([place for place in found if place.share >= 0.9 * best.share])
    if len(fitting) > 1:
        names = ", ".join(place.name or "(outermost)" for place in fitting)
        raise ValueError(f"several weights in it fit the model: choose one of them by checkpoint_key: {names}")
    return fitting[0].weights


class _Place(NamedTuple):
    """A place in a checkpoint: the keys that lead to a state dict, a prefix of names, and the weights that have it."""

    path: tuple[str, ...]
    prefix: str
    weights: dict[str, Tensor]
    share: float  # of the model's weights that is among them

    @property
    def name(self) -> str:
        return ".".join((*self.path, *self.prefix.split(".")[:-1]))


class _Target:
    """The model whose weights are looked for: of a TokenViT its base, whose names may start with `base.`."""

    def __init__(self, model: nn.Module):
        self.base = getattr(model, "base", model)
        self.wrapped = self.base is not model
        heads = tuple(f"{name}." for name in classifiers(self.base))
        self.shapes = {n: p.shape for n, p in self.base.named_parameters() if not n.startswith(heads)}
        self.chunked = any(map(_CHUNKS.search, self.shapes))

    def places(self, checkpoint: Mapping[str, Any], skipped: tuple[str, ...]) -> Iterator[_Place]:
        """All places with half of the model's names or more, or else the best, or what timm converts to them."""
        for path, tensors in _state_dicts(checkpoint, skipped):
            if not self.chunked:
                tensors = {_CHUNKS.sub(r"\1blocks.", name): x for name, x in tensors.items()}
            counts = Counter(prefix for name in tensors for prefix in self._prefixes(name))
            prefixes = [prefix for prefix, count in counts.items() if 2 * count >= len(self.shapes)]
            for prefix in prefixes or [prefix for prefix, _ in counts.most_common(1)]:
                yield self._place(path, prefix, tensors)
            for prefix in () if prefixes else ("", "module."):  # timm may know it by other names
                place = self._place(path, prefix, tensors)
                if place.share >= _SHARE:
                    yield place

    def misfit(self, place: _Place) -> str:
        """Why the weights of a place don't fit, in words."""
        odd = [name for name in self.shapes if self._found(place.weights, name) != self.shapes[name]]
        found, wanted = self._found(place.weights, odd[0]), tuple(self.shapes[odd[0]])
        there = "is not there" if found is None else f"is {tuple(found)} there and {wanted} in the model"
        return f"it doesn't fit the model, of whose {len(self.shapes)} weights it lacks {len(odd)}: {odd[0]} {there}"

    def _prefixes(self, name: str) -> Iterator[str]:
        parts = name.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in self.shapes:
                before = parts[: i - 1] if self.wrapped and parts[:i][-1:] == ["base"] else parts[:i]
                yield "".join(f"{part}." for part in before)

    def _place(self, path: tuple[str, ...], prefix: str, tensors: dict[str, Tensor]) -> _Place:
        weights = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
        inner = "base." if any(name.startswith("base.") for name in weights) else ""  # of a whole TokenViT
        plain = {n.removeprefix(inner): x for n, x in weights.items() if n.startswith(inner)}
        weights = {n: x for n, x in weights.items() if not n.startswith(inner)}
        weights |= {f"{inner}{n}": x for n, x in _converted(plain, self.base).items()}
        weights = {n: x for n, x in weights.items() if not n.startswith(_LEFT_OVER) or n in self.shapes}
        fitting = sum(self._found(weights, name) == shape for name, shape in self.shapes.items())
        return _Place(path, prefix, weights, fitting / max(1, len(self.shapes)))

    def _found(self, weights: dict[str, Tensor], name: str) -> torch.Size | None:
        found = weights.get(name, weights.get(f"base.{name}"))
        return None if found is None else found.shape


def _state_dicts(
    nest: Mapping[str, Any], skipped: tuple[str, ...], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Every dict with tensors by name in a nest of dicts, and the keys that lead to it."""
    named = {name: value for name, value in nest.items() if isinstance(name, str)}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if tensors:
        yield path, tensors
    for name, value in named.items():
        if isinstance(value, Mapping) and name not in skipped:
            yield from _state_dicts(value, skipped, (*path, name))


def _converted(weights: dict[str, Tensor], base: nn.Module) -> dict[str, Tensor]:
    """As timm's own filter for models of this kind leaves them, if it has one that knows what to do."""
    convert = getattr(sys.modules[type(base).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        with suppress(Exception):  # it expects certain names, and raises whatever their absence causes
            return convert(dict(weights), base)
    return weights


def _preferred(places: list[_Place]) -> list[_Place]:
    """Without what is averaged beside it, and without second copies of the same weights."""
    paths = {place.path for place in places}
    averaged = [p for p in places if p.path and (*p.path[:-1], _AVERAGES.get(p.path[-1])) in paths]
    kept = [place for place in places if place not in averaged]
    return [place for i, place in enumerate(kept) if not any(_equal(place, other) for other in kept[:i])]


def _equal(a: _Place, b: _Place) -> bool:
    return a.weights.keys() == b.weights.keys() and all(torch.equal(x, b.weights[n]) for n, x in a.weights.items())


def _not_weights(checkpoint: Any) -> str:
    if pickled(checkpoint):
        return f"it holds a pickled {pickled(checkpoint)}, whose code is not run: save its state_dict() instead"
    return f"it holds a {type(checkpoint).__name__}, not weights by their names: save a state_dict()"


def _nothing(checkpoint: Mapping[str, Any], key: str | None) -> str:
    names = ", ".join(map(str, list(checkpoint)[:8])) + (", ..." if len(checkpoint) > 8 else "")
    where = "" if key is None else f" under {key!r}"
    models = [value for value in checkpoint.values() if pickled(value) and not value]
    hint = f"; {_not_weights(models[0])}" if models and key is None else ""
    return f"it has no weights of the model{where}; it has {names or 'nothing'}{hint}"
