"""Features for dense tasks and pictures: everything un-merged to the full grid of patches."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor

from timm_tokens import blocks
from timm_tokens.parts.merger import groups, unmerge_all


class DenseFeatures:
    """Mixed into TokenViT: what its blocks give, patch by patch."""

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Features after chosen blocks, un-merged to the full grid; arguments and results as timm's.

        Args:
            x: (B, 3, H, W) images.
            indices: The last n blocks if an int, all if None, else these blocks.
            return_prefix_tokens: Return (patches, prefix tokens) pairs.
            norm: Apply the final norm to each.
            stop_early: Don't run the blocks after the last one asked for.
            output_fmt: "NCHW" for maps (B, C, H, W), "NLC" for tokens (B, N, C).
            intermediates_only: Leave the final features out.
            output_dict: Return a dict with "image_intermediates", "image_intermediates_prefix", "image_features".

        Raises:
            ValueError: If output_fmt is unknown.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        taken, final_norm = [], self.base.norm
        take_indices, last = feature_take_indices(len(self.base.blocks), indices)

        def on_block(i: int, x: Tensor, trace: list) -> None:
            if i in take_indices:
                taken.append(unmerge_all(trace, final_norm(x) if norm else x))

        stream, trace = self._encode(x, on_block=on_block, depth=last + 1 if stop_early else None)
        final = None if intermediates_only else unmerge_all(trace, final_norm(stream.x))
        prefix = [y[:, : self.num_prefix_tokens] for y in taken]
        maps = [y[:, self.num_prefix_tokens :] for y in taken]
        if output_fmt == "NCHW":
            grid = blocks.grid_size(self.base, x.shape[-2:])
            maps = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in maps]
        return _pack(maps, prefix if return_prefix_tokens and self.num_prefix_tokens else None, final, output_dict)

    @torch.no_grad()
    def token_groups(self, images: Tensor, block: int | None = None) -> Tensor:
        """Which token, counted after the prefix, each patch of images (B, 3, H, W) ends in: (B, rows, columns) int64.

        Tokens are merged as in evaluation, whatever mode the model is in. With `block`, it is the token after so many
        blocks.
        """
        training = self.training
        try:
            _, trace = self.eval()._encode(images, depth=block)
        finally:
            self.train(training)
        grid = blocks.grid_size(self.base, images.shape[-2:])
        if not trace:
            return torch.arange(grid[0] * grid[1], device=images.device).view(1, *grid).repeat(len(images), 1, 1)
        return groups(trace)[:, self.num_prefix_tokens :].unflatten(1, grid) - self.num_prefix_tokens


def _pack(maps: list[Tensor], prefix: list[Tensor] | None, final: Tensor | None, as_dict: bool) -> Any:
    """The results of forward_intermediates in timm's forms."""
    if as_dict:
        packed = {"image_intermediates": maps, "image_intermediates_prefix": prefix, "image_features": final}
        return {name: value for name, value in packed.items() if value is not None}
    maps = maps if prefix is None else list(zip(maps, prefix, strict=True))
    return maps if final is None else (final, maps)
