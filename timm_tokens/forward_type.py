"""What `TokenViT.forward` gives for which arguments, for type checkers."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeAlias, cast, overload

from torch import Tensor

from timm_tokens.features import MergedTokens, Tokens
from timm_tokens.parts import DenseLogits

Mask: TypeAlias = Tensor | None
Box: TypeAlias = Tensor | Sequence[int] | None


class Forward(Protocol):
    """`TokenViT.forward`, of a model that is at hand."""

    @overload
    def __call__(self, images: Tensor, attn_mask: Mask = ..., is_causal: bool = ..., *, mask: Mask = ...) -> Tensor: ...
    @overload
    def __call__(self, images: Tensor, *, dense: Literal[True], box: Box = ..., mask: Mask = ...) -> DenseLogits: ...
    @overload
    def __call__(self, images: Tensor, *, tokens: Literal[True], mask: Mask = ..., aux: bool = ...) -> Tokens: ...
    @overload
    def __call__(self, images: Tensor, *, tokens: Literal["merged"], mask: Mask = ...) -> MergedTokens: ...
    @overload
    def __call__(
        self,
        images: Tensor,
        attn_mask: Mask = ...,
        is_causal: bool = ...,
        *,
        dense: bool = ...,
        box: Box = ...,
        tokens: bool | str = ...,
        mask: Mask = ...,
        aux: bool = ...,
    ) -> Tensor | DenseLogits | Tokens | MergedTokens: ...


def typed(forward: Callable[..., Any]) -> Forward:
    """A decorator that changes nothing but what type checkers know."""
    return cast(Forward, forward)
