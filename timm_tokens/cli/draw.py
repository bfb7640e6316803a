"""Draw which patches of an image a model treats as one token.

    timm-tokens draw photo.jpg groups.png --model vit_small_patch16_224 --metric keys --r 16
    timm-tokens draw photo.jpg groups.png --model vit_small_patch16_224 --checkpoint trained.safetensors

The picture shows the image as the model sees it, then for each chosen block every group of patches, outlined and filled
with its mean colour.
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from timm_tokens.cli import _models
from timm_tokens.cli._errors import CommandError
from timm_tokens.cli._files import check_picture, read_image
from timm_tokens.cli._picture import SIDE, enlarge, paint_groups, sheet
from timm_tokens.files import replacing
from timm_tokens.vit import TokenViT


class Panel(NamedTuple):
    """The groups (H, W) int64 that the patches are in after a block, and how many there are."""

    block: int
    groups: Tensor
    tokens: int


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of the sub-command: the keyword arguments of `run`."""
    parser.add_argument("image", type=Path, help="the image to read")
    parser.add_argument("out", type=Path, help="the picture to write; its suffix says how (.png, .jpg, .webp)")
    parser.add_argument("--model", required=True, help="name of a ViT in timm, or of a model of this package")
    parser.add_argument(
        "--checkpoint", type=Path, help="weights of the ViT, or of the whole merged model (default: timm's)"
    )
    parser.add_argument("--r", type=int, default=8, help="tokens to merge in each block (default: %(default)s)")
    parser.add_argument("--blocks", type=int, nargs="+", help="blocks to draw, from 1 (default: four, evenly spaced)")
    parser.add_argument(
        "--metric",
        choices=("learned", "keys"),
        help="what tokens are compared by (default: as the model is, else learned)",
    )


def run(
    *,
    image: str | Path,
    out: str | Path,
    model: str,
    checkpoint: str | Path | None = None,
    r: int = 8,
    blocks: Sequence[int] | None = None,
    metric: str | None = None,
) -> list[Panel]:
    """Write the picture; see the command's --help.

    Returns:
        What it shows, one panel a block.

    Raises:
        CommandError: If something is missing or doesn't fit; then nothing is written.
    """
    out = Path(out)
    check_picture(out)
    photo = read_image(Path(image))
    net = _models.merged(_models.create(model, pretrained=checkpoint is None), r, metric)
    if checkpoint is not None:
        _models.load(net, Path(checkpoint))
    blocks = _check_blocks(blocks, depth=len(net.base.blocks))
    pixels, shown = _models.as_seen(net, photo)
    panels = [_panel(net, pixels, block) for block in blocks]
    _check_r(r, patches=panels[0].groups.numel())
    shown = enlarge(shown, SIDE)
    titled = [(f"block {p.block}: {p.tokens} tokens", paint_groups(p.groups, shown)) for p in panels]
    with replacing(out) as partial:
        sheet([(f"image: {panels[0].groups.numel()} patches", shown), *titled]).save(partial)
    return panels


def _panel(net: TokenViT, pixels: Tensor, block: int) -> Panel:
    groups = net.token_groups(pixels, block)[0]
    return Panel(block, groups, len(groups.unique()))


def _check_blocks(blocks: Sequence[int] | None, depth: int) -> list[int]:
    if blocks is None:
        return sorted({-(-depth * quarter // 4) for quarter in (1, 2, 3, 4)})
    for block in blocks:
        if not 1 <= block <= depth:
            raise CommandError(f"--blocks takes numbers from 1 to {depth}, the model's depth, got {block}")
    return list(blocks)


def _check_r(r: int, patches: int) -> None:
    if r > patches // 2:
        raise CommandError(
            f"--r {r} is too large: a block merges at most half of the {patches} patches, {patches // 2}"
        )
