"""Data: label stores and augmentation of images together with their labels."""

from .label_dataset import LabeledTarget, TokenLabelDataset
from .label_format import LabelMap, image_id
from .label_store import TokenLabelStore
from .label_transforms import TokenLabelTransform, View
from .label_writer import TokenLabelWriter, pack_labels, unpack_labels

__all__ = [
    "LabelMap",
    "LabeledTarget",
    "TokenLabelDataset",
    "TokenLabelStore",
    "TokenLabelTransform",
    "TokenLabelWriter",
    "View",
    "image_id",
    "pack_labels",
    "unpack_labels",
]
