"""Runs and models do not depend on a directory: relative paths, and encoders that were moved."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from features import make_store
from pixart.config import load_config
from pixart.errors import InputError
from pixart.inference.pipeline import Pipeline
from pixart.train.config import TrainConfig
from pixart.train.loop import train
from runs import build, make_pictures, make_text_encoder, settings
from test_vae import SMALL, make_reference


@pytest.fixture
def begun(tmp_path, monkeypatch) -> dict:
    """A run of two steps that was begun with relative paths, from its own folder."""
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path / "pictures")
    make_text_encoder(tmp_path / "text")
    base = settings("run", "pictures", "text")
    base["train"] |= {"steps": 2, "save_every": 2}
    train(build(base))
    return base


def test_a_run_begun_with_relative_paths_samples_and_goes_on_from_any_directory(begun, tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    pipeline = Pipeline.from_pretrained("../../run")
    assert pipeline("a red square", steps=1)[0].size == (8, 8)
    elsewhere = {**begun, **settings("../../run", "../../pictures", "../../text"), "train": begun["train"]}
    assert train(build(elsewhere, train__steps=3)).step == 3


def change_weights(folder: Path) -> None:
    model = transformers.AutoModel.from_pretrained(folder)
    torch.nn.init.ones_(model.embeddings.word_embeddings.weight)
    model.save_pretrained(folder)


def move_encoder(base: dict, folder: Path) -> dict:
    """The run's config after its encoder was moved."""
    shutil.move(folder / "text", folder / "moved")
    return {**base, "text": {**base["text"], "model": "moved"}}


def test_a_run_whose_encoder_moved_goes_on_with_the_same_weights(begun, tmp_path):
    shutil.move(tmp_path / "text", tmp_path / "t")
    with pytest.raises(InputError, match=r"text\.model: text encoder .*give another with text\.model="):
        train(build(begun, train__steps=3))
    shutil.move(tmp_path / "t", tmp_path / "text")
    assert train(build(move_encoder(begun, tmp_path), train__steps=3)).step == 3
    assert load_config(TrainConfig, tmp_path / "run" / "config.yaml").text.model == str(tmp_path / "moved")
    assert Pipeline.from_pretrained("run").text.config.model == str(tmp_path / "moved")


def test_a_run_does_not_go_on_with_another_encoder(begun, tmp_path):
    moved = move_encoder(begun, tmp_path)
    change_weights(tmp_path / "moved")
    with pytest.raises(InputError, match=r"text\.model: the weights at \S+moved are not those that .* trained with"):
        train(build(moved, train__steps=3))
    assert load_config(TrainConfig, tmp_path / "run" / "config.yaml").text.model == str(tmp_path / "text")


def test_changed_weights_at_the_same_place_are_reported(begun, tmp_path, capfd):
    change_weights(tmp_path / "text")
    assert train(build(begun, train__steps=3)).step == 3
    assert "warning: text.model: the weights at" in capfd.readouterr().out


def test_a_run_that_holds_no_fingerprints_goes_on_from_the_old_place_alone_and_then_holds_them(begun, tmp_path):
    history = tmp_path / "run" / "history.jsonl"
    row = json.loads(history.read_text())
    assert set(row.pop("encoders")) == {"text.model", "vae.source"}
    history.write_text(json.dumps(row) + "\n")
    with pytest.raises(
        InputError,
        match=r"text\.model may change only if the run has recorded its encoder's fingerprint.*start it once",
    ):
        train(build(move_encoder(begun, tmp_path), train__steps=3))
    shutil.move(tmp_path / "moved", tmp_path / "text")
    assert train(build(begun, train__steps=3)).step == 3
    assert train(build(move_encoder(begun, tmp_path), train__steps=4)).step == 4


def test_a_run_on_features_looks_at_an_encoder_that_moved(begun, tmp_path):
    make_store(begun, tmp_path / "store", prompts=["a red square"])
    base = {**begun, "output": "run2", "data": {**begun["data"], "features": "store"}}
    train(build(base))
    moved = move_encoder(base, tmp_path)
    assert train(build(moved, train__steps=3)).step == 3
    other = make_text_encoder(tmp_path / "other")
    change_weights(other)
    with pytest.raises(InputError, match=r"text\.model: the weights at \S+other are not those that .* trained with"):
        train(build(moved, text__model="other", train__steps=4))


def test_a_run_on_features_goes_on_without_the_encoder_that_it_was_begun_with(begun, tmp_path):
    make_store(begun, tmp_path / "store")
    base = {**begun, "output": "run2", "data": {**begun["data"], "features": "store"}}
    train(build(base))
    shutil.rmtree(tmp_path / "text")
    assert train(build(base, train__steps=3)).step == 3
    assert load_config(TrainConfig, tmp_path / "run2" / "config.yaml").text.model == str(tmp_path / "text")


def test_a_run_begun_with_a_vae_goes_on_with_the_same_one_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path / "pictures", side=32)
    make_text_encoder(tmp_path / "text")
    make_reference(SMALL).save_pretrained(tmp_path / "vae")
    base = settings("run", "pictures", "text")
    base["model"] |= {"in_channels": 4, "latent_size": 4}
    base["data"]["resolution"] = 32
    base |= {"vae": {"kind": "kl", "source": "vae"}, "train": {**base["train"], "steps": 2}}
    train(build(base))
    shutil.move(tmp_path / "vae", tmp_path / "v")
    with pytest.raises(InputError, match=r"vae\.source: VAE .*give another with vae\.source="):
        train(build(base, train__steps=3))
    assert train(build(base, train__steps=3, vae__source="v")).step == 3
    other = make_reference(SMALL)
    torch.nn.init.ones_(other.encoder.conv_in.bias)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"vae\.source: the weights at \S+other are not those that .* trained with"):
        train(build(base, train__steps=4, vae__source="other"))
