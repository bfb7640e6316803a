"""Features of a data set by a timm model, computed once and kept in a safetensors file."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from timm_tokens.cli import _models
from timm_tokens.cli._data import class_names, identity
from timm_tokens.cli._errors import CommandError
from timm_tokens.cli._images import batches
from timm_tokens.files import replacing
from timm_tokens.vit import TokenViT


class Features(NamedTuple):
    """Features (N, D), labels (N,), and the metadata of the file that holds them."""

    features: Tensor
    labels: Tensor
    metadata: dict[str, str]


def load_features(path: Path) -> Features:
    """Reads `features` (N, D) and `labels` (N,) from a safetensors file."""
    if not path.is_file():
        raise CommandError(f"no feature file {path}: check the path, or make one with --model and --data-dir")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CommandError(f"{path} is not a safetensors file: {error}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    features, labels = tensors.get("features"), tensors.get("labels")
    if features is None or labels is None or features.ndim != 2 or labels.shape != features.shape[:1]:
        raise CommandError(f"{path} must hold features (N, D) and labels (N,); it holds {shapes}")
    return Features(features.float(), labels.long(), metadata)


def save_features(path: Path, features: Features) -> None:
    """Writes a file that is there whole or not at all."""
    tensors = {"features": features.features.contiguous(), "labels": features.labels}
    with replacing(path) as partial:
        save_file(tensors, partial, features.metadata)


class Source(NamedTuple):
    """A model whose features are wanted.

    Attributes:
        make: makes it, without a classifier; called when the features are not in the cache.
        about: all that decides its weights, as plain text.
        weights: where they come from, to be read.
        img_size: side of the images; None: the model's own.
    """

    make: Callable[[], nn.Module]
    about: dict[str, str]
    weights: str
    img_size: int | None = None


def named(
    model: str,
    checkpoint: Path | None = None,
    pretrained: bool = False,
    merge_r: int = 0,
    img_size: int | None = None,
) -> Source:
    """A model of timm by its name.

    Args:
        checkpoint: weights of the model; None: see `pretrained`.
        pretrained: timm's own weights.
        merge_r: tokens that every block merges away, by the model's own merger or else by their keys; 0: as it is.

    Raises:
        CommandError: there is no such checkpoint.
    """
    weights = str(checkpoint) if checkpoint else "timm's" if pretrained else "random"
    identified = file_identity(checkpoint) if checkpoint else weights
    about = {"model": model, "checkpoint": identified, "merge_r": str(merge_r)}
    return Source(partial(_create, model, checkpoint, pretrained, merge_r, img_size), about, weights, img_size)


def cached_features(
    cache_dir: Path, dataset: Dataset, source: Source, *, batch_size: int = 64, workers: int = 0, device: str = "cpu"
) -> Features:
    """Features of all the images of a data set, from the cache when it has them.

    Args:
        cache_dir: where feature files are kept; each is named after the model and all that decides its content.
        dataset: of images, without a transform.
        source: of the features.
        batch_size, workers, device: how to compute.

    Raises:
        CommandError: the model can't be made, or an image can't be read.
    """
    metadata = source.about | {"img_size": str(source.img_size)} | identity(dataset)
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()[:12]
    path = cache_dir / f"{source.about['model'].replace('/', '_').replace(':', '_')}-{digest}.safetensors"
    if path.is_file():
        cached = load_features(path)
        if metadata.items() <= cached.metadata.items():
            return cached
    net = source.make().to(device).eval()
    transform = eval_transform(net, source.img_size)
    metadata["classes"] = json.dumps(class_names(dataset))
    features = Features(*_extract(net, dataset, transform, batch_size, workers, device), metadata)
    save_features(path, features)
    return features


def eval_transform(net: nn.Module, img_size: int | None) -> Callable:
    """timm's transform of PIL images for evaluation, to squares of this size; None: the model's own."""
    return create_transform(**resolve_model_data_config(net, args={"img_size": img_size}))


def file_identity(path: Path) -> str:
    """A file's path, size and time: enough to tell that it was replaced."""
    if not path.is_file():
        raise CommandError(f"no checkpoint {path}")
    stat = path.stat()
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"


def _create(
    model: str, checkpoint: Path | None, pretrained: bool, merge_r: int, img_size: int | None = None
) -> nn.Module:
    """The model without its classifier; what merges its tokens is its own merger if it has one, else its keys."""
    net = _models.create(model, pretrained=pretrained, num_classes=0)
    if checkpoint:
        _load(net, model, checkpoint)
    if img_size is not None and hasattr(net, "set_input_size"):
        net.set_input_size(img_size=(img_size, img_size))
    if not merge_r:
        return net
    own = isinstance(net, TokenViT) and net.merger is not None
    return _models.merged(net, merge_r, None if own else "keys")


def _load(net: nn.Module, model: str, checkpoint: Path) -> None:
    try:
        # Not strict, because a classifier in the checkpoint has no place here; but everything here must be filled.
        missing = timm.models.load_checkpoint(net, str(checkpoint), strict=False).missing_keys
    except (RuntimeError, OSError) as error:
        raise CommandError(f"{checkpoint} doesn't fit {model}: {error}") from error
    if missing:
        raise CommandError(f"{checkpoint} lacks {len(missing)} weights of {model}, such as {missing[0]}")


@torch.inference_mode()
def _extract(
    net: nn.Module, dataset: Dataset, transform: Callable, batch_size: int, workers: int, device: str
) -> tuple[Tensor, Tensor]:
    """Features (N, D) and labels (N,) on the CPU."""
    features, labels, errors = [], [], []
    with tqdm(total=len(dataset), desc="features", unit="image") as bar:
        for batch in batches(dataset, transform, batch_size=batch_size, num_workers=workers):
            errors += batch.errors
            if batch.images is not None:
                features.append(net(batch.images.to(device)).float().cpu())
                labels += batch.labels
            bar.update(len(batch))
    if errors:
        raise CommandError(
            f"{len(errors)} of {len(dataset)} images can't be read, repair or remove them: {'; '.join(errors[:10])}"
        )
    return torch.cat(features), torch.tensor(labels)
