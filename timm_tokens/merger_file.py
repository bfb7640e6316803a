"""A trained merger as a small file: its weights, its settings, and which base they were trained for.

The file is safetensors. Its tensors are those of `TokenMerger.state_dict()`; its metadata, all strings, are

    format, version     "timm-tokens merger", "1"
    base                the base's name in timm, with its tag: "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    config              JSON: the arguments of `TokenMerger`
    shape               JSON: the base's blocks, channels and heads
    digest              JSON: digests of a few of the base's weights, by which other weights are noticed
    notes               JSON: whatever else its author wants to say, such as the data and a table of results
"""

import json
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from timm.utils import unwrap_model
from torch import Tensor, nn

from timm_tokens import identity
from timm_tokens.digests import is_whole, save_tensors
from timm_tokens.distributed import whole
from timm_tokens.files import replacing
from timm_tokens.parts import TokenMerger
from timm_tokens.timm_types import ViT

NAME = "merger.safetensors"  # in a training run's folder, and in a repository of the hub
FORMAT, VERSION = "timm-tokens merger", "1"


def save_merger(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write the merger of a model to a file of its own, which `apply_dtem_merging(vit, weights=path)` reads.

        timm_tokens.save_merger(model, "merger.safetensors", dtype=torch.float16)  # 0.3 MB for ViT-Tiny

    The base is not written, but its name and a digest of a few of its weights are, so that the merger is not taken for
    that of another model.

    Args:
        model: A TokenViT with a merger; DDP and torch.compile around it are looked through. With FSDP2 every process
            must call this.
        path: The file to write; it appears whole or not at all.
        dtype: Floating-point type to store the weights in; None keeps theirs. torch.float16 halves the file.
        notes: JSON-able notes to keep in the file.

    Returns:
        The path.

    Raises:
        ValueError: If the model has no merger, or weights that are not finite in this type.
    """
    model, path = unwrap_model(model), Path(path)
    merger = merger_of(model)
    weights = {name: value.cpu().to(dtype or value.dtype) for name, value in whole(dict(merger.state_dict())).items()}
    _check_finite(weights, f"the merger's weights in {dtype or 'their own type'}")
    metadata = {"format": FORMAT, "version": VERSION, "base": identity.base_name(model.base) or "unknown"}
    details = {
        "config": merger.config,
        "shape": identity.shape(model.base),
        "digest": identity.digest(model.base),
        "notes": notes or {},
    }
    metadata |= {name: json.dumps(value) for name, value in details.items()}
    with replacing(path) as partial:
        save_tensors(partial, weights, metadata)
    return path


def merger_of(model: nn.Module) -> TokenMerger:
    """The merger of a TokenViT; a ValueError if it has none."""
    merger = getattr(model, "merger", None)
    if not isinstance(merger, TokenMerger):
        raise ValueError(f"this {type(model).__name__} merges no tokens: apply_dtem_merging(model) gives it a merger")
    return merger


class SavedMerger(NamedTuple):
    """What a merger's file holds: the tensors, and the metadata that this module's docstring lists."""

    source: str  # where it was read from, for messages
    base: str
    config: dict[str, Any]
    shape: dict[str, int]
    digest: dict[str, dict[str, str]]
    notes: dict[str, Any]
    weights: dict[str, Tensor]

    def build(self, base: ViT, r: Any = None, **options: Any) -> TokenMerger:
        """The merger, for a plain timm ViT that it fits; warns if that has other weights than it was trained for.

        `r` is taken instead of the saved one; other options of `TokenMerger` must be as saved, or None.
        """
        self._check_base(base)
        for name, value in options.items():
            if value is not None and value != self.config.get(name):
                raise ValueError(
                    f"{self.source} was trained with {name}={self.config.get(name)!r}, got {name}={value!r}: leave it "
                    "out, as the weights bring it along"
                )
        try:
            merger = TokenMerger(base, **self.config | ({} if r is None else {"r": r}))
            merger.load_state_dict(self.weights)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self.source} holds no merger for this model: {error}") from error
        return merger

    def _check_base(self, base: ViT) -> None:
        name, shape = identity.base_name(base) or "unknown", identity.shape(base)
        same = identity.same_weights(self.digest, identity.digest(base))
        named = "unknown" not in (name, self.base) and identity.architecture(name) != identity.architecture(self.base)
        if shape != self.shape or (named and not same):
            raise ValueError(
                f"{self.source} holds a merger for {self.base} ({identity.words(self.shape)}), but the model is {name} "
                f"({identity.words(shape)}): train one for this model, or use metric='keys', which needs no training"
            )
        if next(base.parameters()).is_meta:
            raise ValueError(f"the model is on the meta device: load its weights before those of {self.source}")
        if not same:
            doubt = "" if same is False else " perhaps, as they can't be compared,"
            whose = "" if self.base == "unknown" else f" of {self.base}"
            warnings.warn(
                f"{self.source} was trained{doubt} on other weights{whose} than this model has: evaluate how well it "
                "chooses tokens here, or train one for these weights",
                stacklevel=4,
            )


def read_merger(source: str | PathLike[str]) -> SavedMerger:
    """Read a merger from what `locate` finds; a ValueError if the file is corrupt, or is no merger's."""
    path = locate(source)
    try:
        with safe_open(path, "pt") as file:
            metadata, weights = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{source} is corrupt, or no safetensors file: {error}") from error
    if is_whole(path) is False:
        raise ValueError(f"{source} is corrupt: it is not what was written, by its digest")
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{source} holds no merger: {_what_it_is(weights)}")
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{source} has version {metadata.get('version')} of the format; this timm-tokens reads {VERSION}: upgrade"
        )
    _check_finite(weights, f"the weights in {source}")
    base, details = metadata.get("base", "unknown"), _details(source, metadata)
    return SavedMerger(str(source), base, *details, weights)  # type: ignore[call-arg]  # mypy counts no unpacked tuple


def locate(source: str | PathLike[str]) -> Path:
    """The file of a merger that is given as a file, a training run's folder, or "hf-hub:user/name[@revision]"; an
    OSError if there is none, or it can't be downloaded."""
    if isinstance(source, str) and source.startswith(("hf-hub:", "hf_hub:")):
        repo, _, revision = source[len("hf-hub:") :].partition("@")
        try:
            return Path(hf_hub_download(repo, NAME, revision=revision or None, library_name="timm-tokens"))
        except (HfHubHTTPError, OSError) as error:
            raise OSError(f"{NAME} of {repo} can't be downloaded from the hub: {error}") from error
    path = Path(source)
    if path.is_dir():
        if not (path / NAME).is_file():
            raise FileNotFoundError(f"the folder {path} has no {NAME}, which `timm-tokens train dtem` writes")
        return path / NAME
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; a merger on the hub is given as 'hf-hub:user/name'")
    return path


def _details(source: Any, metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """The JSON entries of a merger's metadata."""
    found, needs = [], {"config": {"r", "metric"}, "shape": {"depth", "embed_dim", "num_heads"}}
    for name in ("config", "shape", "digest", "notes"):
        needed = needs.get(name, set())
        try:
            value = json.loads(metadata.get(name, "{}"))
        except ValueError as error:
            raise ValueError(f"{source} is corrupt: {name!r} in its metadata is no JSON ({error})") from error
        if not isinstance(value, dict) or needed - value.keys():
            raise ValueError(
                f"{source} is corrupt: {name!r} in its metadata lacks {', '.join(sorted(needed)) or 'its form'}"
            )
        found.append(value)
    return found


def _what_it_is(weights: Mapping[str, Tensor]) -> str:
    """What a file with these tensors seems to be, for whoever took it for a merger."""
    if weights and all(name.startswith("embed.") for name in weights):
        return "it has the tensors of one, but not the metadata that timm_tokens.save_merger writes; save it anew"
    names = ", ".join(sorted(weights)[:2]) or "none"
    return (
        f"its {len(weights)} tensors ({names}, ...) seem to be a whole model's, to be loaded by "
        "timm.create_model(..., checkpoint_path=...); a merger's file is written by timm_tokens.save_merger"
    )


def _check_finite(weights: Mapping[str, Tensor], what: str) -> None:
    for name, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(f"{what} are not finite: {name} has infinite or NaN values")
