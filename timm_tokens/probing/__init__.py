"""Evaluation of frozen features: nearest neighbours, a linear classifier, and NMI of prototypes and classes."""

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
