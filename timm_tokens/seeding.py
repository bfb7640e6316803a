"""Seeds for everything random in a run, each from what it is for: (seed, step, rank), (seed, epoch, index).

So there is no random state to save: a run that was killed draws the same numbers again when it is resumed.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch


def derived_seed(*numbers: int) -> int:
    """A 63-bit seed from any integers, the same on every machine; those of nearby integers are unrelated."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*numbers: int) -> torch.Generator:
    """A generator on the CPU, seeded from these integers."""
    return torch.Generator().manual_seed(derived_seed(*numbers))


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed the global generators of torch (on the CPU), Python and NumPy for a while; put them back afterwards.

    timm's augmentation draws from all three.
    """
    seed = derived_seed(*numbers)
    numpy: Any = np.random  # whose stubs lack the two functions
    states = torch.get_rng_state(), random.getstate(), numpy.get_bit_generator()
    # Reading NumPy's state takes longer than to augment a small image; so another generator stands in for its own.
    spare = _SPARE.pop() if _SPARE else np.random.MT19937()
    numpy.set_bit_generator(spare)
    torch.default_generator.manual_seed(seed)  # the CPU's alone: torch.manual_seed would reseed the GPUs too
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        numpy.set_bit_generator(states[2])
        _SPARE.append(spare)


_SPARE: list[np.random.MT19937] = []  # slow to make


def drawn_from(generator: torch.Generator | None) -> AbstractContextManager[None]:
    """`seeded` by a number drawn from the generator, or from torch's own where none is given."""
    return seeded(int(torch.randint(2**62, (), generator=generator)))
