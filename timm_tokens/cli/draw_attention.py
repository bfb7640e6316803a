"""Draw what a model's auxiliary tokens look at in an image, and how alike they are.

    timm-tokens draw attention photo.jpg attention.png --run output/mte
    timm-tokens draw attention photo.jpg attention.png --model vit_small_mte --checkpoint model.safetensors --block 6

The panels: the image; the attention of the class token and of each auxiliary class token, averaged over heads; the
weights by which each pooled token pools the patches, averaged where channels have their own; and the cosines between
all of them. Each map is drawn from its least to its largest value.
"""

from argparse import ArgumentParser
from pathlib import Path

from PIL import Image
from torch import Tensor

from timm_tokens.cli import _models
from timm_tokens.cli._attention import Looks, looks
from timm_tokens.cli._errors import CommandError
from timm_tokens.cli._files import check_picture, read_image
from timm_tokens.cli._picture import enlarge, paint_heat, paint_matrix, rows_of_panels
from timm_tokens.cli._prototypes import load_run
from timm_tokens.files import replacing
from timm_tokens.vit import TokenViT

SIDE = 224  # pixels of a panel's shorter side, at least


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of the sub-command: the keyword arguments of `run`."""
    parser.add_argument("image", type=Path, help="the image to read")
    parser.add_argument("out", type=Path, help="the picture to write; its suffix says how (.png, .jpg, .webp)")
    parser.add_argument("--run", dest="run_dir", type=Path, help="folder of a run of timm-tokens train mte")
    parser.add_argument("--model", help="instead: a model with auxiliary tokens, such as vit_small_mte")
    parser.add_argument("--checkpoint", type=Path, help="its weights, those of its base alone don't do")
    parser.add_argument("--block", type=int, help="whose attention, from 1 (default: the last)")
    parser.add_argument("--image-size", type=int, help="side of the image (default: the model's)")


def run(
    *,
    image: str | Path,
    out: str | Path,
    run_dir: str | Path | None = None,
    model: str | None = None,
    checkpoint: str | Path | None = None,
    block: int | None = None,
    image_size: int | None = None,
) -> Looks:
    """Write the picture; see the command's --help.

    Returns:
        What it shows, for a batch of one.

    Raises:
        CommandError: If something is missing or doesn't fit; then nothing is written.
    """
    out = Path(out)
    check_picture(out)
    photo = read_image(Path(image))
    if (run_dir is None) == (model is None):
        raise CommandError("give either --run FOLDER, of timm-tokens train mte, or --model NAME")
    net = _of_run(Path(run_dir)) if run_dir else _by_name(model, checkpoint, image_size)
    depth = len(net.base.blocks)
    if block is not None and not 1 <= block <= depth:
        raise CommandError(f"--block takes a number from 1 to {depth}, the model's depth, got {block}")
    if image_size is not None and run_dir:
        net.set_input_size((image_size, image_size))
    pixels, shown = _models.as_seen(net, photo)
    try:
        seen = looks(net, pixels, (block or depth) - 1)
    except ValueError as error:
        raise CommandError(str(error)) from error
    with replacing(out) as partial:
        _picture(enlarge(shown, SIDE), seen).save(partial)
    return seen


def _of_run(folder: Path) -> TokenViT:
    task = load_run(folder).task
    net = None if task is None else task.teacher.encoder.backbone
    if not isinstance(net, TokenViT) or net.aux is None:
        raise CommandError(f"the run in {folder} has no ViT with auxiliary tokens")
    return net


def _by_name(name: str, checkpoint: str | Path | None, image_size: int | None) -> TokenViT:
    if checkpoint is None and ":" not in name:
        raise CommandError("give --checkpoint: the weights of a model trained with auxiliary tokens; timm has none")
    sized = {} if image_size is None else {"img_size": image_size}
    net = _models.create(name, pretrained=checkpoint is None, **sized)
    if not isinstance(net, TokenViT) or net.aux is None:
        raise CommandError(f"{name} has no auxiliary tokens: give a model that has, such as vit_small_mte")
    if checkpoint is not None:
        _models.load_whole(net, Path(checkpoint))
    return net


def _picture(shown: Tensor, seen: Looks) -> Image.Image:
    first = [("image", shown)]
    if seen.cls is not None:
        first.append(("class token", paint_heat(seen.cls[0], shown)))
    first.append(("cosines", paint_matrix(seen.cosine[0], shown.shape[1])))
    rows = [first]
    for name, maps in (("aux", seen.aux_cls), ("pooled", seen.pooled)):
        if maps is not None:
            rows.append([(f"{name} {i + 1}", paint_heat(m, shown)) for i, m in enumerate(maps[0])])
    return rows_of_panels(rows)
