"""A timm image data set with the label map of every image."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from timm_tokens.data.label_format import LabelMap
from timm_tokens.data.label_transforms import View
from timm_tokens.data.reading import check_indexed, image_name, image_names, read_image


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
        return LabeledTarget(*(x.to(*args, **kwargs) for x in self))


class TokenLabelDataset(Dataset):
    """Views and their targets, `(image (3, H, W), LabeledTarget)`, for any torch or timm loader.

        dataset = timm.data.create_dataset("", root)
        dataset = TokenLabelDataset(dataset, TokenLabelStore(labels), TokenLabelTransform(224))
        for images, target in DataLoader(dataset, 64, shuffle=True, num_workers=4): ...

    Args:
        dataset: an indexed data set, such as timm's `ImageDataset`, whose own transform is not used.
        labels: label maps by image id (see `image_id`; the image's number where a data set knows no files), such as a
            `TokenLabelStore`.
        transform: PIL image to `View`, such as a `TokenLabelTransform`.

    Raises:
        TypeError: the data set is a stream.
        KeyError: on reading, an image has no label; names the image.
        OSError: on reading, an image is corrupt; names the image.
    """

    def __init__(self, dataset: Dataset, labels: Mapping[str, LabelMap], transform: Callable[[Image.Image], View]):
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

    def missing_labels(self) -> list[str]:
        """Ids of the images without a label. Ask before a long run."""
        return [name for name in image_names(self.dataset) if name not in self.labels]
