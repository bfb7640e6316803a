"""Speed and memory of token labels: sparse targets and loss against the dense way, the label store against .pt files.

python benchmarks/token_labels.py [--rounds 15] [--device cpu]

The two ways take turns, round by round; medians of the rounds and of their ratios are printed.
"""

import argparse
import platform
import statistics
import time
from collections import namedtuple
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torchvision.ops import roi_align

from timm_tokens.losses import TokenLabelLoss
from timm_tokens.ops import crop_token_labels

B, SIZE, GRID, TOP = 64, 14, 18, 5
Logits = namedtuple("Logits", "cls tokens")


def paired(slow: Callable, fast: Callable, rounds: int, device: str) -> tuple[float, float, float]:
    """Median seconds of each and the median of slow / fast."""
    times = [(_time(slow, device), _time(fast, device)) for _ in range(rounds + 2)][2:]
    slow_times, fast_times = zip(*times, strict=True)
    ratio = statistics.median(a / b for a, b in times)
    return statistics.median(slow_times), statistics.median(fast_times), ratio


def _time(run: Callable, device: str) -> float:
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def label_batch(num_classes: int, device: str) -> tuple:
    """Label maps, boxes of random resized crops, and logits."""
    scores = torch.randn(B, TOP, GRID, GRID).mul(3).add(6).half()
    indices = torch.rand(B, num_classes, GRID, GRID).argsort(1)[:, :TOP].int()
    extent = torch.rand(B, 2) * 0.7 + 0.28
    boxes = torch.cat([torch.rand(B, 2) * (1 - extent), extent], 1)
    logits = Logits(torch.randn(B, num_classes), torch.randn(B, SIZE * SIZE, num_classes))
    values, indices, boxes = (x.to(device) for x in (scores, indices, boxes))
    return values, indices, boxes, Logits(*(x.to(device).requires_grad_() for x in logits))


def dense_way(values, indices, boxes, logits) -> None:
    """Scatter to (B, K, H, W), RoIAlign, softmax, dense cross entropy."""
    K = logits.cls.shape[1]
    full = values.new_zeros(B, K, GRID, GRID, dtype=torch.float32)
    full.scatter_(1, indices.long(), values.float())
    top, left, height, width = boxes.unbind(1)
    corners = torch.stack([left, top, left + width, top + height], 1) * GRID - 0.5
    rois = torch.cat([torch.arange(B, device=boxes.device)[:, None].float(), corners], 1)
    cls = roi_align(full, rois, 1).flatten(1).softmax(1)
    tokens = roi_align(full, rois, SIZE).flatten(2).softmax(1).transpose(1, 2)
    loss = F.cross_entropy(logits.cls, cls)
    loss = loss + 0.5 * F.cross_entropy(logits.tokens.flatten(0, 1), tokens.reshape(-1, K))
    torch.autograd.grad(loss, logits)


def sparse_way(values, indices, boxes, logits, loss=TokenLabelLoss()) -> None:  # noqa: B008
    target = crop_token_labels(values, indices, boxes, logits.cls.shape[1], SIZE)
    torch.autograd.grad(loss(logits, target), logits)


def loss_speed(rounds: int, device: str) -> None:
    batch = label_batch(1000, device)
    slow, fast, ratio = paired(lambda: dense_way(*batch), lambda: sparse_way(*batch), rounds, device)
    print(f"targets and loss, K = 1000: dense {slow * 1e3:.1f} ms, sparse {fast * 1e3:.1f} ms, ratio {ratio:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=2000, help="images in the label store")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    loss_speed(args.rounds, args.device)


if __name__ == "__main__":
    main()
