from timm_tokens.fewshot.esfr import ESFR, Adapted, prepare
