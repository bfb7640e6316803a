"""A user's script, which no one runs: mypy and pyright must understand it. CI runs mypy over it."""

import timm
import torch
from torch import Tensor
from typing_extensions import assert_type

import timm_tokens
from timm_tokens import DenseLogits, Tokens, TokenViT
from timm_tokens.features import MergedTokens

images = torch.randn(1, 3, 224, 224)
vit = timm.create_model("deit_small_patch16_224", num_classes=10)

model = timm_tokens.apply_dtem_merging(vit, r=13)
model.merger.r = 16
model.merger.r = [4, 4, 8]
model.merger.r = (8, -1.0)
assert_type(model, TokenViT)
assert_type(model(images), Tensor)
assert_type(model(images, tokens=True), Tokens)
assert_type(model(images, tokens="merged"), MergedTokens)
assert_type(model(images, attn_mask=torch.ones(197, 197, dtype=torch.bool)), Tensor)
assert_type(model.forward_features(images), Tensor)
assert_type(model.token_groups(images), Tensor)
assert_type(model.flops(r=8), int)

model = timm_tokens.add_aux_tokens(timm_tokens.token_label_head(model), num_cls=2)
assert_type(model(images, dense=True), DenseLogits)
assert_type(model.forward(images, dense=True, box=(0, 0, 7, 7)), DenseLogits)
cls, patches = model(images, dense=True)
print(cls.shape, patches.shape, model.aux.num_cls, model.head.num_classes, model.base.blocks[0])
