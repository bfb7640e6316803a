"""What a model takes: its channels, sizes and normalisation, and the transforms that make such input."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from timm.data import create_transform, resolve_model_data_config
from timm.layers import to_2tuple
from torch import nn
from torchvision.transforms import Compose, Grayscale


def input_config(model: nn.Module, image_size: int | Sequence[int] | None = None, **args: Any) -> dict[str, Any]:
    """timm's `resolve_model_data_config`, for the channels that the model really has and for images of any size.

    A model made with `in_chans=1` still has a configuration of three channels; for it their mean and standard
    deviation are averaged.

    Args:
        image_size: Side of the images, or (height, width); None: as the model's configuration says.
        args: For timm's function, such as `use_test_size=True`.

    Raises:
        ValueError: The model takes neither 1 nor 3 channels, or its patches don't fill images of this size.
    """
    config, channels = resolve_model_data_config(model, **args), getattr(model, "in_chans", 3)
    if channels not in (1, 3):
        raise ValueError(f"the model takes images of {channels} channels: make it with in_chans 1 (grey) or 3 (RGB)")
    size = config["input_size"][1:] if image_size is None else to_2tuple(image_size)
    if image_size is not None:
        check_size(model, *size)
    normalisation = {name: per_channel(config[name], channels) for name in ("mean", "std")}
    return config | {"input_size": (channels, *size)} | normalisation


def input_transform(config: dict[str, Any], **options: Any) -> Compose:
    """timm's `create_transform` for an `input_config`; of grey input it makes grey images first.

    Args:
        options: For timm's function, such as `is_training=True`.
    """
    transform = create_transform(**config, **options)
    return Compose([Grayscale(), *transform.transforms]) if config["input_size"][0] == 1 else transform


def check_size(model: nn.Module, height: int, width: int) -> None:
    """Refuse images whose last rows or columns a ViT would leave out, because they fill no patch."""
    stem: Any = next((module for module in model.modules() if hasattr(module, "feat_ratio")), None)
    if stem is None or getattr(stem, "dynamic_img_pad", False):
        return  # not cut into patches, or padded
    patch = to_2tuple(stem.feat_ratio(as_scalar=False))
    if height % patch[0] or width % patch[1]:
        sides = list(zip((height, width), patch, strict=True))
        smaller = " x ".join(str(max(side - side % p, p)) for side, p in sides)
        larger = " x ".join(str(side + -side % p) for side, p in sides)
        raise ValueError(
            f"images of {height} x {width} px are not filled by the model's patches of {patch[0]} x {patch[1]} px: "
            f"take {' or '.join(dict.fromkeys([smaller, larger]))}"
        )


def per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """A mean or standard deviation for so many channels: the values themselves, or their average for each."""
    return tuple(values) if len(values) == channels else (fmean(values),) * channels
