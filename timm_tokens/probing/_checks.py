"""What all probes ask of features and labels."""

from torch import Tensor

from timm_tokens.ops.finite import check_finite


def check_pair(train_features: Tensor, train_labels: Tensor, features: Tensor, labels: Tensor) -> None:
    """Refuse what is not two sets of finite features (N, D) with labels (N,), N > 0, of one width."""
    for name, x, y in (("train_features", train_features, train_labels), ("features", features, labels)):
        if x.ndim != 2 or y.shape != x.shape[:1] or not len(y):
            raise ValueError(
                f"{name} must be (N, D) with one label a row, N at least 1, "
                f"got {tuple(x.shape)} and labels {tuple(y.shape)}"
            )
        if y.is_floating_point() or y.min() < 0:
            raise ValueError(f"labels of the {name} must be classes from 0 up, got {y.dtype}, min {y.min()}")
    if train_features.shape[1] != features.shape[1]:
        raise ValueError(
            f"train_features have {train_features.shape[1]} channels, features {features.shape[1]}: "
            "take both from one model"
        )
    check_finite(train_features=train_features, features=features)
