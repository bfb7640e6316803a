"""How many rows to work on at once, so that what is computed on the way stays in the cache."""

import torch

# Elements. On the CPU 4 MB of float32, which the allocator and the cache keep: fresh memory is what large temporaries
# cost there. On a GPU it is launches that cost, and the bound is one of memory: 64 MB.
_CPU, _GPU = 2**20, 2**24


def makes_graph() -> bool:
    """Whether a graph is compiled or traced, which may be run with other shapes than these."""
    return torch.compiler.is_compiling() or bool(torch.jit.is_tracing())  # type: ignore[no-untyped-call]


def rows_at_once(columns: int, device: torch.device) -> int:
    """Rows of so many columns for one part of the work, at least 1; all of them while a graph is compiled or traced."""
    if makes_graph():
        return 2**62
    return max(1, (_CPU if device.type == "cpu" else _GPU) // columns)
