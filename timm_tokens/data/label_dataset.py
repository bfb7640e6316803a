"""A timm image data set with the label map of every image."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from PIL import Image
from timm.data import ImageDataset
from torch import Tensor
from torch.utils.data import Dataset

from timm_tokens.data.label_format import LabelMap, image_id
from timm_tokens.data.label_transforms import View


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
        dataset: an indexed timm data set; its images are read as it would, its own transform is not used.
        labels: label maps by image id (see `image_id`), such as a `TokenLabelStore`.
        transform: PIL image to `View`, such as a `TokenLabelTransform`.

    Raises:
        TypeError: the data set is not an indexed one of timm.
        KeyError: on reading, an image has no label; names the image.
        OSError: on reading, an image is damaged; names the image.
    """

    def __init__(self, dataset: ImageDataset, labels: Mapping[str, LabelMap], transform: Callable[[Image.Image], View]):
        if not isinstance(dataset, ImageDataset):
            raise TypeError(
                f"dataset must be a timm.data.ImageDataset, got {type(dataset).__name__}: "
                "labels are found by image name, and streams of images have no names by index"
            )
        self.dataset = dataset
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, LabeledTarget]:
        name = image_id(self.dataset.filename(index))
        values, indices = self.labels[name]
        image, label = self._read(index, name)
        view = self.transform(image)
        return view.image, LabeledTarget(label, values, indices, view.map)

    def missing_labels(self) -> list[str]:
        """Ids of the images without a label. Ask before a long run."""
        return [name for name in map(image_id, self.dataset.filenames()) if name not in self.labels]

    def _read(self, index: int, name: str) -> tuple[Image.Image, int]:
        # Not dataset[index]: for a damaged image that returns the next one, which has another label map.
        try:
            file, label, *_ = self.dataset.reader[index]
            with file, Image.open(file) as image:
                image = image.convert(self.dataset.input_img_mode or "RGB")
        except OSError as error:
            raise OSError(f"image {name!r} can't be read: {error}") from error
        if label is None:
            return image, -1
        return image, self.dataset.target_transform(label) if self.dataset.target_transform else label
