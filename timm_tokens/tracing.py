"""What torch's older tracers can't do with a TokenViT is refused in words."""

from torch import nn
from torch.fx import Proxy


def refuse_symbols(images: object) -> None:
    """Refuse images that torch.fx stands in for, whose number of tokens can't be computed.

    Raises:
        TypeError: If they are no tensor but torch.fx's.
    """
    if isinstance(images, Proxy):
        raise TypeError(
            "torch.fx can't trace a TokenViT symbolically, as its shapes are computed in Python; take features by "
            "forward_intermediates or forward hooks (feature_cls='getter' or 'hook', AttentionExtract with "
            "method='hook'), and graphs by torch.export"
        )


def refuse_scripting(model: nn.Module) -> None:
    """What torch.jit.script calls first, also where the model is inside of another module."""
    raise TypeError("torch.jit.script can't compile a TokenViT; use torch.compile, torch.export or torch.jit.trace")
