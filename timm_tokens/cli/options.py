"""The options that several commands share: what is the same thing has the same name in all of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_tokens.options import Options, option

DTYPES = ("float32", "bfloat16", "float16")
_DECIDED = ("model_name", "pretrained", "checkpoint_path", "num_classes", "in_chans", "features_only")


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Model."""

    model: str | None = option(None, "name of a model in timm or in this package (default: none)")
    pretrained: bool = option(False, "load timm's pretrained weights")
    checkpoint: Path | None = option(
        None, "checkpoint with the model's weights, .safetensors or .pth (default: none)", metavar="FILE"
    )
    checkpoint_key: str | None = option(
        None, "name of the weights to take from --checkpoint where several fit the model, such as teacher (default: "
        "the only ones that fit)", metavar="KEY", rare=True,
    )  # fmt: skip
    img_size: int | None = option(
        None, "side of the square images in pixels (default: the model's own)", at_least=1, at_most=16384,
        aliases=("--image-size",),
    )  # fmt: skip
    in_chans: int | None = option(
        None, "number of image channels: 3 for colour, 1 for grey (default: the model's own)", choices=(1, 3)
    )
    model_kwargs: dict[str, Any] = option(
        {}, "further arguments for timm.create_model, such as depth=6 embed_dim=192", rare=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint_key is not None and self.checkpoint is None:
            raise ValueError(f"checkpoint_key needs a checkpoint, got {self.checkpoint_key!r} without one")
        for name in self.model_kwargs:
            if name in _DECIDED or (name == "img_size" and self.img_size is not None):
                raise ValueError(f"model_kwargs can't have {name}, which the command or another option decides")


@dataclass(frozen=True, kw_only=True)
class WeightOptions(ModelOptions):
    """Model."""

    random: bool = option(False, "use random weights, as a baseline")


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(Options):
    """Machine."""

    device: str | None = option(None, "device to compute on, such as cuda:1 (default: cuda if there is one, else cpu)")


@dataclass(frozen=True, kw_only=True)
class LoadingOptions(DeviceOptions):
    """Machine."""

    batch_size: int = option(64, "number of images in each batch", at_least=1)
    workers: int = option(4, "number of worker processes that load images", at_least=0, at_most=1024)


@dataclass(frozen=True, kw_only=True)
class ImageOptions(Options):
    """Images."""

    data_dir: Path | None = option(
        None, "folder with one folder of images for each class (default: none)", metavar="FOLDER"
    )
    dataset: str = option(
        "", "name of a data set that timm knows, such as torch/cifar10; it is then kept in --data-dir"
    )


@dataclass(frozen=True, kw_only=True)
class SplitOptions(ImageOptions):
    """Images."""

    data_dir: Path | None = option(
        None, "folder with train/<class>/ and val/<class>/ (default: none)", metavar="FOLDER"
    )
    train_split: str = option("train", "folder in --data-dir, or split of --dataset, with the training images")
    val_split: str = option("val", "folder in --data-dir, or split of --dataset, with the validation images")


@dataclass(frozen=True, kw_only=True)
class MergerOptions(Options):
    """Token merging."""

    merger: str | None = option(
        None, "trained merger: a file, the folder of a run of train dtem or calibrate, or hf-hub:user/name "
        "(default: none)", metavar="FILE",
    )  # fmt: skip
