"""What merging is compared with: ToMe's operations, written from its paper, and tokens dropped without looking at them.

Both are plain loops over the modules of a timm ViT with a class token. As this package does, both leave out what the
last block would compute for tokens that the class logits don't read.
"""

import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from timm_tokens.ops.matching import mergeable


class Dropping(nn.Module):
    """Keeps the first N - R tokens of each block: what no way of choosing tokens can beat."""

    def __init__(self, base: nn.Module, schedule: Sequence[int]) -> None:
        super().__init__()
        self.base, self.schedule = base, schedule

    def forward(self, images: Tensor) -> Tensor:
        base = self.base
        x = base.norm_pre(base._pos_embed(base.patch_embed(images)))
        for i, (block, r) in enumerate(zip(base.blocks, self.schedule, strict=True)):
            x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
            x = x[:, : 1 if i == len(base.blocks) - 1 else x.shape[1] - mergeable(r, x.shape[1], 1)]
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return base.forward_head(base.norm(x))


class ToMe(nn.Module):
    """ToMe's operations (arXiv 2210.09461, section 3 and appendix D): keys, bipartite matching, size-weighted mean."""

    def __init__(self, base: nn.Module, schedule: Sequence[int]) -> None:
        super().__init__()
        self.base, self.schedule = base, schedule

    def forward(self, images: Tensor) -> Tensor:
        base, size = self.base, None
        x = base.norm_pre(base._pos_embed(base.patch_embed(images)))
        for i, (block, r) in enumerate(zip(base.blocks, self.schedule, strict=True)):
            y, keys = _attend(block.attn, block.norm1(x), size)
            x = x + block.drop_path1(block.ls1(y))
            if i == len(base.blocks) - 1:
                x = x[:, :1]
            elif r:
                x, size = _merge(
                    x, torch.ones_like(x[..., :1]) if size is None else size, keys, mergeable(r, x.shape[1], 1)
                )
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return base.forward_head(base.norm(x))


def _attend(attn: nn.Module, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """The attention, weighted by sizes (B, N, 1), and its keys averaged over heads."""
    qkv = attn.qkv(x).unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    bias = None if size is None else size.log().mT.unsqueeze(1)  # (B, 1, 1, N)
    y = scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return attn.proj(y.transpose(1, 2).flatten(2)), k.mean(1)


def _merge(x: Tensor, size: Tensor, keys: Tensor, r: int) -> tuple[Tensor, Tensor]:
    keys = keys / keys.norm(dim=-1, keepdim=True)
    scores = keys[:, ::2] @ keys[:, 1::2].mT
    scores[:, 0] = -torch.inf  # the class token stays
    best, partner = scores.max(dim=-1)
    order = best.argsort(dim=-1, descending=True).unsqueeze(-1)
    gone, kept = order[:, :r], order[:, r:].sort(dim=1).values
    into = partner.unsqueeze(-1).gather(1, gone)

    def total(x: Tensor) -> Tensor:
        even, odd, c = x[:, ::2], x[:, 1::2], x.shape[2]
        moved = even.gather(1, gone.expand(-1, -1, c))
        odd = odd.scatter_reduce(1, into.expand(-1, -1, c), moved, reduce="sum")
        return torch.cat([even.gather(1, kept.expand(-1, -1, c)), odd], dim=1)

    x, size = total(x * size), total(size)
    return x / size, size


def in_turns(calls: Sequence[Callable[[], object]], rounds: int, warm_up: int = 2) -> list[list[float]]:
    """Seconds of each call in each round; every round makes each call once, so that what slows one slows all."""
    seconds: list[list[float]] = [[] for _ in calls]
    for count in range(-warm_up, rounds):
        for call, times in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            if count >= 0:
                times.append(time.perf_counter() - start)
    return seconds


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """How many times faster the second is: the median of the rounds' ratios."""
    return median(a / b for a, b in zip(slow, fast, strict=True))


def machine() -> str:
    """Where, with what and when it was measured, in one line."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{processor}, {torch.get_num_threads()} threads"
    )
    return f"{device}, torch {torch.__version__}, timm {timm.__version__}, {time.strftime('%Y-%m-%d')}"
