"""Time a DINO training step with auxiliary tokens against one without: python benchmarks/mte.py [--local-crops 8].

The two take turns on the same images, so that what slows the machine slows both; times are of the process's CPU (best
with one thread), and the ratio is the median over pairs of steps. With --memory a fresh process each takes one step,
and its peak is read. With --cross-entropy the forms of the loss are timed instead: `soft_cross_entropy` against
log_softmax, and against logsumexp(W x / tau) - <W^T P, x> / tau, which never multiplies targets with logits. All must
agree.
"""

import argparse
import multiprocessing
import platform
import resource
import time
from collections.abc import Callable, Mapping
from statistics import median

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import timm_tokens
from timm_tokens.ops import soft_cross_entropy
from timm_tokens.tasks import MTETask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cross-entropy", action="store_true", help="time the loss alone")
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--objective", default="dino")
    parser.add_argument("--prototypes", type=int, default=8192)
    parser.add_argument("--num-cls", type=int, default=6)
    parser.add_argument("--num-pooled", type=int, default=6)
    parser.add_argument("--local-crops", type=int, default=0, help="of 96 px")
    parser.add_argument("--aux-on-local", action="store_true")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true", help="peak memory of a step instead of its time")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {platform.machine()}, {args.threads} threads")
    if args.cross_entropy:
        time_losses(args)
    elif args.memory:
        for name in ("without", "with"):
            process = multiprocessing.get_context("spawn").Process(target=print_peak, args=(args, name))
            process.start()
            process.join()
    else:
        time_steps(args)


def time_steps(args: argparse.Namespace) -> None:
    steps = {"without": training_step(args, aux=False), "with": training_step(args, aux=True)}
    times = in_turns(steps, args.pairs)
    ratios = [w / b for w, b in zip(times["with"], times["without"], strict=True)]
    local = f", {args.local_crops} local crops{' with auxiliary tokens' if args.aux_on_local else ''}"
    print(f"{args.objective}, {args.model}, batch {args.batch_size}, {args.prototypes} prototypes{local}")
    for name, values in times.items():
        print(f"  {name:8s} {1000 * median(values):8.0f} ms")
    print(f"  ratio    {median(ratios):8.3f}, {min(ratios):.3f} to {max(ratios):.3f} in {args.pairs} pairs")


def print_peak(args: argparse.Namespace, name: str) -> None:
    torch.set_num_threads(args.threads)
    training_step(args, aux=name == "with")()
    print(f"  {name:8s} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:8.2f} GiB", flush=True)


def training_step(args: argparse.Namespace, aux: bool) -> Callable[[], None]:
    """Forward, backward, optimizer and teacher on the same crops at each call."""
    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=0, dynamic_img_size=True, drop_path_rate=0.1)
    if aux:
        model = timm_tokens.add_aux_tokens(model, args.num_cls, args.num_pooled)
    task = MTETask(model, args.objective, num_prototypes=args.prototypes, aux_on_local=args.aux_on_local)
    optimizer = torch.optim.AdamW(task.student.parameters(), 1e-4)
    sizes = [224, 224] + [96] * args.local_crops
    crops = [torch.randn(args.batch_size, 3, size, size) for size in sizes]

    def step() -> None:
        task.start_step(5, 10, 1)
        optimizer.zero_grad()
        task(crops)["loss"].backward()
        task.before_optimizer()
        optimizer.step()
        task.end_step()

    return step


def time_losses(args: argparse.Namespace) -> None:
    tokens = 1 + args.num_cls + args.num_pooled
    x = F.normalize(torch.randn(args.batch_size, tokens, 256), dim=-1).requires_grad_()
    weight = F.normalize(torch.randn(args.prototypes, 256), dim=-1).requires_grad_()
    target = torch.randn(args.batch_size, 1, args.prototypes).softmax(-1)
    forms = {
        "log_softmax": lambda: -(target * (F.linear(x, weight) / 0.1).log_softmax(-1)).sum(-1),
        "soft_cross_entropy": lambda: soft_cross_entropy(F.linear(x, weight), target, 0.1),
        "W^T P": lambda: (F.linear(x, weight) / 0.1).logsumexp(-1) - (target @ weight * x).sum(-1) / 0.1,
        "(the product W x alone)": lambda: F.linear(x, weight).sum(-1),
    }
    check(forms, [x, weight])
    steps = {name: lambda form=form: form().mean().backward() for name, form in forms.items()}
    print(f"batch {args.batch_size}, {tokens} tokens, {args.prototypes} prototypes, forward and backward")
    for name, values in in_turns(steps, args.pairs).items():
        print(f"  {name:24s} {1000 * median(values):8.1f} ms")


def check(forms: Mapping[str, Callable[[], Tensor]], inputs: list[Tensor]) -> None:
    """All forms but the last must have the same loss and gradients."""
    found = [(loss := form().mean(), torch.autograd.grad(loss, inputs)) for form in list(forms.values())[:-1]]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-6, rtol=1e-3)


def in_turns(steps: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each step in each round, whatever else the machine does; a first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            times[name].append(time.process_time() - start)
    return {name: values[1:] for name, values in times.items()}


if __name__ == "__main__":
    main()
