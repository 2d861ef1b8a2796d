"""Arms of ablations as whole runs: they train, save, load and sample, in one process and in two."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pixart
from chaos import chaos, tensors
from pixart.checkpoint.files import checkpoints, newest_checkpoint
from pixart.files import read_rows
from pixart.train.loop import train
from runs import build, change, make_pictures, settings, write

FLOW = {"schedule": "flow", "prediction": "velocity"}
ARMS = {
    "adaLN per block": {
        "model__conditioning": "adaln_per_block", "model__positions": "learned", "model__mlp": "swiglu",
        "model__routing": "tread", "model__route_blocks": [1, 1], "model__depth": 3,
        "diffusion": {**FLOW, "weighting": "uncertainty", "times": "logit_normal"},
    },
    "time token": {
        "model__conditioning": "time_token", "model__positions": "rope2d", "model__norm": "rms_norm",
        "model__qk_norm": "rms_norm", "diffusion": {**FLOW, "contrast": 0.05, "time_shift": 2.0},
        "optimizer__name": "schedulefreeadamw", "optimizer__lr": 1e-2, "train__ema": 0.0,
    },
    "DiT": {"model__conditioning": "dit", "diffusion": FLOW, "train__caption_dropout": 0.5},
    "KV compression": {
        "model__kv_compression": "uniform_every", "model__kv_blocks": [1], "model__learn_sigma": True,
        "diffusion": {"prediction": "v", "times": "logit_normal", "weighting": "min_snr"},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory, text_encoder) -> dict:
    folder = tmp_path_factory.mktemp("arms")
    made = settings(folder / "run", make_pictures(folder / "images"), text_encoder)
    made["train"] |= {"steps": 2, "save_every": 1, "keep": 9, "sample_every": 2, "validate_every": 2}
    made["train"] |= {"metrics": ["loss"]}
    made["data"] |= {"validation": 0.25}
    return change(made, prompts=["a red square"], sample={"steps": 2})


SLOW = [pytest.param(arm, marks=pytest.mark.slow) for arm in ("KV compression", "DiT")]


@pytest.mark.parametrize("arm", ["adaLN per block", "time token", *SLOW])
def test_an_arm_trains_resumes_bit_for_bit_loads_and_samples(arm, base, tmp_path):
    run = train(build(base, **ARMS[arm], output=str(tmp_path / "run"))).run
    again = shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(checkpoints(again)[-1])
    train(build(base, **ARMS[arm], output=str(again)))
    first, second = (tensors(newest_checkpoint(place, print)) for place in (run, again))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    learned = [value for name, value in first.items() if "uncertainty" in name and name.endswith("weight")]
    assert bool(learned) == (arm == "adaLN per block") and all(value.any() for value in learned)
    # also with a schedule-free optimizer and ema 0
    raw, average = (load_file(newest_checkpoint(run, print) / part / "model.safetensors") for part in ("model", "ema"))
    assert any(not torch.equal(raw[name], average[name]) for name in raw)
    assert (run / "samples" / "step_00000002.png").is_file()
    pipeline = pixart.Pipeline.from_pretrained(run)
    (image,) = pipeline(["a red square"], seeds=[1], steps=2, guidance=3.0)
    assert image.size == (8, 8)


@pytest.mark.slow
@pytest.mark.parametrize(("arm", "kind"), [("adaLN per block", "fsdp"), ("time token", "ddp")])
def test_two_processes_killed_and_not_end_alike_and_as_one(arm, kind, base, tmp_path):
    steps = {
        "train__steps": 12,
        "train__save_every": 2,
        "train__sample_every": 0,
        "train__validate_every": 0,
        "train__deterministic": True,
    }
    made = change(base, **ARMS[arm], **steps)
    if arm == "time token":  # with two processes an image has another neighbour
        made["diffusion"] = {**made["diffusion"], "contrast": 0.0}
    config = write(tmp_path / "config.yaml", made)
    verdict = chaos(config, tmp_path / "chaos", processes=2, faults=["kill"], overrides=[f"train.parallel={kind}"])
    assert verdict.good, verdict
    one = train(build(made, output=str(tmp_path / "one"))).run
    rows = [list(read_rows(Path(place) / "metrics.jsonl")) for place in (one, tmp_path / "chaos" / "whole")]
    for mine, theirs in zip(*rows, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4, abs=1e-5)
