"""The benchmark of features: both layouts hold the same samples, and the index keeps what the README says."""

import torch

import pixart.benchmark.features as features
from pixart.benchmark.features import OfficialLayout, compare_layouts, make_layouts, simulate_index
from pixart.features.store import FeatureStore


def test_both_layouts_hold_the_same_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "WIDTH", 16)
    make_layouts(tmp_path / "data", 64, 5, (3, 9))
    store, official = FeatureStore(tmp_path / "data" / "store"), OfficialLayout(tmp_path / "data" / "official")
    assert len(store) == len(official) == 5
    for i in range(5):
        ours, theirs = store.get(i), official[i]
        mean, std = theirs["latents"].shape[0], ours.std
        assert mean == 4 and ours.mean.shape == std.shape == (4, 8, 8)
        caption = store.caption(ours.captions[0])
        assert theirs["mask"].sum() == len(caption)
        # the authors pad: one draw of normal numbers, cut by ours
        assert torch.allclose(theirs["caption"][0, : len(caption)].float(), caption.float(), atol=0.02)


def test_the_comparison_measures_both_cold_and_warm(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "WIDTH", 16)
    result = compare_layouts(tmp_path / "data", 64, 8, (3, 9), batch_size=4, workers=0)
    assert not (tmp_path / "data").exists()
    assert {(when, name) for when, rates in result["samples_per_second"].items() for name in rates} == {
        (when, name) for when in ("cold", "warm") for name in ("official", "store")
    }
    assert result["bytes"]["store"] < result["bytes"]["official"]


def test_an_index_takes_at_most_32_bytes_a_sample(tmp_path):
    result = simulate_index(tmp_path / "index", 2_000_000)
    assert result["samples"] == 2_000_000
    assert 0 < result["bytes_per_sample"] <= 32
