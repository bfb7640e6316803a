"""ESFR, many episodes at once, against plain PyTorch modules, one episode after the other.

    python benchmarks/esfr.py --dims 64 192 640 --device cpu

Both sides do the same work: as many networks and updates, dropout, a measurement of the dimension every two updates;
neither stops early. Rounds are paired (one side, then the other), and what is printed are medians over the rounds.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_tokens.fewshot import ESFR, prepare

WAYS, SHOTS, QUERIES, NETS = 5, 1, 15, 5


class FixedUpdates(ESFR):
    """ESFR that measures the dimension but goes on to the last update."""

    def _stopped(self, run) -> Tensor:
        stopped = super()._stopped(run)
        return stopped if run.nets.updates == self.max_updates else stopped[:0]


def plain_dimension(x: Tensor, k: int = 21) -> Tensor:
    """Mean local intrinsic dimensionality of (M, D)."""
    near = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").topk(k, largest=False).values[:, 1:]
    return (-(k - 1) / (near / near[:, -1:]).log().sum(-1)).mean()


def plain_net(dim: int, device: str) -> nn.Sequential:
    net = nn.Sequential(*[module for _ in range(4) for module in (nn.Linear(dim, dim), nn.ReLU())])
    for layer in net[::2]:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return net.to(device)


def plain_adapt(features: Tensor, updates: int) -> Tensor:
    """The obvious implementation, for one prepared episode (M, D)."""
    outputs = []
    for _ in range(NETS):
        net = plain_net(features.shape[1], features.device)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, eps=1e-7)
        with torch.no_grad():
            last = plain_dimension(net[:4](features))
        for update in range(1, updates + 1):
            output = net(F.dropout(features, 0.5))
            loss = -F.cosine_similarity(features, output - output.mean(0), dim=-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if update % 2 == 0 and update < updates:
                with torch.no_grad():
                    now = plain_dimension(net[:4](features))
                bool(now > last)  # the decision to stop waits for the device
                last = now
        with torch.no_grad():
            outputs.append(F.normalize(net(features), dim=-1))
    return torch.stack(outputs).mean(0)


def seconds(work: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def compare(dim: int, episodes: int, args: argparse.Namespace) -> None:
    """Prints one row: milliseconds an episode on both sides, and the ratio."""
    features = torch.randn(episodes, WAYS * (SHOTS + QUERIES), dim, device=args.device).relu()
    features = prepare(features, WAYS * SHOTS)
    few = features[: max(1, episodes // 10)]
    esfr = FixedUpdates(NETS, max_updates=args.updates, chunk_size=args.chunk_size)

    def plain() -> list[Tensor]:
        return [plain_adapt(episode, args.updates) for episode in few]

    plain(), esfr.adapt(features)  # warm up
    pairs = [
        (seconds(plain, args.device) / len(few), seconds(lambda: esfr.adapt(features), args.device) / episodes)
        for _ in range(args.rounds)
    ]
    slow, fast = (statistics.median(side) * 1e3 for side in zip(*pairs, strict=True))
    ratios = sorted(a / b for a, b in pairs)
    spread = f"{ratios[0]:.1f} to {ratios[-1]:.1f}"
    print(f"| {dim} | {slow:.1f} | {fast:.2f} | {statistics.median(ratios):.1f} | {spread} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 192, 640])
    parser.add_argument("--episodes", type=int, help="default: 80 of 64 dimensions, fewer of more")
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--chunk-size", type=int, help="episodes at once; default: as ESFR chooses")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    where = (
        torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or platform.machine()
    )
    print(f"{where}, {args.threads} threads, torch {torch.__version__}, {args.updates} updates, {args.rounds} rounds\n")
    print("| D | plain, ms an episode | ESFR, ms an episode | ratio | its range |\n|---|---|---|---|---|")
    for dim in args.dims:
        compare(dim, args.episodes or max(4, 5120 // dim), args)


if __name__ == "__main__":
    main()
