"""Time merging on a GPU, in turns: python benchmarks/gpu.py [MODEL ...] [--batch-size 1 256] [--modes eager graphs].

For each model, batch size, r and mode (eager, compiled, or compiled into CUDA graphs): the model itself, tokens dropped
unseen, and merging in three ways of weighing the attention by sizes: a mask of floats; one more channel of queries and
keys, which leaves no mask; and no weights, which is another model, and shows what the first two cost. `--train` times
training steps instead. The attention's kernels are printed as torch's profiler names them.
"""

import argparse
from collections.abc import Callable, Sequence
from itertools import product

import timm
import torch
from references import Dropping, in_turns, machine, median, ratio
from torch import Tensor, nn
from torch.profiler import profile

import timm_tokens
from timm_tokens.ops.attention import LearnableBias, size_bias

MODELS = ("deit_small_patch16_224", "deit_base_patch16_224", "vit_large_patch16_224")
MODES = {"eager": None, "compiled": "default", "graphs": "reduce-overhead"}


def compared(name: str, r: int, device: str) -> dict[str, nn.Module]:
    base = timm.create_model(name).to(device)
    ways = {"mask": {}, "channel": {}, "no weights": {"prop_attn": False}}
    models = {way: timm_tokens.apply_dtem_merging(base, r, **options).eval() for way, options in ways.items()}
    models["channel"].merger.bias = lambda size, dtype: size_bias(size).to(dtype).as_subclass(LearnableBias)
    return {"base": base, "dropped": Dropping(base, models["mask"].merger.schedule), **models}


def work(model: nn.Module, images: Tensor, mode: str, train: bool) -> Callable[[], None]:
    """A pass, or a training step, in bfloat16, that has ended when the call returns."""
    model.train(train)
    run = model if MODES[mode] is None else torch.compile(model, mode=MODES[mode])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0) if train else None
    synchronize = torch.cuda.synchronize if images.is_cuda else lambda: None

    def call() -> None:
        with torch.set_grad_enabled(train), torch.autocast(images.device.type, dtype=torch.bfloat16):
            logits = run(images)
        if optimizer is not None:
            logits.float().logsumexp(-1).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        synchronize()

    return call


def kernels(call: Callable[[], None]) -> str:
    with profile() as seen:
        call()
    names = {event.key for event in seen.key_averages() if event.key.startswith("aten::_scaled_dot_product_")}
    return ", ".join(sorted(name.removeprefix("aten::_scaled_dot_product_") for name in names)) or "none in one piece"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--r", type=int, nargs="+", default=[8, 12, 16])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(argv)
    print(f"{machine()}, bfloat16, {'training steps' if args.train else 'forward passes'}\n")
    print("| model | batch | r | mode | which | images/s | speed-up | of ideal | attention |\n" + "|---" * 9 + "|")
    for name, batch, r, mode in product(args.models, args.batch_size, args.r, args.modes):
        models = compared(name, r, args.device)
        images = torch.randn(batch, *models["base"].default_cfg["input_size"], device=args.device)
        ours = models["mask"]
        ideal = ours.costs().flops((0,) * len(ours.base.blocks), features=True) / ours.flops()
        calls = [work(model, images, mode, args.train) for model in models.values()]
        seconds = in_turns(calls, args.rounds, warm_up=5)
        for which, call, times in zip(models, calls, seconds, strict=True):
            faster = ratio(seconds[0], times)
            share = "" if args.train else f"{faster / ideal:.2f}"  # a relaxed step removes no tokens
            figures = f"{batch / median(times):.0f} | {faster:.2f} | {share} | {kernels(call)}"
            print(f"| {name} | {batch} | {r} | {mode} | {which} | {figures} |", flush=True)
        torch.compiler.reset()


if __name__ == "__main__":
    main()
