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
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from _compare import Images, Score, digits, finish, folders, hold_out, normalised, outputs, save
from _crops import batch_crops
from _data import run_example
from timm.models import VisionTransformer
from torch import Tensor
from torch.utils.data import TensorDataset

import timm_tokens
from timm_tokens.data import Crop, dino_crops
from timm_tokens.probing import ensemble_nmi, knn_accuracy, linear_probe
from timm_tokens.tasks import MTETask
from timm_tokens.training import Settings, train


def main(argv: list[str] | None = None) -> int:
    return run_example("mte", run, parse(argv))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="train/<class>/ and val/<class>/ with images; default: digits")
    parser.add_argument("--objectives", nargs="+", default=["dino", "ibot", "moby"])
    parser.add_argument("--out", type=Path, default=Path("output/mte"), help="folder for the results")
    parser.add_argument("--hold-out", action="store_true", help="report on a fifth of train/ instead of val/")
    parser.add_argument("--img-size", type=int, default=16)
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument("--dim", type=int, default=48, help="width of the ViT")
    parser.add_argument("--depth", type=int, default=3, help="of the ViT")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--local-crops", type=int, default=2, help="of DINO and iBOT")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--momentum", type=float, default=0.98, help="of the teacher, at first")
    parser.add_argument("--prototypes", type=int, default=256)
    parser.add_argument("--tau-teacher", type=float, default=0.04)
    parser.add_argument(
        "--batch-norm", action=argparse.BooleanOptionalAction, default=True, help="in the heads of DINO and iBOT"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num-cls", type=int, default=0, help="auxiliary class tokens")
    parser.add_argument("--num-pooled", type=int, default=6, help="pooled tokens")
    parser.add_argument("--aux-sees-cls", action="store_true", help="auxiliary class tokens see the global one")
    parser.add_argument("--aux-sees-aux", action="store_true", help="auxiliary class tokens see each other")
    parser.add_argument("--pool-weight", choices=("spatial", "channel"), default="spatial", help="of pooled tokens")
    parser.add_argument(
        "--aux-target",
        choices=("ensemble", "own"),
        default="ensemble",
        help="of the teacher: what auxiliary tokens learn from",
    )
    parser.add_argument("--without-global", action="store_true", help="the global token is no member of the ensemble")
    parser.add_argument("--global-weight", type=float, default=0.5, help="of the global token, in the loss")
    parser.add_argument(
        "--heads", choices=("kind", "shared"), default="kind", help="a head for each kind of token, or one for all"
    )
    parser.add_argument("--aux-on-local", action="store_true", help="local crops have auxiliary tokens, too")
    parser.add_argument("--only-mte", action="store_true", help="leave the baselines out")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> list[Score]:
    images = folders(args.data_dir, args.img_size) if args.data_dir else digits(args.img_size)
    if args.hold_out:
        images = hold_out(images.train)
    scores: list[Score] = []
    for seed in args.seeds:
        for objective in args.objectives:
            for aux in (True,) if args.only_mte else (False, True):
                method = f"{objective} + MTE" if aux else objective
                task = make_task(objective, aux, images, args, seed)
                start = time.process_time()  # of this process alone, whatever else the machine does
                pretrain(task, images.train.images, args, seed)
                measures = {"CPU time, ms a step": 1000 * (time.process_time() - start) / args.steps}
                measures = measure(task, images, seed) | measures
                scores += [Score(method, seed, name, value) for name, value in measures.items()]
                print(f"seed {seed}, {method}: " + ", ".join(f"{k} {v:.1f}" for k, v in measures.items()), flush=True)
                save(scores, args.out)
    finish(scores, args.out)
    return scores


class InMemoryTask(MTETask):
    """An MTETask that cuts its crops itself, from a batch of whole images."""

    crops: list[Crop]

    def forward(self, input: Tensor, target: object = None) -> dict[str, Tensor]:
        return super().forward(batch_crops(input, self.crops, self.generator()))


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


def pretrain(task: MTETask, images: Tensor, args: argparse.Namespace, seed: int) -> None:
    with TemporaryDirectory() as out:
        settings = Settings(
            out=Path(out), steps=args.steps, batch_size=args.batch_size, lr=args.lr, weight_decay=0.04,
            clip_grad=3.0, clip_mode="parameter", workers=0, seed=seed, log_every=50, save_every=10**6,
            warmup_epochs=0.2 * args.steps / (len(images) // args.batch_size),
        )  # fmt: skip
        train(task, TensorDataset(images, torch.zeros(len(images))), settings)


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
