"""Global and local crops: the options that several objectives have, and the sides that a backbone can take."""

from dataclasses import dataclass
from typing import Any

from timm.data import resolve_model_data_config
from torch import nn

from timm_tokens.cli.common.models import check_size, plain
from timm_tokens.cli.train.images import open_readable
from timm_tokens.cli.train.objective import Objective, TrainOptions
from timm_tokens.cli.train.online import neighbours
from timm_tokens.data import Crop, DeviceCrops, MultiCrop
from timm_tokens.options import option
from timm_tokens.tasks import TokenTask


@dataclass(frozen=True, kw_only=True)
class CropOptions(TrainOptions):
    """Crops."""

    local_crops: int | None = option(None, "number of local crops (default: 8, or 0 for MoBY)", at_least=0)
    local_size: int | None = option(
        None, "side of local crops in pixels (default: 96 where --img-size is 224)", at_least=1, at_most=16384
    )
    global_scale: tuple[float, float] | None = option(
        None, "range of a global crop's area (default: 0.4 1, or 0.08 1 for MoBY)", above=0, at_most=1, ascending=True
    )
    local_scale: tuple[float, float] = option(
        (0.05, 0.4), "range of a local crop's area", above=0, at_most=1, ascending=True
    )
    interpolation: str | None = option(
        None, "interpolation of the crops (default: the one that the model expects)", choices=("bicubic", "bilinear"),
        rare=True,
    )  # fmt: skip
    augment_on_device: bool = option(
        False, "cut and colour the crops on --device, in batches, instead of in the processes that load images"
    )


def crop_sides(options: CropOptions, backbone: nn.Module) -> tuple[int, int]:
    """The sides of global and of local crops: as the options say, else the model's own, and 96 of 224 of that."""
    stem = getattr(plain(backbone), "patch_embed", None)
    patch = getattr(stem, "patch_size", (1,))[0]
    size = options.img_size or resolve_model_data_config(backbone)["input_size"][-1]
    local = options.local_size or max(1, round(size * 96 / 224 / patch)) * patch
    check_size(backbone, size)
    check_size(backbone, local, "--local-size")
    return size, local


def on_crops(task: TokenTask, backbone: nn.Module, crops: list[Crop], options: Any) -> Objective:
    """A task on these crops of the training images, measured as OnlineOptions say; labels are not used to train."""
    images = open_readable(options, options.train_split)
    cut = MultiCrop.for_model(backbone, crops, options.interpolation)
    on_device = DeviceCrops(cut) if options.augment_on_device else None
    images.transform = cut if on_device is None else on_device.draw
    evaluate = neighbours(images, options, backbone, options.img_size)
    return Objective(task, images, evaluate=evaluate, augment=on_device)
