"""Draw which patches of an image a model treats as one token.

    timm-tokens draw photo.jpg groups.png --model vit_small_patch16_224 --pretrained --metric keys --r 16
    timm-tokens draw photo.jpg groups.png --model vit_small_patch16_224 --checkpoint trained.safetensors

The picture shows the image as the model sees it, then, after each chosen block, every group of patches that share a
token, outlined and filled with its mean colour. Where the patches of a token do not touch, each piece has its number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from timm_tokens.cli.common import checkpoints, checks, models
from timm_tokens.cli.draw.photo import PictureOptions, as_seen, check_picture, open_photo
from timm_tokens.cli.errors import CommandError
from timm_tokens.cli.options import DeviceOptions, MergerOptions, WeightOptions
from timm_tokens.ops.finite import check_weights
from timm_tokens.options import option
from timm_tokens.vit import TokenViT


class Panel(NamedTuple):
    """The groups (H, W) int64 that the patches are in after a block, and how many there are."""

    block: int
    groups: Tensor
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Options(PictureOptions, WeightOptions, MergerOptions, DeviceOptions):
    """What to draw."""

    model: str = option(help="name of a ViT in timm, or of a model of this package")
    checkpoint: Path | None = option(
        None, "checkpoint of the ViT, or of the whole model with its merger (default: none)", metavar="FILE"
    )
    r: int | None = option(None, "tokens to merge in each block (default: 8, or as --merger was saved)", at_least=0)
    blocks: tuple[int, ...] | None = option(
        None, "numbers of the blocks to draw, from 1 (default: four, evenly spaced)", at_least=1
    )
    metric: str | None = option(
        None, "what tokens are compared by (default: as in the model, else learned)", choices=("learned", "keys")
    )


def run(options: Options) -> list[Panel]:
    """Write the picture, and return what it shows: one panel per block."""
    check_picture(options.out)
    photo, device = open_photo(options.image), checks.device(options.device)
    net = _merged(options)
    blocks = _check_blocks(options.blocks, depth=len(net.base.blocks))
    pixels, shown = as_seen(net, photo)
    net, pixels = net.to(device), pixels.to(device)
    groups = [net.token_groups(pixels, block)[0].cpu() for block in blocks]
    panels = [Panel(block, found, len(found.unique())) for block, found in zip(blocks, groups, strict=True)]
    from timm_tokens.drawing import draw_groups, save  # not above: matplotlib is an extra

    titled = {f"after block {p.block}": p.groups[None] for p in panels}
    save(draw_groups(shown[None], titled, f"image: {panels[0].groups.numel()} patches"), options.out)
    return panels


def _merged(options: Options) -> TokenViT:
    """The model that merges."""
    if options.merger is not None:
        if options.metric is not None:
            raise CommandError("--merger brings what tokens are compared by: leave out --metric")
        return models.with_merger(models.make_trained(options), options.merger, options.r)
    bare = models.make_trained(options, load=False)
    net = models.merged(bare, 8 if options.r is None else options.r, options.metric)
    if options.checkpoint is not None:
        checkpoints.load_merged(net, options.checkpoint, options.checkpoint_key)
        check_weights(net)
    return net


def _check_blocks(blocks: Sequence[int] | None, depth: int) -> list[int]:
    if blocks is None:
        return sorted({-(-depth * quarter // 4) for quarter in (1, 2, 3, 4)})
    for block in blocks:
        if block > depth:
            raise CommandError(f"--blocks takes numbers from 1 to {depth}, the model's depth, got {block}")
    return list(blocks)
