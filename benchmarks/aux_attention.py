"""Time two ways to keep auxiliary tokens out of the main tokens' attention: python benchmarks/aux_attention.py.

Masked: one attention over all tokens with an additive mask, which is how the package does it. Two streams: the main
tokens attend without a mask, the auxiliary ones to all keys, in two calls. Both must give the same block.
"""

import argparse
import platform
from collections.abc import Callable
from functools import partial
from statistics import median

import timm
import torch
import torch.nn.functional as F
from references import in_turns, ratio
from torch import Tensor, nn

from timm_tokens.ops import aux_attention_mask


def two_streams(block: nn.Module, x: Tensor, mask: Tensor, num_aux: int) -> Tensor:
    """timm's Block on x (B, N + A, C), its last A tokens auxiliary."""
    attn, main = block.attn, x.shape[1] - num_aux
    q, k, v = attn.qkv(block.norm1(x)).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    own = F.scaled_dot_product_attention(q[:, :, :main], k[:, :, :main], v[:, :, :main])
    aux = F.scaled_dot_product_attention(q[:, :, main:], k, v, attn_mask=mask[:, :, main:])
    x = x + attn.proj(torch.cat([own, aux], dim=2).transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))


def step(forward: Callable[[Tensor], Tensor], x: Tensor) -> None:
    forward(x).square().mean().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--aux", type=int, default=6, help="auxiliary tokens")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = timm.create_model(options.model)
    block, n = model.blocks[0], model.patch_embed.num_patches + 1
    x = torch.randn(options.batch_size, n + options.aux, model.embed_dim, requires_grad=True)
    own = x.detach()[:, :n].clone().requires_grad_()
    mask = aux_attention_mask(n, 1, options.aux)
    masked, streams = partial(block, attn_mask=mask), partial(two_streams, block, mask=mask, num_aux=options.aux)
    torch.testing.assert_close(masked(x), streams(x))
    forms = {
        "without": partial(step, block, own),
        "masked": partial(step, masked, x),
        "streams": partial(step, streams, x),
    }
    times = dict(zip(forms, in_turns(list(forms.values()), options.rounds), strict=True))
    print(f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}, a block of {options.model}")
    for name, taken in times.items():
        print(f"{name:8s} {1e3 * median(taken):7.1f} ms   x {ratio(taken, times['without']):.3f}")


if __name__ == "__main__":
    main()
