"""Class scores for every place of an image, by any timm classifier that keeps a spatial map: conv nets, ViTs, Swin."""

import torch
from torch import Tensor, nn

from timm_tokens.vit import TokenViT


def dense_scores(model: nn.Module, images: Tensor) -> Tensor:
    """Scores before the softmax: what the model would say of an image that looks everywhere as it does in this cell.

    Every cell of the features after the last layer is given to the model's own head, as the features of an image all
    of whose cells are this one. So pooling gives the cell itself, and all that comes after it acts: norms, hidden
    layers, the classifier, and both classifiers (averaged) of a distilled model. Where nothing nonlinear follows the
    average pooling, the mean over cells is the model's logits. For a ViT that reads its class token, patch tokens take
    that token's place. A `TokenViT` with a label head is asked for its own token scores.

    Args:
        model: with timm's `forward_features` and `forward_head`, in evaluation mode.
        images: (B, 3, h, w).

    Returns:
        (B, H, W, K)

    Raises:
        TypeError: the model has no classifier, or no spatial map; says what it has.
    """
    height, width = images.shape[-2:]
    if isinstance(model, TokenViT) and model.head is not None:
        tokens = model(images, dense=True).tokens
        return tokens.unflatten(1, _grid(tokens.shape[1], height / width) or _refuse(model, tokens))
    if not getattr(model, "num_classes", 0) or not hasattr(model, "forward_head"):
        raise TypeError(f"{type(model).__name__} has no classifier: make it with its classes, not num_classes=0")
    features = model.forward_features(images)
    cells, grid = _cells(model, features, height / width)  # (B * H * W, ...)
    scores = model.forward_head(cells)
    if not isinstance(scores, Tensor) or scores.shape[:-1] != cells.shape[:1]:
        _refuse(model, features)
    return scores.view(-1, *grid, scores.shape[-1])


def _cells(model: nn.Module, features: Tensor, aspect: float) -> tuple[Tensor, tuple[int, int]]:
    """Each cell as the features of an image of its own, and the grid (H, W)."""
    dim = features.ndim if isinstance(features, Tensor) else 0
    if dim == 4 and _channels_last(model, features):
        grid, cells = features.shape[1:3], features.flatten(0, 2)[:, None, None]  # (B, H, W, C) -> (B * H * W, 1, 1, C)
    elif dim == 4:
        grid, cells = features.shape[2:], features.permute(0, 2, 3, 1).flatten(0, 2)[:, :, None, None]
    elif dim == 3:
        prefix, grid = _prefix(model, features, aspect)
        # (B, P + N, C) -> (B * N, P + 1, C): the cell is all of the image's tokens, its class token included
        cells = features[:, prefix:].flatten(0, 1)[:, None].expand(-1, prefix + 1, -1)
    else:
        _refuse(model, features)
    if grid[0] * grid[1] == 1:
        _refuse(model, features)
    return cells, tuple(grid)


def _channels_last(model: nn.Module, features: Tensor) -> bool:
    channels = model.num_features
    if features.shape[1] == features.shape[-1] == channels:
        return getattr(getattr(model, "head", None), "input_fmt", "NCHW") == "NHWC"
    return features.shape[-1] == channels


def _prefix(model: nn.Module, features: Tensor, aspect: float) -> tuple[int, tuple[int, int]]:
    """How many tokens come before those of the patches, and the patches' grid."""
    known = getattr(model, "num_prefix_tokens", None)
    for prefix in (0, 1) if known is None else (known,):  # some class-token models of timm don't say that they have one
        grid = _grid(features.shape[1] - prefix, aspect)
        if grid is not None:
            return prefix, grid
    return _refuse(model, features)


def _grid(count: int, aspect: float) -> tuple[int, int] | None:
    """The rows and columns that so many cells make in an image of this height over width; None if they don't."""
    rows, columns = round((count * aspect) ** 0.5), round((count / aspect) ** 0.5)
    return (rows, columns) if rows * columns == count > 0 else None


def _refuse(model: nn.Module, features: object) -> None:
    shape = tuple(features.shape) if isinstance(features, torch.Tensor) else f"a {type(features).__name__}"
    raise TypeError(
        f"{type(model).__name__} has no spatial map to take scores from: its features are {shape}; "
        "use a model that ends in a map (B, C, H, W) or in one token a patch: a conv net, a ViT, a Swin"
    )
