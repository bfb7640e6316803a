"""Speed and memory of token labels: sparse targets and loss against the dense way, the label store against .pt files.

python benchmarks/token_labels.py [--rounds 15] [--device cpu]

The two ways take turns, round by round; medians of the rounds and of their ratios are printed.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.ops import roi_align

from timm_tokens.data import LabelMap, pack_labels
from timm_tokens.data.label_format import write_label_file
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


def loss_memory() -> None:
    """Peak memory beyond the inputs, each in a process of its own; the gradient of the logits is part of it."""
    for num_classes in (1000, 4000):
        logits = B * (SIZE * SIZE + 1) * num_classes * 4 / 2**20
        peaks = []
        for way in ("dense", "sparse"):
            command = [sys.executable, __file__, "--peak", way, "--classes", str(num_classes)]
            peaks.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) - logits)
        print(
            f"memory beyond logits and gradient, K = {num_classes} (logits {logits:.0f} MiB): "
            f"dense {peaks[0]:.0f} MiB, sparse {peaks[1]:.0f} MiB"
        )


def print_peak(way: str, num_classes: int) -> None:
    """MiB by which one call raises the peak of this process (Linux)."""
    run = {"dense": dense_way, "sparse": sparse_way}[way]
    batch = label_batch(num_classes, "cpu")
    small = label_batch(10, "cpu")
    run(*small)  # libraries loaded, threads started
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _status("VmRSS")
    run(*batch)
    print((_status("VmHWM") - before) / 1024)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def store_speed(rounds: int, images: int) -> None:
    """Random reads of the same labels from shards and from files; all from the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        files, shards = Path(folder) / "files", Path(folder) / "shards"
        names = [f"n{i % 100:08d}/n{i % 100:08d}_{i}" for i in range(images)]
        for name in names:
            values = torch.randn(TOP, GRID, GRID).half()
            write_label_file(files / f"{name}.pt", LabelMap(values, torch.randint(1000, values.shape)))
        store = pack_labels(files, shards, 1000)
        order = [names[i] for i in torch.randperm(images).tolist()]

        def from_files() -> None:
            for name in order:
                torch.load(files / f"{name}.pt", weights_only=True)

        def from_store() -> None:
            for name in order:
                store[name]

        slow, fast, ratio = paired(from_files, from_store, rounds, "cpu")
        print(f"reads per second: one .pt a file {images / slow:.0f}, store {images / fast:.0f}, ratio {ratio:.1f}")
        tensors = images * TOP * GRID * GRID * (2 + 4)
        size = sum(path.stat().st_size for path in shards.iterdir())
        print(f"bytes of the store / bytes of its tensors: {size / tensors:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=2000, help="images in the label store")
    parser.add_argument("--peak", choices=["dense", "sparse"], help="print the peak memory of one way and stop")
    parser.add_argument("--classes", type=int, default=1000, help="K for --peak")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.peak:
        return print_peak(args.peak, args.classes)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    loss_speed(args.rounds, args.device)
    loss_memory()
    store_speed(max(1, args.rounds // 3), args.images)


if __name__ == "__main__":
    main()
