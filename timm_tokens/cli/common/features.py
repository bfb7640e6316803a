"""Features of a data set by a timm model, computed once and kept in a safetensors file."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from timm_tokens.cli.common import checkpoints, models
from timm_tokens.cli.common.datasets import class_names, identity, tell
from timm_tokens.cli.common.loading import batches
from timm_tokens.cli.errors import CommandError
from timm_tokens.cli.options import LoadingOptions, MergerOptions, WeightOptions
from timm_tokens.data import Images, input_config, input_transform
from timm_tokens.data.images import file_name
from timm_tokens.digests import is_whole, save_tensors
from timm_tokens.files import replacing
from timm_tokens.merger_file import locate
from timm_tokens.ops.finite import check_weights
from timm_tokens.options import option


class Features(NamedTuple):
    """Features (N, D), labels (N,), and the metadata of the file that holds them."""

    features: Tensor
    labels: Tensor
    metadata: dict[str, str]

    @property
    def notes(self) -> list[str]:
        """What was left out of the images; see `Images.notes`."""
        return json.loads(self.metadata.get("notes", "[]"))


def load_features(path: Path) -> Features:
    """Reads `features` (N, D) and `labels` (N,) from a file of safetensors, NumPy (.npz) or torch (.pt, .pth)."""
    if not path.is_file():
        raise CommandError(f"no feature file {path}: check the path, or make one with --model and --data-dir")
    read, kind = _READERS.get(path.suffix, (_read_safetensors, "safetensors"))
    try:
        tensors, metadata = read(path)
        whole = is_whole(path) if read is _read_safetensors else None
    except Exception as error:  # of damaged files, and of pickles that hold more than tensors, each in its own words
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CommandError(f"{path} is not a {kind} file: {reason}") from error
    if whole is False:
        raise CommandError(f"{path} is corrupt, its digest is not that of its content: delete it, or copy it again")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    features, labels = tensors.get("features"), tensors.get("labels")
    if features is None or labels is None or features.ndim != 2 or labels.shape != features.shape[:1]:
        raise CommandError(f"{path} must hold features (N, D) and labels (N,); it holds {shapes}")
    return Features(features.float(), labels.long(), metadata)


Read = tuple[dict[str, Tensor], dict[str, str]]


def _read_safetensors(path: Path) -> Read:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)


def _read_numpy(path: Path) -> Read:
    with np.load(path, allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}, {}


def _read_torch(path: Path) -> Read:
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__} instead of a dict")
    return {str(name): torch.as_tensor(value) for name, value in found.items()}, {}


_READERS = {".npz": (_read_numpy, "NumPy"), ".pt": (_read_torch, "torch"), ".pth": (_read_torch, "torch")}


class Source(NamedTuple):
    """A model whose features are wanted."""

    make: Callable[[], nn.Module]  # makes it, without a classifier; called when the features are not in the cache
    about: dict[str, str]  # all that decides its weights, as plain text
    weights: str  # where they come from, in words
    img_size: int | None = None  # side of the images; None: the model's own


@dataclass(frozen=True, kw_only=True)
class FeatureOptions(WeightOptions, MergerOptions):
    """Model."""

    r: int = option(
        0, "tokens to merge in each block; with --merger, 0 keeps the number it was saved with", at_least=0,
        aliases=("--merge-r",), group="Token merging",
    )  # fmt: skip


def named(options: FeatureOptions) -> Source:
    """A model of timm by its name."""
    path, weights = options.checkpoint, models.weights_of(options)
    about = {"model": str(options.model), "checkpoint": checkpoints.identity(path) if path else weights}
    about |= {"merge_r": str(options.r), "in_chans": str(options.in_chans)}
    if options.merger:
        about["merger"] = f"{options.merger} {checkpoints.identity(locate(options.merger))}"
    if options.checkpoint_key:
        about["checkpoint_key"] = options.checkpoint_key
    if options.model_kwargs:
        about["model_kwargs"] = json.dumps(options.model_kwargs, sort_keys=True, default=str)
    return Source(partial(_make, options), about, weights, options.img_size)


def cached_features(
    cache_dir: Path, dataset: Dataset, source: Source, loading: LoadingOptions, device: str = "cpu"
) -> Features:
    """Features of all the images of a data set that can be read, from the cache when it has them; the others are named.

    Files in the cache are named after the model and all that decides their content.
    """
    metadata = source.about | {"img_size": str(source.img_size)} | identity(dataset)
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()[:12]
    path = cache_dir / f"{source.about['model'].replace('/', '_').replace(':', '_')}-{digest}.safetensors"
    if path.is_file():
        cached = load_features(path)
        if metadata.items() <= cached.metadata.items():
            tell(cached.notes)
            return cached
    net = source.make()
    check_weights(net)
    transform = input_transform(input_config(net, source.img_size))
    features, labels, notes = _extract(net.to(device).eval(), dataset, transform, loading, device)
    metadata |= {"classes": json.dumps(class_names(dataset)), "notes": json.dumps(notes)}
    with replacing(path) as partial:
        save_tensors(partial, {"features": features.contiguous(), "labels": labels}, metadata)
    tell(notes)
    return Features(features, labels, metadata)


def _make(options: FeatureOptions) -> nn.Module:
    """The model without its classifier; what merges its tokens is --merger, else its own merger, else its keys."""
    size = options.img_size
    net: Any = models.make_trained(replace(options, img_size=None), num_classes=0)
    if size is not None:
        models.check_size(net, size)
    if size is not None and hasattr(net, "set_input_size"):
        net.set_input_size(img_size=(size, size))
    if options.merger:
        return models.with_merger(net, options.merger, options.r or None)
    return models.merged(net, options.r, default="keys") if options.r else net


@torch.inference_mode()
def _extract(
    net: nn.Module, dataset: Any, transform: Callable, loading: LoadingOptions, device: str
) -> tuple[Tensor, Tensor, list[str]]:
    """Features (N, D) and labels (N,) on the CPU, and lines about the images that were left out."""
    features: list[Tensor] = []
    labels: list[int] = []
    unread: dict[int, str] = {}
    with tqdm(total=len(dataset), desc="features", unit="image") as bar:
        for batch in batches(dataset, transform, loading):
            unread |= batch.unread
            if batch.images is not None:
                features.append(net(batch.images.to(device)).float().cpu())
                labels += batch.labels
                _check(features[-1], dataset, batch.numbers)
            bar.update(len(batch))
    notes = dataset.without(unread).notes() if isinstance(dataset, Images) else []
    return torch.cat(features), torch.tensor(labels), notes


def _check(features: Tensor, dataset: Dataset, numbers: list[int]) -> None:
    bad = ~features.isfinite().all(dim=1)
    if bad.any():
        first = file_name(dataset, numbers[int(bad.nonzero()[0])])
        raise ValueError(f"the model's features of {int(bad.sum())} images are not finite, the first of them {first}")
