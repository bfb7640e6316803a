"""A timm image data set with the label map of every image."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from timm_tokens.data.images import check_indexed, image_name, image_names, read_image
from timm_tokens.data.label_format import LabelMap
from timm_tokens.data.label_transforms import View
from timm_tokens.ops import others_share


class LabeledTarget(NamedTuple):
    """What a batch of views is trained towards. torch's `default_collate` stacks it field by field.

    Attributes:
        label: (B,) int64 classes.
        values: (B, top, H, W) float16 scores of the whole images' label maps.
        indices: (B, top, H, W) int32 classes of the scores.
        map: (B, 3, 3) from the views to the images, for `warp_token_labels(values, indices, map, K, size)`.
    """

    label: Tensor | int
    values: Tensor
    indices: Tensor
    map: Tensor

    def to(self, *args, **kwargs) -> "LabeledTarget":
        """All tensors moved as by `Tensor.to`, so that timm's `PrefetchLoader` can."""
        return LabeledTarget(*(cast(Tensor, x).to(*args, **kwargs) for x in self))


class TokenLabelDataset(Dataset):
    """Views and their targets, `(image (3, H, W), LabeledTarget)`, for any torch or timm loader.

        dataset = timm.data.create_dataset("", root)
        dataset = TokenLabelDataset(dataset, TokenLabelStore(labels), TokenLabelTransform(224))
        for images, target in DataLoader(dataset, 64, shuffle=True, num_workers=4): ...

    Args:
        dataset: An indexed data set, such as timm's `ImageDataset`, whose own transform is not used.
        labels: Label maps by image id (see `image_id`; the image's number where a data set knows no files), such as a
            `TokenLabelStore`.
        transform: PIL image to `View`, such as a `TokenLabelTransform`.

    Raises:
        TypeError: The data set is a stream.
        KeyError: On reading, an image has no label; names the image.
        OSError: On reading, an image is corrupt; names the image.
    """

    def __init__(self, dataset: Any, labels: Mapping[str, LabelMap], transform: Callable[[Image.Image], View]):
        check_indexed(dataset)
        self.dataset = dataset
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, LabeledTarget]:
        values, indices = self.labels[image_name(self.dataset, index)]
        image, label = read_image(self.dataset, index)
        view = self.transform(image)
        return view.image, LabeledTarget(label, values, indices, view.map)

    def others_share(self, num_classes: int, images: int = 64) -> float:
        """The mean probability that a cell leaves to all classes together that it does not keep, see `top_scores`.

        Where it is high the labels say little. Published `.pt` files of annotators that were trained by binary cross
        entropy are such labels.

        Args:
            num_classes: K.
            images: How many images to look at, evenly spaced.
        """
        chosen = range(0, len(self), max(1, len(self) // images))
        values = (self.labels[image_name(self.dataset, index)].values for index in chosen)
        return float(torch.stack([others_share(x.movedim(0, -1), num_classes).mean() for x in values]).mean())

    def missing_labels(self) -> list[str]:
        """Ids of the images without a label. Ask before a long run."""
        return [name for name in image_names(self.dataset) if name not in self.labels]
