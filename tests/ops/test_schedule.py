"""Schedules: every form that r can take, and the words for those it can't."""

import pytest

from timm_tokens.ops import schedule


@pytest.mark.parametrize(
    ("r", "depth", "expected"),
    [
        (8, 3, (8, 8, 8)),
        (0, 2, (0, 0)),
        ([4, 2], 4, (4, 2, 0, 0)),
        ((8, 1), 3, (8, 1, 0)),
        ((), 2, (0, 0)),
        ((8, 0.0), 3, (8, 8, 8)),
        ((8, -1.0), 3, (16, 8, 0)),
        ((8, -1), 3, (16, 8, 0)),
        ((8, 1.0), 3, (0, 8, 16)),
        ((13, -0.5), 1, (19,)),
    ],
)
def test_forms(r, depth, expected):
    assert schedule(r, depth) == expected


@pytest.mark.parametrize("inflection", [-1.0, -0.3, 0.0, 0.7, 1.0])
def test_inflection_keeps_the_total(inflection):
    assert sum(schedule((13, inflection), 12)) == pytest.approx(13 * 12, abs=12)


@pytest.mark.parametrize(
    ("r", "error", "words"),
    [
        (-1, ValueError, "must not be negative, got -1"),
        ([3, -2], ValueError, "must not be negative, got -2"),
        (2.5, TypeError, r"must be an int.*got 2\.5"),
        (True, TypeError, "got True"),
        ("8", TypeError, "got '8'"),
        ([1, 2, 3, 4], ValueError, "4 numbers for 3 blocks"),
        ((8, 1.5), ValueError, r"\[-1, 1\], got 1\.5"),
        (None, TypeError, "got None"),
    ],
)
def test_refuses(r, error, words):
    with pytest.raises(error, match=words):
        schedule(r, 3)
