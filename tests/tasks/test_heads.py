import torch
import torch.nn.functional as F

from timm_tokens.tasks.heads import Prototypes, mira_head


def test_projections_have_unit_length():
    projector = mira_head(12, hidden=16, width=8)
    torch.testing.assert_close(projector(torch.randn(6, 12)).norm(dim=1), torch.ones(6))


def test_prototypes_are_cosines():
    prototypes, x = Prototypes(8, 5), F.normalize(torch.randn(6, 8), dim=1)
    expected = F.cosine_similarity(x[:, None], prototypes.weight[None], dim=2)
    torch.testing.assert_close(prototypes(x), expected)
    with torch.no_grad():
        prototypes.weight.mul_(3)  # their length is of no matter
    torch.testing.assert_close(prototypes(x), expected)
