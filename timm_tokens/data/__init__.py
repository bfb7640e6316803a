"""Data: label stores and augmentation of images together with their labels."""

from timm_tokens.data.label_dataset import LabeledTarget, TokenLabelDataset
from timm_tokens.data.label_format import LabelMap, image_id
from timm_tokens.data.label_store import TokenLabelStore
from timm_tokens.data.label_transforms import TokenLabelTransform, View
from timm_tokens.data.label_writer import TokenLabelWriter, pack_labels, unpack_labels

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
