"""Files of a VAE, how a model's config names them, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart.config import build, to_dict
from pixart.encoders.autoencoder import AutoencoderConfig, IdentityAutoencoder, load_autoencoder
from pixart.encoders.vae import AutoencoderKL, VaeAutoencoder, VaeConfig
from pixart.errors import InputError
from test_vae import SMALL, make_reference, pixels, wrap

OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module")
def reference():
    return make_reference()


@pytest.fixture(scope="module")
def saved(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    reference.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of `saved` to damage."""
    return shutil.copytree(saved, tmp_path / "vae")


def edit_config(folder, **changes):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))


@pytest.mark.parametrize("form", ["folder", "file", "subfolder", "bin"])
def test_what_diffusers_saves_loads(form, reference, folder):
    source, options = folder, {}
    if form == "file":
        source = folder / "diffusion_pytorch_model.safetensors"
    elif form == "subfolder":
        source, options = folder.parent, {"subfolder": folder.name}
    elif form == "bin":
        (folder / "diffusion_pytorch_model.safetensors").unlink()
        torch.save(reference.state_dict(), folder / "diffusion_pytorch_model.bin")
    vae = VaeAutoencoder.from_pretrained(source, **options)
    assert torch.equal(vae.encode(pixels()), wrap(reference).encode(pixels()))
    assert not vae.model.training
    assert not any(parameter.requires_grad for parameter in vae.model.parameters())


@pytest.mark.parametrize("source", ["owner/name", "owner/name/vae"])
def test_a_cached_hub_repository_loads_offline(source, saved, reference, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    shutil.copytree(saved, repository / "snapshots" / ("0" * 40) / source.removeprefix("owner/name").strip("/"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert torch.equal(VaeAutoencoder.from_pretrained(source).encode(pixels()), wrap(reference).encode(pixels()))
    with pytest.raises(InputError, match="VAE 'owner/other': no such folder, and not on the Hub or in its cache"):
        VaeAutoencoder.from_pretrained("owner/other")


@pytest.mark.parametrize("convolutions", [False, True])
def test_files_with_the_old_attention_names_load(convolutions, reference, folder):
    state = {}
    for name, tensor in reference.state_dict().items():
        for new, old in OLD_NAMES.items():
            if f"attentions.0.{new}." in name:
                name = name.replace(new, old)
                tensor = tensor[..., None, None] if convolutions and name.endswith("weight") else tensor
        state[name] = tensor.contiguous()
    assert sum("query" in name or "proj_attn" in name for name in state) == 8
    model = AutoencoderKL(VaeConfig(block_out_channels=SMALL))
    model.load_state_dict(state, strict=True)
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    expected = wrap(reference).encode(pixels())
    assert torch.equal(VaeAutoencoder(model).encode(pixels()), expected)
    assert torch.equal(VaeAutoencoder.from_pretrained(folder).encode(pixels()), expected)


def test_both_attention_names_at_once_are_refused(reference):
    state = dict(reference.state_dict())
    state["decoder.mid_block.attentions.0.query.weight"] = state["decoder.mid_block.attentions.0.to_q.weight"]
    with pytest.raises(RuntimeError, match=r"Unexpected key.*attentions\.0\.query"):
        AutoencoderKL(VaeConfig(block_out_channels=SMALL)).load_state_dict(state)


def test_a_config_of_the_first_diffusers_files_means_sds_scale(folder):
    settings = json.loads((folder / "config.json").read_text())
    first = ("act_fn", "block_out_channels", "down_block_types", "in_channels", "latent_channels", "layers_per_block",
             "norm_num_groups", "out_channels", "sample_size", "up_block_types", "_class_name")  # fmt: skip
    (folder / "config.json").write_text(json.dumps({key: settings[key] for key in first}))
    assert VaeAutoencoder.from_pretrained(folder).scale == 0.18215


@pytest.mark.parametrize(
    ("force_upcast", "upcast", "asked", "expected"),
    [
        (True, None, torch.float16, torch.float32),
        (True, False, torch.float16, torch.float16),
        (False, None, torch.float16, torch.float16),
        (False, True, torch.float16, torch.float32),
        (True, None, torch.bfloat16, torch.bfloat16),
    ],
)
def test_a_vae_that_overflows_in_fp16_runs_in_fp32(force_upcast, upcast, asked, expected, folder):
    edit_config(folder, force_upcast=force_upcast)
    assert VaeAutoencoder.from_pretrained(folder, dtype=asked, upcast=upcast).dtype == expected


# in a model's config


def test_a_configs_numbers_are_there_without_the_weights_and_are_those_of_the_weights(saved):
    config = AutoencoderConfig("kl", "no/where")
    assert (config.latent_channels, config.downsample) == (4, 8)
    vae = load_autoencoder(AutoencoderConfig("kl", str(saved), 0.18215), dtype=torch.bfloat16)
    assert (vae.latent_channels, vae.downsample, vae.dtype) == (4, 8, torch.bfloat16)
    identity = load_autoencoder(AutoencoderConfig())
    assert isinstance(identity, IdentityAutoencoder)
    assert (AutoencoderConfig().latent_channels, AutoencoderConfig().downsample) == (3, 1)


def test_a_config_survives_its_file_and_an_old_one_still_loads():
    config = AutoencoderConfig("kl", "stabilityai/sd-vae-ft-ema", 0.18215)
    assert build(AutoencoderConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert build(AutoencoderConfig, {"kind": "identity"}) == AutoencoderConfig()


def test_a_scale_other_than_the_files_is_refused_with_both(saved):
    with pytest.raises(InputError, match=r"has scaling factor 0\.18215, but vae\.scale is 0\.13025"):
        load_autoencoder(AutoencoderConfig("kl", str(saved), 0.13025))


def test_a_vae_of_other_numbers_than_the_kinds_is_refused(tmp_path):
    make_reference((32, 64, 64)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has 4 channels at 1/4 of the size, expected 4 at 1/8"):
        load_autoencoder(AutoencoderConfig("kl", str(tmp_path)))


# wrong input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "kl"}, "vae.source: expected"),
        ({"source": "somewhere"}, "need vae.kind kl"),
        ({"kind": "kl", "source": "somewhere", "scale": 0.0}, "vae.scale: got 0.0"),
        ({"kind": "vq"}, "kind: got 'vq'"),
    ],
)
def test_wrong_autoencoder_configs_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        build(AutoencoderConfig, settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "_class_name: got AutoencoderTiny, expected AutoencoderKL"),
        ({"use_quant_conv": False}, "use_quant_conv: got False, only True is supported"),
        ({"shift_factor": 0.1}, "shift_factor: got 0.1, only None"),
        ({"latents_mean": [0.0] * 4}, "latents_mean: got"),
        ({"act_fn": "relu"}, "act_fn: got 'relu'"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"] * 4}, "up_block_types: got 'AttnUpDecoderBlock2D', only"),
        ({"norm_num_groups": 48}, r"block_out_channels \[32, 32, 64, 64\]: not multiples of norm_num_groups 48"),
        ({"scaling_factor": -1.0}, "scaling_factor: got -1.0, expected positive"),
        ({"layers_per_block": "two"}, "layers_per_block: got 'two'"),
        ({"block_out_channels": []}, r"block_out_channels: got \(\)"),
        ({"new_setting": 1}, "unknown key 'new_setting'"),
        ({"latent_channels": 16}, r"conv_in\.weight: got \(64, 4, 3, 3\), expected \(64, 16, 3, 3\)"),
        ({"layers_per_block": 1}, r"resnets\.2\.conv1\.bias: got \(64,\), expected no such tensor.*and \d+ more"),
        ({"in_channels": 4, "out_channels": 4}, "does not fit"),
    ],
)
def test_wrong_configs_are_refused(changes, message, folder):
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=message) as error:
        VaeAutoencoder.from_pretrained(folder)
    assert str(folder) in str(error.value)


def drop_a_tensor(path):
    save_file({name: tensor for name, tensor in load_file(path).items() if name != "quant_conv.bias"}, path)


SAFE, BIN = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("config.json", lambda path: path.unlink(), "config.json: the VAE's config cannot be read"),
        ("config.json", lambda path: path.write_text("{"), "config.json: the VAE's config cannot be read"),
        ("config.json", lambda path: path.write_text("[]"), "expected the settings of a VAE, got a list"),
        (SAFE, lambda path: path.unlink(), rf"expected {SAFE} or {BIN} in"),
        (SAFE, lambda path: path.write_bytes(path.read_bytes()[:1000]), "the VAE's weights cannot be read"),
        (SAFE, drop_a_tensor, r"quant_conv\.bias: got nothing, expected \(8,\)$"),
        (BIN, lambda path: path.write_bytes(b"nothing"), r"a text, not weights \('nothing'\)"),
        (BIN, lambda path: path.write_bytes(b"\x80\2}"), "the VAE's weights cannot be read"),
        (BIN, lambda path: torch.save({"state_dict": {}}, path), "expected a VAE's tensors by name"),
        (BIN, lambda path: torch.save({"a": shutil.Error()}, path), "the VAE's weights cannot be read"),
    ],
)
def test_broken_files_are_refused(file, damage, message, folder):
    if file == BIN:
        (folder / SAFE).unlink()
    damage(folder / file)
    with pytest.raises(InputError, match=message):
        VaeAutoencoder.from_pretrained(folder)


def test_a_place_without_a_vae_is_refused_with_a_hint(folder):
    with pytest.raises(InputError, match="no such folder or file, and not a Hub id"):
        VaeAutoencoder.from_pretrained(folder / "nothing")
    with pytest.raises(InputError, match="there is a VAE in its subfolder 'vae'"):
        VaeAutoencoder.from_pretrained(folder.parent)
    (folder / "vae.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"vae\.pt: the file is empty"):
        VaeAutoencoder.from_pretrained(folder / "vae.pt")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda vae: vae.encode(torch.zeros(3, 32, 32)), r"pixels: got shape \(3, 32, 32\), expected \(B, 3, H, W\)"),
        (lambda vae: vae.encode(torch.zeros(1, 4, 32, 32)), r"pixels: got shape \(1, 4, 32, 32\)"),
        (lambda vae: vae.encode(torch.zeros(1, 3, 32, 36)), "pixels: size 32 × 36: both sides must be multiples of 8"),
        (lambda vae: vae.encode(torch.zeros(1, 3, 0, 32)), "pixels: size 0 × 32"),
        (lambda vae: vae.encode(torch.zeros(1, 3, 32, 32).byte()), "pixels: got torch.uint8"),
        (lambda vae: vae.encode(torch.zeros(1, 3, 32, 32), torch.zeros(1, 4, 4, 5)), "noise: got shape .*, expected"),
        (lambda vae: vae.decode(torch.zeros(1, 3, 4, 4)), r"latents: got shape \(1, 3, 4, 4\), expected"),
        (lambda vae: vae.save_memory(tile=24), "tile: got 24 px, expected a multiple of 8, at least 32"),
        (lambda vae: vae.save_memory(tile=100), "tile: got 100 px"),
        (lambda vae: VaeAutoencoder(AutoencoderKL(VaeConfig(1, 1, 4, (32,)))), "expected RGB"),
    ],
)
def test_wrong_inputs_are_refused(call, message, reference):
    with pytest.raises(InputError, match=message):
        call(wrap(reference))
