"""What does a text decoder lose, and save, when the image's tokens are merged first?

    python examples/captioning.py            # rows of handwritten digits: nothing to download

A small ViT reads an image with a row of four digits, and a decoder writes them down one after the other, attending to
what `model(images, tokens="merged")` gives: fewer tokens, and how many patches each stands for. The logarithm of that
number is added to the attention. ViT and decoder are trained together without merging; then they are frozen, and for
each r the report has the share of rows that are read without a mistake, with keys and with embeddings that were trained
through the frozen decoder, and the time that the decoder takes. It takes about three minutes on one core.
"""

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from _data import digits
from _example import averaging_vit, fit, make_parser, normalised, run_example, start_positions
from _scenes import digit_rows
from torch import Tensor, nn

import timm_tokens
from timm_tokens import TokenViT
from timm_tokens.tables import markdown, write_csv

LENGTH, START = 4, 10  # digits in a row; the token that a caption starts with


class DecoderBlock(nn.Module):
    """Causal self-attention over the text, cross-attention to the image, and an MLP; each with a residual."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q, self.kv, self.cross_proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, image: Tensor, bias: Tensor) -> Tensor:
        """Text (B, L, C), image tokens (B, M, C), bias (B, 1, 1, M) -> (B, L, C)."""
        q, k, v = map(self._heads, self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        q, (k, v) = self._heads(self.q(self.norm2(x))), map(self._heads, self.kv(image).chunk(2, dim=-1))
        x = x + self.cross_proj(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm3(x))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, L, C) -> (B, heads, L, C / heads)


class Decoder(nn.Module):
    """Writes a row of digits, given the tokens of its image."""

    def __init__(self, dim: int = 96, depth: int = 2, num_heads: int = 3):
        super().__init__()
        self.words, self.places = nn.Embedding(11, dim), nn.Parameter(0.02 * torch.randn(LENGTH, dim))
        self.blocks = nn.ModuleList(DecoderBlock(dim, num_heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, text: Tensor, image: Tensor, size: Tensor | None = None) -> Tensor:
        """Logits (B, L, 10) of the digit after each of `text` (B, L), for image tokens (B, M, C) of `size` (B, M)."""
        bias = torch.zeros(image.shape[:2]) if size is None else size.log()
        x = self.words(text) + self.places[: text.shape[1]]
        for block in self.blocks:
            x = block(x, image, bias[:, None, None])
        return self.head(self.norm(x))

    def write(self, image: Tensor, size: Tensor) -> Tensor:
        """The most likely digit, again and again: (B, LENGTH)."""
        text = torch.full((len(image), 1), START)
        for _ in range(LENGTH):
            text = torch.cat([text, self(text, image, size)[:, -1:].argmax(-1)], dim=1)
        return text[:, 1:]


class Row(NamedTuple):
    """What one r gives: rows read without a mistake in percent, and milliseconds per image."""

    r: int
    tokens: int
    metric: str
    exact: float
    encoder_ms: float
    decoder_ms: float


def main(argv: list[str] | None = None) -> int:
    return run_example("captioning", run, parse(argv))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "captioning", steps=1000, lr=2e-3)
    parser.add_argument("--r", type=int, nargs="+", default=[8, 12, 16, 20], help="tokens to merge in each block")
    parser.add_argument("--merge-steps", type=int, default=100, help="number of steps that train the embeddings")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> list[Row]:
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    train, val = ((*part, generator) for part in digits(8))
    vit = averaging_vit((24, 16 * LENGTH), 4, in_chans=1, dim=96, depth=4, num_heads=3)
    decoder = Decoder()
    start_aligned(vit, decoder)
    keys = timm_tokens.apply_dtem_merging(vit, r=0, metric="keys")
    everything = [*vit.parameters(), *decoder.parameters()]
    train_on(train, keys, decoder, everything, args.steps, args, "the ViT and the decoder")
    vit.requires_grad_(False)
    decoder.requires_grad_(False)
    learned = timm_tokens.apply_dtem_merging(vit, r=sorted(args.r)[len(args.r) // 2]).freeze_base()
    what = f"the merging, r = {learned.merger.r}"
    train_on(train, learned, decoder, learned.merger.parameters(), args.merge_steps, args, what)
    images, truth = digit_rows(*val[:2], 500, LENGTH, generator)
    rows = []
    for r in [0, *args.r]:
        for metric, model in (("keys", keys), ("learned", learned)):
            model.eval().merger.r = r
            rows.append(report(model, decoder.eval(), images, truth, r, metric))
    save(rows, args.out)
    return rows


@torch.no_grad()
def start_aligned(vit: nn.Module, decoder: Decoder) -> None:
    """Let positions in the image and in the text start as those of the same places, which the decoder has to match."""
    rows = vit.patch_embed.grid_size[0]
    decoder.places.copy_(start_positions(vit).unflatten(0, (rows, LENGTH, -1)).mean((0, 2)))


def train_on(
    source: tuple, model: TokenViT, decoder: Decoder, parameters: Iterable[nn.Parameter], steps: int,
    args: argparse.Namespace, what: str,
) -> None:  # fmt: skip
    """Train by the cross-entropy of the next digit, on rows drawn anew in each step."""
    digits, labels, generator = source
    model.train()

    def loss(images: Tensor, text: Tensor) -> Tensor:
        shifted = F.pad(text[:, :-1], (1, 0), value=START)
        logits = decoder(shifted, model(normalised(images), tokens=True).patches)
        return F.cross_entropy(logits.flatten(0, 1), text.flatten())

    rows = (digit_rows(digits, labels, args.batch_size, LENGTH, generator) for _ in range(steps))
    fit(parameters, loss, rows, steps, what, args.lr)


@torch.inference_mode()
def report(model: TokenViT, decoder: Decoder, images: Tensor, digits: Tensor, r: int, metric: str) -> Row:
    exact, encoder, writing = 0, [], []
    for part, truth in zip(images.split(25), digits.split(25), strict=True):
        start = time.perf_counter()
        merged = model(normalised(part), tokens="merged")
        encoded = time.perf_counter()
        text = decoder.write(merged.patches, merged.size)
        writing.append((time.perf_counter() - encoded) / len(part))
        encoder.append((encoded - start) / len(part))
        exact += (text == truth).all(1).sum().item()
    times = (1000 * sorted(seconds)[len(seconds) // 2] for seconds in (encoder, writing))
    return Row(r, merged.patches.shape[1], metric, 100 * exact / len(images), *times)


def save(rows: list[Row], out: Path) -> None:
    """Print the table, and write it to table.csv."""
    head = ("r", "tokens", "compared by", "exact, %", "encoder, ms", "decoder, ms")
    print(f"\n{markdown(head, rows, ('', '', '', '.1f', '.2f', '.2f'))}")
    write_csv(out / "table.csv", Row._fields, rows)


if __name__ == "__main__":
    sys.exit(main())
