"""Refuse numbers that are infinite or NaN, and say where they are."""

from torch import Tensor, nn


def check_finite(**tensors: Tensor) -> None:
    """Refuse tensors (..., D) with numbers that are not finite. Waits for the device."""
    for name, x in tensors.items():
        bad = ~x.isfinite()
        if bad.any():
            first = bad.nonzero()[0].tolist()
            rows = bad.reshape(-1, bad.shape[-1]).any(dim=1)
            raise ValueError(
                f"{name} must be finite, got {x[tuple(first)].item()} at {first}; "
                f"{int(rows.sum())} of {len(rows)} rows have such numbers"
            )


def check_weights(model: nn.Module) -> None:
    """Refuse a model with weights that are not finite, or statistics that are NaN. Waits for the device."""
    wrong = {name: ~x.isfinite() for name, x in model.named_parameters() if not x.is_meta}
    wrong |= {name: x.isnan() for name, x in model.named_buffers() if not x.is_meta}  # a mask may hold -inf
    for name, bad in wrong.items():
        if bad.any():
            raise ValueError(
                f"{name} of the model has {int(bad.sum())} of {bad.numel()} numbers that are not finite: "
                "its checkpoint is corrupt, or its training diverged"
            )
