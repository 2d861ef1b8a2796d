"""Files of models as other people and tools leave them: variants, odd suffixes, and what is no model, by its name."""

import gzip
import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import HEADS, assert_same_weights, in_diffusers, official, put_in_hub_cache
from pixart import InputError, load_model
from pixart.checkpoint.save import export_model
from pixart.encoders.autoencoder import AutoencoderConfig, load_autoencoder
from pixart.encoders.text import TextConfig, TextEncoder
from pixart.encoders.vae import VaeAutoencoder
from test_vae import make_reference
from toy import tiny_inputs, tiny_model

STEM = "diffusion_pytorch_model"


def refuse(source, *parts: str, **options) -> str:
    with pytest.raises(InputError) as caught:
        load_model(source, **options)
    text = str(caught.value)
    assert "\n" not in text and all(part in text for part in parts), text
    return text


@pytest.fixture(scope="module")
def model():
    return tiny_model()


# ---------------------------------------------------------------------------------------------------- variants


@pytest.mark.parametrize("form", ["safetensors", "bin", "shards"])
def test_a_transformer_of_which_there_is_one_variant_loads(model, tmp_path, form):
    size = {"max_shard_size": "100KB"} if form == "shards" else {}
    in_diffusers(model).half().save_pretrained(tmp_path, variant="fp16", safe_serialization=form != "bin", **size)
    found = load_model(tmp_path)
    assert_same_weights(found, tiny_model().half(), null=False)


def test_the_file_without_a_variant_takes_precedence_and_of_two_variants_one_is_to_be_named(model, tmp_path):
    for variant in ("fp16", "ema"):
        in_diffusers(model).half().save_pretrained(tmp_path, variant=variant)
    refuse(tmp_path, "variants ema, fp16; name the file that you mean")
    assert load_model(tmp_path / f"{STEM}.ema.safetensors").x_embedder.proj.weight.dtype == torch.float16
    in_diffusers(model).save_pretrained(tmp_path)
    assert load_model(tmp_path).x_embedder.proj.weight.dtype == torch.float32


def test_a_cached_repository_of_one_variant_loads_offline(model, tmp_path, monkeypatch):
    in_diffusers(model).half().save_pretrained(tmp_path / "repository" / "transformer", variant="fp16")
    put_in_hub_cache(tmp_path / "repository", tmp_path / "cache", monkeypatch)
    assert_same_weights(load_model("owner/name"), tiny_model().half(), null=False)


@pytest.mark.parametrize("safe", [True, False])
def test_a_vae_of_which_there_is_one_variant_loads(tmp_path, safe):
    reference = make_reference().half()
    reference.save_pretrained(tmp_path, variant="fp16", safe_serialization=safe)
    vae = VaeAutoencoder.from_pretrained(tmp_path)
    for name, tensor in reference.float().state_dict().items():
        assert torch.equal(vae.model.state_dict()[name], tensor)


@pytest.mark.parametrize("form", ["whole", "shards"])
def test_a_text_encoder_of_which_there_is_one_variant_loads(text_encoder, tmp_path, form):
    from transformers import AutoTokenizer, BertModel

    whole = BertModel.from_pretrained(text_encoder)
    whole.half().save_pretrained(tmp_path, variant="fp16", max_shard_size="1MB" if form == "shards" else "1GB")
    AutoTokenizer.from_pretrained(text_encoder).save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    config = TextConfig(str(tmp_path), length=12, clean=False)
    states = TextEncoder.load(config).encode(["a red fox"])[0]
    reference = TextEncoder.load(TextConfig(str(text_encoder), length=12, clean=False)).encode(["a red fox"])[0]
    assert (states - reference).abs().max() < 5e-3 * reference.abs().max()


# --------------------------------------------------------------------------------- content, not suffix; buffers


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x.bin", "x.model", "x"])
@pytest.mark.parametrize("write", [torch.save, save_file])
def test_the_content_of_a_file_decides_and_not_its_suffix(model, tmp_path, name, write):
    write(official(model), tmp_path / name)
    assert_same_weights(load_model(tmp_path / name, overrides=HEADS), model)


@pytest.mark.parametrize("name", [f"{STEM}.safetensors", f"{STEM}.bin", "mine.pt"])
@pytest.mark.parametrize("write", [torch.save, save_file])
def test_the_content_of_a_vaes_file_decides_and_not_its_suffix(tmp_path, name, write):
    reference = make_reference()
    reference.save_config(tmp_path)
    write(reference.state_dict(), tmp_path / name)
    assert VaeAutoencoder.from_pretrained(tmp_path / name).downsample == 8


def test_a_text_encoder_under_the_wrong_suffix_says_what_to_rename(text_encoder, tmp_path):
    from transformers import AutoTokenizer, BertModel

    encoder = BertModel.from_pretrained(text_encoder)
    encoder.config.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(text_encoder).save_pretrained(tmp_path)
    torch.save(encoder.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"not what its suffix says.*rename it to pytorch_model\.bin"):
        TextEncoder.load(TextConfig(str(tmp_path), length=12, clean=False))


@pytest.mark.parametrize(
    "buffers",
    [
        {"n_averaged": torch.tensor(5)}, {"num_updates": torch.tensor(9), "decay": torch.tensor(0.99)},
        {"position_ids": torch.arange(7)}, {"mask": torch.zeros(3, dtype=torch.bool)},
    ],
)  # fmt: skip
def test_counters_beside_the_weights_make_no_quantised_model(model, tmp_path, buffers):
    save_file({**official(model), **buffers}, tmp_path / "x.safetensors")
    assert_same_weights(load_model(tmp_path / "x.safetensors", overrides=HEADS), model)


@pytest.mark.parametrize("name", ["t_block.1.bias", "blocks.0.attn.qkv.weight_scale", "blocks.0.mlp.fc1.weight.absmax"])
def test_integers_in_place_of_weights_or_their_scales_are_quantised(model, tmp_path, name):
    save_file({**official(model), name: torch.zeros(288, dtype=torch.int8)}, tmp_path / "x.safetensors")
    refuse(tmp_path / "x.safetensors", name, "quantised weights are not supported", overrides=HEADS)


# ------------------------------------------------------------------------------------------ other tools' files


def archive(kind: str) -> bytes:
    data = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=data, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("model.safetensors"), io.BytesIO())
    elif kind == "npz":
        np.savez(data, a=np.zeros(3))
    else:
        with zipfile.ZipFile(data, "w") as file:
            file.writestr("model/x.safetensors", b"123")
    return data.getvalue()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"GGUF\3\0\0\0" + bytes(99), "a GGUF file, whose weights are quantised; load the model that it was made of"),
        (gzip.compress(b"x" * 99, mtime=0), "compressed by gzip; unpack it"),
        (b"7z\xbc\xaf'\x1c" + bytes(99), "a 7z archive; unpack it"),
        (b"Rar!\x1a\x07\x01\0", "a RAR archive; unpack it"),
        (b"\x28\xb5\x2f\xfd" + bytes(99), "compressed by zstd; unpack it"),
        (archive("tar"), "a tar archive; unpack it"),
        (archive("zip"), "an archive of model/x.safetensors; unpack it, and name a file in it"),
        (archive("npz"), "arrays of NumPy (.npz)"),
        (b"\x93NUMPY" + bytes(99), "an array of NumPy"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file, as of Keras"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "an image, not weights"),
        (bytes(2000), "begins with zeros, as unfinished downloads do; fetch it again"),
        (b"404: Not Found\n", "a text, not weights ('404: Not Found')"),
        (b'{"error": "gated"}', 'a text, not weights (\'{"error": "gated"}\')'),
    ],
    ids=range(14),
)
def test_files_of_other_kinds_are_named_whatever_their_suffix(tmp_path, content, expected):
    for name in ("x.safetensors", "x.pth"):
        (tmp_path / name).write_bytes(content)
        refuse(tmp_path / name, expected)


NAMES = {
    "lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight": "holds LoRA matrices",
    "unet.down_blocks.0.attentions.0.attn1.processor.to_q_lora.down.weight": "holds LoRA matrices",
    "lycoris_blocks_0_attn_qkv.hada_w1_a": "holds LoHa matrices",
    "lycoris_blocks_0_attn_qkv.lokr_w1": "holds LoKr matrices",
    "oft_unet_blocks_0_attn_qkv.oft_blocks": "holds OFT matrices",
    "base_model.model.blocks.0.attn.qkv.boft_R": "holds OFT matrices",
    "base_model.model.blocks.0.attn.qkv.ia3_l": "holds (IA)³ scales",
    "lycoris_blocks_0_attn_qkv.diff": "holds a LyCORIS adapter",
    "ip_adapter.1.to_k_ip.weight": "an IP-Adapter",
    "adapter.conv_in.weight": "a T2I-Adapter",
    "<cat>": "a textual inversion",
    "768.0.linear.0.weight": "a hypernetwork",
    "text_model.encoder.layers.0.self_attn.k_proj.weight": "a CLIP encoder",
    "single_transformer_blocks.0.attn.to_q.weight": "another kind of transformer (SD3, FLUX)",
    "blocks.0.attn1.Wqkv.weight": "another kind of transformer (HunyuanDiT, Lumina, Sana)",
    "model.layers.0.self_attn.q_proj.weight": "a language model",
}


@pytest.mark.parametrize("name", NAMES)
def test_adapters_and_other_networks_are_named(tmp_path, name):
    save_file({name: torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    refuse(tmp_path / "x.safetensors", NAMES[name])


@pytest.mark.parametrize("other", ["vae.encoder.conv_in.weight", "text_encoders.t5xxl.transformer.shared.weight"])
def test_an_all_in_one_file_is_named_with_its_parts(model, tmp_path, other):
    network = {f"model.diffusion_model.{name}": tensor for name, tensor in official(model).items()}
    save_file({**network, other: torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    refuse(tmp_path / "x.safetensors", f"all-in-one file of a network and its {other.partition('.')[0]}; save the")
    save_file(network, tmp_path / "x.safetensors")
    assert_same_weights(load_model(tmp_path / "x.safetensors", overrides=HEADS), model)


FOLDERS = {
    "adapter_config.json": "an adapter of PEFT (LORA on PixArt-alpha/x); give its base as the model",
    "pytorch_lora_weights.safetensors": "LoRA matrices that diffusers saved",
    "zero_to_fp32.py": "a checkpoint of DeepSpeed; gather it first: python FOLDER/zero_to_fp32.py",
    "pytorch_model_fsdp_0/__0_0.distcp": "torch.distributed.checkpoint.format_utils dcp_to_torch",
    "random_states_0.pkl": "a state that accelerate saved; it holds no weights",
    "pixart-Q8.gguf": "pixart-Q8.gguf is quantised (GGUF)",
    "metrics.jsonl": "a run without a checkpoint; train it until its first save",
    "sub/x.safetensors": "its weights are one folder deeper; name",
    "image.png": "expected model.safetensors and config.json, a run's checkpoints",
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_other_tools_and_incomplete_runs_are_named(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    text = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "PixArt-alpha/x"})
    (tmp_path / name).write_text(text)
    refuse(tmp_path, FOLDERS[name])


def test_the_weights_in_a_state_that_accelerate_saved_load_as_the_error_says(model, tmp_path):
    save_file(official(model), tmp_path / "model.safetensors")
    for name in ("optimizer.bin", "random_states_0.pkl"):
        (tmp_path / name).write_bytes(b"x")
    text = refuse(tmp_path, "a state that accelerate saved; give")
    assert_same_weights(load_model(text.rpartition("give ")[2], overrides=HEADS), model)
    (tmp_path / "optimizer.bin").unlink()
    (tmp_path / "random_states_0.pkl").unlink()
    refuse(tmp_path, "model.safetensors without config.json, so not a model of this package; give")


# --------------------------------------------------------------------------------------- configs and dtypes


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("caption_channels", None, "caption_channels null, by which diffusers builds a transformer without"),
        ("interpolation_scale", "a", "interpolation_scale 'a', expected a number"),
        ("sample_size", [8, 8], "sample_size [8, 8], expected a whole number"),
    ],
)
def test_a_transformers_config_of_another_kind_is_named(model, tmp_path, key, value, expected):
    in_diffusers(model).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, key: value}))
    refuse(tmp_path, expected)
    if value is None:  # with tensors that fit it
        path = tmp_path / f"{STEM}.safetensors"
        save_file({name: t for name, t in load_file(path).items() if "caption_projection" not in name}, path)
        refuse(tmp_path, expected)


def test_a_vae_that_does_not_shrink_by_8_is_named(tmp_path):
    make_reference((32, 32, 64)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has 4 channels at 1/4 of the size, expected 4 at 1/8"):
        load_autoencoder(AutoencoderConfig("kl", str(tmp_path)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["t", "size", "aspect_ratio"])
def test_times_and_sizes_in_half_precision_are_refused_by_dtype(dtype, name):
    model = tiny_model(micro_conditions=True)
    inputs = tiny_inputs(model)
    inputs[name] = inputs[name].to(dtype)
    with pytest.raises(InputError, match=rf"{name}: got {str(dtype)[6:]}, in which numbers are already rounded"):
        model(**inputs)


def test_times_may_be_whole_numbers_and_the_weights_in_half_precision():
    model = tiny_model().bfloat16()
    inputs = tiny_inputs(model)
    for name in ("x", "caption"):
        inputs[name] = inputs[name].bfloat16()
    rounded = {**inputs, "t": inputs["t"].round().long()}
    assert torch.equal(model(**rounded), model(**{**rounded, "t": rounded["t"].float()}))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("form", ["ours", "official", "diffusers"])
def test_weights_that_are_not_finite_are_not_exported(tmp_path, value, form):
    model = tiny_model()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.bias[3] = value
    with pytest.raises(InputError, match=r"blocks\.0\.mlp\.fc1\.bias has NaN or infinite weights; nothing was written"):
        export_model(model, tmp_path / "x.pth" if form == "official" else tmp_path / "x", form, card=_card(model))
    assert list(tmp_path.iterdir()) == []


def _card(model):
    from pixart import ModelCard

    return ModelCard(model.config)
