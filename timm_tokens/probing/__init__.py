"""How good are frozen features? Nearest neighbours, a linear classifier, and how prototypes agree with classes."""

from timm_tokens.probing.knn import knn_accuracy
from timm_tokens.probing.linear import LEARNING_RATES, LinearResult, linear_probe
from timm_tokens.probing.nmi import assignment_nmi, ensemble_assignments, ensemble_nmi

__all__ = [
    "LEARNING_RATES",
    "LinearResult",
    "assignment_nmi",
    "ensemble_assignments",
    "ensemble_nmi",
    "knn_accuracy",
    "linear_probe",
]
