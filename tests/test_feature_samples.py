"""Samples of feature stores: from which stored values, sample, variant and caption each is made."""

import numpy as np
import pytest
import torch

from pixart.data.buckets import Bucket
from pixart.data.samples import Drawing
from pixart.features.samples import FeatureDataset
from pixart.features.store import Features


class Stand:
    """A stand-in for a feature store: sample i of store `name` has mean i, deviation 3 and the captions 0, 1 and 2."""

    def __init__(self, name: str, count: int, weights=(1 / 3, 1 / 3, 1 / 3)):
        self.name, self.count, self.weights = name, count, list(weights)

    def __len__(self) -> int:
        return self.count

    def get(self, index: int, *, mirrored: bool = False) -> Features:
        assert 0 <= index < self.count
        mean = torch.full((4, 8, 8), -1.0 - index if mirrored else float(index))
        bucket = Bucket(1.0, 64, 64)
        return Features(
            f"{self.name}{index}", mean, torch.full_like(mean, 3.0), [0, 1, 2], self.weights, 70, 90, bucket
        )

    def caption(self, number: int) -> torch.Tensor:
        return torch.full((2, 6), float(number))


def test_latents_of_a_store_are_drawn_with_their_mean_and_standard_deviation():
    options = {"stores": [Stand("a", 5)], "chosen": [None], "drawing": Drawing(7)}
    drawn, means = FeatureDataset(**options), FeatureDataset(**options, posterior_mean=True)
    values = []
    for epoch in range(20):
        sample = drawn[epoch, 4]
        expected = 4 + 3 * Drawing(7)(epoch, "a4", (4, 8, 8)).normal("posterior_noise", 4, 8, 8)
        assert torch.allclose(sample["latents"], expected, atol=1e-6)
        assert torch.equal(means[epoch, 4]["latents"], torch.full((4, 8, 8), 4.0))
        values.append(sample["latents"])
    values, n = torch.stack(values).double(), 20 * 256
    assert abs(values.mean() - 4) < 5 * 3 / n**0.5
    assert abs(values.std() - 3) < 5 * 3 / (2 * n) ** 0.5


def test_half_of_a_stores_latents_are_the_mirrored_images_and_without_flip_none():
    options = {"stores": [Stand("a", 1)], "chosen": [None], "drawing": Drawing(0), "posterior_mean": True}
    for flip, expected in ((True, 500), (False, 0)):
        dataset = FeatureDataset(**options, flip=flip)
        mirrored = sum(dataset[epoch, 0]["latents"][0, 0, 0].item() == -1 for epoch in range(1000))
        assert abs(mirrored - expected) <= flip * 5 * (1000 / 4) ** 0.5


def test_samples_of_several_stores_follow_one_another_as_far_as_they_are_chosen():
    stores, chosen = [Stand("a", 3), Stand("b", 9), Stand("c", 2)], [None, np.array([1, 8], dtype=np.int32), None]
    dataset = FeatureDataset(stores, chosen, Drawing(0), posterior_mean=True)
    samples = [dataset[0, i] for i in range(len(dataset))]
    assert [sample["id"] for sample in samples] == ["a0", "a1", "a2", "b1", "b8", "c0", "c1"]
    assert [sample["latents"][0, 0, 0].item() for sample in samples] == [0, 1, 2, 1, 8, 0, 1]


@pytest.mark.parametrize("weights", [(0.7, 0.1, 0.2), (1 / 3, 1 / 3, 1 / 3)])
def test_each_caption_of_a_store_is_taken_as_often_as_its_weight_says(weights):
    dataset = FeatureDataset([Stand("a", 1, weights)], [None], Drawing(0))
    taken = [int(dataset[epoch, 0]["caption"][0, 0]) for epoch in range(1000)]
    for i, weight in enumerate(weights):
        assert abs(taken.count(i) - 1000 * weight) < 5 * (1000 * weight * (1 - weight)) ** 0.5
