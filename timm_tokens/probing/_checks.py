"""What all probes ask of features and labels."""

from torch import Tensor


def check_features(features: Tensor, labels: Tensor, name: str = "features") -> None:
    """Refuse what is not features (N, D) with labels (N,), N > 0."""
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise ValueError(
            f"{name} must be (N, D) with one label a row, N at least 1, "
            f"got {tuple(features.shape)} and labels {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.min() < 0:
        raise ValueError(f"labels of the {name} must be classes from 0 up, got {labels.dtype}, min {labels.min()}")


def check_same_width(train: Tensor, features: Tensor) -> None:
    """Refuse features of two models."""
    if train.shape[1] != features.shape[1]:
        raise ValueError(
            f"train_features have {train.shape[1]} channels, features {features.shape[1]}: take both from one model"
        )
