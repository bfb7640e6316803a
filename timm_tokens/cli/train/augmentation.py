"""How the images of one view are augmented: the options that several objectives have, and their transform."""

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from timm.data import Mixup
from torchvision.transforms import Compose

from timm_tokens.data import TokenLabelTransform
from timm_tokens.options import Options, option


@dataclass(frozen=True, kw_only=True)
class CropAndFlip(Options):
    """Augmentation."""

    scale: tuple[float, float] = option((0.08, 1.0), "range of a crop's area", above=0, at_most=1, ascending=True)
    hflip: float = option(0.5, "probability of a left-right flip", at_least=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class AugmentationOptions(CropAndFlip):
    """Augmentation."""

    aa: str = option("rand-m9-mstd0.5-inc1", "RandAugment as timm writes it, such as rand-m9-mstd0.5-inc1; '' for none",
                     aliases=("--auto-augment",))  # fmt: skip
    re_prob: float = option(0.25, "probability of random erasing", at_least=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class MixOptions(Options):
    """Augmentation."""

    mixup: float = option(0.0, "alpha of mixup; 0 for none", at_least=0)
    cutmix: float = option(0.0, "alpha of CutMix; 0 for none", at_least=0)


def mixer(options: MixOptions, num_classes: int, smoothing: float = 0.0) -> Mixup | None:
    """What mixes the images of a batch and their classes; None where nothing is to be mixed."""
    if not (options.mixup or options.cutmix):
        return None
    return Mixup(options.mixup, options.cutmix, label_smoothing=smoothing, num_classes=num_classes or 1)


def transform(options: AugmentationOptions, config: dict[str, Any], **more: Any) -> TokenLabelTransform:
    """The transform to views of a model's input; `more` are further arguments of `TokenLabelTransform`."""
    return TokenLabelTransform(
        config["input_size"][1:], options.scale, hflip=options.hflip, auto_augment=options.aa or None,
        mean=config["mean"], std=config["std"], re_prob=options.re_prob, **more,
    )  # fmt: skip


def image_alone(views: TokenLabelTransform) -> Compose:
    """The transform that gives the image alone of each view."""
    return Compose([views, attrgetter("image")])
