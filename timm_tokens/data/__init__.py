"""Data: label stores and augmentation of images together with their labels."""

from .label_format import LabelMap, image_id
from .label_store import TokenLabelStore
from .label_writer import TokenLabelWriter, pack_labels, unpack_labels

__all__ = [
    "LabelMap",
    "TokenLabelStore",
    "TokenLabelWriter",
    "image_id",
    "pack_labels",
    "unpack_labels",
]
