"""Randomness by key: the same item gets the same draws whichever process draws it, and whenever."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_WORD = 2**64 - 1


def keyed_generator(*key: int) -> torch.Generator:
    """A generator of the CPU seeded by whole numbers, such as (seed, epoch, index): near keys give unrelated draws."""
    state = 0
    for word in key:
        state = _mix((state ^ (int(word) & _WORD)) + 0x9E3779B97F4A7C15 & _WORD)
    return torch.Generator().manual_seed(state >> 32)  # torch's CPU generator reads no more than 32 bits


def _mix(x: int) -> int:
    """A bijection of 64-bit words in which each bit depends on each (the finaliser of splitmix64)."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _WORD
    return x ^ x >> 31


@contextmanager
def seeded(generator: torch.Generator | None) -> Iterator[None]:
    """Seed the global generators, from which timm's and torchvision's pieces draw; put them back afterwards."""
    seed = int(torch.randint(2**62, (), generator=generator))
    states = torch.get_rng_state(), random.getstate()
    torch.default_generator.manual_seed(seed)  # the CPU's alone: torch.manual_seed would reseed the GPUs too
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
