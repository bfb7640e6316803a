"""Scores cell by cell: against the model's own logits, against the last block written out, and in the right place."""

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

import timm_tokens
from timm_tokens.dense import dense_scores

LINEAR = [
    "test_resnet",
    "test_nfnet",
    "test_efficientnet",
    "test_byobnet",
    "levit_128s",
    "swin_tiny_patch4_window7_224",
]
OTHERS = ["test_convnext", "test_mambaout", "test_vit", "test_vit2", "test_vit3", "hiera_tiny_224"]
DISTILLED = "deit_tiny_distilled_patch16_224"


def make(name, **options):
    model = timm.create_model(name, num_classes=7, **options).eval()
    heads = model.get_classifier()
    for head in heads if isinstance(heads, tuple) else (heads,):
        for parameter in head.parameters():
            nn.init.normal_(parameter)  # some start at zero
    return model


def images_for(model, count=2):
    return torch.randn(count, *resolve_model_data_config(model)["input_size"])


@pytest.mark.parametrize("name", LINEAR)
@torch.no_grad()
def test_the_mean_is_the_models_logits_where_a_linear_classifier_follows_the_average(name):
    model = make(name)
    images = images_for(model)
    scores = dense_scores(model, images)
    assert scores.ndim == 4 and min(scores.shape[1:3]) > 1
    expected = model(images)
    torch.testing.assert_close(scores.mean((1, 2)), expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("name", ["test_convnext", "test_mambaout", "test_vit2"])
@torch.no_grad()
def test_each_cell_is_the_head_of_an_image_that_is_all_that_cell(name):
    model = make(name)
    images = images_for(model)
    features, scores = model.forward_features(images), dense_scores(model, images)
    for row, column in [(0, 0), (2, 1)]:
        if name == "test_vit2":
            cell = features[:, model.num_prefix_tokens + row * scores.shape[2] + column]
            same = cell[:, None].expand_as(features)
        elif name == "test_mambaout":
            same = features[:, row : row + 1, column : column + 1].expand_as(features)
        else:
            same = features[:, :, row : row + 1, column : column + 1].expand_as(features)
        torch.testing.assert_close(scores[:, row, column], model.forward_head(same), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_class_token_reads_one_cell_in_the_last_block():
    """The block written out: of the attention, all that is left is the cell's value."""
    model = make("test_vit")
    images = images_for(model)
    x = model._pos_embed(model.patch_embed(images))
    for block in model.blocks[:-1]:
        x = block(x)
    last, scores = model.blocks[-1], dense_scores(model, images)
    for n in (0, 37, 99):
        y = last.norm1(x[:, 1 + n])
        value = last.attn.proj(last.attn.qkv(y).chunk(3, dim=-1)[2])
        token = x[:, 0] + last.ls1(value)
        token = token + last.ls2(last.mlp(last.norm2(token)))
        expected = model.head(model.fc_norm(model.norm(token)))
        torch.testing.assert_close(scores[:, n // 10, n % 10], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_both_tokens_of_a_distilled_model_count():
    model = make(DISTILLED)
    nn.init.zeros_(model.head.weight), nn.init.ones_(model.head.bias)
    nn.init.zeros_(model.head_dist.weight), nn.init.constant_(model.head_dist.bias, 5)
    torch.testing.assert_close(dense_scores(model, images_for(model, 1)), torch.full((1, 14, 14, 7), 3.0))


@pytest.mark.parametrize("name", [*LINEAR[:4], *LINEAR[5:], *OTHERS])
@torch.no_grad()
def test_what_changes_in_a_corner_changes_the_scores_of_that_corner(name):
    model = make(name)
    images = images_for(model, 1)
    size = images.shape[-1] // 4
    before = dense_scores(model, images)
    for rows, columns in [(slice(size), slice(-size, None)), (slice(-size, None), slice(size))]:
        changed = images.clone()
        changed[..., rows, columns] = torch.randn_like(changed[..., rows, columns]) + 2
        moved = (dense_scores(model, changed) - before).norm(dim=-1)[0]
        moved = moved / moved.sum()
        height, width = (length // 2 for length in moved.shape)
        corner = moved[:height] if rows.start is None else moved[-height:]
        corner = corner[:, :width] if columns.start is None else corner[:, -width:]
        # A quarter of the map at the most; what spreads, spreads to all.
        assert corner.mean() > 1.2 * moved.mean()


@torch.no_grad()
def test_other_sizes_and_shapes():
    assert dense_scores(make("test_resnet"), torch.randn(1, 3, 96, 160)).shape == (1, 3, 5, 7)
    for name in ("test_vit", "test_vit2"):
        model = make(name, img_size=(96, 160))
        assert dense_scores(model, torch.randn(2, 3, 96, 160)).shape == (2, 6, 10, 7)


@torch.no_grad()
def test_a_token_vit_is_asked_for_its_own_scores_or_its_bases():
    vit = make("test_vit")
    images = images_for(vit)
    labelled = timm_tokens.token_label_head(vit).eval()
    expected = labelled(images, dense=True).tokens.unflatten(1, (10, 10))
    torch.testing.assert_close(dense_scores(labelled, images), expected)
    merged = timm_tokens.apply_dtem_merging(vit, r=8).eval()
    torch.testing.assert_close(dense_scores(merged, images), dense_scores(vit, images))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("test_resnet", {"num_classes": 0}, "ResNet has no classifier: make it with its classes"),
        ("crossvit_9_240", {"num_classes": 7}, "CrossVit .*timm's VisionTransformer"),
        ("xcit_nano_12_p16_224", {}, "Xcit reads a class token, and can't be asked .*such as a conv net or a Swin"),
    ],
)
@torch.no_grad()
def test_refuses_in_words(name, options, message):
    model = timm.create_model(name, **options).eval()
    with pytest.raises(TypeError, match=message):
        dense_scores(model, images_for(model, 1))


class Pooled(nn.Module):
    """A model whose features are pooled already."""

    num_classes, num_features, shape = 7, 8, (2, 8)

    def forward_features(self, x):
        return torch.zeros(self.shape)

    def forward_head(self, x):
        return x.flatten(1)[:, :7]


@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 1, 1), (2, 1, 8), (2, 3, 8), (2, 2, 2, 2, 8)])
def test_refuses_features_without_a_map(shape):
    model = Pooled()
    model.shape = shape
    with pytest.raises(TypeError, match=r"Pooled has no spatial map to take scores from: its features are \(2, "):
        dense_scores(model, torch.zeros(2, 3, 32, 32))
