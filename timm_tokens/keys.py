"""The keys of a block's attention, which tokens are compared by: training-free, and at the start of training."""

from timm.layers import DiffAttention
from torch import Tensor, nn

from timm_tokens.blocks import name


def mean_keys(block: nn.Module, y: Tensor) -> Tensor:
    """The attention's keys of y = read(block, x), averaged over heads: (B, N, C) -> (B, N, head_dim)."""
    if isinstance(block.attn.k_norm, nn.Identity):  # the average of linear maps is one small linear map
        return nn.functional.linear(y, *mean_projection(block, block.attn.head_dim))
    weight, bias, heads = _key_projection(block.attn)
    return block.attn.k_norm(nn.functional.linear(y, weight, bias).unflatten(-1, (heads, -1))).mean(dim=2)


def mean_projection(block: nn.Module, width: int) -> tuple[Tensor | None, Tensor | None]:
    """Weight (E, C) and bias (E,) that make the keys, averaged over as many groups of heads as give E = width channels.

    The bias is None if the keys have none; the weight, too, if the heads can't be grouped to that width.
    """
    weight, bias, heads = _key_projection(block.attn)
    groups, rest = divmod(width, block.attn.head_dim)
    if rest or heads % groups:
        return None, None

    def mean(w: Tensor) -> Tensor:
        return w.unflatten(0, (groups, heads // groups, -1)).mean(dim=1).flatten(0, 1)

    return mean(weight), None if bias is None else mean(bias)


def _key_projection(attn: nn.Module) -> tuple[Tensor, Tensor | None, int]:
    """The weight and bias that make the keys, and how many heads they have.

    Raises:
        TypeError: If FSDP2 wraps the attention, which keeps its weights sharded outside its forward.
    """
    if hasattr(attn, "unshard"):
        raise TypeError(
            f"{name(attn)} is wrapped, but its keys are computed from its weights without calling it; "
            "wrap the MLPs and the whole model only, or merge by learned embeddings"
        )
    heads = 2 * attn.num_heads if isinstance(attn, DiffAttention) else getattr(attn, "num_kv_heads", attn.num_heads)
    if attn.qkv is None:
        return attn.k_proj.weight, attn.k_proj.bias, heads
    bias = attn.qkv.bias  # EvaAttention keeps its biases apart, and has none on the keys
    return attn.qkv.weight.chunk(3)[1], None if bias is None else bias.chunk(3)[1], heads
