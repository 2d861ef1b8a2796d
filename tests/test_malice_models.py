"""Malicious model files that would take forever or run code: one line each, before anything is built."""

import json
import os
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from checkpoints import edit_json, official
from guard import guarded, within
from pixart.adapters.load import load_with_card
from pixart.checkpoint.files import ModelCard, save_model
from pixart.checkpoint.load import load_model
from pixart.config import load_config
from pixart.encoders.autoencoder import AutoencoderConfig, load_autoencoder
from pixart.encoders.text import TextConfig, TextEncoder, find_text_model
from pixart.errors import InputError
from pixart.features.official import OfficialFeatures
from pixart.files import read_json
from pixart.train.config import TrainConfig
from toy import tiny_model


def refuse(source: Path | str, match: str, load=load_model) -> None:
    with within(10), pytest.raises(InputError, match=match) as caught:
        load(source)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000


def strided(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros(1).as_strided(shape, (0,) * len(shape))


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return official(tiny_model())


@pytest.fixture
def text(text_encoder, tmp_path) -> Path:
    return Path(shutil.copytree(text_encoder, tmp_path / "text"))


def encoder(folder: Path | str) -> TextEncoder:
    return TextEncoder.load(TextConfig(model=str(folder), length=12))


# --------------------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("number", ["1000000000", "9" * 5000, "07"])
def test_a_block_of_any_number_builds_no_blocks_before_it(state, tmp_path, number):
    state[f"blocks.{number}.attn.qkv.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "x.safetensors") if len(number) < 100 else torch.save(state, tmp_path / "x.safetensors")
    refuse(tmp_path / "x.safetensors", r"blocks\.2 is missing beside blocks\.|a tensor is called 'blocks\.999")


@pytest.mark.parametrize("name", ["pos_embed", "blocks.0.attn.qkv.weight", "x_embedder.proj.weight"])
@pytest.mark.parametrize("new", [True, False])
def test_tensors_of_stride_0_claim_no_more_than_their_file_holds(state, tmp_path, name, new):
    shape = {"pos_embed": (1, 10**10, 48), "x_embedder.proj.weight": (10**6, 4, 2, 10**6)}.get(name, (10**9, 10**6))
    torch.save({**state, name: strided(shape)}, tmp_path / "x.pth", _use_new_zipfile_serialization=new)
    refuse(tmp_path / "x.pth", rf"its tensors claim .* \({name} (is of|has) shape|truncated or damaged")


def test_tensors_that_are_not_plain_are_named(state, tmp_path):
    sparse = torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (10**9, 10**9))
    for odd in (sparse, torch.empty(10**9, 10**9, device="meta")):
        torch.save({**state, "pos_embed": odd}, tmp_path / "x.pth")
        refuse(tmp_path / "x.pth", "pos_embed is a torch|pos_embed")
    torch.save({**state, 3: torch.zeros(2)}, tmp_path / "x.pth")
    refuse(tmp_path / "x.pth", "a tensor is called '3'")
    torch.save({**state, "x_embedder.proj.weight": torch.zeros(0, 4, 2, 2)}, tmp_path / "x.pth")
    refuse(tmp_path / "x.pth", r"expected 4 dimensions, none of them empty")


def test_an_archive_that_is_packed_or_lies_about_its_length_is_refused(state, tmp_path):
    torch.save(state, tmp_path / "x.pth")
    with (
        zipfile.ZipFile(tmp_path / "x.pth") as old,
        zipfile.ZipFile(tmp_path / "y.pth", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry) + bytes(20_000_000) * entry.filename.endswith("data.pkl"))
    refuse(tmp_path / "y.pth", r"x/data\.pkl in it is compressed, which torch\.save never does")


def test_many_networks_in_one_file_cost_no_comparison_of_each_with_each(tmp_path):
    state = {f"m{i}.x_embedder.proj.weight": torch.zeros(1) for i in range(2_000)}
    torch.save(OrderedDict(state), tmp_path / "x.pth")
    refuse(tmp_path / "x.pth", "holds 2000 networks")


@pytest.mark.parametrize("kind", ["fifo", "device", "in a folder"])
def test_sources_that_are_no_files_hang_nothing(tmp_path, kind):
    source = tmp_path / "x.pth"
    if kind == "fifo":
        os.mkfifo(source)
    elif kind == "device":
        source = Path("/dev/zero")
    else:
        save_model(tmp_path / "m", tiny_model().state_dict(), ModelCard())
        os.remove(tmp_path / "m" / "config.json")
        os.mkfifo(tmp_path / "m" / "config.json")
        refuse(tmp_path / "m", r"config\.json: cannot be read .*FIFO")
        return
    refuse(source, "a FIFO or device, expected a file or folder of weights")
    refuse(source, "expected a folder with an encoder", encoder)
    refuse(str(source), "no such folder|expected", lambda path: load_autoencoder(AutoencoderConfig("kl", path)))


# --------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("name", "value"), [("depth", 10**9), ("hidden_size", 10**12), ("latent_size", 10**9), ("caption_length", 10**18)]
)
def test_a_card_of_any_size_builds_no_network_before_it_is_compared(tmp_path, name, value):
    model = tiny_model()
    save_model(tmp_path / "m", model.state_dict(), ModelCard(model.config))
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps({**read_json(path), "model": {**read_json(path)["model"], name: value}}))
    refuse(tmp_path / "m", rf"{name}: got {value}")


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, '{"model": ' + "9" * 5000 + "}", "[1]", "\udcff"])
def test_every_json_is_read_by_one_reader(tmp_path, text):
    model = tiny_model()
    save_model(tmp_path / "m", model.state_dict(), ModelCard(model.config))
    (tmp_path / "m" / "config.json").write_bytes(text.encode(errors="surrogatepass"))
    refuse(tmp_path / "m", r"config\.json: (cannot be read|expected keys and values)")
    (tmp_path / "m" / "config.json").rename(tmp_path / "m" / "adapter.json")
    refuse(tmp_path / "m", r"adapter\.json: (the adapter's settings cannot be read|expected)", load_with_card)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"layers_per_block": 10**8}, "layers_per_block: got 100000000, expected positive numbers up to 65536"),
        ({"layers_per_block": 60_000}, "describes 240000 layers, but .* has [0-9]+ tensors"),
        ({"block_out_channels": [10**12] * 4}, "block_out_channels: got .* expected positive numbers"),
        ({"block_out_channels": [32] * 2000}, "describes [0-9]+ layers"),
        ({"scaling_factor": float("inf")}, "scaling_factor: got inf"),
    ],
)
def test_a_vae_of_any_depth_is_compared_with_its_tensors_first(tmp_path, changes, match):
    from diffusers import AutoencoderKL

    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    AutoencoderKL(
        **kinds, block_out_channels=[8, 8, 8, 8], norm_num_groups=4, layers_per_block=1, latent_channels=4
    ).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    refuse(str(tmp_path), match, lambda path: load_autoencoder(AutoencoderConfig("kl", path)))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_hidden_layers": 10**8}, "num_hidden_layers is 100000000, expected at most 64"),
        ({"num_labels": 10**9}, "num_labels is 1000000000, expected at most"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000, expected at most 16,777,216"),
        ({"vocab_size": 10**7}, "describes .* weights, but the files beside it have"),
        ({"attn_implementation": "someone/kernel"}, "attn_implementation names code on the Hub"),
    ],
)
def test_a_text_encoder_of_any_depth_is_compared_with_its_tensors_first(text, changes, match):
    edit_json(text / "config.json", **changes)
    refuse(text, match, encoder)


def test_yaml_aliases_stand_for_no_more_than_a_person_writes(tmp_path):
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (tmp_path / "x.yaml").write_text("\n".join(lines))
    refuse(
        tmp_path / "x.yaml", "its aliases expand to more than 10000 values", lambda path: load_config(TrainConfig, path)
    )
    os.mkfifo(tmp_path / "fifo.yaml")
    refuse(tmp_path / "fifo.yaml", "cannot be read .*FIFO", lambda path: load_config(TrainConfig, path))


# ------------------------------------------------------------------------------------------------------------- code


def test_a_folder_with_code_of_its_own_neither_runs_it_nor_asks(text, tmp_path, monkeypatch):
    proof = tmp_path / "proof"
    (text / "mine.py").write_text(f"open({str(proof)!r}, 'w')\nclass C: pass\nclass M: pass\n")
    auto = {"AutoConfig": "mine.C", "AutoModel": "mine.M", "AutoTokenizer": ["mine.M", "mine.M"]}
    edit_json(text / "config.json", auto_map=auto, model_type="mine")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked on the terminal"))
    refuse(text, "cannot be loaded", encoder)
    edit_json(text / "config.json", model_type="bert")
    edit_json(text / "tokenizer_config.json", auto_map=auto, tokenizer_class="Mine")
    encoder(text)  # by transformers' own classes
    assert not proof.exists()


@pytest.mark.parametrize("package", ["json", "six", "sys", "yaml", "torch", "pixart", "__main__"])
def test_a_package_without_an_encoder_is_refused_and_not_run(package, monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text("raise SystemExit")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')  # beside a module, as in site-packages
    for name in ("tokenizer.json", "model.safetensors"):
        (tmp_path / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in (package, "mine"):
        with pytest.raises(InputError, match=r"the package (has no encoder|is not installed)"):
            find_text_model(f"pip:{name}")


# --------------------------------------------------------------------------------------------- the authors' features


def authors_features(root: Path) -> Path:
    (root / "img_vae_features_32resolution" / "noflip").mkdir(parents=True)
    (root / "caption_feature_wmask").mkdir()
    (root / "data_info.json").write_text(json.dumps([{"path": "a.png", "prompt": "x", "height": 32, "width": 32}]))
    np.save(root / "img_vae_features_32resolution" / "noflip" / "a.npy", np.zeros((8, 4, 4), np.float32))
    np.savez_compressed(
        root / "caption_feature_wmask" / "a.npz",
        caption_feature=np.zeros((1, 3, 16), np.float32),
        attention_mask=np.ones((1, 3)),
    )
    return root


def features(root: Path) -> OfficialFeatures:
    from pixart.data.buckets import bucket_table

    return OfficialFeatures(root, bucket_table(32, 8, square=True), resolution=32, downsample=8, scale=1.0)


class Proof:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_objects_packed_zeros_and_fifos_in_the_authors_features_are_one_line(tmp_path):
    root, proof = authors_features(tmp_path / "f"), tmp_path / "proof"
    latents, states = (
        root / "img_vae_features_32resolution" / "noflip" / "a.npy",
        root / "caption_feature_wmask" / "a.npz",
    )
    assert features(root).caption(0).shape == (3, 16)
    good = states.read_bytes()
    bombs = {
        "object": lambda: np.savez(states, caption_feature=np.array([Proof(proof)], dtype=object)),
        "expected the states of one caption": lambda: np.savez_compressed(
            states, caption_feature=np.zeros((1, 10**6, 128), np.uint8)
        ),
        "cannot be read": lambda: states.write_bytes(good[:-20]),
        "KeyError": lambda: np.savez(states, other=np.zeros(3)),
        "it is a FIFO": lambda: (states.unlink(), os.mkfifo(states)),
    }
    with guarded(root, tmp_path):
        for match, make in bombs.items():
            make()
            if match == "it is a FIFO":
                refuse(root, "npz is missing", lambda path: features(path).caption(0))
            else:
                refuse(root, match, lambda path: features(path).caption(0))
    for make in (
        lambda: np.save(latents, np.array([Proof(proof)], dtype=object), allow_pickle=True),
        lambda: latents.write_bytes(latents.read_bytes()[:-4].replace(b"(8, 4, 4)", b"(10**9,4)")),
        lambda: (latents.unlink(), os.mkfifo(latents)),
    ):
        make()
        refuse(root, "none of its features can be used; the first: a.png: latents cannot be read", features)
    assert not proof.exists()
