"""Features of a folder of images by a timm model, computed once and kept in a safetensors file."""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.data import ImageDataset, create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from timm_tokens.cli import _models
from timm_tokens.cli._errors import CommandError
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
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        tensors = {"features": features.features.contiguous(), "labels": features.labels}
        save_file(tensors, partial, features.metadata)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def cached_features(
    cache_dir: Path,
    *,
    model: str,
    data_dir: Path,
    checkpoint: Path | None = None,
    pretrained: bool = False,
    merge_r: int = 0,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "cpu",
) -> Features:
    """Features of all the images in a folder of class folders, from the cache when it has them.

    Args:
        cache_dir: where feature files are kept; each is named after the model and all that decides its content.
        model: name in timm.
        data_dir: one folder a class.
        checkpoint: weights of the model; None: see `pretrained`.
        pretrained: timm's own weights.
        merge_r: tokens that every block merges away, by the model's own merger or else by their keys; 0: as it is.
        batch_size, workers, device: how to compute.
    """
    metadata = {
        "model": model,
        "checkpoint": _identity(checkpoint) if checkpoint else f"pretrained={pretrained}",
        "data_dir": str(data_dir.resolve()),
        "images": _listing(data_dir),
        "merge_r": str(merge_r),
    }
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()[:12]
    path = cache_dir / f"{model.replace('/', '_').replace(':', '_')}-{digest}.safetensors"
    if path.is_file():
        cached = load_features(path)
        if metadata.items() <= cached.metadata.items():
            return cached
    net = _create(model, checkpoint, pretrained, merge_r).to(device).eval()
    dataset = ImageDataset(str(data_dir), transform=create_transform(**resolve_model_data_config(net)))
    metadata["classes"] = json.dumps(dataset.reader.class_to_idx)
    features = Features(*_extract(net, dataset, batch_size, workers, device), metadata)
    save_features(path, features)
    return features


def _identity(path: Path) -> str:
    """A file's path, size and time: enough to tell that it was replaced."""
    if not path.is_file():
        raise CommandError(f"no checkpoint {path}")
    stat = path.stat()
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"


def _listing(folder: Path) -> str:
    """A digest of the names and sizes of the files in a folder of images."""
    if not folder.is_dir():
        raise CommandError(f"no folder {folder}: --data-dir takes a folder with one folder of images a class")
    files = sorted((str(p.relative_to(folder)), p.stat().st_size) for p in folder.rglob("*") if p.is_file())
    if not files:
        raise CommandError(f"{folder} is empty: --data-dir takes a folder with one folder of images a class")
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _create(model: str, checkpoint: Path | None, pretrained: bool, merge_r: int) -> nn.Module:
    """The model without its classifier; what merges its tokens is its own merger if it has one, else its keys."""
    net = _models.create(model, pretrained=pretrained, num_classes=0)
    if checkpoint:
        _load(net, model, checkpoint)
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
    net: nn.Module, dataset: ImageDataset, batch_size: int, workers: int, device: str
) -> tuple[Tensor, Tensor]:
    """Features (N, D) and labels (N,) on the CPU."""
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=workers)
    features, labels = [], []
    for images, targets in tqdm(loader, desc="features", unit="batch"):
        features.append(net(images.to(device)).float().cpu())
        labels.append(targets)
    return torch.cat(features), torch.cat(labels)
