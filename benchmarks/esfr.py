"""ESFR, many episodes at once, against plain PyTorch modules, one episode after the other.

    python benchmarks/esfr.py --dims 64 192 640 --device cpu

Both sides do the same work: the same number of networks and updates, dropout, a measurement of the dimension every
two updates. Rounds are paired (one side, then the other), and what is printed are the medians over the rounds.
"""

import argparse
import platform
import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_tokens.fewshot import ESFR


def plain_dimension(x: Tensor, k: int = 21) -> Tensor:
    """Mean local intrinsic dimensionality of (M, D)."""
    near = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").topk(k, largest=False).values[:, 1:]
    return (-(k - 1) / (near / near[:, -1:]).log().sum(-1)).mean()


def plain_net(dim: int) -> nn.Sequential:
    net = nn.Sequential(*[module for _ in range(4) for module in (nn.Linear(dim, dim), nn.ReLU())])
    for layer in net[::2]:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return net


def plain_adapt(features: Tensor, num_nets: int, updates: int, stop_early: bool = False) -> Tensor:
    """The obvious implementation, for one prepared episode (M, D)."""
    outputs = []
    for _ in range(num_nets):
        net = plain_net(features.shape[1]).to(features.device)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, eps=1e-7)
        with torch.no_grad():
            last = plain_dimension(net[:4](features))
        for update in range(1, updates + 1):
            output = net(F.dropout(features, 0.5))
            loss = -F.cosine_similarity(features, output - output.mean(0), dim=-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if update % 2 == 0 and update < updates:
                with torch.no_grad():
                    now = plain_dimension(net[:4](features))
                if now > last and stop_early:
                    break
                last = now
        with torch.no_grad():
            outputs.append(F.normalize(net(features), dim=-1))
    return torch.stack(outputs).mean(0)
