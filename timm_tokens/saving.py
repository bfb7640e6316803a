"""What timm saves beside the weights: plain data from which the same TokenViT is built again."""

from typing import Any

from timm_tokens import blocks, identity
from timm_tokens.timm_types import Wrapped


def model_args(model: Wrapped) -> dict[str, Any]:
    """Arguments of timm.create_model for the TokenViT as it is now; a base of unknown name is a ValueError."""
    args = {name: getattr(model.base, name) for name in ("in_chans", "global_pool")}
    if getattr(blocks.stem(model.base), "img_size", None):
        args["img_size"] = list(model.image_size)
    args |= getattr(model.base, "_model_args", {})
    if model.pretrained_cfg["architecture"] == "token_vit":
        args["base"] = identity.base_name(model.base)
        if args["base"] is None:
            raise ValueError(
                f"the base, a {type(model.base).__name__}, does not say by which name timm.create_model makes it "
                "(base.pretrained_cfg['architecture']); save its state dict instead, or create it by name"
            )
    args["num_classes"] = model.num_classes
    if model.num_classes != model.base.num_classes:
        args["base_num_classes"] = model.base.num_classes
    args |= {name: part and part.config for name, part in model.parts.items()}
    if model.head is not None:
        del args["head"]["num_classes"]  # said above, and there to be overridden
    return args | {"mask_token": model.mask_token is not None}
