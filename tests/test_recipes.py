"""Freezing, learning rates by batch size, stages, and what is looked for before any work."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pixart.checkpoint.files import checkpoints
from pixart.config import load_config
from pixart.errors import InputError
from pixart.train.config import OptimizerConfig, TrainConfig
from pixart.train.freeze import freeze, match_names
from pixart.train.loop import train
from pixart.train.optimizer import learning_rate
from runs import build, make_pictures, make_text_encoder, settings
from toy import tiny_model


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory) -> Path:
    return make_text_encoder(tmp_path_factory.mktemp("text") / "encoder")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("data") / "pictures", side=16)


@pytest.fixture
def base(tmp_path, pictures, text_encoder) -> dict:
    return settings(tmp_path / "run", pictures, text_encoder)


def weights(checkpoint: Path, kind: str = "model") -> dict[str, torch.Tensor]:
    return load_file(checkpoint / kind / "model.safetensors")


def test_auto_lr_is_the_square_root_of_the_batch_over_256():
    config = OptimizerConfig(lr=2e-5, auto_lr="sqrt", warmup=0)
    assert learning_rate(config, 0, 10, 256) == 2e-5
    assert learning_rate(config, 5, 10, 1024) == pytest.approx(4e-5)
    assert learning_rate(config, 5, 10, 11392) == pytest.approx(2e-5 * 44.5**0.5)
    plain = OptimizerConfig(lr=2e-5, warmup=0)
    assert learning_rate(plain, 5, 10, 1024) == 2e-5


def test_auto_lr_is_what_a_run_trains_with(base):
    sgd = {"optimizer__name": "sgd", "optimizer__warmup": 0, "optimizer__weight_decay": 0.0, "train__steps": 1}
    scaled = train(build(base, **sgd, optimizer__lr=0.8, optimizer__auto_lr="sqrt")).run  # √(4 / 256) is 1/8
    plain = train(build(base, **sgd, optimizer__lr=0.1, output=f"{base['output']}2")).run
    found, expected = weights(checkpoints(scaled)[-1]), weights(checkpoints(plain)[-1])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert '"lr": 0.1,' in (scaled / "metrics.jsonl").read_text()


def test_frozen_parameters_stay_and_the_others_move(base):
    run = train(build(base, train__freeze=["blocks.0.*", "*.scale_shift_table", "x_embedder.proj.bias"],
                      train__save_every=1, train__keep=9, optimizer__warmup=0)).run  # fmt: skip
    first, last = weights(checkpoints(run)[0]), weights(checkpoints(run)[-1])
    averages = weights(checkpoints(run)[-1], "ema")
    for name in first:
        if name == "y_embedder.y_embedding":
            continue
        still = name.startswith("blocks.0.") or name.endswith("scale_shift_table") or name == "x_embedder.proj.bias"
        assert torch.equal(first[name], last[name]) == still, name
        if still:
            assert torch.equal(averages[name], last[name]), name
    state = torch.load(checkpoints(run)[-1] / "training.pt", weights_only=True)
    model = tiny_model(in_channels=3, learn_sigma=False)
    frozen = match_names([n for n, _ in model.named_parameters()], ["blocks.0.*", "*.scale_shift_table"])
    assert len(state["optimizer"]["state"]) == len(list(model.parameters())) - len(frozen) - 1


def test_a_frozen_run_goes_on_bit_for_bit(base):
    options = {"train__freeze": ["blocks.0.*"], "train__keep": 9}
    straight = train(build(base, **options)).run
    again = Path(f"{base['output']}2")
    shutil.copytree(straight, again)
    shutil.rmtree(checkpoints(again)[-1])
    train(build(base, **options, output=str(again)))
    found, expected = weights(checkpoints(again)[-1]), weights(checkpoints(straight)[-1])
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_pattern_that_matches_nothing_names_near_ones_before_any_work(base):
    broken = build(base, train__freeze=["blocks.1.atn.qkv.*"], data__folder="none", text__model="none")
    with pytest.raises(InputError, match=r"'blocks.1.atn.qkv.\*' matches no parameter; near it are blocks.1.attn.qkv"):
        train(broken)
    with pytest.raises(InputError, match="match every parameter: nothing is left to train"):
        train(build(base, train__freeze=["*"]))
    train(build(base, train__steps=2))
    with pytest.raises(InputError, match=r"another configuration .*train.freeze"):
        train(build(base, train__steps=4, train__freeze=["blocks.0.*"]))


def test_freezing_nothing_trains_everything():
    model = copy.deepcopy(tiny_model())
    freeze(model, ["blocks.*"])
    freeze(model, [])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_stage_is_a_config_with_a_base_and_the_run_before_it(base, tmp_path):
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "second.yaml").write_text(yaml.safe_dump({
        "base": "first.yaml", "output": f"{base['output']}_16", "init_from": base["output"],
        "data": {"resolution": 16}, "model": {"latent_size": 16, "position_scale": 2.0},
        "train": {"steps": 2, "batch_size": 2, "save_every": 1}, "optimizer": {"lr": 1e-30},
    }))  # fmt: skip
    first = train(load_config(TrainConfig, tmp_path / "first.yaml"))
    second = train(load_config(TrainConfig, tmp_path / "second.yaml"))
    averages, start = weights(checkpoints(first.run)[-1], "ema"), weights(checkpoints(second.run)[0])
    assert all(torch.equal(start[name], averages[name]) for name in averages)  # lr is next to nothing
    # a stage that goes on needs the one before it no more
    config = load_config(TrainConfig, tmp_path / "second.yaml", ["train.steps=3"])
    first.run.rename(tmp_path / "moved")
    assert train(config).step == 3


def test_everything_missing_is_told_at_once_before_any_work(base, tmp_path):
    with pytest.raises(InputError) as caught:
        train(build(base, text__model=str(tmp_path / "t5"), init_from=str(tmp_path / "weights.pth"),
                    vae={"kind": "kl", "source": str(tmp_path / "vae")}, model__in_channels=4, model__latent_size=1,
                    data__folder=str(tmp_path / "none"), model__patch_size=1))  # fmt: skip
    lines = str(caught.value).split("\n")
    assert [line.split(" ")[0] for line in lines] == ["data.folder", "text.model", "vae.source", "init_from"]
    assert not (tmp_path / "run").exists()
