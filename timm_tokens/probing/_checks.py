"""What all probes ask of features and labels."""

from torch import Tensor

from timm_tokens.ops.finite import check_finite


def check_pair(train_features: Tensor, train_labels: Tensor, features: Tensor, labels: Tensor) -> None:
    """Refuse what is not two sets of finite features (N, D) with labels (N,), N > 0, of one width.

    Raises:
        ValueError: Says what is wrong, and which row is not finite.
    """
    _check("train_features", train_features, train_labels)
    _check("features", features, labels)
    if train_features.shape[1] != features.shape[1]:
        raise ValueError(
            f"train_features have {train_features.shape[1]} channels, features {features.shape[1]}: "
            "take both from one model"
        )
    check_finite(train_features=train_features, features=features)


def _check(name: str, features: Tensor, labels: Tensor) -> None:
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise ValueError(
            f"{name} must be (N, D) with one label a row, N at least 1, "
            f"got {tuple(features.shape)} and labels {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.min() < 0:
        raise ValueError(f"labels of the {name} must be classes from 0 up, got {labels.dtype}, min {labels.min()}")
