"""Images, label stores, augmentation of images together with their label maps, multi-crop and block masks."""

from timm_tokens.data.decoding import decode_image
from timm_tokens.data.device_crops import DeviceCrops
from timm_tokens.data.folders import open_folder
from timm_tokens.data.images import ImageError, Images, image_names, read_image, unreadable
from timm_tokens.data.label_dataset import LabeledTarget, TokenLabelDataset
from timm_tokens.data.label_format import LabelMap, image_id
from timm_tokens.data.label_store import TokenLabelStore
from timm_tokens.data.label_transforms import TokenLabelTransform, View
from timm_tokens.data.label_writer import TokenLabelWriter, flush_journals, pack_labels, unpack_labels
from timm_tokens.data.masking import block_masks, random_ratio_masks
from timm_tokens.data.model_input import input_config, input_transform
from timm_tokens.data.multi_crop import Crop, MultiCrop, dino_crops, swav_crops

__all__ = [
    "Crop",
    "DeviceCrops",
    "ImageError",
    "Images",
    "LabelMap",
    "LabeledTarget",
    "MultiCrop",
    "TokenLabelDataset",
    "TokenLabelStore",
    "TokenLabelTransform",
    "TokenLabelWriter",
    "View",
    "block_masks",
    "decode_image",
    "dino_crops",
    "flush_journals",
    "image_id",
    "image_names",
    "input_config",
    "input_transform",
    "open_folder",
    "pack_labels",
    "random_ratio_masks",
    "read_image",
    "swav_crops",
    "unpack_labels",
    "unreadable",
]
