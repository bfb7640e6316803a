import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import roi_align

from timm_tokens.ops import crop_maps, crop_token_labels, warp_token_labels


def label_maps(batch, grid, num_classes, top=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(batch, top, *grid, generator=generator) * 12 - 2
    indices = torch.rand(batch, num_classes, *grid, generator=generator).argsort(1)[:, :top]
    return values.half(), indices.int()


def random_boxes(batch, smallest=0.05, seed=1):
    generator = torch.Generator().manual_seed(seed)
    extent = smallest + (1 - smallest) * torch.rand(batch, 2, generator=generator)
    return torch.cat([torch.rand(batch, 2, generator=generator) * (1 - extent), extent], 1)


def dense_scores(values, indices, num_classes):
    full = torch.zeros(len(values), num_classes, *values.shape[2:])
    return full.scatter_(1, indices.long(), values.float())


def slow_crop(values, indices, boxes, num_classes, size, flip=None):
    """The dense way: (B, K, H, W), torchvision's RoIAlign, softmax."""
    B, _, H, W = values.shape
    full = dense_scores(values, indices, num_classes)
    top, left, height, width = boxes.unbind(1)
    corners = torch.stack([left * W, top * H, (left + width) * W, (top + height) * H], 1) - 0.5
    rois = torch.cat([torch.arange(B)[:, None].float(), corners], 1)
    tokens, cls = roi_align(full, rois, size, aligned=False), roi_align(full, rois, 1, aligned=False)
    if flip is not None:
        tokens = torch.where(flip[:, None, None, None], tokens.flip(-1), tokens)
    return torch.cat([cls.flatten(2), tokens.flatten(2)], 2).softmax(1)


def bilinear(full, y, x):
    """Score (K,) of one map (K, H, W) at one point in cells."""
    _, H, W = full.shape
    if not (-1 <= y <= H and -1 <= x <= W):
        return torch.zeros(len(full))
    y, x = min(max(y, 0), H - 1), min(max(x, 0), W - 1)
    y0, x0 = int(y), int(x)
    y1, x1, fy, fx = min(y0 + 1, H - 1), min(x0 + 1, W - 1), y - y0, x - x0
    above = full[:, y0, x0] * (1 - fx) + full[:, y0, x1] * fx
    below = full[:, y1, x0] * (1 - fx) + full[:, y1, x1] * fx
    return above * (1 - fy) + below * fy


def slow_warp(full, matrix, size):
    """Probabilities (K, size * size) of one map, point by point."""
    _, H, W = full.shape
    cells = torch.tensor([[H], [W]]) * matrix[:2]
    counts = [max(1, int(torch.ceil(cells[:, axis].norm() / size - 1e-4))) for axis in (0, 1)]
    tokens = []
    for i in range(size):
        for j in range(size):
            total = 0
            for a in range(counts[0]):
                for b in range(counts[1]):
                    view = torch.tensor([(i + (a + 0.5) / counts[0]) / size, (j + (b + 0.5) / counts[1]) / size, 1.0])
                    y, x = (cells @ view - 0.5).tolist()
                    total = total + bilinear(full, y, x)
            tokens.append(total / (counts[0] * counts[1]))
    return torch.stack(tokens, 1).softmax(0)


@pytest.mark.parametrize("num_classes", [7, 300])
@pytest.mark.parametrize("size", [1, 4, 7, 14, (3, 8)])
@pytest.mark.parametrize("grid", [(1, 1), (7, 7), (18, 18), (9, 16)])
def test_equals_dense_roi_align(grid, size, num_classes):
    values, indices = label_maps(12, grid, num_classes)
    boxes, flip = random_boxes(12), torch.arange(12) % 2 == 0
    boxes[0] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    got = crop_token_labels(values, indices, boxes, num_classes, size, flip=flip, dense=True)
    torch.testing.assert_close(got, slow_crop(values, indices, boxes, num_classes, size, flip), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("case", ["0", "1"])
def test_golden_targets(golden, case):
    data = {k[2:]: v for k, v in golden("token_label").items() if k.startswith(case)}
    boxes = data["crop_ijhw"][:, [1, 0, 3, 2]]  # the reference exchanges the axes of its boxes
    classes, smoothing = int(data["num_classes"]), float(data["smoothing"])
    got = crop_token_labels(data["values"], data["indices"], boxes, classes, int(data["label_size"]), dense=True)
    off = smoothing / classes
    torch.testing.assert_close(got * (1 - smoothing + off) + off, data["target"][:, :, 1:], atol=1e-5, rtol=0)


def test_box_axes_are_not_exchanged():
    values = torch.zeros(1, 1, 8, 8)
    values[0, 0, :, 4:] = 20.0  # class 3 fills the right half
    indices = torch.full((1, 1, 8, 8), 3)
    right, bottom = torch.tensor([[0.0, 0.5, 1.0, 0.5]]), torch.tensor([[0.5, 0.0, 0.5, 1.0]])
    inside = crop_token_labels(values, indices, right, 5, 4, dense=True)[0, 3, 1:].view(4, 4)
    assert (inside[:, 1:] > 0.99).all()
    across = crop_token_labels(values, indices, bottom, 5, 4, dense=True)[0, 3, 1:].view(4, 4)
    torch.testing.assert_close(across[:, 0], torch.full((4,), 0.2))
    assert (across[:, 3] > 0.99).all()


def test_sparse_form_is_small_and_sums_to_one():
    values, indices = label_maps(2, (18, 18), 1000)
    labels = crop_token_labels(values, indices, random_boxes(2), 1000, 14)
    assert labels.classes.shape == labels.excess.shape == (2, 196, 45)
    torch.testing.assert_close(labels.dense().sum(1), torch.ones(2, 197))
    same = labels.classes[..., None] == labels.classes[..., None, :]
    assert same.sum() > same.shape[-1] * labels.background.numel()  # some classes have several slots,
    assert (same & (labels.excess[..., None, :] > 0)).sum(-1).max() == 1  # and one of these has it all


@pytest.mark.parametrize("rows", [1, 7, 50])
def test_in_parts_it_is_the_same(rows, monkeypatch):
    values, indices = label_maps(3, (9, 9), 30)
    whole = crop_token_labels(values, indices, random_boxes(3), 30, 7, dense=True)
    monkeypatch.setattr("timm_tokens.ops.chunking._CPU", rows * 30)
    parts = crop_token_labels(values, indices, random_boxes(3), 30, 7, dense=True)
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


def slow_exact(values, indices, num_classes, size):
    """Targets of the whole image in float64: each token averages the cells that it covers, without interpolation."""
    full = torch.zeros(len(values), num_classes, *values.shape[2:], dtype=torch.float64)
    full.scatter_(1, indices.long(), values.double())
    tokens, cls = F.adaptive_avg_pool2d(full, size), full.mean((2, 3))
    return torch.cat([cls[:, :, None], tokens.flatten(2)], 2).softmax(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("listed", [2, 5, 6])
def test_exact_for_all_finite_scores(listed, dtype):
    """However high or low they are, with all of the 6 classes listed and with some, in one cell or several a token."""
    whole, flip = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(3, 4), torch.zeros(3, dtype=torch.bool)
    for scale, shift in [(1, -8), (1, -20), (3, -100), (1, 200), (3, 3e3), (30, -6e4), (1e3, 0), (1e4, 0), (3e4, 3e4)]:
        generator = torch.Generator().manual_seed(listed)
        values = (torch.randn(3, listed, 4, 4, generator=generator).clamp(-1, 1) * scale + shift).to(dtype)
        indices = torch.rand(3, 6, 4, 4, generator=generator).argsort(1)[:, :listed]
        for size in (4, 2):
            expected = slow_exact(values, indices, 6, size).float()
            dense = crop_token_labels(values, indices, whole, 6, size, dense=True)
            sparse = crop_token_labels(values, indices, whole, 6, size, flip=flip)
            warped = warp_token_labels(values, indices, torch.eye(3).expand(3, 3, 3), 6, size, dense=True)
            for got in (dense, sparse.dense(), warped):
                torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-4)
            assert all(x.dtype == torch.float32 for x in (sparse.cls, sparse.excess, sparse.background))


def test_exact_at_the_end_of_float32():
    largest = torch.finfo(torch.float32).max
    values = torch.tensor([largest, largest, -largest]).view(1, 3, 1, 1).expand(1, 3, 7, 7)
    indices = torch.tensor([2, 0, 1]).view(1, 3, 1, 1).expand(1, 3, 7, 7)
    for num_classes in (3, 4):
        got = crop_token_labels(values, indices, torch.tensor([[0.1, 0.2, 0.7, 0.5]]), num_classes, 3, dense=True)
        expected = torch.tensor([0.5, 0, 0.5, 0])[:num_classes]
        torch.testing.assert_close(got, expected[None, :, None].expand(1, num_classes, 10))


@pytest.mark.parametrize("size", [1, 4, 9, 14])
@pytest.mark.parametrize("grid", [(7, 7), (18, 18), (9, 16)])
def test_warp_of_a_crop_equals_the_crop(grid, size):
    values, indices = label_maps(16, grid, 30)
    boxes, flip = random_boxes(16), torch.arange(16) % 3 == 0
    got = warp_token_labels(values, indices, crop_maps(boxes, flip), 30, size, dense=True)
    torch.testing.assert_close(got, slow_crop(values, indices, boxes, 30, size, flip), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("grid", [(6, 6), (9, 9), (5, 8)])
@pytest.mark.parametrize("degrees", [10, -35, 90])
def test_warp_equals_point_by_point(grid, degrees):
    values, indices = label_maps(3, grid, 11)
    crops = crop_maps(random_boxes(3, smallest=0.5))
    angle = torch.tensor(degrees).deg2rad()
    cos, sin = angle.cos() * 0.9, angle.sin() * 0.9
    centre = torch.tensor([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    rotate = centre @ torch.tensor([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]]) @ centre.inverse()
    maps = crops @ rotate
    got = warp_token_labels(values, indices, maps, 11, 6, dense=True)
    for full, matrix, labels in zip(dense_scores(values, indices, 11), maps, got, strict=True):
        torch.testing.assert_close(labels[:, 1:], slow_warp(full, matrix, 6), atol=1e-5, rtol=1e-4)


def test_a_view_outside_the_image_knows_nothing():
    values, indices = label_maps(1, (4, 4), 10)
    beside = torch.tensor([[[1.0, 0, 0], [0, 1, 3], [0, 0, 1]]])
    torch.testing.assert_close(
        warp_token_labels(values, indices, beside, 10, 4, dense=True), torch.full((1, 10, 17), 0.1)
    )


def test_a_footprint_wider_than_the_window_still_averages():
    values = torch.full((1, 1, 8, 8), 5.0)
    zoom_out = crop_maps(torch.tensor([[-1.0, -1.0, 3.0, 3.0]]))
    got = warp_token_labels(values, torch.zeros(1, 1, 8, 8, dtype=torch.int32), zoom_out, 4, 6)
    centre = got.dense()[0, 0, 1:].view(6, 6)[2:4, 2:4]
    torch.testing.assert_close(centre, torch.tensor([5.0, 0, 0, 0]).softmax(0)[0].expand(2, 2))


@pytest.mark.parametrize("op", [crop_token_labels, warp_token_labels])
def test_autocast_and_compile_change_nothing(op):
    values, indices = label_maps(3, (9, 9), 40)
    where = random_boxes(3) if op is crop_token_labels else crop_maps(random_boxes(3))
    expected = op(values, indices, where, 40, 7)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = op(values, indices, where, 40, 7)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")(values, indices, where, 40, 7)
    for other in (mixed, compiled):
        torch.testing.assert_close(tuple(other), tuple(expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(2, 5, 4)}, r"must both be \(B, top, H, W\), got \(2, 5, 4\)"),
        ({"indices": torch.zeros(2, 5, 4, 4)}, "indices must be integers, got torch.float32"),
        ({"boxes": torch.zeros(3, 4)}, r"boxes must be \(B, 4\) with B = 2.*got \(3, 4\)"),
        ({"flip": torch.zeros(2)}, "flip must be bool"),
        ({"size": 0}, r"at least 1, got \(0, 0\)"),
    ],
)
def test_bad_arguments(change, message):
    values, indices = label_maps(2, (4, 4), 9)
    good = {"values": values, "indices": indices, "boxes": random_boxes(2), "num_classes": 9, "size": 2}
    with pytest.raises(ValueError, match=message):
        crop_token_labels(**(good | change))


def test_bad_maps():
    with pytest.raises(ValueError, match=r"maps must be \(B, 3, 3\) with B = 2.*got \(2, 2, 3\)"):
        warp_token_labels(*label_maps(2, (4, 4), 9), torch.zeros(2, 2, 3), 9, 2)
