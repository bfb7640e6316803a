"""Everything that measures features refuses those that are not finite, and says which row."""

import pytest
import torch

from timm_tokens import fewshot, probing


def test_every_measure_refuses():
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(60, 8, generator=generator), torch.arange(60) % 3
    episodes, support = torch.randn(2, 9, 8, generator=generator), torch.arange(3)
    weights = [torch.randn(5, 8, 8, generator=generator) for _ in range(4)]
    probabilities = torch.rand(3, 60, 5, generator=generator)

    def spoiled(tensor, *place):
        tensor = tensor.clone()
        tensor[place] = float("nan")
        return tensor

    calls = {
        r"train_features must be finite, got nan at \[7, 2\]; 1 of 60": [
            lambda: probing.knn_accuracy(spoiled(x, 7, 2), labels, x, labels, [3]),
            lambda: probing.linear_probe(spoiled(x, 7, 2), labels, x, labels, epochs=1),
        ],
        r"^features must be finite, got nan at \[7, 2\]; 1 of 60": [
            lambda: probing.knn_accuracy(x, labels, spoiled(x, 7, 2), labels, [3]),
            lambda: probing.linear_probe(x, labels, spoiled(x, 7, 2), labels, epochs=1),
            lambda: fewshot.compare(spoiled(x, 7, 2), labels, ways=2, queries=2, episodes=2),
        ],
        r"^features must be finite, got nan at \[1, 4, 0\]; 1 of 18": [
            lambda: fewshot.ESFR(max_updates=2).adapt(spoiled(episodes, 1, 4, 0)),
        ],
        r"weights\[2\] must be finite, got nan at \[0, 1, 2\]": [
            lambda: fewshot.ESFR(max_updates=2).adapt(
                episodes, [*weights[:2], spoiled(weights[2], 0, 1, 2), weights[3]]
            )
        ],
        r"probabilities must be finite, got nan at \[2, 1, 0\]": [
            lambda: probing.ensemble_assignments(spoiled(probabilities, 2, 1, 0)),
            lambda: probing.ensemble_nmi(spoiled(probabilities, 2, 1, 0), labels),
        ],
    }
    for classify in (fewshot.nearest_centroid, fewshot.cosine_centroid, fewshot.bd_cspn):
        calls.setdefault(r"support must be finite, got nan at \[0, 1, 3\]", []).append(
            lambda classify=classify: classify(spoiled(episodes[:, :3], 0, 1, 3), support, episodes[:, 3:])
        )
        calls.setdefault(r"query must be finite, got nan at \[1, 5, 3\]", []).append(
            lambda classify=classify: classify(episodes[:, :3], support, spoiled(episodes[:, 3:], 1, 5, 3))
        )
    for message, refused in calls.items():
        for call in refused:
            with pytest.raises(ValueError, match=message):
                call()
    with pytest.raises(ValueError, match="must be integers"):
        probing.assignment_nmi(spoiled(x[:, 0], 3), labels)
