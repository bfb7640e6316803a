"""Data: label stores, augmentation of images together with their labels, multi-crop and block masks."""

from timm_tokens.data.label_dataset import LabeledTarget, TokenLabelDataset
from timm_tokens.data.label_format import LabelMap, image_id
from timm_tokens.data.label_store import TokenLabelStore
from timm_tokens.data.label_transforms import TokenLabelTransform, View
from timm_tokens.data.label_writer import TokenLabelWriter, pack_labels, unpack_labels
from timm_tokens.data.masking import block_masks, random_ratio_masks
from timm_tokens.data.multi_crop import Crop, MultiCrop, dino_crops, swav_crops

__all__ = [
    "Crop",
    "LabelMap",
    "LabeledTarget",
    "MultiCrop",
    "TokenLabelDataset",
    "TokenLabelStore",
    "TokenLabelTransform",
    "TokenLabelWriter",
    "View",
    "block_masks",
    "dino_crops",
    "image_id",
    "pack_labels",
    "random_ratio_masks",
    "swav_crops",
    "unpack_labels",
]
