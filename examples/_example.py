"""What all examples share: how one is started, its options, one training loop, and one small ViT."""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models import VisionTransformer
from torch import Tensor, nn
from tqdm import tqdm

from timm_tokens.cli import CommandError
from timm_tokens.cli.errors import explained


def run_example(name: str, run: Callable[[Any], Any], args: Any) -> int:
    """Run an example; what the user can mend is one line, and the exit code 2."""
    try:
        with explained():
            run(args)
    except CommandError as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.default is None or action.default is False or "default:" in (action.help or "")
        return action.help if said else super()._get_help_string(action)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


def make_parser(
    doc: str | None, name: str, *, steps: int | None = None, batch_size: int | None = 32, lr: float | None = 1e-3
) -> argparse.ArgumentParser:
    """A parser with the options of every example; its help shows defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=_HelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("output") / name, help="folder for the results")
    words = "number of training steps" + (" (default: by the data)" if steps is None else "")
    parser.add_argument("--steps", type=positive, default=steps, help=words)
    words = "number of images in each step" + (" (default: by the data)" if batch_size is None else "")
    parser.add_argument("--batch-size", type=positive, default=batch_size, help=words)
    parser.add_argument(
        "--lr", type=float, default=lr, help="learning rate" + (" (default: by the data)" if lr is None else "")
    )
    return parser


def averaging_vit(img_size: Any, patch_size: int, in_chans: int, dim: int, depth: int, num_heads: int) -> nn.Module:
    """A small ViT without class token or classifier, whose feature is the mean of its patches."""
    return VisionTransformer(
        img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=dim, depth=depth, num_heads=num_heads,
        num_classes=0, class_token=False, global_pool="avg", fc_norm=False,
    )  # fmt: skip


@torch.no_grad()
def start_positions(vit: nn.Module) -> Tensor:
    """Let the position embedding start as sines and cosines, and return it, (patches, C).

    A small ViT that has to find things learns that several times as fast as from random positions.
    """
    positions = 0.5 * build_sincos2d_pos_embed(vit.patch_embed.grid_size, vit.embed_dim, temperature=30.0)
    vit.pos_embed.copy_(positions)
    return positions


def normalised(images: Tensor) -> Tensor:
    """uint8 -> [-1, 1]."""
    return images.float().div_(127.5).sub_(1)


def fit(
    parameters: Iterable[nn.Parameter], loss: Callable[..., Tensor], batches: Iterable[tuple], steps: int, what: str,
    lr: float,
) -> None:  # fmt: skip
    """Minimise loss(*batch) by AdamW with a one-cycle schedule."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps + 1, pct_start=0.1)
    bar = tqdm(batches, f"training {what}", steps)
    for batch in bar:
        value = loss(*batch)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{value.item():.3f}", refresh=False)
