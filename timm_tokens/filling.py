"""Load weights into a model that they have to fit, so that nothing of it stays random without a word."""

from collections.abc import Mapping

from timm.models import adapt_input_conv
from torch import Tensor, nn

from timm_tokens.loading import classifiers


def fill(model: nn.Module, weights: Mapping[str, Tensor], *, classifier: bool = False) -> None:
    """Load what `find_weights` gave. A first convolution for other channels is adapted as timm does it.

    Args:
        model: A timm model, or a TokenViT, whose parts stay as they are where the weights are a plain ViT's.
        weights: By name.
        classifier: Whether the classifier has to fit, too; else one of other classes is left out.

    Raises:
        ValueError: Weights are missing, of another shape, or too many; names the first.
    """
    base = getattr(model, "base", model)
    target = model if base is model or any(name.startswith("base.") for name in weights) else base
    heads = tuple(f"{name}." for name in (*classifiers(model), *classifiers(base)))
    given, shapes = dict(weights), {name: value.shape for name, value in target.state_dict().items()}
    if not classifier:
        given = {n: x for n, x in given.items() if not n.startswith(heads) or x.shape == shapes.get(n)}
    given |= _adapted(target, given)
    try:
        missing, unexpected = model.load_state_dict(given, strict=False)
    except RuntimeError as error:
        detail = str(error).splitlines()[1:2] or [str(error)]
        counts = [len(x) for n, x in given.items() if n.startswith(heads) and x.shape != shapes.get(n)]
        hint = f" It classifies {counts[0]} classes: num_classes={counts[0]} makes a model that fits." if counts else ""
        raise ValueError(f"it doesn't fit the model: {detail[0].strip()}{hint}") from error
    if not classifier:
        missing = [name for name in missing if not name.removeprefix("base.").startswith(heads)]
    for names, what in ((missing, "it lacks {}"), (unexpected, "it has {} that the model does not know")):
        if names:
            count = what.format(f"{len(names)} weights")
            raise ValueError(f"it doesn't fit the model: {count}, such as {names[0]}")


def _adapted(target: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first convolutions, for as many channels as the model's images have."""
    names = (getattr(target, "pretrained_cfg", None) or {}).get("first_conv") or ()
    own, adapted = target.state_dict(), {}
    for name in (f"{conv}.weight" for conv in ((names,) if isinstance(names, str) else names)):
        given, wanted = weights.get(name), own.get(name)
        if given is not None and wanted is not None and given.ndim == 4 and given.shape[1] != wanted.shape[1]:
            try:
                adapted[name] = adapt_input_conv(wanted.shape[1], given)
            except NotImplementedError as error:
                channels = f"{given.shape[1]} channels, but the model's images have {wanted.shape[1]}"
                raise ValueError(f"{name} is for {channels}, and can't be adapted") from error
    return adapted
