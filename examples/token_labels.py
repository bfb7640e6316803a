"""Train a small ViT with and without token labels, at equal budget, and see what they buy.

    python examples/token_labels.py                   # handwritten digits: nothing to download, a few minutes
    python examples/token_labels.py --data-dir DIR --annotator NAME [--checkpoint FILE] --model lvvit_t --img-size 96

The annotator, any classifier of timm, labels every patch of the images in train/ once. Then the same model is trained
with these labels and without, with the same images, augmentation and number of steps, for each of --seeds; --variants
adds rows for parts of the recipe. The report, a table and a plot in --out, is the accuracy on val/ at the end, which
nothing was trained or chosen on. For the digits an annotator is trained first. What was stopped goes on where it was
when it is started again.

Source: token labeling (arXiv 2104.10858).
"""

import argparse
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from _data import digits
from _example import make_parser, run_example
from PIL import Image
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from timm.utils import ParseKwargs

from timm_tokens import drawing
from timm_tokens.cli import call
from timm_tokens.data import TokenLabelStore
from timm_tokens.tables import markdown, write_csv

ARMS = {"classes alone": None, "token labels": {}}  # None: without labels; else the settings beside them
VARIANTS = {
    "labels, no MixToken": {"mix": False},
    "labels, truth": {"ground_truth": True},
    "labels, truth, no MixToken": {"ground_truth": True, "mix": False},
}
Curve = dict[int, float]  # accuracy after so many epochs


def main(argv: list[str] | None = None) -> int:
    return run_example("token_labels", run, parse(argv))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "token_labels", lr=2e-3)
    add, flag = parser.add_argument, {"action": "store_true"}
    add("--data-dir", type=Path, help="folder with train/<class>/ and val/<class>/ (default: scikit-learn's digits)")
    add("--annotator", help="classifier of timm with a spatial feature map, with --data-dir")
    add("--checkpoint", type=Path, help="weights of the annotator (default: timm's pretrained ones)")
    add("--num-classes", type=int, help="number of classes of the checkpoint (default: the annotator's own)")
    add("--folder-classes", **flag, help="use only the classes that the folders are named after (WordNet names)")
    add("--model", default="vit_tiny_patch16_224", help="name of the ViT to train, with --data-dir")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, help="arguments for the ViT, such as depth=4")
    add("--img-size", type=int, help="side of the images to train on, in pixels (default: the ViT's own)")
    add("--val-split", default="val", help="folder to report on; choose settings on another")
    add("--seeds", type=int, default=3, help="number of seeds")
    add("--variants", **flag, help="also train without MixToken, and with the true classes mixed in")
    add("--epochs", type=int, default=30, help="number of epochs of each training, unless --steps is given")
    add("--scale", type=float, nargs=2, default=(0.5, 1.0), help="range of a crop's area")
    add("--workers", type=int, default=0, help="number of worker processes that load images")
    add("--device", help="device to compute on (default: cuda if there is one, else cpu)")
    args = parser.parse_args(argv)
    if args.data_dir and not args.annotator:
        parser.error("--data-dir needs --annotator: a classifier that knows its classes, such as one of ImageNet")
    return args


def run(args: argparse.Namespace) -> None:
    shared = {
        "epochs": args.epochs,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "scale": tuple(args.scale),
    }
    shared |= {"workers": args.workers, "device": args.device, "resume": True, "aa": "", "re_prob": 0.0}
    shared |= {"eval_every": max(1, args.epochs // 10)}
    if not args.data_dir:
        digits_job(args, shared)
    labels = args.out / "labels"
    loading = {"batch_size": args.batch_size, "workers": args.workers, "device": args.device}
    call(
        "annotate", dataset=str(args.data_dir / "train"), out=labels, model=args.annotator, **loading,
        checkpoint=args.checkpoint, pretrained=args.checkpoint is None, num_classes=args.num_classes,
        folder_classes=args.folder_classes,
    )  # fmt: skip
    shared |= {"data_dir": args.data_dir, "model": args.model, "img_size": args.img_size, "val_split": args.val_split}
    classes = TokenLabelStore(labels).num_classes  # both tell as many classes apart
    shared |= {"model_kwargs": args.model_kwargs, "num_classes": classes}
    arms = ARMS | VARIANTS if args.variants else ARMS
    curves: dict[str, list[Curve]] = {arm: [] for arm in arms}
    for seed in range(args.seeds):
        for arm, options in arms.items():
            out = args.out / f"{arm.replace(',', '').replace(' ', '-')}-{seed}"
            chosen = {"seed": seed, "out": out} | ({} if options is None else {"labels": labels} | options)
            result = call("train token-label", **shared, **chosen)
            curves[arm].append({row["epoch"] + 1: row["eval_top1"] for row in result.epochs if "eval_top1" in row})
    report(curves, args.out)


def digits_job(args: argparse.Namespace, shared: dict[str, Any]) -> None:
    """The digits as folders of images, and an annotator that is trained on them."""
    shared |= {"hflip": 0.0}  # a mirrored digit is none
    args.data_dir, args.img_size, args.model, args.annotator = write_digits(args.out / "digits"), None, *DIGIT_MODELS
    result = call(
        "train token-label", **shared, data_dir=args.data_dir, model=args.annotator,
        out=args.out / "annotator",
    )  # fmt: skip
    args.checkpoint, args.num_classes = result.path, 10


def write_digits(folder: Path) -> Path:
    """scikit-learn's digits as train/<class>/ and val/<class>/; a quarter of each class is to report on."""
    for split, (images, labels) in zip(("train", "val"), digits(24, test_size=0.25), strict=True):
        for i, (image, label) in enumerate(zip(images[:DIGITS], labels, strict=False)):
            path = folder / split / str(int(label)) / f"{i:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((255 * image).round().byte().numpy()).save(path)
    return folder


DIGIT_MODELS = ("digits_vit", "digits_annotator")  # registered below
DIGITS = None  # how many to write of each split; all of them


_cfg = {"input_size": (3, 24, 24), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0, "classifier": "head"}
default_cfgs = generate_default_cfgs(dict.fromkeys(DIGIT_MODELS, _cfg))  # where timm looks for them


def _digits_vit(variant: str, pretrained: bool, **kwargs: Any) -> VisionTransformer:
    shape = {"img_size": 24, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2}
    return build_model_with_cfg(VisionTransformer, variant, pretrained, **shape | kwargs)


@register_model
def digits_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """6 x 6 patches, and a class token."""
    return _digits_vit("digits_vit", pretrained, **kwargs)


@register_model
def digits_annotator(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """6 x 6 patches, whose average is classified: so every patch has scores that were trained."""
    return _digits_vit("digits_annotator", pretrained, class_token=False, global_pool="avg", fc_norm=False, **kwargs)


def report(curves: dict[str, list[Curve]], out: Path) -> None:
    """Print the table of final accuracies, and write table.csv and accuracy.png."""
    finals = {arm: [curve[max(curve)] for curve in runs] for arm, runs in curves.items()}
    base, *labelled = finals
    gains = {f"gain, {arm}": [b - a for a, b in zip(finals[base], finals[arm], strict=True)] for arm in labelled}
    rows = [["", *(f"seed {seed}" for seed in range(len(finals[base]))), "mean", "spread"]]
    for name, values in (finals | gains).items():
        spread = stdev(values) if len(values) > 1 else float("nan")
        rows.append([name, *(f"{value:.2f}" for value in [*values, fmean(values), spread])])
    write_csv(out / "table.csv", rows[0], rows[1:])
    drawing.save(drawing.draw_runs(curves, "epoch", "accuracy (%)"), out / "accuracy.png")
    print("\nAccuracy on val/ after the last epoch, in percent; the spread is the standard deviation over the seeds.\n")
    print(markdown(rows[0], rows[1:]))
    print(f"\nThe table, the plot and the runs are in {out}.")


if __name__ == "__main__":
    sys.exit(main())
