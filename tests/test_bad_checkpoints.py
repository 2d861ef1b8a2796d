"""Broken and foreign inputs: each is one `InputError` that says what it is and what to do."""

import argparse
import builtins
import datetime
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import HEADS, assert_same_weights, edit_json, in_diffusers, official, put_in_hub_cache, save_official
from pixart.checkpoint.describe import describe
from pixart.checkpoint.files import ModelCard, save_model
from pixart.checkpoint.load import load_model
from pixart.errors import InputError
from test_start import dit_weights
from toy import tiny_model

ROOT = Path(__file__).parent.parent


class Bomb:
    """A pickle that runs a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def refuse(source, match: str, **options) -> str:
    with pytest.raises(InputError, match=match) as caught:
        load_model(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save(path, state):
    torch.save(state, path)
    return path


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def sharded(model, tmp_path):
    folder = tmp_path / "transformer"
    in_diffusers(model).save_pretrained(folder, max_shard_size="100KB")
    return folder


# files


@pytest.mark.parametrize("form", ["pth", "safetensors"])
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_a_truncated_file(form, part, model, tmp_path):
    path = tmp_path / f"x.{form}"
    torch.save(official(model), path) if form == "pth" else save_file(official(model), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    refuse(path, r"truncated or damaged \([\d,]+ bytes; .*\); fetch it again")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"\x00\x01\x02\x03 nothing that anyone wrote", "neither a torch nor a safetensors file; it starts with b'"),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>", "a web page, not weights; the download failed"),
        (b"\n<HTML><body>login</body></HTML>", "a web page, not weights"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2443574661\n",
            "Git-LFS pointer.*git lfs pull",
        ),
        (b"", "the file is empty"),
        (b"\x80\x02}q\x00.", "a pickle that torch.save did not write|truncated or damaged"),
        (b"PK\x03\x04 and no more", "truncated or damaged"),
    ],
)
def test_a_file_that_is_no_checkpoint(content, match, tmp_path):
    (tmp_path / "x.pth").write_bytes(content)
    refuse(tmp_path / "x.pth", match)


@pytest.mark.parametrize("form", ["zip", "old", "plain"])
def test_a_pickle_that_would_run_code(form, model, tmp_path):
    path, proof = tmp_path / "x.pth", tmp_path / "proof"
    payload = {"state_dict": official(model), "config": Bomb(proof)}
    if form == "plain":
        path.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=form == "zip")
    if form == "plain":
        message = refuse(path, r"a pickle that torch\.save did not write, which might run code \(.*\); fetch it again")
        assert "weights_only" not in message, "torch's own advice is to switch the protection off"
    else:
        message = refuse(path, r"loading it would run code: its pickle calls (posix|nt)\.system")
        assert "weights_only=False" in message, "the way to convert it"
    assert not proof.exists()


@pytest.mark.parametrize("form", ["sections", "dit", "one section", "bare", "network", "networks", "old network"])
def test_the_command_in_the_error_of_a_refused_pickle_extracts_its_weights(form, tmp_path, monkeypatch):
    raw, averaged = tiny_model(seed=0), tiny_model(seed=1)
    today = datetime.date(2026, 1, 1)  # which a pickle can only make by a call
    payload = {
        "sections": {"state_dict": official(raw), "state_dict_ema": official(averaged), "ema": 0.9, "date": today},
        "dit": {"model": official(raw), "ema": official(averaged), "args": argparse.Namespace(date=today)},
        "one section": {"state_dict": official(averaged), "state_dict_ema": None, "date": today},
        "bare": {**official(averaged), "date": today},
        "network": averaged,
        "networks": {"model": raw, "ema": averaged, "epoch": 3},
        "old network": averaged,
    }[form]
    path = tmp_path / "it's $5.pth"
    torch.save(payload, path, _use_new_zipfile_serialization=form != "old network")
    calls = r"pixart\.model\.pixart\.PixArt" if "network" in form else r"datetime\.date"
    message = refuse(path, f"loading it would run code: its pickle calls {calls}")
    made, command = re.search(r" into (.*), in an environment you can lose: (python -c .*)$", message).groups()
    monkeypatch.chdir(tmp_path)
    command = command.replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(command, shell=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    told = {**HEADS, **({"latent_size": 8, "position_scale": 1.0} if "network" in form else {})}
    assert_same_weights(load_model(made, overrides=told), averaged)
    if form in ("sections", "dit", "networks"):
        assert_same_weights(load_model(made, ema=False, overrides=told), raw)


def test_no_permission(model, tmp_path, monkeypatch):
    path = save_official(tmp_path / "x.pth", model)
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads everything: let the system's refusal come from open itself
        true_open = builtins.open

        def closed(file, *args, **options):
            if str(file) == str(path):
                raise PermissionError(13, "Permission denied", str(file))
            return true_open(file, *args, **options)

        monkeypatch.setattr(builtins, "open", closed)
    refuse(path, r"x\.pth: cannot be read \(Permission denied\)")


@pytest.mark.parametrize(
    ("payload", "match"),
    [
        ([1, 2], "holds a list, expected tensors by name"),
        ({}, "has no tensor in it"),
        ({"optimizer": {"lr": 1.0}, "epoch": 3}, r"found optimizer \(dict\), epoch \(int\)"),
        ({"state_dict": {"x": 3}}, r"found x \(int\)"),
    ],
)
def test_a_file_without_a_state_dict(payload, match, tmp_path):
    refuse(save(tmp_path / "x.pth", payload), match)


# folders and the Hub


def test_an_empty_folder_and_others_without_a_model(model, tmp_path):
    refuse(tmp_path, "the folder is empty")
    save_official(tmp_path / "PixArt.pth", model)
    refuse(tmp_path, r"the folder holds PixArt\.pth; name the file that you mean")
    (tmp_path / "PixArt.pth").rename(tmp_path / "notes.txt")
    refuse(tmp_path, r"expected model\.safetensors and config\.json.*; found notes\.txt")
    (tmp_path / "__0_0.distcp").touch()
    refuse(tmp_path, "sharded torch.distributed checkpoint; gather it first: python -m")
    refuse(tmp_path / "nowhere.pth", "no model at .*no such file or folder, and not a Hub id")


def test_a_missing_shard(sharded):
    shards = sorted(sharded.glob("*-of-*.safetensors"))
    shards[1].unlink()
    refuse(sharded, rf"shard {shards[1].name} is missing \({len(shards)} shards named\)")


def test_an_index_that_names_what_is_not_there(sharded, tmp_path):
    index = sharded / "diffusion_pytorch_model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    name = "proj_out.weight"
    shard = next(file for file in sorted(set(where.values())) if file != where[name])
    index.write_text(json.dumps({"weight_map": {**where, name: shard}}))
    refuse(sharded, f"names {name} in shard {shard}, which does not hold it")
    for file in ("no_such.safetensors", "../../etc/passwd", 3):
        index.write_text(json.dumps({"weight_map": {**where, name: file}}))
        match = (
            "shard no_such.safetensors is missing" if file == "no_such.safetensors" else "cannot be read|files beside"
        )
        refuse(sharded, match)
    index.write_text("{")
    refuse(sharded, "the index of the shards cannot be read")
    index.unlink()
    refuse(sharded, r"holds shards \(.*\) but no index")


def test_an_unknown_hub_id_offline(model, tmp_path, monkeypatch):
    (tmp_path / "made").mkdir()
    save_official(tmp_path / "made" / "x.pth", model)
    put_in_hub_cache(tmp_path / "made", tmp_path / "hub", monkeypatch)
    refuse("owner/other", "no model at owner/other: not on disk, and not on the Hub or in its cache")
    refuse("owner/name/y.pth", "no model at owner/name/y.pth: not on disk")
    refuse("owner/name", r"the folder holds x\.pth; name the file that you mean")
    refuse("owner/name/sub", "the repository owner/name has no folder 'sub'")


# other networks


@pytest.mark.parametrize(
    ("state", "match"),
    [
        (
            {"controlnet.0.before_proj.weight": 1, "controlnet.0.copied_block.attn.qkv.weight": 1},
            "this is a ControlNet",
        ),
        (dit_weights(48, 2), "this is DiT, not PixArt: use init_from"),
        ({"blocks.0.adaLN_modulation.1.weight": 1, "x_embedder.proj.weight": 1}, "not a PixArt; its tensors are"),
        (
            {"base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight": 1},
            "holds LoRA matrices, an adapter and no model",
        ),
        ({"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q.weight": 1}, "the UNet of Stable Diffusion"),
        ({"model.diffusion_model.input_blocks.0.0.weight": 1}, "the UNet of Stable Diffusion"),
        ({"encoder.down_blocks.0.resnets.0.conv1.weight": 1, "quant_conv.weight": 1}, "this is a VAE, not a PixArt"),
        ({"shared.weight": 1, "encoder.block.0.layer.0.SelfAttention.q.weight": 1}, "a T5 text encoder"),
        ({"double_blocks.0.img_attn.qkv.weight": 1}, "another kind of transformer"),
        ({"t5.encoder.block.0.layer.0.q.weight": 1, "t5.ids": 1}, "a T5 text encoder"),
        ({"something.weight": 1}, "not a PixArt; its tensors are something.weight and 0 more"),
    ],
)
def test_a_file_of_another_network(state, match, tmp_path):
    refuse(
        save(
            tmp_path / "x.pth",
            {name: torch.zeros(2, 2, dtype=torch.int64 if name.endswith("ids") else None) for name in state},
        ),
        match,
    )


def test_lora_matrices_beside_the_base_are_not_dropped(model, tmp_path):
    state = {**official(model), "blocks.0.attn.qkv.lora_A.weight": torch.zeros(4, 48)}
    refuse(save(tmp_path / "x.pth", state), "LoRA matrices")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            {"_class_name": "AutoencoderKL"},
            "is of a AutoencoderKL, expected PixArtTransformer2DModel; a VAE is given as",
        ),
        ({"_class_name": "UNet2DConditionModel"}, "is of a UNet2DConditionModel, expected PixArtTransformer2DModel"),
        ({"_class_name": None, "architectures": ["T5EncoderModel"]}, "a T5EncoderModel of transformers, not a PixArt"),
    ],
)
def test_a_folder_of_another_network(settings, match, model, tmp_path):
    in_diffusers(model).save_pretrained(tmp_path / "x")
    edit_json(tmp_path / "x" / "config.json", **settings)
    refuse(tmp_path / "x", match)


# a PixArt that is not whole, or not itself


def test_names_and_shapes_are_all_compared(model, tmp_path):
    state = official(model)
    state["blocks.1.mlp.fc2.weight"] = torch.zeros(64, 192)
    del state["t_block.1.bias"]
    state["blocks.0.extra"] = torch.zeros(1)
    message = refuse(save(tmp_path / "x.pth", state), "is not a PixArt in the official format", overrides=HEADS)
    for part in (
        "missing: t_block.1.bias",
        "unknown: blocks.0.extra",
        "of another shape: blocks.1.mlp.fc2.weight (64, 192), expected (48, 192)",
    ):
        assert part in message


@pytest.mark.parametrize("lost", ["x_embedder.proj.weight", "blocks.0.mlp.fc1.weight", "t_block.1.bias"])
def test_a_pixart_that_lacks_tensors_is_incomplete(lost, model, tmp_path):
    state = official(model)
    del state[lost]
    refuse(
        save(tmp_path / "x.pth", state),
        rf"{lost} is missing; the file is not whole|is not a whole PixArt .*{lost}",
        overrides=HEADS,
    )


OTHERS = [
    # Sana's blocks: the MLP is convolutions; then video transformers' first layers, texts and times
    ("mlp.fc1.", "mlp.inverted_conv.", r"no blocks\.0\.mlp\.fc1\.weight, and blocks\.0\.mlp\.inverted_conv"),
    ("x_embedder.proj.", "patch_embedding.", r"no x_embedder\.proj\.weight, and patch_embedding"),
    ("y_embedder.y_proj.", "text_embedding.", r"no y_embedder\.y_proj\.fc1\.weight, and text_embedding"),
    ("t_block.1.", "time_projection.1.", r"in the official format; missing: t_block.* unknown: time_projection"),
]


@pytest.mark.parametrize(("old", "new", "match"), OTHERS)
def test_a_complete_model_of_another_kind_is_not_called_incomplete(old, new, match, model, tmp_path):
    state = {name.replace(old, new): tensor for name, tensor in official(model).items()}
    message = refuse(save(tmp_path / "x.pth", state), f"not a PixArt.*{match}", overrides=HEADS)
    assert "not whole" not in message and "a whole" not in message


def test_another_transformer_of_diffusers_is_not_called_incomplete(tmp_path):
    # LTX-Video's names, a transformer with PixArt's adaLN-single
    names = ("proj_in", "adaln_single.linear", "transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.norm_q")
    state = {f"{name}.weight": torch.zeros(8, 8) for name in names}
    match = (
        r"not a PixArt: it has no pos_embed.proj.weight, and proj_in.weight, transformer_blocks.0.attn1.norm_q.weight"
    )
    assert "not whole" not in refuse(save(tmp_path / "x.pth", state), match)


def test_a_wrong_width(model, tmp_path):
    state = official(model)
    state["x_embedder.proj.weight"] = torch.zeros(64, 4, 2, 2)
    refuse(save(tmp_path / "x.pth", state), r"pos_embed has shape \(1, 16, 48\), expected \(1, N, 64\)")
    del state["pos_embed"]
    told = {**HEADS, "latent_size": 8, "position_scale": 1.0}
    refuse(
        save(tmp_path / "x.pth", state),
        r"t_block.1.bias \(288,\), expected \(384,\)|\(48,\), expected \(64,\)",
        overrides=told,
    )


def test_a_missing_part_of_a_matrix_in_diffusers_names(model, tmp_path):
    in_diffusers(model).save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    del state["transformer_blocks.1.attn1.to_k.weight"]
    save_file(state, path)
    refuse(tmp_path, r"in the diffusers format; missing: transformer_blocks\.1\.attn1\.to_k\.weight$")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_layers": 28}, "its config.json says depth 28; by the file's own tensors it is 2"),
        ({"attention_head_dim": 72}, "says hidden_size 288; by the file's own tensors it is 48"),
        ({"use_additional_conditions": True}, "says micro_conditions True; by the file's own tensors it is False"),
        ({"norm_eps": 1e-5}, "says norm_eps 1e-05, PixArt's is 1e-06"),
        ({"norm_type": "layer_norm"}, "says norm_type 'layer_norm', PixArt's is 'ada_norm_single'"),
        ({"sample_size": "8"}, "says sample_size '8', expected a whole number"),
    ],
)
def test_a_config_of_another_model(settings, match, model, tmp_path):
    in_diffusers(model).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **settings)
    refuse(tmp_path, match)


def test_a_position_table_of_another_scale(model, tmp_path):
    path = save_official(tmp_path / "x.pth", tiny_model(position_scale=0.5))
    refuse(
        path,
        "overrides say position_scale 1.0; by the file's own position table it is 0.5",
        overrides={**HEADS, "position_scale": 1.0},
    )
    refuse(
        path,
        "overrides say latent_size 16; by the file's own position table it is 8",
        overrides={**HEADS, "latent_size": 16},
    )
    in_diffusers(model).save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    table = official(tiny_model(position_scale=0.5))["pos_embed"]
    save_file({**load_file(weights), "pos_embed.pos_embed": table}, weights)
    refuse(tmp_path, "its config.json says position_scale 1.0; by the file's own position table it is 0.5")


def test_mixed_dtypes(model, tmp_path):
    state = {name: t.half() if "blocks.1" in name else t for name, t in official(model).items()}
    path = save(tmp_path / "x.pth", state)
    message = refuse(path, "its tensors are of several dtypes", overrides=HEADS)
    assert "float32" in message
    assert "float16 as blocks.1." in message
    assert "--dtype float32" in message
    loaded = load_model(path, overrides=HEADS, dtype=torch.float32)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_quantised_matrix(dtype, model, tmp_path):
    state = {**official(model), "t_block.1.weight": torch.zeros(288, 48, dtype=torch.int8)}
    refuse(save(tmp_path / "x.pth", state), "t_block.1.weight holds int8.*quantised", overrides=HEADS, dtype=dtype)


@pytest.mark.parametrize("quantised", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32])
@pytest.mark.parametrize("form", ["official", "diffusers", "ours"])
def test_quantised_weights(form, quantised, model, tmp_path):
    """All of them, the position table too, as ComfyUI's users have them."""
    path, told = tmp_path / "x.safetensors", HEADS
    if form == "official":
        state = official(model)
    elif form == "diffusers":
        in_diffusers(model).save_pretrained(tmp_path)
        state, path, told = in_diffusers(model).state_dict(), tmp_path / "diffusion_pytorch_model.safetensors", None
    else:
        save_model(tmp_path, model.state_dict(), ModelCard(model.config))
        state, path, told = model.state_dict(), tmp_path / "model.safetensors", None
    save_file({name: tensor.to(quantised) for name, tensor in state.items()}, path)
    match = rf"holds {str(quantised).removeprefix('torch.')}, expected float32, .*; quantised weights are not supported"
    for dtype in (None, torch.float32):
        refuse(path, match, overrides=told, dtype=dtype)
    text = describe(path, overrides=told)
    assert re.search(rf"^refused           load: .*{match}", text, re.MULTILINE), text
    assert f"dtype             {str(quantised).removeprefix('torch.')} ({len(state)} tensors)" in text
    assert f"NaNs              none; {len(state)} quantised tensors were not looked at" in text
    assert form == "ours" or f"format            {form}" in text


def test_quantised_weights_in_packed_shapes(model, tmp_path):
    state = {name: torch.zeros(tensor.numel() // 2, 1, dtype=torch.uint8) for name, tensor in official(model).items()}
    path = save(tmp_path / "x.pth", state)
    refuse(path, "holds uint8.*quantised", overrides=HEADS)
    assert "quantised weights are not supported" in describe(path, overrides=HEADS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", ["official", "diffusers", "cast"])
def test_weights_that_are_not_finite(value, form, model, tmp_path):
    model.requires_grad_(False).blocks[1].attn.qkv.weight[50, 3] = value
    if form == "diffusers":
        in_diffusers(model).save_pretrained(tmp_path / "x")
        refuse(tmp_path / "x", r"transformer_blocks\.1\.attn1\.to_k\.weight has NaN or infinite weights")
    else:
        path = save_official(tmp_path / "x.pth", model)
        dtype = torch.bfloat16 if form == "cast" else None
        refuse(path, r"blocks\.1\.attn\.qkv\.weight has NaN or infinite", overrides=HEADS, dtype=dtype)


def test_large_sums_are_not_taken_for_infinities(model, tmp_path):
    model.requires_grad_(False).half().t_block[1].weight.fill_(6e4)
    assert load_model(save_official(tmp_path / "x.pth", model), overrides=HEADS).t_block[1].weight[0, 0] == 6e4


def test_names_that_are_equal_without_their_prefixes(model, tmp_path):
    state = official(model)
    state["module.t_block.1.bias"] = state["t_block.1.bias"] + 1
    refuse(save(tmp_path / "x.pth", state), r"t_block\.1\.bias and module\.t_block\.1\.bias are both t_block\.1\.bias")


def test_two_networks_under_their_own_prefixes(model, tmp_path):
    state = {prefix + name: tensor for prefix in ("teacher.", "student.") for name, tensor in official(model).items()}
    match = r"teacher\.pos_embed and student\.pos_embed are both pos_embed without their prefixes; keep one"
    refuse(save(tmp_path / "x.pth", state), match, overrides=HEADS)


def test_wrong_overrides(model, tmp_path):
    path = save_official(tmp_path / "x.pth", model)
    refuse(path, "unknown field 'num_head'; did you mean 'num_heads'", overrides={"num_head": 4})
    refuse(path, "hidden_size 48 is not a multiple of num_heads 5", overrides={"num_heads": 5})
    refuse(path, "num_heads: got 'four', expected int", overrides={"num_heads": "four"})
    refuse(path, "overrides say depth 4; by the file's own tensors it is 2", overrides={**HEADS, "depth": 4})
    refuse(path, "is on disk, where there is no revision", overrides=HEADS, revision="main")
