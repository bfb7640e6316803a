"""Types of models, for annotations.

They are Any to type checkers: `nn.Module` says of every member that it may be a tensor, a module or neither.
"""

from typing import Any, TypeAlias

ViT: TypeAlias = Any  # a timm VisionTransformer, Eva or NaFlexVit
Block: TypeAlias = Any  # one of its blocks
Attention: TypeAlias = Any  # the attention of a block
Wrapped: TypeAlias = Any  # a TokenViT, for what it is made of
