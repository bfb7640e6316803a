"""Stochastic depth over the global batch: each image is dropped as it would be if one process had them all."""

import torch
from timm.layers import DropPath
from torch import Tensor, nn


class GlobalDropPath(DropPath):
    """timm's DropPath, which draws for the images of all processes and takes its own."""

    generator: torch.Generator | None = None  # the stream that one process would draw from, on the images' device
    rows: Tensor | None = None  # (B,) of its images in the global batch; None: it draws for its own, as timm's does
    total: int = 0  # how many images the global batch has
    # Whether a compiled model calls it from outside of its graphs, which take no generators; otherwise a compiled one
    # draws as timm's does.
    outside: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """V crops of B images, (V B, ...), crop by crop."""
        if not self.training or self.drop_prob == 0:
            return x
        if torch.compiler.is_compiling() and not self.outside:
            return super().forward(x)
        return self._drop(x)

    @torch.compiler.disable
    def _drop(self, x: Tensor) -> Tensor:
        if self.rows is None or len(x) % len(self.rows):
            return super().forward(x)
        crops = len(x) // len(self.rows)
        drawn = x.new_empty(crops * self.total, *[1] * (x.ndim - 1))
        kept = drawn.bernoulli_(1 - self.drop_prob, generator=self.generator)
        if self.scale_by_keep and self.drop_prob < 1:
            kept.div_(1 - self.drop_prob)
        return x * kept.unflatten(0, (crops, self.total))[:, self.rows].flatten(0, 1)

    def __getstate__(self) -> dict:
        own = {"generator": None, "rows": None, "outside": False}  # a copy belongs to no batch, nor do generators copy
        return self.__dict__ | own


def make_drop_paths_global(module: nn.Module) -> list[GlobalDropPath]:
    """Replace timm's DropPaths in a module, in place, by global ones; those are returned."""
    made = []
    for name, old in list(module.named_modules(remove_duplicate=False)):
        if name and type(old) is DropPath:
            made.append(GlobalDropPath(old.drop_prob, old.scale_by_keep).train(old.training))
            module.set_submodule(name, made[-1])
    return made
