"""Runs with `train.ema: 0`: nothing is averaged, so nothing is kept twice, in memory or on the disk."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import pixart
from chaos import tensors
from pixart.checkpoint.files import checkpoints
from pixart.files import read_rows
from pixart.train.estimate import estimate
from pixart.train.loop import train
from pixart.train.setup import start
from runs import build, change, make_pictures, settings

TINY_DECAY = 1e-30  # keeps an average that has the weights' own values: 1 - 1e-30 is 1 in fp32


@pytest.fixture
def base(tmp_path, text_encoder) -> dict:
    found = settings(tmp_path / "run", make_pictures(tmp_path / "images"), text_encoder)
    found["train"] |= {"steps": 4, "keep": 9, "ema": 0, "validate_every": 2, "sample_every": 4}
    found["data"] |= {"validation": 0.25}
    return change(
        found,
        prompts=["a red square"],
        sample={"steps": 2},
        diffusion={**found["diffusion"], "weighting": "uncertainty"},
    )


def results(run: Path) -> list[dict]:
    kept = ("step", "loss", "grad_norm", "validation")
    return [{k: v for k, v in row.items() if k.startswith(kept)} for row in read_rows(run / "metrics.jsonl")]


def test_the_average_is_the_weights_themselves(base):
    state = start(build(base)).state
    network, average = state.parts.network, state.parts.average
    pairs = dict(network.named_parameters()), dict(average.named_parameters())
    assert all(pairs[0][name].data_ptr() == pairs[1][name].data_ptr() for name in pairs[0]) and pairs[0]
    own, averaged = (next(module.parameters()) for module in (
        state.parts.trained["uncertainty"], state.parts.averages["uncertainty"],
    ))  # fmt: skip
    assert own.data_ptr() == averaged.data_ptr()
    assert network.training and not average.training and all(p.requires_grad for p in network.parameters())
    with_average = start(build(base, train__ema=0.9, output=f"{base['output']}_ema")).state.parts
    assert next(with_average.network.parameters()).data_ptr() != next(with_average.average.parameters()).data_ptr()


def test_files_numbers_and_samples_are_those_of_a_run_that_keeps_a_copy(base, tmp_path):
    run = train(build(base)).run
    copied = train(build(base, train__ema=TINY_DECAY, output=str(tmp_path / "copied"))).run
    for one, other in zip(checkpoints(run), checkpoints(copied), strict=True):
        names = [sorted(str(p.relative_to(c)) for p in c.rglob("*") if p.is_file()) for c in (one, other)]
        assert names[0] == names[1]
        found, expected = tensors(one), tensors(other)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
        for name in ("model.safetensors", "config.json"):
            assert (one / "ema" / name).read_bytes() == (one / "model" / name).read_bytes()
    assert results(run) == results(copied) and any("validation_error" in row for row in results(run))
    drawn = [(place / "samples" / "step_00000004.png").read_bytes() for place in (run, copied)]
    assert drawn[0] == drawn[1]
    images = [pixart.Pipeline.from_pretrained(place)(["a red square"], seeds=[1])[0] for place in (run, copied)]
    assert images[0].tobytes() == images[1].tobytes()


def test_a_run_goes_on_bit_for_bit_also_from_checkpoints_with_a_copy(base, tmp_path):
    whole = tensors(checkpoints(train(build(base)).run)[-1])
    copied = train(build(base, train__ema=TINY_DECAY, output=str(tmp_path / "copied"))).run
    config = yaml.safe_load((copied / "config.yaml").read_text())
    config["train"]["ema"] = 0
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    for run in (Path(base["output"]), copied):
        shutil.rmtree(checkpoints(run)[-1])
        train(build(base, output=str(run)))
        found = tensors(checkpoints(run)[-1])
        assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in found)


def bytes_on_disk(checkpoint: Path) -> int:
    files = {(s.st_dev, s.st_ino): s.st_size for s in (p.stat() for p in checkpoint.rglob("*") if p.is_file())}
    return sum(files.values())


def test_the_disk_holds_the_tensors_once_or_twice_without_hard_links(base, tmp_path, monkeypatch):
    config = build(base, model__hidden_size=192)
    checkpoint = checkpoints(train(config).run)[-1]
    assert bytes_on_disk(checkpoint) == pytest.approx(estimate(config).checkpoint_bytes, rel=0.03)
    weights = (checkpoint / "model" / "model.safetensors").stat().st_size

    def refuse(*_):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", refuse)
    other = checkpoints(train(build(base, model__hidden_size=192, output=str(tmp_path / "other"))).run)[-1]
    assert bytes_on_disk(other) - bytes_on_disk(checkpoint) == pytest.approx(weights, rel=0.01)
    found, expected = tensors(other), tensors(checkpoint)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_estimate_has_no_second_copy(base):
    without, with_one = (estimate(build(base, train__ema=decay)).memory for decay in (0, 0.9))
    assert without.at_peak["average"] == 0 and with_one.at_peak["average"] > 0
    assert without.at_peak["weights"] == with_one.at_peak["weights"]
    assert with_one.total - without.total >= with_one.at_peak["average"]
    sharded = estimate(build(base, train__parallel="fsdp")).memory
    assert sharded.at_peak["average"] > 0, "FSDP keeps its shards to itself"


@pytest.mark.parametrize("kind", ["fsdp", "adapter"])
def test_sharded_networks_and_adapters_have_an_average_with_the_same_values(kind, base, tmp_path):
    if kind == "adapter":
        start_from = train(build(base, train__steps=1, output=str(tmp_path / "start"))).run
        more = {"init_from": str(start_from), "adapter": {"kind": "lora", "rank": 2}}
    else:
        more = {"train__parallel": "fsdp"}
    run = train(build(base, **more)).run
    copied = train(build(base, **more, train__ema=TINY_DECAY, output=str(tmp_path / "copied"))).run
    found, expected = (tensors(checkpoints(place)[-1]) for place in (run, copied))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert results(run) == results(copied)
    shutil.rmtree(checkpoints(run)[-1])
    train(build(base, **more))
    again = tensors(checkpoints(run)[-1])
    assert all(torch.equal(again[name], found[name]) for name in found)
