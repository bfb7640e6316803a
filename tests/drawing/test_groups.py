"""Pictures of groups of patches."""

import pytest
import torch

from timm_tokens.drawing import draw_groups, save
from timm_tokens.drawing.groups import fill, outlines, pieces, tint

GROUPS = torch.tensor([[0, 0, 1], [2, 0, 1], [1, 2, 2]])  # 1 and 2 are split


def test_a_group_is_filled_with_its_mean_colour():
    image = torch.arange(36.0).view(1, 6, 6) / 36
    filled = fill(image, GROUPS)
    owner = GROUPS.repeat_interleave(2, 0).repeat_interleave(2, 1)
    for token in range(3):
        torch.testing.assert_close(
            filled[0][owner == token], image[0][owner == token].mean().expand((owner == token).sum())
        )


def test_groups_of_a_grey_image_have_a_colour_each_and_single_patches_none():
    image, group = torch.full((1, 8, 8), 0.5), torch.arange(16).view(4, 4).clamp_max(7)  # 7 has nine patches
    group[0, :4] = torch.tensor([0, 1, 0, 1])
    tinted = tint(image, group)
    assert tinted.shape == (3, 8, 8) and tinted[:, 2, 0].tolist() == pytest.approx(
        [0.7] * 3
    )  # patch 4 alone: grey, and light enough to see
    found = {
        token: {
            tuple(c) for c in tinted[:, (group == token).repeat_interleave(2, 0).repeat_interleave(2, 1)].T.tolist()
        }
        for token in (0, 1, 7)
    }
    assert [len(each) for each in found.values()] == [1, 1, 1] and len(set.union(*found.values())) == 3
    picture = draw_groups(torch.rand(1, 1, 8, 8), {"r": group[None]})
    assert picture.axes[1].get_xlabel() == "6 tokens" and not picture.axes[1].texts
    many = tint(torch.ones(1, 2, 80), torch.arange(20).repeat_interleave(2)[None].expand(2, -1))
    assert len(many.flatten(1).unique(dim=1).T) == 20  # more than there are colours: paler ones


def test_outlines_stand_between_different_groups_alone():
    edges = {tuple(sorted((round(3 * x), round(3 * y)) for x, y in edge)) for edge in outlines(GROUPS)}
    beside = {((2, 0), (2, 1)), ((1, 1), (1, 2)), ((2, 1), (2, 2)), ((1, 2), (1, 3))}
    below = {((0, 1), (1, 1)), ((0, 2), (1, 2)), ((1, 2), (2, 2)), ((2, 2), (3, 2))}
    assert edges == beside | below


def test_pieces_of_a_spiral_and_of_split_groups():
    assert pieces(GROUPS).tolist() == [[0, 0, 2], [3, 0, 2], [6, 7, 7]]
    spiral = torch.ones(7, 7, dtype=torch.long)
    spiral[1, :6], spiral[1:6, 5], spiral[5, 1:6], spiral[3:6, 1], spiral[3, 1:4] = 0, 0, 0, 0, 0
    assert torch.equal(pieces(spiral), torch.where(spiral == 0, 7, 0))  # the arm, and all that is not


def test_the_picture_counts_tokens_and_split_ones(tmp_path):
    picture = draw_groups(torch.rand(2, 3, 12, 12), {"r = 3": torch.stack([GROUPS, torch.zeros_like(GROUPS)])})
    assert [axes.get_xlabel() for axes in picture.axes] == ["", "3 tokens, 2 split", "", "1 tokens"]
    assert [text.get_text() for text in picture.axes[1].texts] == ["1", "1", "2", "2"]
    save(picture, tmp_path / "picture.webp")
    assert [file.name for file in tmp_path.iterdir()] == ["picture.webp"]
