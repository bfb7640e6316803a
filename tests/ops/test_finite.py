"""Numbers that are not finite are refused, with their place."""

import pytest
import torch
from torch import nn

from timm_tokens.ops.finite import check_finite, check_weights


def test_says_where():
    x = torch.zeros(2, 3, 4)
    check_finite(features=x, counts=x.long())
    x[1, 2, 3], x[1, 0, 0] = float("inf"), float("nan")
    with pytest.raises(ValueError, match=r"features must be finite, got nan at \[1, 0, 0\]; 2 of 6 rows have"):
        check_finite(features=x)


def test_weights():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    check_weights(model)
    with torch.no_grad():
        model[1].bias[1] = float("inf")
    with pytest.raises(ValueError, match=r"^1\.bias of the model has 1 of 3 numbers that are not finite"):
        check_weights(model)
    nn.init.zeros_(model[1].bias)
    model[1].running_var[:2] = float("nan")
    with pytest.raises(ValueError, match=r"^1\.running_var of the model has 2 of 3 numbers"):
        check_weights(model)
