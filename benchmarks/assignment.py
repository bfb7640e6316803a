"""Time mira_assign against the elementwise form of its fixed point: python benchmarks/assignment.py [--beta 0.75].

The elementwise form is the paper's iteration as written, over (B, K) temporaries as in Sinkhorn-Knopp. Both must give
the same assignment.
"""

import argparse
import platform
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from references import in_turns, ratio
from torch import Tensor

from timm_tokens.ops import mira_assign


@torch.no_grad()
def elementwise(logits: Tensor, tau: float, beta: float, iterations: int = 30) -> Tensor:
    k = (logits / (tau * (1 - beta))).softmax(1)
    u = k.mean(0).pow(1 - beta)
    for _ in range(iterations):
        row = (k * u.pow(-beta / (1 - beta))).sum(1, keepdim=True)
        u = (k / row).mean(0).pow(1 - beta)
    w = k * u.pow(-beta / (1 - beta))
    return w / w.sum(1, keepdim=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--beta", type=float, nargs="+", default=[2 / 3, 0.75, 0.9])
    parser.add_argument("--tau", type=float, default=0.225)
    parser.add_argument("--pairs", type=int, default=51)
    args = parser.parse_args()
    torch.manual_seed(0)
    b, d, k = 512, 256, 3000
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    logits = F.normalize(torch.randn(b, d), dim=1) @ F.normalize(torch.randn(d, k), dim=0)
    for beta in args.beta:
        torch.testing.assert_close(
            mira_assign(logits, args.tau, beta),
            elementwise(logits.double(), args.tau, beta).float(),
            atol=1e-6,
            rtol=1e-3,
        )
        times = in_turns([partial(form, logits, args.tau, beta) for form in (elementwise, mira_assign)], args.pairs)
        slow, fast = (1e3 * median(each) for each in times)
        print(
            f"B = {b}, K = {k}, 30 iterations, beta {beta:.2f}: elementwise {slow:.1f} ms, mira_assign {fast:.1f} ms, "
            f"x {ratio(*times):.2f}"
        )


if __name__ == "__main__":
    main()
