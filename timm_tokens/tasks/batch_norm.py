"""Batch norm over the global batch: with the statistics of all processes together."""

import torch
from torch import Tensor, nn

from timm_tokens.distributed import all_reduce_sum_with_gradient, world_size
from timm_tokens.ops.precision import at_least_float32


class GlobalBatchNorm(nn.BatchNorm1d):
    """Batch norm of (B, C) or (B, C, ...) with the statistics of all processes' batches together, on any device.

    torch's SyncBatchNorm is for GPUs alone. On one process this is torch's batch norm, and its state is the same.

    Raises:
        ValueError: In training, there is one value per channel only, which would be normalised to 0.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1] and world_size() == 1:
            raise ValueError(
                f"batch norm has to train on more than one value per channel, got a batch of shape {tuple(x.shape)}: "
                "make the batches larger, or build the model or the heads without batch norm"
            )
        if not self.training or world_size() == 1:
            return super().forward(x)
        return self._normalise(at_least_float32(x).transpose(1, -1)).transpose(1, -1).to(x.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions will do."""

    def _normalise(self, x: Tensor) -> Tensor:
        """(B, ..., C), by the statistics of all processes, which the running ones follow."""
        rows = x.flatten(0, -2)
        sums = all_reduce_sum_with_gradient(torch.cat([rows.sum(0), rows.new_full((1,), len(rows))]))
        count = sums[-1]
        mean = sums[:-1] / count
        centred = x - mean
        variance = all_reduce_sum_with_gradient(centred.flatten(0, -2).square().sum(0)) / count
        if self.track_running_stats:
            self._follow(mean, variance * count / (count - 1))
        y = centred * (variance + self.eps).rsqrt()
        return y * self.weight + self.bias if self.affine else y

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        assert self.num_batches_tracked is not None and self.running_mean is not None and self.running_var is not None
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


class GlobalBatchNormAct(GlobalBatchNorm):
    """The same for timm's batch norms that drop and activate."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def make_batch_norms_global(module: nn.Module) -> nn.Module:
    """Replace the batch norms in a module, in place, by global ones with the same parameters and buffers.

    Returns the module, or what takes its place if it is a batch norm itself.
    """
    for name, child in module.named_children():
        setattr(module, name, make_batch_norms_global(child))
    if not isinstance(module, nn.modules.batchnorm._BatchNorm) or isinstance(module, GlobalBatchNorm):
        return module
    kind = GlobalBatchNormAct if hasattr(module, "act") else GlobalBatchNorm
    new = kind(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
    new._parameters, new._buffers, new.training = module._parameters, module._buffers, module.training
    if kind is GlobalBatchNormAct:
        new.drop, new.act = module.drop, module.act
    return new
