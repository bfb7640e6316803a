"""What do auxiliary tokens add to DINO, iBOT and MoBY, at the same budget?

    python examples/mte.py                             # handwritten digits: nothing to download, some minutes
    python examples/mte.py --data-dir DIR --img-size 64 --patch-size 8 --dim 96 --depth 6 --steps 1000

A small ViT is pre-trained without labels from several seeds, by each objective alone and with auxiliary tokens on top:
the same steps, batches and crops. Then the plain ViT's features are judged on val/, which nothing was trained or chosen
on: by nearest neighbours, by a linear classifier, and by how well prototypes agree with classes (NMI; with auxiliary
tokens also that of all tokens together, which are dropped afterwards). With --hold-out a fifth of train/ takes the
place of val/: to choose settings by. A table with the spread over seeds, a plot and all numbers go to --out.

To pre-train a model for use: timm-tokens train mte.
"""

import argparse
import sys
import time

import torch
from _compare import Images, Score, finish, make_parser, note, open_images, outputs, pretrain
from _crops import InMemory
from _example import normalised, run_example
from timm.models import VisionTransformer
from torch import Tensor

import timm_tokens
from timm_tokens.data import Crop, dino_crops
from timm_tokens.probing import ensemble_nmi, knn_accuracy, linear_probe
from timm_tokens.tasks import MTETask


def main(argv: list[str] | None = None) -> int:
    return run_example("mte", run, parse(argv))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "mte", img_size=16, steps=700, lr=2e-3)
    add, flag, own = parser.add_argument, {"action": "store_true"}, argparse.BooleanOptionalAction
    add("--objectives", nargs="+", default=["dino", "ibot", "moby"], help="losses to train with")
    add("--patch-size", type=int, default=4, help="side of the patches in pixels")
    add("--dim", type=int, default=48, help="dimension of the ViT's tokens")
    add("--depth", type=int, default=3, help="number of the ViT's blocks")
    add("--local-crops", type=int, default=2, help="number of local crops for DINO and iBOT")
    add("--momentum", type=float, default=0.98, help="momentum of the teacher at the start")
    add("--prototypes", type=int, default=256, help="number of prototypes")
    add("--tau-teacher", type=float, default=0.04, help="temperature of the teacher")
    add("--batch-norm", action=own, default=True, help="use batch norm in the heads of DINO and iBOT")
    add("--num-cls", type=int, default=0, help="number of auxiliary class tokens")
    add("--num-pooled", type=int, default=6, help="number of pooled tokens")
    add("--aux-sees-cls", **flag, help="let auxiliary class tokens attend to the global one")
    add("--aux-sees-aux", **flag, help="let auxiliary class tokens attend to each other")
    words = "pooling weights: one map per token, or one per token and channel"
    add("--pool-weight", choices=("spatial", "channel"), default="spatial", help=words)
    words = "what an auxiliary token learns from: the mean of the teacher's tokens, or the same token"
    add("--aux-target", choices=("ensemble", "own"), default="ensemble", help=words)
    add("--without-global", **flag, help="leave the global token out of the ensemble")
    add("--global-weight", type=float, default=0.5, help="weight of the global token in the loss")
    add("--heads", choices=("kind", "shared"), default="kind", help="one head for each kind of token, or one for all")
    add("--aux-on-local", **flag, help="give local crops auxiliary tokens as well")
    add("--only-mte", **flag, help="leave the baselines out")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> list[Score]:
    images = open_images(args)
    scores: list[Score] = []
    for seed in args.seeds:
        for objective in args.objectives:
            for aux in (True,) if args.only_mte else (False, True):
                method = f"{objective} + MTE" if aux else objective
                task = make_task(objective, aux, images, args, seed)
                start = time.process_time()  # of this process alone, whatever else the machine does
                warmup = 0.2 * args.steps / (len(images.train.images) // args.batch_size)
                settings = {"weight_decay": 0.04, "clip_grad": 3.0, "clip_mode": "parameter", "warmup_epochs": warmup}
                pretrain(task, images.train.images, args, seed, save_every=10**6, **settings)
                measures = {"CPU time, ms a step": 1000 * (time.process_time() - start) / args.steps}
                note(scores, method, seed, measure(task, images, seed) | measures, args.out)
    finish(scores, args.out)
    return scores


class InMemoryTask(InMemory, MTETask):
    """An MTETask that cuts its crops itself."""


def make_task(objective: str, aux: bool, images: Images, args: argparse.Namespace, seed: int) -> MTETask:
    torch.manual_seed(seed)
    channels = images.train.images.shape[1]
    num_heads = next(n for n in range(max(1, args.dim // 24), 0, -1) if args.dim % n == 0)
    model = VisionTransformer(
        img_size=args.img_size, patch_size=args.patch_size, in_chans=channels, embed_dim=args.dim, depth=args.depth,
        num_heads=num_heads, num_classes=0, dynamic_img_size=True, weight_init="jax",
    )  # fmt: skip
    if aux:
        kernel = min(11, 2 * args.img_size // args.patch_size - 1)  # a larger one sees nothing more
        model = timm_tokens.add_aux_tokens(
            model, args.num_cls, args.num_pooled, kernel_size=kernel, pool_weight=args.pool_weight,
            aux_sees_cls=args.aux_sees_cls, aux_sees_aux=args.aux_sees_aux,
        )  # fmt: skip
    task = InMemoryTask(
        model, objective, num_prototypes=args.prototypes, hidden=4 * args.dim, width=64, queue_size=1024,
        aux_target=args.aux_target, include_global=not args.without_global, global_weight=args.global_weight,
        heads=args.heads, batch_norm=args.batch_norm, aux_on_local=args.aux_on_local,
        momentum=(args.momentum, 1.0), tau_teacher=(args.tau_teacher, args.tau_teacher),
    )  # fmt: skip
    task.crops = make_crops(objective, images, args)
    return task


def make_crops(objective: str, images: Images, args: argparse.Namespace) -> list[Crop]:
    """DINO's crops; milder ones of digits, which fill their images, have no colours, and are not to be mirrored.

    Two views must have more in common than tau_teacher / tau_student, or everything collapses into one prototype.
    """
    local = args.patch_size * round(args.img_size / args.patch_size / 2)
    num_local = 0 if objective == "moby" else args.local_crops
    if images.train.images.shape[1] > 1:
        crops = dino_crops(args.img_size, local, num_local, (0.08 if objective == "moby" else 0.4, 1.0))
        return [crop._replace(blur_sigma=(0.1, 2 * args.img_size / 224)) for crop in crops]
    crops = dino_crops(args.img_size, local, num_local, (0.6, 1.0), (0.25, 0.6))
    plain = dict(flip=0.0, grayscale=0.0, solarize=0.0, blur=0.0, jitter=(0.2, 0.2, 0, 0), ratio=(0.9, 1.1))
    return [crop._replace(**plain) for crop in crops]


def measure(task: MTETask, images: Images, seed: int) -> dict[str, float]:
    """In percent: accuracies of the plain ViT's features, and NMI of the teacher's prototypes with the classes."""
    (train_images, labels), (val_images, val_labels) = images
    features = outputs(task.product, train_images), labels, outputs(task.product, val_images), val_labels
    linear = linear_probe(*features, epochs=50, generator=torch.Generator().manual_seed(seed)).accuracy
    found = {"k-NN (20), %": knn_accuracy(*features, k=[20])[20], "linear, %": linear}
    if task.objective != "moby":
        nmi = ensemble_nmi(assignments(task, val_images), val_labels)
        found |= {"NMI, %": nmi[0], "NMI of all tokens, %": nmi[-1]}
    return {name: 100 * value for name, value in found.items()}


@torch.inference_mode()
def assignments(task: MTETask, images: Tensor) -> Tensor:
    """The teacher's probabilities (T, B, K) of whole images, the global token first."""
    logits = [task.teacher([normalised(batch)], num_global=1).tokens[0] for batch in images.split(256)]
    return torch.cat([target.transpose(0, 1) for target in task.criterion.baseline.targets(logits)], 1)


if __name__ == "__main__":
    sys.exit(main())
