import math

import pytest
import torch

from timm_tokens.ops import draw_mix_box, mix_ratio, mix_tokens


def test_boxes_lie_on_the_grid_and_have_the_area_of_a_uniform_lambda():
    generator = torch.Generator().manual_seed(0)
    boxes = torch.stack([draw_mix_box((14, 10), generator) for _ in range(4000)])
    top, left, bottom, right = boxes.unbind(1)
    assert boxes.dtype == torch.int64
    assert ((top >= 0) & (top <= bottom) & (bottom <= 14) & (left >= 0) & (left <= right) & (right <= 10)).all()
    whole = (top > 0) & (bottom < 14) & (left > 0) & (right < 10)  # not cut at the border
    shares = ((bottom - top) * (right - left) / 140)[whole]
    assert shares.max() > 0.3 and shares.min() < 0.02
    # Uniform lambda and centre: E[area] = integral of (r - r^2 / 4)^2 2r dr = 0.32, less what rounding down takes.
    area = (((bottom - top) * (right - left)) / 140.0).mean()
    assert 0.25 < area < 0.32


def published_box(height, width, lam, centre):
    """The paper's code (tlt/models/lvvit.py, rand_bbox), for draws in [0, 1)."""
    cut_h, cut_w = int(height * math.sqrt(1 - lam)), int(width * math.sqrt(1 - lam))
    y, x = int(height * centre[0]), int(width * centre[1])
    top, bottom = max(y - cut_h // 2, 0), min(y + cut_h // 2, height)
    left, right = max(x - cut_w // 2, 0), min(x + cut_w // 2, width)
    return [top, left, bottom, right]


def test_even_boxes_are_the_published_ones():
    odd = 0
    for seed in range(300):
        draws = torch.rand(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
        box = draw_mix_box((14, 9), torch.Generator().manual_seed(seed), even=True)
        assert box.tolist() == published_box(14, 9, draws[0], draws[1:])
        odd += not torch.equal(box, draw_mix_box((14, 9), torch.Generator().manual_seed(seed)))
    assert 150 < odd < 290  # most boxes have an odd side


def test_same_generator_same_box():
    draw = [draw_mix_box((14, 14), torch.Generator().manual_seed(7)) for _ in range(2)]
    before = torch.get_rng_state()
    draw_mix_box((14, 14), torch.Generator().manual_seed(8))
    assert torch.equal(*draw)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("box", [(0, 0, 0, 0), (1, 0, 3, 2), (0, 0, 4, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_mixing_equals_a_loop_and_is_its_own_inverse(box, batch):
    x = torch.randn(batch, 20, 3)
    expected = x.clone().view(batch, 4, 5, 3)
    top, left, bottom, right = box
    for b in range(batch):
        expected[b, top:bottom, left:right] = x.view(batch, 4, 5, 3)[batch - 1 - b, top:bottom, left:right]
    got = mix_tokens(x, box, (4, 5))
    assert torch.equal(got, expected.view(batch, 20, 3))
    assert torch.equal(got, mix_tokens(x, torch.tensor(box), (4, 5)))
    assert torch.equal(mix_tokens(got, box, (4, 5)), x)


def test_ratio():
    assert mix_ratio((1, 0, 3, 2), 16) == 0.75
    assert mix_ratio(torch.tensor([1, 0, 3, 2]), 16) == 0.75
    assert mix_ratio((2, 2, 2, 4), 16) == 1


def test_compiles_without_recompiling_for_each_box():
    compiled = torch.compile(mix_tokens, fullgraph=True, backend="eager")
    x = torch.randn(2, 16, 3)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for box in ((0, 0, 1, 1), (1, 2, 4, 4), (0, 1, 3, 2)):
            assert torch.equal(compiled(x, torch.tensor(box), (4, 4)), mix_tokens(x, box, (4, 4)))


def test_wrong_number_of_tokens():
    with pytest.raises(ValueError, match=r"N = 4 \* 4 = 16 patch tokens, got \(2, 17, 3\)"):
        mix_tokens(torch.zeros(2, 17, 3), (0, 0, 1, 1), (4, 4))
