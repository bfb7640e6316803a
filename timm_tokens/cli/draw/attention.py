"""Draw what a model's auxiliary tokens attend to in an image, and how similar they are.

    timm-tokens draw attention photo.jpg attention.png --run output/mte
    timm-tokens draw attention photo.jpg attention.png --model vit_small_mte --checkpoint model.safetensors --block 6

The picture shows the image and the cosine similarity of all tokens; then the attention of the class token and of each
auxiliary class token, averaged over heads; then the weights by which each pooled token averages the patches (averaged
over channels where these have their own). The maps of a row share one scale that starts at zero.
"""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from timm_tokens import blocks
from timm_tokens.cli.common import checkpoints, models
from timm_tokens.cli.common.runs import RunOptions, load_run
from timm_tokens.cli.draw.photo import PictureOptions, as_seen, check_picture, open_photo
from timm_tokens.cli.errors import CommandError
from timm_tokens.cli.options import WeightOptions
from timm_tokens.ops.finite import check_weights
from timm_tokens.options import option
from timm_tokens.vit import TokenViT


class Looks(NamedTuple):
    """Where tokens look, over the patch grid, and how alike they end up; None of tokens that the model lacks."""

    cls: Tensor | None  # (B, H, W) the class token's attention, averaged over heads
    aux_cls: Tensor | None  # (B, k_a, H, W) the auxiliary class tokens'
    pooled: Tensor | None  # (B, k_p, H, W) the pooling weights, averaged over channels
    cosine: Tensor  # (B, T, T) between the global token, the auxiliary class tokens and the pooled tokens


@dataclass(frozen=True, kw_only=True)
class Options(PictureOptions, RunOptions, WeightOptions):
    """What to draw."""

    model: str | None = option(None, "name of a model with auxiliary tokens, instead of --run (default: none)")
    checkpoint: Path | None = option(
        None, "checkpoint of the whole model: the weights of its base are not enough (default: none)", metavar="FILE"
    )
    block: int | None = option(None, "number of the block whose attention to draw, from 1 (default: the last)",
                               at_least=1)  # fmt: skip


def run(options: Options) -> Looks:
    """Write the picture, and return what it shows, for a batch of one."""
    check_picture(options.out)
    photo, block = open_photo(options.image), options.block
    if (options.run_dir is None) == (options.model is None):
        raise CommandError("give either --run FOLDER, of timm-tokens train mte, or --model NAME")
    net = _by_name(options) if options.run_dir is None else _of_run(options.run_dir)
    depth = len(net.base.blocks)
    if block is not None and block > depth:
        raise CommandError(f"--block takes a number from 1 to {depth}, the model's depth, got {block}")
    if options.img_size is not None and options.run_dir:
        models.check_size(net, options.img_size)
        net.set_input_size((options.img_size, options.img_size))
    pixels, shown = as_seen(net, photo)
    seen = looks(net, pixels, (block or depth) - 1)
    from timm_tokens.drawing import draw_attention, save  # not above: matplotlib is an extra

    save(draw_attention(shown, _maps(seen), seen.cosine[0]), options.out)
    return seen


def _of_run(folder: Path) -> TokenViT:
    task = load_run(folder).task
    net = None if task is None else task.teacher.encoder.backbone
    if not isinstance(net, TokenViT) or net.aux is None:
        raise CommandError(f"the run in {folder} has no ViT with auxiliary tokens")
    return net


def _by_name(options: Options) -> TokenViT:
    if options.checkpoint is None and not options.random and ":" not in (options.model or ""):
        raise CommandError("give --checkpoint: the weights of a model trained with auxiliary tokens; timm has none")
    net = models.make_trained(options, load=False)
    if not isinstance(net, TokenViT) or net.aux is None:
        raise CommandError(f"{options.model} has no auxiliary tokens: give a model that has, such as vit_small_mte")
    if options.checkpoint is not None:
        checkpoints.load_whole(net, options.checkpoint, options.checkpoint_key)
        check_weights(net)
    return net


def _maps(seen: Looks) -> dict[str, dict[str, Tensor]]:
    """The maps (H, W) by what they show and by the token's name, as steps.csv has it."""
    attention = {} if seen.cls is None else {"cls": seen.cls[0]}
    if seen.aux_cls is not None:
        attention |= {f"aux{i}": values for i, values in enumerate(seen.aux_cls[0])}
    rows = {"attention": attention}
    if seen.pooled is not None:
        rows["pooling weight"] = {f"pooled{i}": values for i, values in enumerate(seen.pooled[0])}
    return {what: maps for what, maps in rows.items() if maps}


@torch.no_grad()
def looks(model: TokenViT, images: Tensor, block: int = -1) -> Looks:
    """Where the tokens of a model look in a block, for images (B, 3, h, w). Nothing is merged for it.

    Raises:
        ValueError: If the block's attention has no weights to read.
    """
    net: Any = deepcopy(model).eval()
    net.merger = None
    read = _record_attention(net.base.blocks[block])
    tokens = net(images, tokens=True)
    if not read:
        raise ValueError(f"the attention of {type(model.base.blocks[block]).__name__} gives no weights to draw")
    prefix, n = model.num_prefix_tokens, tokens.patches.shape[1]
    grid = blocks.grid_size(model.base, images.shape[-2:])
    attention = read[-1].mean(dim=1)[:, :, prefix : prefix + n].unflatten(2, grid)  # (B, N + A, H, W)
    pooled = None
    if tokens.pooled is not None:
        pool = net.aux.pool
        weights = pool.weights(pool.normed(tokens.patches.transpose(1, 2).unflatten(2, grid)))
        pooled = (weights.mean(dim=1) if pool.per_channel else weights).unflatten(2, grid)
    kinds = [tokens.cls[:, None], tokens.aux_cls, tokens.pooled]
    every = nn.functional.normalize(torch.cat([kind for kind in kinds if kind is not None], dim=1), dim=2)
    return Looks(
        cls=attention[:, 0] if model.has_class_token else None,
        aux_cls=None if tokens.aux_cls is None else attention[:, prefix + n :],
        pooled=pooled,
        cosine=every @ every.transpose(1, 2),
    )


def _record_attention(block: nn.Module) -> list[Tensor]:
    """A list that gets the block's attention weights (B, heads, N, N), where timm drops some of them in training."""
    read: list[Tensor] = []
    module: Any
    for module in block.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
            module.attn_drop.register_forward_hook(lambda module, args, output: read.append(output))
    return read
