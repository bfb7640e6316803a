"""What merging costs as tokens grow in number: python benchmarks/growth.py [--sizes 224 384 512 768 1024].

A ViT-S at batch size 1, a sixteenth of the tokens merged in each block: the base, merging, and tokens dropped unseen,
in turns. Merging's own cost is the time that it takes beyond dropping; memory is what torch holds at its peak.
"""

import argparse

import timm
import torch
from references import Dropping, in_turns, machine, median, ratio
from torch.profiler import profile

import timm_tokens


def peak(model: torch.nn.Module, images: torch.Tensor) -> float:
    """MiB that a pass allocates at its peak, from what torch's profiler sees allocated and freed."""
    with profile(profile_memory=True) as seen:
        model(images)
    held = most = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / 2**20


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 384, 512, 768, 1024], help="pixels a side")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"{args.model}, {machine()}\n\n| tokens | r | base, ms | ideal | merged | dropped | merging's own, ms | "
          "of the pass | base, MiB | merged, MiB |\n" + "|---" * 10 + "|", flush=True)  # fmt: skip
    for size in args.sizes:
        base = timm.create_model(args.model, img_size=size).eval()
        tokens = (size // 16) ** 2 + 1
        r = tokens // 16
        merged = timm_tokens.apply_dtem_merging(base, r).eval()
        dropped = Dropping(base, merged.merger.schedule).eval()
        images = torch.randn(1, 3, size, size)
        seconds = in_turns([lambda m=m, x=images: m(x) for m in (base, merged, dropped)], args.rounds)
        own = median(ours - theirs for ours, theirs in zip(*seconds[1:], strict=True))
        ideal = merged.costs().flops((0,) * len(base.blocks), features=True) / merged.flops()
        memory = [peak(model, images) for model in (base, merged)]
        faster = [ratio(seconds[0], times) for times in seconds[1:]]
        values = (f"{1e3 * median(seconds[0]):.1f}", f"{ideal:.2f}", *(f"{value:.2f}" for value in faster))
        own_share = f"{1e3 * own:.1f} | {own / median(seconds[1]):.0%}"
        print(
            f"| {tokens} | {r} | {' | '.join(values)} | {own_share} | {memory[0]:.0f} | {memory[1]:.0f} |", flush=True
        )


if __name__ == "__main__":
    main()
