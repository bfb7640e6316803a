"""Few-shot classification with ESFR: on scikit-learn's digits, or on your images with any timm model.

    python examples/fewshot.py
    python examples/fewshot.py --data-dir path/to/folder-of-class-folders --model vit_tiny_patch16_224 --pretrained

Prints the accuracy of BD-CSPN and of nearest centroids over many 5-way episodes, without and with ESFR, 1- and 5-shot.
The digits take scikit-learn (pip install 'timm-tokens[examples]'); their features are the 64 pixels themselves.
"""

import argparse
from pathlib import Path

import torch

from timm_tokens.cli import call
from timm_tokens.cli.fewshot import table
from timm_tokens.fewshot import compare


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder with one folder of images for each class")
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="any timm model, with --data-dir")
    parser.add_argument("--checkpoint", type=Path, help="file with the weights of the model")
    parser.add_argument("--pretrained", action="store_true", help="use timm's pretrained weights")
    parser.add_argument("--random", action="store_true", help="use random weights, to see what features are worth")
    parser.add_argument("--episodes", "--steps", type=int, default=200, help="episodes to classify (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("fewshot"), help="for the features and the table of images")
    args = parser.parse_args(arguments)
    names = ["nearest_centroid", "bd_cspn"]
    if args.data_dir:  # this is what the command `timm-tokens fewshot` does
        call("fewshot", **vars(args), classifiers=names, workers=0, plot=False)
        return
    from sklearn.datasets import load_digits

    data = load_digits()
    features, labels = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)
    results = []
    for shots in (1, 5):
        generator = torch.Generator().manual_seed(args.seed)
        setting = {"shots": shots, "episodes": args.episodes, "classifiers": names}
        results += compare(features, labels, generator=generator, **setting)
    print(table(results))


if __name__ == "__main__":
    main()
