"""Pictures of label maps."""

import torch
from matplotlib.colors import to_rgb

from timm_tokens.drawing import LabelPanel, draw_label_maps
from timm_tokens.drawing.label_maps import frequent_classes, tint
from timm_tokens.drawing.style import COLOURS


def test_cells_have_their_classes_colours_by_probability():
    image = torch.full((3, 4, 4), 0.5)
    probabilities = torch.tensor([[[1.0, 0.0]], [[0.0, 0.6]], [[0.0, 0.4]]])  # two cells
    painted = tint(image, probabilities, [1, 0])
    grey = torch.full((3,), 0.5)
    torch.testing.assert_close(painted[:, 0, 0], grey.lerp(torch.tensor(to_rgb(COLOURS[1])), 0.8))
    torch.testing.assert_close(painted[:, 3, 3], grey.lerp(torch.tensor(to_rgb(COLOURS[0])), 0.48))


def test_the_most_frequent_classes_get_colours():
    best = torch.tensor([3, 3, 3, 1, 1, 0, 2, 4, 5, 6, 7, 8])
    probabilities = torch.nn.functional.one_hot(best, 9).T.float().view(9, 1, 12)
    assert frequent_classes([probabilities]) == [3, 1, 0, 2, 4, 5, 6]


def test_the_legend_names_the_classes():
    probabilities = torch.tensor([[[0.9]], [[0.1]]])
    panels = [LabelPanel("image", torch.rand(3, 8, 8)), LabelPanel("map", torch.rand(3, 8, 8), probabilities)]
    (legend,) = draw_label_maps(panels, ["cap", "shoe"], "a note").legends
    assert [text.get_text() for text in legend.texts] == ["cap"]
    assert legend.get_title().get_text().startswith("a note")
