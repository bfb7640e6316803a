"""Every figure of the commands and examples, as matplotlib figures. Needs `pip install 'timm-tokens[viz]'`."""

from timm_tokens.drawing.attention import draw_attention
from timm_tokens.drawing.charts import (
    draw_accuracy,
    draw_bars,
    draw_curves,
    draw_probe,
    draw_runs,
    draw_scores,
    draw_speed,
)
from timm_tokens.drawing.groups import draw_groups
from timm_tokens.drawing.label_maps import LabelPanel, draw_label_maps
from timm_tokens.drawing.style import save

__all__ = [
    "LabelPanel",
    "draw_accuracy",
    "draw_attention",
    "draw_bars",
    "draw_curves",
    "draw_groups",
    "draw_label_maps",
    "draw_probe",
    "draw_runs",
    "draw_scores",
    "draw_speed",
    "save",
]
