"""Every published PixArt format loads, with the config that its files imply."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ideas  # noqa: F401 - registers DiT's modulation
import pixart
from checkpoints import (
    HEADS,
    assert_same_weights,
    edit_json,
    in_diffusers,
    official,
    put_in_hub_cache,
    save_official,
    save_run,
)
from pixart.adapters import load as adapters
from pixart.checkpoint import describe as describe_module
from pixart.checkpoint.describe import describe
from pixart.checkpoint.detect import solve_positions
from pixart.checkpoint.files import CONFIG, ModelCard, save_model
from pixart.checkpoint.load import load_model, load_with_card, make_plan
from pixart.checkpoint.locate import Found
from pixart.checkpoint.save import save
from pixart.checkpoint.weights import CARD_KEY, Weights
from pixart.config import differences
from pixart.diffusion import make_schedule
from pixart.diffusion.sampling import resolve
from pixart.diffusion.schedule import DiffusionConfig
from pixart.encoders.text import TextConfig
from pixart.errors import InputError
from pixart.model import PRESETS, PixArt, PixArtConfig
from test_model_golden import CASES, GOLDEN, RELEASED, load, official_weights, run, tolerance
from toy import relative, tiny_model

ROOT = Path(__file__).parent.parent
VARIANTS = {
    **RELEASED,
    "Sigma-XL-2-1024-MS-kvcompress": "sigma-1024",
    "Sigma-XL-2-2K-MS-kvcompress": "sigma-2k",
}
OTHERS = {
    "ControlNet-1024-MS": "ControlNet",
    "ControlNet-512": "ControlNet",
    "DiT-XL-2-256x256": "use init_from",
    "DiT-XL-2-512x512": "use init_from",
}


def official_shapes(name: str) -> dict[str, list[int]]:
    folded = json.loads((GOLDEN / "official_names.json").read_text())[name]
    return {
        pattern.replace("*", str(i), 1): shape
        for pattern, (shape, span) in folded.items()
        for i in (range(span[0], span[1] + 1) if span else [0])
    }


# official files


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("model_alpha_256", {}), ("model_alpha_1024ms_24x40", {}), ("model_sigma_kvcompress_24x40", {"latent_size": 256})],
)
def test_a_golden_file_loads_and_gives_the_official_output(name, overrides, tmp_path):
    golden = load(name)
    torch.save({"state_dict": official_weights(golden)}, tmp_path / "x.pth")
    model = load_model(tmp_path / "x.pth", overrides={**HEADS, **overrides})
    assert model.config == CASES[name]
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        assert relative(run(model, golden), golden["out"]) <= tolerance(model, golden)


def test_without_its_position_table_an_alpha_file_asks_for_the_native_size(tmp_path):
    weights = official_weights(load("model_alpha_256"))
    del weights["pos_embed"]
    torch.save(weights, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"cannot tell latent_size .*overrides=\{'latent_size': 64\}"):
        load_model(tmp_path / "x.pth", overrides=HEADS)
    for size in (32, 64):
        config = load_model(tmp_path / "x.pth", overrides={**HEADS, "latent_size": size}).config
        assert (config.latent_size, config.position_scale) == (size, 1.0)
    with pytest.raises(InputError, match=r"cannot tell num_heads \(width 144 is no preset's\)"):
        load_model(tmp_path / "x.pth", overrides={"latent_size": 32})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: torch.randn_like(table), "not PixArt's table of 16 × 16 positions at any scale"),
        (lambda table: table.flip(-1), "at any scale"),
        (lambda table: table * float("nan"), "at any scale"),
        (lambda table: table + 1e-3, "off by 0.001"),
        (lambda table: table[:, :-1], "with N a square number"),
        (lambda table: table[..., :-4], r"expected \(1, N, 144\)"),
    ],
)
def test_a_wrong_position_table_is_refused(change, message, tmp_path):
    weights = official_weights(load("model_alpha_256"))
    torch.save({"state_dict": {**weights, "pos_embed": change(weights["pos_embed"])}}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=message):
        load_model(tmp_path / "x.pth", overrides=HEADS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0, 4.0, 1.37])
def test_native_side_and_scale_come_from_the_table(scale, dtype):
    model = PixArt(PixArtConfig(hidden_size=48, num_heads=4, depth=1, position_scale=scale, latent_size=48))
    side, found = solve_positions(model.positions(24, 24)[None].to(dtype), 48, "x")
    assert side == 24
    assert found == scale or (scale == 1.37 and dtype == torch.bfloat16 and abs(found / scale - 1) < 1e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_official_model_is_detected_and_built(name):
    expected = PRESETS[VARIANTS[name]]
    if "kvcompress" in name:
        expected = replace(expected, kv_compression="conv", kv_ratio=2, kv_blocks=tuple(range(14, 28)))
    state = {key: torch.empty(shape, device="meta") for key, shape in official_shapes(name).items()}
    with torch.device("meta"):
        model = PixArt(expected)
    side = expected.latent_size // 2
    assert list(state["pos_embed"].shape) == [1, side**2, 1152]
    state["pos_embed"] = model.positions(side, side, device="cpu")[None]
    plan = make_plan(Found(name, "foreign", Weights(())), state)
    assert (plan.format, plan.card.model) == ("official", expected)
    sigma = "Sigma" in name
    text, vae = plan.card.text, plan.card.vae
    assert (text.length, text.clean, text.null) == ((300, False, "empty") if sigma else (120, True, "buffer"))
    assert (vae.kind, vae.scale) == ("kl", 0.13025 if sigma else 0.18215)
    sampling = resolve(plan.card.sample, make_schedule(plan.card.diffusion))
    assert (sampling.sampler, sampling.steps, sampling.guidance) == ("dpm_solver", 20, 4.5)


@pytest.mark.parametrize("name", OTHERS)
def test_every_official_network_that_is_no_pixart_is_refused_by_its_name(name):
    state = {key: torch.empty(shape, device="meta") for key, shape in official_shapes(name).items()}
    with pytest.raises(InputError, match=OTHERS[name]):
        make_plan(Found(name, "foreign", Weights(())), state)


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"caption_length": 300}, {"micro_conditions": True}, {"qk_norm": True}, {"learn_sigma": False},
        {"kv_compression": "conv", "kv_blocks": (1,), "kv_ratio": 2}, {"kv_compression": "conv", "kv_blocks": (0, 1),
        "kv_ratio": 4}, {"patch_size": 4}, {"in_channels": 16}, {"mlp_ratio": 2.0}, {"depth": 3, "position_scale": 0.5},
    ],
)  # fmt: skip
def test_the_network_is_read_off_names_and_shapes(changes, tmp_path):
    model = tiny_model(**changes)
    loaded = load_model(save_official(tmp_path / "x.pth", model), overrides=HEADS)
    assert loaded.config == model.config
    assert_same_weights(loaded, model)


# training checkpoints


PREFIXES = ["", "module.", "_orig_mod.", "base_model.", "module._orig_mod.", "model.module.", "transformer.",
            "model.diffusion_model.", "net.of.ours."]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_training_checkpoint_gives_its_averaged_or_raw_weights(prefix, tmp_path):
    raw, averaged = tiny_model(seed=0), tiny_model(seed=1)
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 2e-5, "params": [0]}]}
    torch.save(
        {
            "state_dict": {prefix + name: tensor for name, tensor in official(raw).items()},
            "state_dict_ema": {prefix + name: tensor for name, tensor in official(averaged).items()},
            "optimizer": optimizer,
            "scheduler": {"last_epoch": 3},
            "epoch": 1,
            "step": 3,
        },
        tmp_path / "epoch_1.pth",
    )
    assert_same_weights(load_model(tmp_path / "epoch_1.pth", overrides=HEADS), averaged)
    assert_same_weights(load_model(tmp_path / "epoch_1.pth", ema=False, overrides=HEADS), raw)


def test_prefixes_inside_a_name_go_too(tmp_path):
    model = tiny_model()
    names = {name: name.replace("blocks.1.", "blocks.1._orig_mod.") for name in model.state_dict()}
    state = {names[name]: torch.nn.Parameter(tensor) for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "x.pth")
    loaded = load_model(tmp_path / "x.pth", overrides={**HEADS, "latent_size": 8, "position_scale": 1.0})
    assert_same_weights(loaded, model)


@pytest.mark.parametrize("prefix", ["transformer.", "model.diffusion_model."])
def test_prefixes_in_front_of_the_names_of_diffusers_go_too(prefix, tmp_path):
    """In shards, of which one alone holds the layer that the prefix is told by."""
    model = tiny_model()
    in_diffusers(model).save_pretrained(tmp_path, max_shard_size="100KB")
    for shard in tmp_path.glob("*-of-*.safetensors"):
        save_file({prefix + name: tensor for name, tensor in load_file(shard).items()}, shard)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={prefix + name: shard for name, shard in where.items()})
    loaded = load_model(tmp_path, overrides={"caption_length": 12})
    assert_same_weights(loaded, model, null=False)


def test_a_checkpoint_with_the_arguments_of_its_script_loads(tmp_path):
    """DiT's training code, and many after it, put the argparse.Namespace in; it is data alone."""
    raw, averaged = tiny_model(seed=0), tiny_model(seed=1)
    arguments = argparse.Namespace(lr=1e-4, image_size=256, ckpt=None, betas=(0.9, 0.999))
    payload = {"model": official(raw), "ema": official(averaged), "opt": {"state": {}}, "args": arguments}
    torch.save(payload, tmp_path / "0400000.pt")
    assert_same_weights(load_model(tmp_path / "0400000.pt", overrides=HEADS), averaged)
    assert_same_weights(load_model(tmp_path / "0400000.pt", ema=False, overrides=HEADS), raw)


def test_a_file_with_averaged_weights_only_has_no_raw_ones(tmp_path):
    torch.save({"state_dict_ema": official(tiny_model()), "state_dict": None}, tmp_path / "x.pth")
    assert load_model(tmp_path / "x.pth", overrides=HEADS).config.hidden_size == 48
    with pytest.raises(InputError, match="has no raw weights, only state_dict_ema"):
        load_model(tmp_path / "x.pth", ema=False, overrides=HEADS)


def test_files_from_before_the_zip_format_load(tmp_path):
    model = tiny_model()
    torch.save({"state_dict": official(model)}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert_same_weights(load_model(tmp_path / "x.pth", overrides=HEADS), model)


# diffusers


def forms(transformer, folder: Path, form: str) -> tuple[Path, Path]:
    """A folder with config.json, and the source to load."""
    if form == "folder":
        transformer.save_pretrained(folder)
    elif form == "sharded":
        transformer.save_pretrained(folder, max_shard_size="100KB")
        assert len(list(folder.glob("*-of-*.safetensors"))) > 1
    elif form == "bin":
        transformer.save_pretrained(folder, safe_serialization=False)
    elif form == "sharded bin":
        transformer.save_pretrained(folder, safe_serialization=False, max_shard_size="100KB")
    elif form == "file":
        transformer.save_pretrained(folder)
        return folder, folder / "diffusion_pytorch_model.safetensors"
    elif form == "pipeline":
        transformer.save_pretrained(folder / "transformer")
        (folder / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
        return folder / "transformer", folder
    elif form == "old class":
        transformer.save_pretrained(folder)
        edit_json(folder / "config.json", _class_name="Transformer2DModel", double_self_attention=False)
    return folder, folder


@pytest.mark.parametrize("form", ["folder", "sharded", "bin", "sharded bin", "file", "pipeline", "old class"])
@pytest.mark.parametrize("micro", [False, True])
def test_a_transformer_of_diffusers_loads(form, micro, tmp_path):
    model = tiny_model(position_scale=2.0, micro_conditions=micro)
    _, source = forms(in_diffusers(model), tmp_path / "transformer", form)
    loaded, card = load_with_card(source)
    length = 120 if micro or form == "pipeline" else 300  # without these, Σ's converter alone writes such a config
    assert loaded.config == replace(model.config, caption_length=length)
    assert card.text.null == "empty_own_mask"
    reference = tiny_model(position_scale=2.0, micro_conditions=micro, caption_length=length)
    reference.load_state_dict({**model.state_dict(), "y_embedder.y_embedding": reference.y_embedder.y_embedding})
    assert_same_weights(loaded, reference, null=False)


def test_what_a_config_leaves_out_is_what_diffusers_takes(tmp_path):
    model = tiny_model(latent_size=64, position_scale=1.0)
    in_diffusers(model, interpolation_scale=None, use_additional_conditions=None).save_pretrained(tmp_path / "a")
    config = load_model(tmp_path / "a").config
    assert (config.position_scale, config.caption_length) == (1.0, 120)
    in_diffusers(tiny_model(latent_size=256, position_scale=4.0), interpolation_scale=None).save_pretrained(
        tmp_path / "b"
    )
    config = load_model(tmp_path / "b").config
    assert (config.position_scale, config.caption_length) == (4.0, 300)


def test_the_scale_of_a_sigma_at_256_px_is_not_guessed(tmp_path):
    transformer = in_diffusers(tiny_model(latent_size=32), interpolation_scale=None)
    _, folder = forms(transformer, tmp_path / "pipeline", "pipeline")
    assert load_model(folder).config.position_scale == 1.0  # α
    edit_json(folder / "model_index.json", _class_name="PixArtSigmaPipeline")
    with pytest.raises(InputError, match=r"trained with 0.5: pass the right one, as overrides="):
        load_model(folder)
    assert load_model(folder, overrides={"position_scale": 0.5}).config.position_scale == 0.5


def test_a_pipeline_folder_names_its_own_parts(tmp_path):
    folder = tmp_path / "pipeline"
    in_diffusers(tiny_model()).save_pretrained(folder / "transformer")
    for part in ("vae", "text_encoder", "scheduler"):
        (folder / part).mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "PixArtSigmaPipeline"}')
    (folder / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL", "scaling_factor": 0.7}')
    (folder / "text_encoder" / "config.json").write_text("{}")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(
        '{"_class_name": "LCMScheduler", "beta_schedule": "linear", "prediction_type": "v_prediction"}'
    )
    card = load_with_card(folder)[1]
    assert (card.vae.source, card.vae.scale) == (str(folder / "vae"), 0.7)
    assert (card.text.model, card.text.length) == (str(folder / "text_encoder"), 300)
    assert (card.diffusion.prediction, card.sample.sampler) == ("v", "lcm")
    edit_json(scheduler, beta_schedule="scaled_linear")
    with pytest.raises(InputError, match="beta_schedule is 'scaled_linear', expected PixArt's 'linear'"):
        load_with_card(folder)


@pytest.mark.parametrize("source", ["owner/name", "owner/name/transformer", "owner/name/raw/x.pth"])
def test_a_cached_hub_repository_loads_offline(source, tmp_path, monkeypatch):
    model = tiny_model(micro_conditions=True, caption_length=120)
    forms(in_diffusers(model), tmp_path / "made", "pipeline")
    (tmp_path / "made" / "raw").mkdir()
    save_official(tmp_path / "made" / "raw" / "x.pth", model)
    put_in_hub_cache(tmp_path / "made", tmp_path / "hub", monkeypatch, revision="v1")
    loaded = load_model(source, revision="v1", overrides=HEADS)
    assert_same_weights(loaded, model, null=source.endswith(".pth"))
    with pytest.raises(InputError, match=f"no model at {source}: not on disk, and not on the Hub or in its cache"):
        load_model(source, revision="v2", overrides=HEADS)


# dtype, memory, laziness


def test_dtype_and_device_are_as_asked(tmp_path):
    model = tiny_model()
    for source in (save_official(tmp_path / "x.pth", model), tmp_path / "d"):
        if source.name == "d":
            in_diffusers(model).save_pretrained(source)
        loaded = load_model(source, dtype=torch.bfloat16, device="cpu", overrides=HEADS if source.suffix else None)
        for name, tensor in loaded.state_dict().items():
            expected = model.state_dict()[name].bfloat16()
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, expected) or name.endswith("y_embedding")


def test_weights_that_overflow_in_half_precision_are_refused(tmp_path):
    model = tiny_model().requires_grad_(False)
    model.t_block[1].weight[0, 0] = 1e5
    save_official(tmp_path / "x.pth", model)
    assert load_model(tmp_path / "x.pth", dtype=torch.bfloat16, overrides=HEADS).config.hidden_size == 48
    with pytest.raises(InputError, match=r"t_block\.1\.weight overflows in float16; use bfloat16 or float32"):
        load_model(tmp_path / "x.pth", dtype=torch.float16, overrides=HEADS)


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_training_a_loaded_model_leaves_its_file_alone(form, tmp_path):
    path = tmp_path / f"x.{form}"
    state = official(tiny_model())
    torch.save(state, path) if form == "pth" else save_file(state, path)
    before = path.read_bytes()
    model = load_model(path, overrides=HEADS)
    for parameter in model.parameters():
        parameter.add_(1)
    model.y_embedder.y_embedding.zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize("form", ["zip", "old", "bin"])
def test_a_model_can_be_saved_over_the_file_that_it_came_from(form, tmp_path):
    """In a process of its own, which a map of a file cut short would kill."""
    model, source, told = tiny_model(), tmp_path / "x.pth", HEADS
    if form == "bin":
        in_diffusers(model).save_pretrained(tmp_path / "d", safe_serialization=False)
        source, told = tmp_path / "d", {"caption_length": 12}
        path = tmp_path / "d" / "diffusion_pytorch_model.bin"
    else:
        path = source
        torch.save({"state_dict": official(model)}, path, _use_new_zipfile_serialization=form == "zip")
    code = (
        "import torch, pixart\n"
        f"model = pixart.load_model({str(source)!r}, overrides={told})\n"
        f"torch.save({{'state_dict': model.state_dict()}}, {str(path)!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    (tmp_path / "d" / CONFIG).unlink(missing_ok=True)  # now in our names
    again = load_model(path, overrides={**HEADS, "latent_size": 8, "position_scale": 1.0})
    assert_same_weights(again, model, null=form != "bin")


def test_importing_pixart_does_not_import_torch():
    code = "import sys, pixart; assert 'torch' not in sys.modules; pixart.load_model; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert pixart.load_model is adapters.load_model  # which loads adapters, too
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pixart.nothing


@pytest.mark.skipif(sys.platform != "linux", reason="a process's own peak is in Linux's /proc alone")
@pytest.mark.parametrize(("form", "dtype"), [("official", None), ("diffusers", None), ("official", "bfloat16")])
def test_a_load_holds_each_weight_once(form, dtype, tmp_path):
    """Peak resident size over what was there before, mapped pages of the file included, in a process of its own."""
    model = tiny_model(hidden_size=768, num_heads=12, depth=3, caption_channels=1024, latent_size=32)
    if form == "official":
        source = save_official(tmp_path / "x.pth", model)
    else:
        source = tmp_path / "d"
        in_diffusers(model).save_pretrained(source)
    code = (
        "import re, torch\n"
        "from pixart.checkpoint import load\n"
        "from toy import tiny_model\n"
        "tiny_model()\n"  # what the first network of a process imports
        # not getrusage: its peak starts at that of the process that forked this one
        "status = lambda key: int(re.search(key + r':\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
        "load.GROUP_BYTES = 8 << 20\n"
        "before = status('VmRSS')\n"
        f"model = load.load_model({str(source)!r}, dtype={f'torch.{dtype}' if dtype else None})\n"
        "print(status('VmHWM') - before, sum(t.nbytes for t in model.state_dict().values()))\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout
    peak, size = map(int, output.split())
    assert size > (50e6 if dtype else 100e6)
    # a cast holds, besides the result, what a group was copied from: two bytes read per byte kept
    allowed = 1.2 * size + (2 * (8 << 20) if dtype else 0)
    assert peak <= allowed, peak / size


# folders and paths


def test_a_home_directory_is_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = tiny_model()
    save_official(tmp_path / "x.pth", model)
    assert_same_weights(load_model("~/x.pth", overrides=HEADS), model)
    with pytest.raises(InputError, match=r"no model at ~/y\.pth: no such file"):
        load_model("~/y.pth")
    with pytest.raises(InputError, match=r"no model at ~nobody_of_that_name/y\.pth: no such file"):
        load_model("~nobody_of_that_name/y.pth")


@pytest.mark.parametrize("place", ["run", "run/checkpoints", "run/checkpoints/", "."])
def test_the_folder_of_a_runs_checkpoints_means_the_newest_good_one(place, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    monkeypatch.chdir(tmp_path if place != "." else save_run(run, [2, 4, 6]) / "checkpoints")
    if place != ".":
        save_run(run, [2, 4, 6])
    (run / "checkpoints" / "step_00000006" / "ema" / CONFIG).write_text("{}")
    assert_same_weights(load_model(place), tiny_model(seed=4))
    assert_same_weights(load_model(place, ema=False), tiny_model(seed=1004))
    assert "step_00000006 is damaged" in capsys.readouterr().out


# descriptions


def described(source, **options) -> dict[str, str]:
    options = options if Path(source).is_dir() else {"overrides": HEADS, **options}
    return {line[:18].strip(): line[18:] for line in describe(source, **options).splitlines()}


def test_a_description_says_which_weights_of_a_file_it_is_of(tmp_path):
    path = tmp_path / "x.pth"
    raw, averaged = official(tiny_model(seed=0)), official(tiny_model(seed=1))
    raw["t_block.1.bias"][0] = float("nan")
    torch.save({"state_dict": raw, "state_dict_ema": averaged, "epoch": 3}, path)
    assert described(path)["weights"] == "state_dict_ema (also there: state_dict)"
    assert described(path)["NaNs"] == "none"
    assert described(path, ema=False)["weights"] == "state_dict (also there: state_dict_ema)"
    assert described(path, ema=False)["NaNs"] == "in 1 tensors: t_block.1.bias"
    torch.save({"state_dict": averaged}, path)
    assert described(path)["weights"] == "state_dict"
    torch.save(averaged, path)
    assert "weights" not in described(path)


def test_a_description_says_which_weights_of_a_run_it_is_of(tmp_path, monkeypatch):
    run = save_run(tmp_path / "run", [2, 4])
    newest, first = run / "checkpoints" / "step_00000004", run / "checkpoints" / "step_00000002"
    assert described(run)["weights"] == "step_00000004/ema (also there: step_00000004/model)"
    assert described(run, ema=False)["weights"] == "step_00000004/model (also there: step_00000004/ema)"
    for source in (first, first / "ema"):
        assert described(source)["weights"] == "step_00000002/ema (also there: step_00000002/model)"
    monkeypatch.chdir(newest / "model")
    assert described(".")["weights"] == "step_00000004/model (also there: step_00000004/ema)"
    save_model(tmp_path / "model", tiny_model().state_dict(), ModelCard(tiny_model().config))
    assert "weights" not in described(tmp_path / "model")


def test_every_setting_of_a_network_shows_in_its_description(tmp_path):
    def facts(**changes) -> dict[str, str]:
        model = tiny_model(**{"kv_compression": "conv", "kv_blocks": (1,), **changes})
        name = "_".join(changes) or "plain"
        save_model(tmp_path / name, model.state_dict(), ModelCard(model.config))
        lines = described(tmp_path / name)
        return {key: lines[key] for key in lines if key not in ("dtype", "parameters", "refused")}  # follow from others

    plain = facts()
    assert "other settings" not in plain
    for field in fields(PixArtConfig):
        value = getattr(tiny_model().config, field.name)
        others = {"kv_compression": "uniform", "kv_blocks": (0,), "conditioning": "adaln", "positions": "rope",
                  "attention": "sharper", "norm": "rms_norm", "mlp": "swish_gated", "routing": "skipping",
                  "route_blocks": (0, 1), "route_ratio": 0.25, "options": {"mine": 1}}  # fmt: skip
        other = others.get(field.name)
        if other is None:
            other = not value if isinstance(value, bool) else 2 * value
        assert facts(**{field.name: other}) != plain, field.name
    assert facts(mlp_ratio=2.0, in_channels=8)["other settings"] == "mlp_ratio 2.0, in_channels 8"


def test_a_setting_that_is_new_shows_in_a_description_too(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Roped(PixArtConfig):
        rope: bool = False

    def plan_roped(*arguments):
        plan = make_plan(*arguments)
        return replace(plan, card=replace(plan.card, model=Roped(**asdict(plan.card.model), rope=rope)))

    path = save_official(tmp_path / "x.pth", tiny_model())
    monkeypatch.setattr(describe_module, "make_plan", plan_roped)
    rope = True
    assert described(path)["other settings"] == "rope True"
    rope = False
    assert "other settings" not in described(path)


# networks that only their cards make


@pytest.mark.parametrize("format", ["ours", "official"])
def test_a_network_with_modules_of_its_own_is_compared_with_what_its_card_makes(format, tmp_path):
    model, path = tiny_model(conditioning="adaln"), tmp_path / "x.pth"
    card = ModelCard(model.config)
    if format == "ours":
        save(model, card, path, format)
    else:  # no longer written, but version 0.1 did
        table = model.positions(4, 4)[None]
        payload = {"state_dict": {"pos_embed": table, **model.state_dict()}, CARD_KEY: json.dumps(differences(card))}
        torch.save(payload, path)
    assert_same_weights(load_model(path), model)
    assert f"format            {format}" in describe(path)
    # its card is what tells: as another network it is refused, and never taken for a DiT
    with pytest.raises(
        InputError, match=r"does not fit the model of its .*missing: .*t_block.*unknown: .*adaLN_mod"
    ) as e:
        load_model(path, overrides={"conditioning": "adaln_single"})
    assert "DiT" not in str(e.value)
    assert "refused           load: " in describe(path, overrides={"conditioning": "adaln_single"})
    with pytest.raises(InputError, match=r"there is no 'adalm'; did you mean 'adaln'"):
        load_model(path, overrides={"conditioning": "adalm"})


def test_a_card_inside_is_compared_with_the_position_table_beside_it(tmp_path):
    model = tiny_model(mlp_ratio=2.0, position_scale=0.5)
    save(model, ModelCard(model.config), tmp_path / "x.pth", "official")
    payload = torch.load(tmp_path / "x.pth")
    payload["state_dict"]["pos_embed"] = tiny_model().positions(4, 4)[None]
    torch.save(payload, tmp_path / "x.pth")
    with pytest.raises(
        InputError, match=r"its card says position_scale 0.5; by the file's own position table it is 1.0"
    ):
        load_model(tmp_path / "x.pth")


@pytest.mark.parametrize("format", ["ours", "official", "diffusers"])
def test_a_card_holds_what_differs_from_the_defaults_and_a_newer_one_is_read_if_the_rest_is_off(format, tmp_path):
    model = tiny_model(learn_sigma=False, micro_conditions=True)
    card = ModelCard(model.config, DiffusionConfig(prediction="v"), text=TextConfig(null="empty"))
    save(model, card, tmp_path / "x.pth", format)
    if format == "official":
        payload = torch.load(tmp_path / "x.pth")
        written = json.loads(payload["pixart_card"])
    else:
        path = tmp_path / "x.pth" / {"ours": "config.json", "diffusers": "pixart.json"}[format]
        written = json.loads(path.read_text())
    different = {"hidden_size": 48, "depth": 2, "num_heads": 4, "learn_sigma": False, "caption_channels": 16,
                 "caption_length": 12, "micro_conditions": True, "latent_size": 8}  # fmt: skip
    assert written == {
        "model": different,
        "diffusion": {"prediction": "v"},
        "vae": {},
        "text": {"null": "empty"},
        "sample": {},
    }
    for unknown in (False, True):
        newer = json.dumps({**written, "model": {**different, "rope": unknown}})
        if format == "official":
            torch.save({**payload, "pixart_card": newer}, tmp_path / "x.pth")
        else:
            path.write_text(newer)
        if unknown:
            with pytest.raises(InputError, match=r"unknown key 'model\.rope'"):
                load_model(tmp_path / "x.pth")
        else:
            assert load_with_card(tmp_path / "x.pth")[1] == card
