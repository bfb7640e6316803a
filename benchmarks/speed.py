"""Time merging beside what it is compared with: python benchmarks/speed.py [MODEL ...] [--batch-size 1 16] [--compile].

In turns, in one run: the model itself, merging by learned embeddings and by keys, ToMe's operations, and tokens
dropped unseen (see references.py). Speed-ups over the model itself are medians of the rounds' ratios; the last columns
are merging's speed as a share of that of dropping unseen. `--every 2` merges twice as many in every other block.
"""

import argparse
from collections.abc import Sequence
from itertools import product

import timm
import torch
from references import Dropping, ToMe, in_turns, machine, ratio

import timm_tokens

COLUMNS = ("ideal", "dropped", "ToMe", "keys", "learned")


def schedule(r: int, every: int, depth: int) -> tuple[int, ...]:
    """r tokens a block on average, merged in the first of every so many blocks."""
    return tuple(r * every if i % every == 0 else 0 for i in range(depth))


def compared(name: str, counts: Sequence[int]) -> dict[str, torch.nn.Module]:
    base = timm.create_model(name).eval()
    ours = {m: timm_tokens.apply_dtem_merging(base, counts, metric=m).eval() for m in ("learned", "keys")}
    return {"base": base, **ours, "ToMe": ToMe(base, counts).eval(), "dropped": Dropping(base, counts).eval()}


@torch.inference_mode()
def measure(models: dict[str, torch.nn.Module], batch: int, rounds: int, compiled: bool) -> dict[str, float]:
    """The speed-up of each model over the base, and what the FLOPs promise."""
    images = torch.randn(batch, 3, 224, 224)
    runs = [torch.compile(model) if compiled else model for model in models.values()]
    seconds = in_turns([lambda run=run: run(images) for run in runs], rounds)
    torch.compiler.reset()
    costs = models["learned"].costs()
    ideal = costs.flops((0,) * 12, features=True) / models["learned"].flops()
    return {"ideal": ideal, **{name: ratio(seconds[0], times) for name, times in zip(models, seconds, strict=True)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "models", nargs="*", default=["deit_tiny_patch16_224", "deit_small_patch16_224"], metavar="MODEL"
    )
    parser.add_argument("--r", type=int, nargs="+", default=[8, 12, 16])
    parser.add_argument("--every", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, help="default: as many as make 60 images, at least 9")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(machine() + (", compiled" if args.compile else ", eager") + "\n")
    print(f"| model | batch | every | r | {' | '.join(COLUMNS)} | keys of dropped | learned of dropped |")
    print("|---" * 11 + "|", flush=True)
    for setting in product(args.models, args.batch_size, args.every, args.r):
        name, batch, every, r = setting
        models = compared(name, schedule(r, every, 12))
        faster = measure(models, batch, args.rounds or max(9, 60 // batch), args.compile)
        values = [faster[n] for n in COLUMNS] + [faster[n] / faster["dropped"] for n in ("keys", "learned")]
        print(f"| {' | '.join([*map(str, setting), *(f'{value:.2f}' for value in values)])} |", flush=True)


if __name__ == "__main__":
    main()
