"""How well assignments to prototypes agree with classes, by one token and by several together."""

from torch import Tensor

from timm_tokens.ops.finite import check_finite


def assignment_nmi(assignments: Tensor, labels: Tensor) -> float:
    """Normalised mutual information 2 I(A; Y) / (H(A) + H(Y)) of two labellings of the same N images.

    Equal to scikit-learn's `normalized_mutual_info_score`, in memory that grows with N alone, however many prototypes.

    Args:
        assignments: (N,) integers, such as the argmax over prototypes.
        labels: (N,) integers.

    Returns:
        0 for independent labellings, 1 for the same up to names.

    Raises:
        ValueError: Shapes or types do not fit.
    """
    if assignments.ndim != 1 or assignments.shape != labels.shape or not len(labels):
        raise ValueError(
            f"assignments and labels must both be (N,), N at least 1, "
            f"got {tuple(assignments.shape)} and {tuple(labels.shape)}"
        )
    if assignments.is_floating_point() or labels.is_floating_point():
        raise ValueError(
            f"assignments and labels must be integers, got {assignments.dtype} and {labels.dtype}: take the argmax"
        )
    a, y = (x.cpu().unique(return_inverse=True)[1] for x in (assignments, labels))
    h_a, h_y, h_both = (_entropy(x) for x in (a, y, a * (int(y.max()) + 1) + y))
    if h_a + h_y == 0:  # both are constant, so they agree
        return 1.0
    return max(0.0, 2 * (h_a + h_y - h_both) / (h_a + h_y))


def ensemble_assignments(probabilities: Tensor) -> Tensor:
    """The prototype with the largest mean probability over the first token, the first two, and so on.

    Args:
        probabilities: (T, B, K), one distribution over prototypes a token and image, the global token first.

    Returns:
        (T, B) int64. Batches can be joined along B for `assignment_nmi`, row by row.

    Raises:
        ValueError: The shape does not fit, or probabilities are not finite.
    """
    if probabilities.ndim != 3:
        raise ValueError(f"probabilities must be (T, B, K), got {tuple(probabilities.shape)}")
    check_finite(probabilities=probabilities)
    return probabilities.cumsum(0).argmax(-1)  # a sum is largest where the mean is


def ensemble_nmi(probabilities: Tensor, labels: Tensor) -> list[float]:
    """NMI with the classes as tokens are added one by one: T numbers.

    Args:
        probabilities: (T, B, K), the global token first.
        labels: (B,).

    Source: the experiment of Fig. 1 of MTE (arXiv 2411.15787).
    """
    return [assignment_nmi(row, labels) for row in ensemble_assignments(probabilities)]


def _entropy(x: Tensor) -> float:
    """Entropy, in nats, of the frequencies of the integers in x (N,)."""
    share = x.unique(return_counts=True)[1].double() / len(x)
    return -float((share * share.log()).sum())
