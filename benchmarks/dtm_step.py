"""Time what morphing adds to a training step of DTM: python benchmarks/dtm_step.py [--student ...] [--batch-size 32].

A step is the task's forward and backward, both models included, without optimizer and data. The loss alone, forward and
backward, is timed on tokens of the same shapes: morphed with two draws, and token by token. Their difference is what
morphing costs.
"""

import argparse
import platform
from collections.abc import Callable
from statistics import median

import timm
import torch
from references import in_turns

from timm_tokens.data import input_config
from timm_tokens.losses import DTMLoss
from timm_tokens.tasks import DTMTask


def seconds(function: Callable[[], object], repeats: int) -> list[float]:
    return in_turns([function], repeats, warm_up=1)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", default="vit_small_patch16_224")
    parser.add_argument("--teacher", default="vit_small_patch16_224")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=15, help="of the loss")
    args = parser.parse_args()
    torch.manual_seed(0)
    teacher = timm.create_model(args.teacher)
    task = DTMTask(timm.create_model(args.student, num_classes=0), teacher)
    size = input_config(teacher)["input_size"]
    images, step = torch.randn(args.batch_size, *size), iter(range(10**6))

    def whole() -> None:
        task.start_step(next(step), 10**6, 10**6)
        task.zero_grad()
        task(images)["loss"].backward()

    steps = seconds(whole, args.steps)
    targets = task.teacher(images)
    student = (targets + torch.randn_like(targets)).requires_grad_()
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{args.student} from {args.teacher}, {tuple(targets.shape)} tokens: a step {median(steps):.2f} s ({steps})")
    losses = {}
    for name, criterion in [("token by token", DTMLoss(rounds=())), ("morphed, two draws", DTMLoss())]:
        losses[name] = seconds(lambda loss=criterion: loss(student, targets).backward(), args.repeats)
        print(
            f"loss and gradient, {name}: {1e3 * median(losses[name]):.1f} ms, at most {1e3 * max(losses[name]):.1f} ms"
        )
    extra = median(losses["morphed, two draws"]) - median(losses["token by token"])
    print(f"morphing: {1e3 * extra:.1f} ms, {100 * extra / median(steps):.2f} % of a step")


if __name__ == "__main__":
    main()
