"""Which model a base is: its name in timm, its shape, and a digest of a few of its weights."""

import hashlib
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from timm_tokens.distributed import whole
from timm_tokens.timm_types import ViT

_ROUNDED = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def base_name(base: ViT) -> str | None:
    """The name of a timm model, with its tag, if it knows it."""
    cfg = getattr(base, "pretrained_cfg", None) or {}
    return ".".join(filter(None, (cfg.get("architecture"), cfg.get("tag")))) or None


def digest(base: ViT) -> dict[str, dict[str, str]]:
    """Digests of up to 2048 values of each weight in the first and the last block: {"float16": {name: hex}, ...}.

    They are taken of the values as rounded to half precisions, so that a model and its half compare equal. What is no
    plain floating-point parameter (quantised, parametrised) is left out, and so is what has another name by now
    (wrapped in an adapter); the norms remain.
    """
    depth = len(base.blocks)
    found: dict[str, dict[str, str]] = {name: {} for name in _ROUNDED}
    for i in sorted({0, depth - 1}):
        for name, weight in base.blocks[i].named_parameters():
            plain = type(weight) is nn.Parameter or hasattr(weight, "full_tensor")
            if plain and weight.is_floating_point() and not weight.is_meta:
                values = whole(weight).detach().flatten()
                values = values[:: max(1, values.numel() // 2048)].cpu().contiguous()
                for rounded, dtype in _ROUNDED.items():
                    if values.dtype in (torch.float32, torch.float64, dtype):
                        found[rounded][f"blocks.{i}.{name}"] = _hex(values.to(dtype))
    return found


def same_weights(a: Mapping[str, Mapping[str, str]], b: Mapping[str, Mapping[str, str]]) -> bool | None:
    """Whether two digests are of the same weights; None if nothing in them can be compared."""
    verdicts = []
    for rounded in a.keys() & b.keys():
        names = a[rounded].keys() & b[rounded].keys()
        verdicts += [all(a[rounded][name] == b[rounded][name] for name in names)] if names else []
    return any(verdicts) if verdicts else None


def _hex(values: Tensor) -> str:
    return hashlib.blake2b(bytes(values.view(torch.uint8).tolist()), digest_size=6).hexdigest()


def shape(base: ViT) -> dict[str, int]:
    """What a part's weights depend on: how many blocks, channels and heads the base has."""
    return {"depth": len(base.blocks), "embed_dim": base.embed_dim, "num_heads": base.blocks[0].attn.num_heads}


def words(shape: Mapping[str, int]) -> str:
    """A shape as messages say it."""
    return "{depth} blocks, {embed_dim} channels, {num_heads} heads".format_map(shape)


def architecture(name: str) -> str:
    """A model's name without its tag and its image size, which a merger does not depend on."""
    return re.sub(r"_\d{2,4}$", "", name.split(".")[0])
