"""Pseudo-labels that use the prototypes evenly: mutual-information-regularised assignment (MIRA, arXiv 2211.02284).

Shapes: B samples, K prototypes.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from timm_tokens.distributed import all_reduce_max, all_reduce_sum, batch_logmeanexp, batch_mean, batch_size

_LARGEST_BATCH = 2**16  # of all processes; only the bound on the weights uses it


class Information(NamedTuple):
    """What an assignment says, in nats: scalars on the device.

    Attributes:
        entropy: Entropy of a sample's assignment, averaged over samples; 0 where each has one prototype.
        marginal_entropy: Entropy of the average assignment; log K where all prototypes are used alike.
        mutual_information: Between sample and prototype: the marginal entropy less the entropy.
    """

    entropy: Tensor
    marginal_entropy: Tensor
    mutual_information: Tensor


@torch.no_grad()
def mira_assign(logits: Tensor, tau: float, beta: float, iterations: int = 30) -> Tensor:
    """Assign samples to prototypes: close to the softmax, with much information between sample and prototype.

    The maximiser of  -KL(w, softmax(z / tau)) + beta * (mutual information)  is the fixed point

        w_bj = p_bj m_j^(-beta) / row_b,    row_b = sum_j p_bj m_j^(-beta),    m_j = mean_b p_bj / row_b

    with p = softmax(z / (tau (1 - beta))), iterated from row = 1. The mean is over the global batch.

    Args:
        logits: (B, K) z, any finite values.
        tau: Temperature of the logits.
        beta: Strength of the information, in [0, 1). 0 is the softmax.
        iterations: Fixed-point iterations; each reduces the error by about the factor beta.

    Returns:
        (B, K) of float32 (float64 for float64), rows that sum to 1. No gradient passes. A beta above about 0.87 is
        computed in float64, which needs a device that has it.

    Raises:
        TypeError: If logits is not floating-point, or iterations no int.
        ValueError: If logits is not (B, K), tau is not positive, beta is not in [0, 1) or iterations is negative.

    Source: MIRA (arXiv 2211.02284), the fixed-point iteration of section 3.
    """
    _check(logits, tau, beta, iterations)
    double = logits.dtype == torch.float64
    logits = logits.double() if double or not _fits(torch.float32, beta, logits.shape[1]) else logits.float()
    # Rows and columns of p may be divided by constants, if the weights get the columns' back: exp(anchor). With the
    # largest entry of every row and every column at 1, no logits make a row or a prototype underflow.
    log_p = (logits - logits.amax(1, keepdim=True)).div_(tau * (1 - beta))
    log_p.clamp_(min=torch.finfo(log_p.dtype).min / 4)  # logits may differ by more than their type can say
    anchor = all_reduce_max(log_p.amax(0))
    log_p -= anchor
    with torch.autocast(logits.device.type, enabled=False):
        solve = _solve if _fits(log_p.dtype, beta, logits.shape[1]) else _solve_in_logs
        return solve(log_p, anchor, beta, iterations).to(torch.float64 if double else torch.float32)


def _solve(log_p: Tensor, anchor: Tensor, beta: float, iterations: int) -> Tensor:
    """The fixed point by two matrix-vector products an iteration. Overwrites log_p (B, K)."""
    count = batch_size(log_p)
    # As a batch of products, because BLAS leaves one on one thread. (B, K) -> (8, B / 8, K)
    p = torch.unflatten(log_p.exp_(), 0, (8 if log_p.shape[0] % 8 == 0 else 1, -1))
    constant = ((1 - beta) * (anchor - _log_range(beta, p.shape[2]) / 2)).exp()
    weight = anchor.exp()
    for _ in range(iterations + 1):  # the first gives the mean of the softmax, where the fixed point starts
        row = weight.expand(p.shape[0], 1, -1) @ p.mT  # (8, 1, B / 8)
        mean = all_reduce_sum((row.reciprocal() @ p).sum((0, 1))) / count  # (K,)
        weight = constant * mean.pow(-beta)
    p.mul_(weight).div_(p.sum(2, keepdim=True))
    return p.flatten(0, 1)


def _solve_in_logs(log_p: Tensor, anchor: Tensor, beta: float, iterations: int) -> Tensor:
    """The same fixed point, elementwise: slower, for a beta so near 1 that the weights outgrow even float64."""
    log_weight = anchor
    for _ in range(iterations + 1):
        log_row = (log_p + log_weight).logsumexp(1, keepdim=True)
        log_weight = (1 - beta) * anchor - beta * batch_logmeanexp(log_p - log_row)
    return (log_p + log_weight).softmax(1)


def _log_range(beta: float, num_prototypes: int) -> float:
    """The logarithm of the most by which the weights of prototypes that matter can differ.

    A mean is at least 1 / (B K max weight), as p has an entry of 1 in each column; and weight <= mean^(-beta). So the
    weights lie between 1 and (B K)^(beta / (1 - beta)). Half of it, taken off in the logarithm, centres them.
    """
    return beta / (1 - beta) * math.log(_LARGEST_BATCH * num_prototypes)


def _fits(dtype: torch.dtype, beta: float, num_prototypes: int) -> bool:
    """Whether no sum or reciprocal in `_solve` leaves dtype's range: for 3000 prototypes and float32, beta < 0.87."""
    largest = _log_range(beta, num_prototypes) / 2 + math.log(_LARGEST_BATCH * num_prototypes)
    return largest < -math.log(torch.finfo(dtype).tiny) - 2


@torch.no_grad()
def assignment_information(assignment: Tensor) -> Information:
    """Entropies and mutual information of an assignment (B, K) over the batches of all processes.

    Source: MIRA (arXiv 2211.02284), the mutual information of section 3.
    """
    entropy = batch_mean(torch.special.entr(assignment).sum(1))
    marginal_entropy = torch.special.entr(batch_mean(assignment)).sum()
    return Information(entropy, marginal_entropy, marginal_entropy - entropy)


def _check(logits: Tensor, tau: float, beta: float, iterations: int) -> None:
    if logits.ndim != 2:
        raise ValueError(f"logits must have shape (B, K), got {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating-point, got {logits.dtype}")
    check_regularisation(tau, beta, iterations)


def check_regularisation(tau: float, beta: float, iterations: int) -> None:
    """Refuse arguments that `mira_assign` has no answer for."""
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1), got {beta}; 0 is the plain softmax, and at 1 there is no optimum")
    if not 1e-30 < tau * (1 - beta) < math.inf:  # below, logits that are equal would give 0 / 0
        raise ValueError(f"tau must be a positive number, and tau (1 - beta) above 1e-30, got tau={tau}, beta={beta}")
    if isinstance(iterations, bool) or not isinstance(iterations, int):
        raise TypeError(f"iterations must be an int, got {iterations!r}")
    if iterations < 0:
        raise ValueError(f"iterations must not be negative, got {iterations}")
