"""What all training objectives start from: the options for images and model, and what they stand for."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from timm.layers import PatchEmbed
from timm.models import get_pretrained_cfg
from timm.utils import ParseKwargs
from torch import Tensor, nn
from torch.utils.data import Dataset

from timm_tokens.cli import _models
from timm_tokens.cli._data import create
from timm_tokens.cli._errors import CommandError

_VALIDATION = ("val", "valid", "validation", "eval", "test")


def add_sources(parser: ArgumentParser) -> None:
    """Declare the options that say which images and which model to train."""
    images = parser.add_argument_group("images")
    images.add_argument("--data-dir", type=Path, help="folder with train/<class>/ and val/<class>/")
    images.add_argument("--dataset", default="", help="instead of folders: a data set of timm, such as torch/cifar10")
    images.add_argument("--train-split", default="train", help="folder, or split, to train on")
    images.add_argument("--val-split", default="val", help="to validate on; '' for none")
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="any model of timm, or of this package")
    model.add_argument("--pretrained", action="store_true", help="start from timm's weights")
    model.add_argument("--checkpoint", type=Path, help="start from these weights; another classifier is left out")
    model.add_argument("--img-size", type=int, help="side of the images (default: the model's)")
    model.add_argument("--drop-path", type=float, help="rate of dropped residual branches")
    model.add_argument(
        "--model-kwargs", nargs="*", default={}, action=ParseKwargs, help="such as depth=6 embed_dim=192"
    )
    model.add_argument("--grad-checkpointing", action="store_true", help="less memory, more time")


def open_split(options: Namespace, split: str, class_map: dict[str, int] | None = None) -> Dataset:
    """A split of the images, without a transform; `class_map` numbers the classes, of folders only.

    Raises:
        CommandError: There is no such data set, or no image in it.
    """
    if options.data_dir is None:
        raise CommandError("--data-dir is missing: a folder with train/<class>/ and val/<class>/")
    root, numbered = Path(options.data_dir), {"class_map": class_map}
    if not options.dataset:
        root = _split_folder(root, split)
    elif class_map is not None and "/" in options.dataset:
        numbered = {}  # its classes are numbered already
    return create(options.dataset, root, split, search_split=False, **numbered)


def _split_folder(root: Path, split: str) -> Path:
    names = _VALIDATION if split in _VALIDATION else (split,)
    found = next((root / name for name in (split, *names) if (root / name).is_dir()), None)
    if found is None:
        raise CommandError(f"no folder {root / split}: --data-dir must have {split}/<class>/ with images")
    return found


def make_model(options: Namespace, **kwargs: Any) -> nn.Module:
    """The model that the options name.

    Args:
        options: As `add_sources` declares them.
        kwargs: For timm.create_model: num_classes, and what the objective needs.

    Raises:
        CommandError: There is no such model or checkpoint, or they don't fit.
    """
    if options.model is None:
        raise CommandError("--model is missing: the name of a model in timm")
    if options.drop_path is not None:
        kwargs["drop_path_rate"] = options.drop_path
    state = None if options.checkpoint is None else _models.read(Path(options.checkpoint))
    if state is not None:
        kwargs["pretrained_cfg_overlay"] = _as_pretrained(options.model, options.checkpoint, state)
    kwargs |= {"pretrained": options.pretrained or options.checkpoint is not None} | options.model_kwargs
    sized = {} if options.img_size is None else {"img_size": options.img_size}
    try:
        model = _models.create(options.model, **kwargs, **sized)
    except CommandError as error:
        if not sized or "img_size" not in str(error):
            raise
        model = _models.create(options.model, **kwargs)  # a conv net: takes any size
    if state is not None and not model.state_dict().keys() & state.keys():
        raise CommandError(f"{options.checkpoint} has no weight of {options.model}: is it of another model?")
    if options.grad_checkpointing:
        model.set_grad_checkpointing()
    return model


def make_backbone(options: Namespace) -> nn.Module:
    """The model without a classifier; a ViT so that it takes crops of all sizes.

    Raises:
        CommandError: As `make_model`.
    """
    try:
        return make_model(options, num_classes=0, dynamic_img_size=True)
    except CommandError as error:
        if "dynamic_img_size" not in str(error):
            raise
        return make_model(options, num_classes=0)


def local_size(backbone: nn.Module, size: int) -> int:
    """The side of local crops where global ones have `size`: 96 of 224, in whole patches."""
    stem = getattr(backbone, "patch_embed", None)
    patch = stem.patch_size[0] if hasattr(stem, "patch_size") else 1
    return max(1, round(size * 96 / 224 / patch)) * patch


def check_size(backbone: nn.Module, size: int, option: str) -> None:
    """Refuse a side of crops that a ViT can't cut into whole patches.

    Raises:
        CommandError: Names the option.
    """
    stem = getattr(backbone, "patch_embed", None)
    if isinstance(stem, PatchEmbed) and size % stem.patch_size[0] and not stem.dynamic_img_pad:
        raise CommandError(f"{option} must be a multiple of the model's patches of {stem.patch_size[0]} px, got {size}")


def _as_pretrained(name: str, checkpoint: Path, state: dict[str, Tensor]) -> dict[str, Any]:
    """The checkpoint in the place of timm's own weights: timm then resizes position embeddings, and leaves out a
    classifier of another number of classes, or makes do without."""
    cfg = get_pretrained_cfg(name)
    classifier = cfg.classifier if cfg is not None else None
    keys = [f"{c}.weight" for c in _names(classifier)]
    rows = {len(state[key]) for key in keys if key in state} or (
        {0} if keys else set()
    )  # 0: pre-trained without labels
    overlay = {"file": str(checkpoint), "custom_load": False, "source": "file"}
    return overlay | ({"num_classes": rows.pop()} if len(rows) == 1 else {})


def _names(classifier: Any) -> tuple[str, ...]:
    return (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
