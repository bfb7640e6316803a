"""Class scores for every place of an image, by any timm classifier that keeps a spatial map: conv nets, ViTs, Swin."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from timm_tokens import blocks
from timm_tokens.driver import encode
from timm_tokens.vit import TokenViT


def dense_scores(model: Any, images: Tensor) -> Tensor:
    """Scores before the softmax of each cell: those of an image that looks everywhere as it does in this cell.

    * Models that pool their cells (conv nets, Swin, ViTs that average or attend over patches): each cell of the last
      features goes through the model's own head, as the features of an image all of whose cells are this one. Where
      nothing nonlinear follows an average pooling, the mean over cells is the model's logits.
    * ViTs that read class tokens: in the last block these tokens attend to this cell alone. (The head on the patch
      tokens themselves would say little: no loss has ever seen them.) Both class tokens of a distilled model count.
    * A `TokenViT` with a label head is asked for its own token scores; one without, for its base's.

    Args:
        model: a timm classifier, in evaluation mode.
        images: (B, 3, h, w).

    Returns:
        (B, H, W, K)

    Raises:
        TypeError: The model has no classifier or no spatial map, or reads class tokens in a way that is not known here.
    """
    aspect = images.shape[-2] / images.shape[-1]
    if isinstance(model, TokenViT):
        if model.head is None:
            return dense_scores(model.base, images)
        tokens = model(images, dense=True).tokens
        return tokens.unflatten(1, blocks.grid_size(model.base, images.shape[-2:]))
    if not getattr(model, "num_classes", 0) or not hasattr(model, "forward_head"):
        raise TypeError(f"{type(model).__name__} has no classifier: make it with its classes, not num_classes=0")
    if getattr(model, "global_pool", None) == "token":
        return _class_token_scores(model, images)
    features = model.forward_features(images)
    cells, grid = _cells(model, features, aspect)  # (B * H * W, ...)
    scores = model.forward_head(cells)
    if not isinstance(scores, Tensor) or scores.shape[:-1] != cells.shape[:1]:
        _refuse(model, features)
    return scores.view(-1, *grid, scores.shape[-1])


def _class_token_scores(model: Any, images: Tensor) -> Tensor:
    try:
        vit = TokenViT(model)
    except TypeError as error:
        raise TypeError(
            f"{type(model).__name__} reads a class token, and can't be asked what it would read from one cell: "
            f"{error}; or use a model that pools a map, such as a conv net or a Swin"
        ) from error
    stream, _ = encode(vit, images, depth=len(model.blocks) - 1)
    prefix, patches = stream.x.tensor_split([model.num_prefix_tokens], dim=1)
    # Every cell with its own copy of the prefix, (B, N, C) -> (B * N, P + 1, C), and all look at the cell alone.
    tokens = torch.cat([prefix[:, None].expand(-1, patches.shape[1], -1, -1), patches[:, :, None]], dim=2)
    mask = tokens.new_full((tokens.shape[2],) * 2, float("-inf"))
    mask[:, -1] = 0
    x = model.blocks[-1](tokens.flatten(0, 1), attn_mask=mask)
    scores = model.forward_head(model.norm(x))
    return scores.view(images.shape[0], *blocks.grid_size(model, images.shape[-2:]), -1)


def _cells(model: Any, features: Tensor, aspect: float) -> tuple[Tensor, tuple[int, int]]:
    """Each cell as the features of an image of its own, and the grid (H, W)."""
    dim = features.ndim if isinstance(features, Tensor) else 0
    if dim == 4 and _channels_last(model, features):
        grid: Sequence[int] = features.shape[1:3]
        cells = features.flatten(0, 2)[:, None, None]  # (B, H, W, C) -> (B * H * W, 1, 1, C)
    elif dim == 4:
        grid = features.shape[2:]
        cells = features.permute(0, 2, 3, 1).flatten(0, 2)[:, :, None, None]
    elif dim == 3:
        prefix, grid = _prefix(model, features, aspect)
        # (B, P + N, C) -> (B * N, P + 1, C): the cell is all of the image's tokens, its class token included
        cells = features[:, prefix:].flatten(0, 1)[:, None].expand(-1, prefix + 1, -1)
    else:
        _refuse(model, features)
    if grid[0] * grid[1] == 1:
        _refuse(model, features)
    return cells, (grid[0], grid[1])


def _channels_last(model: Any, features: Tensor) -> bool:
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
    _refuse(model, features)


def _grid(count: int, aspect: float) -> tuple[int, int] | None:
    """The rows and columns that so many cells make in an image of this height over width; None if they don't."""
    rows, columns = round((count * aspect) ** 0.5), round((count / aspect) ** 0.5)
    return (rows, columns) if rows * columns == count > 0 else None


def _refuse(model: nn.Module, features: object) -> NoReturn:
    shape = tuple(features.shape) if isinstance(features, torch.Tensor) else f"a {type(features).__name__}"
    raise TypeError(
        f"{type(model).__name__} has no spatial map to take scores from: its features are {shape}; "
        "use a model that ends in a map (B, C, H, W) or in one token per patch: a conv net, a ViT, a Swin"
    )
