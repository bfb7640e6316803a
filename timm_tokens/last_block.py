"""The last block of a model that classifies its class token, where class logits are all that is asked for.

Nothing behind its attention reads any token but the prefix: merging, the MLP and the final norm may leave the patches
out. That is exact, and is done only where nothing could tell: with layers that are known to work token by token,
without hooks of their own, adapters or dropout. (Hooks on all modules, as FLOP counters have, see what is computed.)
"""

from timm import layers
from timm.models import Eva, VisionTransformer, VisionTransformerDistilled
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import LayerScale
from torch import nn

from timm_tokens import blocks, hooks
from timm_tokens.parts import TokenMerger
from timm_tokens.timm_types import ViT

# dictionaries and tuples: torch 2.6 compiles no look-up in a set of them
_HEADS = {m.forward_head: m for m in (VisionTransformer, VisionTransformerDistilled, Eva, NaFlexVit)}
_TOKEN_BY_TOKEN = (
    *(nn.Linear, nn.Identity, nn.Dropout, layers.Mlp, layers.GluMlp, layers.SwiGLU, layers.DropPath, LayerScale),
    *(nn.LayerNorm, layers.LayerNorm, layers.LayerNormFp32, layers.RmsNorm, layers.SimpleNorm),
    *(nn.GELU, nn.SiLU, nn.ReLU, layers.GELU, layers.GELUTanh, layers.QuickGELU, layers.Swish),
)


def needs_prefix_alone(base: ViT) -> bool:
    """Whether class logits need the MLP of the last block and the final norm for the prefix tokens alone."""
    if base.global_pool != "token" or getattr(base, "attn_pool", None) is not None or not base.num_prefix_tokens:
        return False
    block = base.blocks[-1]
    known = type(base).forward_head in _HEADS and "forward_head" not in base.__dict__
    if not known or not blocks.has_halves(block) or hooks.has_own(block):
        return False
    behind = [block._modules.get(name) for name in ("norm2", "mlp", "ls2", "drop_path2")]
    return all(_works_token_by_token(layer) for part in (*behind, base.norm) if part for layer in part.modules())


def _works_token_by_token(layer: nn.Module) -> bool:
    if type(layer) not in _TOKEN_BY_TOKEN or hooks.has_own(layer) or blocks.is_replaced(layer):
        return False
    if type(layer) is nn.Linear:
        return hooks.is_ordinary(layer.weight)  # quantised weights may scale by all tokens
    return not (type(layer) is nn.Dropout and layer.training and layer.p)


def is_watched(merger: TokenMerger, index: int) -> bool:
    """Whether anything could tell that block `index` does not merge: a hook, or gradients that are 0 or None."""
    embed = () if merger.embed is None else (merger.embed[index],)
    return merger.relaxed or any(hooks.has_own(module) for module in (merger, *embed))
