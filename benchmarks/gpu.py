"""Time merging on a GPU, in turns: python benchmarks/gpu.py [MODEL ...] [--batch-size 1 256] [--modes eager graphs].

For each model, batch size, r and mode (eager, compiled, or compiled into CUDA graphs): the model itself, tokens dropped
unseen, ToMe's operations, and merging in three ways of weighing the attention by sizes: a mask of floats; one more
channel of queries and keys, which leaves no mask; and no weights, which is another model, and shows what the first two
cost. `--train` times training steps under autocast instead. Beside the figures: how many kernels ran, and which of
torch's attentions.
"""

import argparse
from collections.abc import Callable, Sequence
from itertools import product

import timm
import torch
from references import Dropping, ToMe, in_turns, machine, median, ratio
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import profile

import timm_tokens
from timm_tokens.ops.attention import LearnableBias, size_bias

MODELS = ("deit_small_patch16_224", "deit_base_patch16_224", "vit_large_patch16_224")
MODES = {"eager": None, "compiled": "default", "graphs": "reduce-overhead"}
WAYS = {"mask": {}, "channel": {}, "no weights": {"prop_attn": False}}
ATTENTIONS = {  # parts of the names of operations and of kernels
    "flash": ("flash_fwd", "product_flash"),
    "efficient": ("fmha_cutlass", "product_efficient"),
    "cudnn": ("sdpa_sm", "product_cudnn"),
}


def compared(name: str, r: int, device: str) -> dict[str, nn.Module]:
    base = timm.create_model(name).to(device)
    models = {way: timm_tokens.apply_dtem_merging(base, r, **options).eval() for way, options in WAYS.items()}
    models["channel"].merger.bias = lambda size, dtype: size_bias(size).to(dtype).as_subclass(LearnableBias)
    schedule = models["mask"].merger.schedule
    return {"base": base, "dropped": Dropping(base, schedule), "ToMe": ToMe(base, schedule), **models}


def work(model: nn.Module, images: Tensor, mode: str, train: bool) -> Callable[[], None]:
    """A pass of a model in bfloat16, or a training step under autocast, that has ended when the call returns."""
    model.train(train)
    if not train:
        model, images = model.to(torch.bfloat16), images.to(torch.bfloat16)
    run = model if MODES[mode] is None else torch.compile(model, mode=MODES[mode])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0) if train else None
    synchronize = torch.cuda.synchronize if images.is_cuda else lambda: None

    def call() -> None:
        with torch.set_grad_enabled(train), torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=train):
            logits = run(images)
        if optimizer is not None:
            logits.float().logsumexp(-1).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        synchronize()

    return call


def profiled(call: Callable[[], None]) -> str:
    """How many kernels a call starts on the GPU, and which attention it takes."""
    with profile() as seen:
        call()
    events = seen.events() or []
    kernels = sum(event.device_type == DeviceType.CUDA for event in events)
    names = {event.name for event in events}
    found = [which for which, parts in ATTENTIONS.items() if any(part in name for part in parts for name in names)]
    return f"{kernels} | {', '.join(found) or 'in pieces'}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--r", type=int, nargs="+", default=[8, 12, 16])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--which", nargs="+", help="rows beside the base (default: all)")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(argv)
    print(f"{machine()}, bfloat16, {'training steps' if args.train else 'forward passes'}\n")
    columns = ("model", "batch", "r", "mode", "which", "images/s", "speed-up", "of ideal", "kernels", "attention")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, batch, r, mode in product(args.models, args.batch_size, args.r, args.modes):
        models = compared(name, r, args.device)
        images = torch.randn(batch, *models["base"].default_cfg["input_size"], device=args.device)
        ours = models["mask"]
        ideal = ours.costs().flops((0,) * len(ours.base.blocks), features=True) / ours.flops()
        if args.which:
            models = {which: model for which, model in models.items() if which in ("base", *args.which)}
        calls = [work(model, images, mode, args.train) for model in models.values()]
        seconds = in_turns(calls, args.rounds, warm_up=5)
        for which, call, times in zip(models, calls, seconds, strict=True):
            faster = ratio(seconds[0], times)
            share = "" if args.train else f"{faster / ideal:.2f}"  # a relaxed step removes no tokens
            figures = f"{batch / median(times):.0f} | {faster:.2f} | {share} | {profiled(call)}"
            print(f"| {name} | {batch} | {r} | {mode} | {which} | {figures} |", flush=True)
        torch.compiler.reset()


if __name__ == "__main__":
    main()
