"""Images of a data set by name, read one at a time; a damaged one is an error that names it."""

from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import Dataset, IterableDataset

from timm_tokens.data.label_format import image_id


def check_indexed(dataset: Dataset) -> None:
    """Refuse what gives images in its own order.

    Raises:
        TypeError: the data set is a stream.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"dataset must be indexed, such as a timm.data.ImageDataset, got {type(dataset).__name__}: "
            "labels are found by image name, and streams of images have no names by index"
        )


def image_name(dataset: Dataset, index: int) -> str:
    """The id of an image: from its file (see `image_id`), or its number where a data set knows no files."""
    return image_id(dataset.filename(index)) if isinstance(dataset, ImageDataset) else f"{index:08d}"


def image_names(dataset: Dataset) -> list[str]:
    """The ids of all images.

    Raises:
        ValueError: two images have the same id.
    """
    if not isinstance(dataset, ImageDataset):
        return [image_name(dataset, index) for index in range(len(dataset))]
    first: dict[str, str] = {}
    for file in dataset.filenames():
        name = image_id(file)
        if name in first:
            raise ValueError(
                f"{first[name]} and {file} are both named {name!r}, so their labels would be mixed up: rename one"
            )
        first[name] = file
    return list(first)


def read_image(dataset: Dataset, index: int) -> tuple[Image.Image, int]:
    """An image (in RGB, or as the data set says) and its class, -1 without one; the set's transform is not used.

    Raises:
        OSError: the image is damaged; names it.
    """
    # Not dataset[index]: for a damaged image timm's returns the next one, which has another label map.
    try:
        if not isinstance(dataset, ImageDataset):
            image, label = dataset[index][:2]
            return image.convert("RGB"), label
        file, label, *_ = dataset.reader[index]
        with file, Image.open(file) as image:
            image = image.convert(dataset.input_img_mode or "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow raises all of these
        raise OSError(f"image {image_name(dataset, index)!r} can't be read: {error}") from error
    if label is None:
        return image, -1
    return image, dataset.target_transform(label) if dataset.target_transform else label
