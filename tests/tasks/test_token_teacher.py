import pytest
import timm
import torch
import torch.nn.functional as F
from tiny import base, images
from torch import nn

from timm_tokens.tasks.token_teacher import TokenTeacher, normalisation_of

GRID = (4, 4)


@pytest.mark.parametrize("family", ["class_token", "average", "attention_pool", "rope", "mixed_rope"])
def test_tokens_of_the_patches(family):
    vit = base(family)
    teacher = TokenTeacher(vit, GRID)
    expected = vit.forward_features(images())[:, vit.num_prefix_tokens :]
    torch.testing.assert_close(teacher(images()), expected.detach())
    assert teacher.width == 48 and not teacher(images()).requires_grad


@pytest.mark.parametrize("family", ["class_token", "average", "rope"])
@pytest.mark.parametrize(("patch", "grid"), [(8, (6, 6)), (8, (3, 5)), (4, (4, 4)), (14, (4, 6))])
def test_the_grid_is_matched_by_the_size_of_the_images(family, patch, grid):
    vit = base(family, patch_size=patch, img_size=4 * patch)
    teacher, size = TokenTeacher(vit, grid), (grid[0] * patch, grid[1] * patch)
    assert teacher.size == size
    vit.set_input_size(img_size=size)
    resized = F.interpolate(images(), size, mode="bicubic", antialias=True)
    torch.testing.assert_close(teacher(images()), vit.forward_features(resized)[:, vit.num_prefix_tokens :].detach())


def test_the_teacher_given_is_left_alone():
    vit = base()
    TokenTeacher(vit, (6, 6))
    assert vit.patch_embed.img_size == (32, 32) and vit(images()).requires_grad


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about how timm resizes BEiT's bias
@pytest.mark.parametrize("name", ["vit_base_patch16_clip_224", "beit_base_patch16_224", "naflexvit_base_patch16_gap"])
def test_other_vits(name):
    vit = timm.create_model(name, depth=1, embed_dim=32, num_heads=2)
    if "beit" in name and not hasattr(vit, "set_input_size"):
        pytest.skip("this timm's BEiT is tied to one size")
    teacher = TokenTeacher(vit, (3, 4))
    assert teacher(images()).shape == (3, 12, teacher.width)


def test_images_are_renormalised():
    vit = base()
    vit.pretrained_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    pixels = torch.rand(3, 3, 32, 32)

    def normal(mean, std):
        return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    own = ((0.1, 0.2, 0.3), (0.6, 0.5, 0.4))
    teacher = TokenTeacher(vit, GRID, normalisation=own)
    expected = vit.forward_features(normal(*normalisation_of(vit)))[:, 1:]
    torch.testing.assert_close(teacher(normal(*own)), expected.detach())
    plain = TokenTeacher(vit, GRID)
    torch.testing.assert_close(plain(pixels), vit.forward_features(pixels)[:, 1:].detach())


@pytest.mark.parametrize("family", ["class_token", "average"])
def test_targets_through_the_classifier(family):
    vit = base(family)
    teacher = TokenTeacher(vit, GRID, head=True)
    tokens = vit.forward_features(images())[:, vit.num_prefix_tokens :]
    torch.testing.assert_close(teacher(images()), vit.head(vit.fc_norm(tokens)).detach())
    assert teacher.width == 10


def test_it_moves_with_its_task_but_is_not_saved():
    outer = nn.ModuleDict({"teacher": TokenTeacher(base(), GRID, normalisation=None)})
    assert not outer.state_dict() and not list(outer.parameters())
    outer.double()
    assert outer["teacher"](images().double()).dtype == torch.float64


def test_a_teacher_without_classifier_is_refused():
    with pytest.raises(ValueError, match=r"head=True.*this one has none"):
        TokenTeacher(base(num_classes=0), GRID, head=True)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_conv_nets_are_refused(name):
    with pytest.raises(ValueError, match=r"does not cut images into patches.*grid of 4 x 4; choose a ViT"):
        TokenTeacher(timm.create_model(name), GRID)


def test_teachers_with_other_tokens_are_refused():
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2, depths=(1, 1), embed_dim=16)
    with pytest.raises(ValueError, match=r"SwinTransformer.*16 x 16 takes \(1, 256, D\)"):
        TokenTeacher(swin, (16, 16))


def test_a_fixed_size_is_refused():
    class Fixed(nn.Module):
        patch_embed = base().patch_embed

    with pytest.raises(ValueError, match=r"tied to images of \(32, 32\).*grid of 5 x 5 takes \(40, 40\)"):
        TokenTeacher(Fixed(), (5, 5))


def test_other_channels_are_refused():
    vit = base()
    vit.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(ValueError, match="normalised in 2 channels, but the teacher takes 3"):
        TokenTeacher(vit, GRID, normalisation=((0.5,) * 2, (0.5,) * 2))


def test_grey_images_go_to_all_channels():
    vit = base()
    vit.pretrained_cfg = {"mean": (0.2, 0.4, 0.6), "std": (0.1, 0.2, 0.4)}
    grey = torch.rand(2, 1, 32, 32)
    teacher = TokenTeacher(vit, GRID, normalisation=((0.3,), (0.5,)))
    mean, std = (torch.tensor(vit.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    expected = vit.eval().forward_features((grey - mean) / std)[:, vit.num_prefix_tokens :]
    torch.testing.assert_close(teacher((grey - 0.3) / 0.5), expected)
    assert TokenTeacher(vit, GRID)(grey).shape == expected.shape
