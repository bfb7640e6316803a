import torch
import torch.nn.functional as F

from timm_tokens.losses import DistillLoss


def test_logits_are_compared_by_the_divergence_of_their_probabilities():
    student, teacher = torch.randn(4, 7), 3 * torch.randn(4, 7)
    expected = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    torch.testing.assert_close(DistillLoss()(student, teacher), expected)
    one = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.75, 0.25]]).log()
    torch.testing.assert_close(DistillLoss()(*one).item(), 0.75 * torch.tensor(1.5).log().item() - 0.25 * 0.6931472)
    assert DistillLoss()(*one[::-1]).item() != DistillLoss()(*one).item()  # the teacher's probabilities weigh


def test_features_are_compared_by_cosine():
    cls, patches = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.ones(2, 3, 2)
    other = torch.tensor([[0.0, 5.0], [0.0, 1.0]])  # orthogonal, the same
    assert DistillLoss()((cls, patches), (other, 7 * patches)).item() == 0.25
    opposite = patches * torch.tensor([1.0, 1.0, -1.0])[:, None]  # the last patch of each
    loss = DistillLoss().per_image((cls, patches), (cls, opposite))
    torch.testing.assert_close(loss, torch.full((2,), 1 / 3))


def test_the_mean_of_images_is_the_loss():
    for student, teacher in ((torch.randn(5, 4), torch.randn(5, 4)), (torch.randn(5, 3, 4), torch.randn(5, 3, 4))):
        for wrap in (lambda x: x, lambda x: (x, x.flip(1))):
            images = DistillLoss().per_image(wrap(student), wrap(teacher))
            assert images.shape == (5,) and (images > 0).all()
            torch.testing.assert_close(DistillLoss()(wrap(student), wrap(teacher)), images.mean())
            torch.testing.assert_close(DistillLoss()(wrap(student), wrap(student)), torch.zeros(()), atol=1e-6, rtol=0)


def test_half_precision_is_compared_in_float32():
    student, teacher = torch.randn(8, 1000), torch.randn(8, 1000)
    loss = DistillLoss()(student.bfloat16(), teacher.bfloat16())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, DistillLoss()(student.bfloat16().float(), teacher.bfloat16().float()))
