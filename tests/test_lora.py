"""LoRA and its kin: files of PEFT, LyCORIS and by kohya's rule, made by those or by hand, in and out; training; use."""

import json
import math
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import pixart
from checkpoints import in_diffusers
from pixart import commands
from pixart.adapters.adapter import AdapterConfig, adapt
from pixart.adapters.apply import Loras, merge
from pixart.adapters.base import mark_base
from pixart.adapters.load import load_with_card
from pixart.adapters.lora import find_layers
from pixart.adapters.lora_files import FORMATS, read_lora, write_lora
from pixart.checkpoint.files import ModelCard, save_model
from pixart.checkpoint.save import save
from pixart.contact_sheet import contact_sheet
from pixart.errors import InputError
from pixart.files import read_rows
from pixart.inference.strengths import strength_sheet
from pixart.train.loop import train
from runs import build, make_pictures, settings
from toy import relative, tiny_inputs, tiny_model

# the authors' four scripts adapt these
AUTHORS = [
    "to_k", "to_q", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "proj", "linear",
    "linear_1", "linear_2",
]  # fmt: skip


def call(monkeypatch, name: str, *words: object) -> None:
    """Run a command in this process."""
    monkeypatch.setattr("sys.argv", [name, *map(str, words)])
    with pytest.raises(SystemExit) as end:
        commands.run(name, [*map(str, words)])
    assert not end.value.code


def their_output(model, inputs: dict) -> torch.Tensor:
    """diffusers' network on our inputs."""
    with torch.no_grad():
        return model(
            inputs["x"], encoder_hidden_states=inputs["caption"], timestep=inputs["t"],
            encoder_attention_mask=inputs["caption_mask"],
            added_cond_kwargs={"resolution": inputs.get("size"), "aspect_ratio": inputs.get("aspect_ratio")},
        ).sample  # fmt: skip


def outputs(model, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs)


@pytest.fixture
def network():
    torch.manual_seed(5)
    return tiny_model()


@pytest.fixture
def inputs(network) -> dict:
    return tiny_inputs(network)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """All factors of an adapter random: B starts at zero, which would hide every mistake."""
    torch.manual_seed(6)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name or "lokr" in name or "hada" in name or name.endswith(("down", "up")):
                if "magnitude" in name:
                    parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
                else:
                    parameter.normal_(std=0.2)
    return module


def peft_model(network, **config):
    theirs = in_diffusers(network).eval()
    return randomised(peft.get_peft_model(theirs, peft.LoraConfig(**{"target_modules": AUTHORS, **config}))).eval()


VARIANTS = {
    "authors": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True},
    "patterns": {"r": 4, "lora_alpha": 4, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 7, "ff.net.2": 1}},
    "attention": {"r": 3, "lora_alpha": 3, "target_modules": ["attn1.to_q", "attn2.to_v"]},
}


# ---------------------------------------------------------------------------------------------------------------- in


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_folder_of_peft_acts_as_in_peft(network, inputs, tmp_path, variant):
    theirs = peft_model(network, **VARIANTS[variant])
    theirs.save_pretrained(tmp_path / "peft")
    expected, before = their_output(theirs, inputs), outputs(network, inputs)
    lora = read_lora(tmp_path / "peft")
    if variant == "authors":
        assert len(lora.modules) == 2 * 7 + 7
    merge(network, lora)
    assert relative(outputs(network, inputs), expected) <= 2e-5
    assert relative(before, expected) > 1e-3


def test_the_second_copy_of_the_authors_scripts_takes_its_strength_from_the_folder_beside(network, tmp_path):
    theirs = peft_model(network, **VARIANTS["authors"])
    theirs.save_pretrained(tmp_path / "out")
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    (tmp_path / "out" / "transformer_lora").mkdir()
    copy = tmp_path / "out" / "transformer_lora" / "pytorch_lora_weights.safetensors"
    save_file({f"unet.{name}": tensor for name, tensor in state.items()}, copy)
    assert_same(read_lora(copy), read_lora(tmp_path / "out"), network)


def assert_same(a, b, network) -> None:
    """Both files change all weights alike."""
    state = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    found = []
    for file in (a, b):
        loras = Loras(network)
        loras.load("x", file)
        found.append({name: tensor.detach().clone() for name, tensor in network.state_dict().items()})
        loras.unload()
        assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in state.items())
    changed = 0
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-5, atol=1e-6)
        changed += not torch.equal(tensor, state[name])
    assert changed


@pytest.mark.parametrize(
    ("prefix", "underscores", "official", "suffixes", "alpha"),
    [
        ("lora_unet_", True, True, ("lora_down.weight", "lora_up.weight"), 2.0),  # kohya's rule
        ("lora_unet_", True, True, ("lora_down.weight", "lora_up.weight"), None),
        ("diffusion_model.", False, True, ("lora_A.weight", "lora_B.weight"), 2.0),  # OneTrainer, ComfyUI
        ("", False, True, ("lora_A.weight", "lora_B.weight"), 2.0),  # OneTrainer, original
        ("transformer.", False, False, ("lora_A.weight", "lora_B.weight"), None),  # diffusers
        ("transformer.", False, False, ("lora.down.weight", "lora.up.weight"), None),  # diffusers, old
        ("lora_transformer_", True, False, ("lora_down.weight", "lora_up.weight"), 2.0),  # OneTrainer, legacy
        ("lycoris_", True, False, ("lora_down.weight", "lora_up.weight"), 2.0),
    ],
)
def test_files_of_every_naming_act_by_the_formula(network, tmp_path, prefix, underscores, official, suffixes, alpha):
    torch.manual_seed(7)
    ours = {"blocks.1.attn.qkv": (3, 0, 48), "blocks.0.mlp.fc1": (1, 0, 192), "final_layer.linear": (1, 0, 32)}
    theirs = {
        "transformer_blocks.1.attn1.to_k": ("blocks.1.attn.qkv", 48, 96),
        "transformer_blocks.0.ff.net.0.proj": ("blocks.0.mlp.fc1", 0, 192),
        "proj_out": ("final_layer.linear", 0, 32),
    }
    named = {name: (name, 0, None) for name in ours} if official else theirs
    state, expected = {}, {name: t.detach().clone() for name, t in network.state_dict().items()}
    for name, (module, first, last) in named.items():
        weight = expected[f"{module}.weight"]
        down, up = torch.randn(4, weight.shape[1]), torch.randn(len(weight[first:last]), 4)
        key = prefix + (name.replace(".", "_") if underscores else name)
        state |= {f"{key}.{suffixes[0]}": down, f"{key}.{suffixes[1]}": up}
        if alpha is not None:
            state[f"{key}.alpha"] = torch.tensor(alpha)
        weight[first:last] += (1 if alpha is None else alpha / 4) * up @ down
    save_file(state, tmp_path / "x.safetensors")
    merge(network, read_lora(tmp_path / "x.safetensors"))
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("algo", "options"),
    [("lora", {}), ("loha", {}), ("lokr", {}), ("lokr", {"full_matrix": True}), ("lokr", {"factor": 4}), ("full", {}),
     ("lora", {"weight_decompose": True})],
)  # fmt: skip
def test_files_of_lycoris_act_as_in_lycoris(network, inputs, tmp_path, algo, options):
    from lycoris import LycorisNetwork, create_lycoris

    theirs = in_diffusers(network).eval()
    LycorisNetwork.apply_preset({"target_module": ["BasicTransformerBlock"]})
    wrapped = create_lycoris(theirs, 1.0, linear_dim=3, linear_alpha=2, algo=algo, train_norm=False, **options)
    wrapped.apply_to()
    torch.manual_seed(8)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "dora_scale" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    wrapped.eval()
    expected = their_output(theirs, inputs)
    save_file(
        {k: v.contiguous() for k, v in wrapped.state_dict().items()}, tmp_path / "pytorch_lora_weights.safetensors"
    )
    merge(network, read_lora(tmp_path))
    assert relative(outputs(network, inputs), expected) <= 2e-5


# --------------------------------------------------------------------------------------------------------------- out


@pytest.fixture(params=["lora", "dora", "rslora"])
def trained(request, network, tmp_path) -> tuple[Path, torch.nn.Module]:
    """A folder with an adapter of ours, random, and the network with it on."""
    options = {"rank": 4, "alpha": 6, "targets": "all", request.param: True}
    options.pop("lora", None)
    save_model(tmp_path / "base", network.state_dict(), ModelCard(network.config))
    from pixart.adapters.load import save_adapter

    weights = mark_base(network)
    adapter = randomised(adapt(network, AdapterConfig("lora", options)))
    (tmp_path / "mine").mkdir()
    card = ModelCard(network.config)
    save_adapter(
        tmp_path / "mine", adapter.state_dict(), AdapterConfig("lora", options), card, str(tmp_path / "base"), weights
    )
    return tmp_path / "mine", network


def target(folder: Path, format: str) -> Path:
    return folder / ("out.safetensors" if format == "kohya" else f"out-{format}")


def test_peft_loads_our_folder_into_diffusers_network_with_the_same_output(trained, tmp_path):
    source, adapted = trained
    inputs = tiny_inputs(adapted)
    write_lora(read_lora(source), tmp_path / "out", "peft")
    base, _ = load_with_card(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(in_diffusers(base).eval(), tmp_path / "out").eval()
    assert relative(their_output(theirs, inputs), outputs(adapted, inputs)) <= 1e-5
    merged, _ = load_with_card(tmp_path / "base")
    merge(merged, read_lora(source))
    assert relative(outputs(merged, inputs), outputs(adapted, inputs)) <= 1e-5


@pytest.mark.parametrize("format", FORMATS)
def test_in_and_out_and_in_is_the_same(trained, tmp_path, format):
    source, _ = trained
    network, _ = load_with_card(tmp_path / "base")
    first = read_lora(source)
    write_lora(first, target(tmp_path, format), format)
    second = read_lora(target(tmp_path, format))
    assert_same(first, second, network)
    for other in FORMATS:  # and through any other one
        (tmp_path / other).mkdir()
        write_lora(second, target(tmp_path / other, other), other)
        assert_same(first, read_lora(target(tmp_path / other, other)), network)


def test_every_reader_gets_the_same_strength_from_our_files(trained, tmp_path):
    """ComfyUI reads no adapter_config.json and takes α/r of the file, else 1: both are 1."""
    source, _ = trained
    for format in FORMATS:
        write_lora(read_lora(source), target(tmp_path, format), format)
    config = json.loads((tmp_path / "out-peft" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4 and config["rank_pattern"] == config["alpha_pattern"] == {}
    kohya = load_file(tmp_path / "out.safetensors")
    for name, tensor in kohya.items():
        if name.endswith(".alpha"):
            assert tensor == len(kohya[name.replace(".alpha", ".lora_down.weight")])


# -------------------------------------------------------------------------------------------------------------- use


def test_strengths_add_up_and_unloading_restores_every_bit(network, tmp_path):
    for i, variant in enumerate(("authors", "attention")):
        torch.manual_seed(i)
        peft_model(network, **VARIANTS[variant]).save_pretrained(tmp_path / variant)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    files = [read_lora(tmp_path / variant) for variant in ("authors", "attention")]
    loras = Loras(network)
    loras.load("a", files[0], 0.5)
    loras.load("b", files[1], -2.0)
    name = "blocks.0.attn.qkv.weight"
    expected = before[name].clone()
    for strength, file in zip((0.5, -2.0), files, strict=True):
        for place, change in file.changes.items():
            if place.module == "blocks.0.attn.qkv":
                rows = slice(48 * place.part, 48 * place.part + 48)
                expected[rows] += strength * change.delta(before[name][rows])
    torch.testing.assert_close(network.state_dict()[name], expected)
    loras.set_strength("a", 0)
    loras.set_strength("b", 0)
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in before.items())
    loras.set_strength("b", 1)
    loras.unload("b")
    loras.unload("a")
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in before.items())
    assert not loras._before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_summed_in_fp32_in_place_and_put_back(network, tmp_path, dtype):
    for i, variant in enumerate(("authors", "dora")):
        torch.manual_seed(i)
        peft_model(network, **VARIANTS[variant]).save_pretrained(tmp_path / variant)
    network.to(dtype)
    parameters = dict(network.named_parameters())
    before = {name: (tensor.data_ptr(), tensor.detach().clone()) for name, tensor in parameters.items()}
    files = [read_lora(tmp_path / variant) for variant in ("authors", "dora")]
    loras = Loras(network)
    for name, file, strength in zip("ab", files, (0.5, 2.0), strict=True):
        loras.load(name, file, strength)
    loras.set_strength("a", -1.0)
    for name in ("blocks.1.cross_attn.kv_linear.weight", "x_embedder.proj.weight"):
        first = before[name][1].double()
        expected = first.clone()
        for strength, file in zip((-1.0, 2.0), files, strict=True):
            for place, change in file.changes.items():
                if place.name == name:
                    step = len(first) // place.parts
                    rows = slice(step * place.part, step * (place.part + 1))
                    expected[rows] += strength * change.delta(first[rows])
        # bf16 is rounded to once, so at most half of its last digit
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
        torch.testing.assert_close(parameters[name].double(), expected, **tolerance)
    # in place: a CUDA graph reads the weights where they were when it was recorded
    assert all(parameters[name].data_ptr() == place for name, (place, _) in before.items())
    loras.unload()
    assert all(parameter is parameters[name] for name, parameter in network.named_parameters())
    for name, (place, values) in before.items():
        assert parameters[name].data_ptr() == place and torch.equal(parameters[name], values)


@pytest.fixture(scope="module")
def run(tmp_path_factory, text_encoder) -> Path:
    """A base, and a LoRA trained on it with dropout."""
    home = tmp_path_factory.mktemp("lora")
    base = settings(home / "base", make_pictures(home / "pictures"), text_encoder)
    train(build(base, train__steps=2))
    adapter = {"kind": "lora", "rank": 3, "alpha": 5, "targets": "attention+mlp", "dropout": 0.3}
    base |= {"init_from": str(home / "base"), "output": str(home / "style"), "adapter": adapter}
    base["optimizer"] = {**base["optimizer"], "lr": 0.02}
    train(build(base, train__steps=4, train__save_every=2))
    (home / "config.json").write_text(json.dumps(base))
    return home


def test_a_resumed_lora_ends_bit_for_bit_like_one_that_was_not(run, tmp_path):
    base = json.loads((run / "config.json").read_text()) | {"output": str(tmp_path / "again")}
    shutil.copytree(run / "style", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step_00000004")
    train(build(base, train__steps=4, train__save_every=2))
    for part in ("model", "ema"):
        one, two = (
            load_file(next((home / "checkpoints" / "step_00000004" / part).glob("adapter.safetensors")))
            for home in (run / "style", tmp_path / "again")
        )
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert [row["step"] for row in read_rows(tmp_path / "again" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_run_is_drawn_from_converted_and_merged(run, tmp_path, monkeypatch, capsys):
    adapted = pixart.Pipeline.from_pretrained(run / "style")
    expected = adapted("a red square", steps=2, output="latent")
    plain = pixart.Pipeline.from_pretrained(run / "base")
    before = plain("a red square", steps=2, output="latent")
    assert relative(before, expected) > 1e-3
    for format in FORMATS:
        path = target(tmp_path, format)
        call(monkeypatch, "convert", run / "style", path, "--to", format)
        name = plain.load_lora(path)
        assert relative(plain("a red square", steps=2, output="latent"), expected) <= 1e-4, format
        plain.unload_lora(name)
        assert torch.equal(plain("a red square", steps=2, output="latent"), before)
    call(monkeypatch, "convert", run / "style", tmp_path / "merged", "--to", "ours")
    merged = pixart.Pipeline.from_pretrained(tmp_path / "merged")
    assert relative(merged("a red square", steps=2, output="latent"), expected) <= 1e-4
    kohya = tmp_path / "out.safetensors"
    call(monkeypatch, "convert", run / "base", tmp_path / "half", "--to", "ours", "--lora", f"{kohya}:0.5")
    half = pixart.load_model(tmp_path / "half").state_dict()
    name = "blocks.0.mlp.fc1.weight"
    middle = (merged.model.state_dict()[name] + plain.model.state_dict()[name]) / 2
    torch.testing.assert_close(half[name], middle, rtol=1e-5, atol=1e-6)
    call(monkeypatch, "sample", "--model", run / "base", "a red square", "--lora", f"{kohya}:0.5", "--out",
         tmp_path / "drawn", "--set", "steps=2", "--device", "cpu")  # fmt: skip
    from PIL import Image

    assert Image.open(next((tmp_path / "drawn").glob("0*.png"))).text["lora"] == "out:0.5"


def test_a_sheet_has_a_column_for_each_strength_and_changes_none(run, tmp_path, monkeypatch, capsys):
    arguments = ("sample", "--model", run / "base", "a red square", "a dog", "--out", tmp_path, "--set", "steps=2",
                 "--device", "cpu", "--lora", f"{run / 'style'}:0.5")  # fmt: skip
    call(monkeypatch, *arguments, "--strengths", "0", "2")
    assert (tmp_path / "strengths.png").is_file()
    with pytest.raises(SystemExit):
        commands.run("sample", [*map(str, arguments[1:]), "--strengths", "0", "2"])
    assert "strengths.png is already there; remove it" in capsys.readouterr().err
    pipeline = pixart.Pipeline.from_pretrained(run / "base")
    with pytest.raises(InputError, match="no adapter is loaded"):
        strength_sheet(pipeline, ["a dog"], [1.0])
    plain = pipeline(["a red square", "a dog"], [0, 0], steps=2)
    name = pipeline.load_lora(run / "style", strength=500.0)  # few steps have taught it little
    sheet = strength_sheet(pipeline, ["a red square", "a dog"], [0.0, 2.0], steps=2)
    assert pipeline.loras.loaded[name].strength == 500.0
    pipeline.set_strength(name, 1000.0)
    strong = pipeline(["a red square", "a dog"], [0, 0], steps=2)
    cells = [[image] for pair in zip(plain, strong, strict=True) for image in pair]
    labels = ["0: a red square", "2: a red square", "0: a dog", "2: a dog"]
    assert sheet.tobytes() == contact_sheet(cells, labels, columns=2).tobytes()
    assert plain[0].tobytes() != strong[0].tobytes()


# ---------------------------------------------------------------------------------------------------- another base


@pytest.mark.parametrize("format", FORMATS)
def test_files_keep_the_mark_of_the_base_through_every_format(trained, tmp_path, format):
    source, _ = trained
    base, _ = load_with_card(tmp_path / "base")
    write_lora(read_lora(source), target(tmp_path, format), format)
    for other in FORMATS:
        (tmp_path / other).mkdir()
        write_lora(read_lora(target(tmp_path, format)), target(tmp_path / other, other), other)
        assert read_lora(target(tmp_path / other, other)).base_weights == mark_base(base), other


def told(network, *files) -> list[str]:
    """The warnings at loading these adapters, one after the other."""
    loras = Loras(network)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i, file in enumerate(files):
            loras.load(f"x{i}", file)
    return [str(warning.message) for warning in caught]


def test_a_lora_on_another_base_than_its_own_warns_in_one_line_and_acts(trained, tmp_path):
    source, _ = trained
    write_lora(read_lora(source), tmp_path / "x.safetensors", "kohya")
    other, _ = load_with_card(tmp_path / "base")
    with torch.no_grad():
        other.blocks[0].mlp.fc1.weight.mul_(1.1)
    before = other.blocks[0].attn.qkv.weight.clone()
    files = read_lora(source), read_lora(tmp_path / "x.safetensors")
    lines = told(other, *files)
    assert len(lines) == 2
    for line in lines:
        assert "was trained on" in line and "whose weights are not this network's" in line and "\n" not in line
    assert not torch.equal(other.blocks[0].attn.qkv.weight, before)
    assert told(load_with_card(tmp_path / "base")[0], *files) == []
    foreign = replace(read_lora(source), base_weights=None)
    assert told(other, foreign) == []


def test_no_dtype_of_the_base_no_other_adapter_and_no_null_caption_makes_it_another_base(trained, tmp_path):
    lora, dtypes = read_lora(trained[0]), (torch.float32, torch.bfloat16, torch.float16)
    base, card = load_with_card(tmp_path / "base")
    for stored in dtypes:
        folder = tmp_path / str(stored)
        save_model(folder, {name: tensor.to(stored) for name, tensor in base.state_dict().items()}, card)
        for dtype in dtypes:
            network, _ = load_with_card(folder, dtype=dtype)
            # also where the adapter's own base was stored in fp16
            own = replace(lora, base_weights=mark_base(load_with_card(folder, dtype=torch.float32)[0]))
            assert told(network, lora, own) == [], (stored, dtype)
            assert told(load_with_card(tmp_path / "base", dtype=dtype)[0], own) == [], (stored, dtype)
    with torch.no_grad():
        base.y_embedder.y_embedding.add_(1)  # training from images puts the text encoder's there
    assert told(base, lora) == []
    # two bases in fp16 are compared with each other
    half, _ = load_with_card(tmp_path / "torch.float16")
    own = replace(lora, base_weights=mark_base(half))
    half.blocks[0].mlp.fc1.weight.data += 1
    assert len(told(half, own)) == 1


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "rank: got 0"),
        ({"rank": 2.5}, "rank: got 2.5"),
        ({"alpha": -1}, "alpha: got -1"),
        ({"dropout": 1.0}, r"dropout: got 1\.0"),
        ({"targets": "blocks.*.attn.nothing"}, "matches no layer"),
        ({"targets": ["blocks.0.attn.qkv", "to_q"]}, "'to_q' matches no layer"),
        ({"rnak": 3}, "refuses its options"),
    ],
)
def test_wrong_settings_are_one_line(network, options, match):
    with pytest.raises(InputError, match=match) as caught:
        adapt(network, AdapterConfig("lora", options))
    assert "\n" not in str(caught.value)


def refused(state: dict, path: Path, match: str) -> None:
    save_file(state, path)
    with pytest.raises(InputError, match=match) as caught:
        read_lora(path)
    assert "\n" not in str(caught.value)


def pair(name: str, width: int = 8) -> dict:
    return {f"{name}.lora_A.weight": torch.ones(2, width), f"{name}.lora_B.weight": torch.ones(width, 2)}


def test_files_that_are_no_adapter_of_a_pixart_are_named(network, tmp_path):
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="this is a model, not a LoRA; give it as the model"):
        read_lora(tmp_path / "model.safetensors")
    path = tmp_path / "x.safetensors"
    refused(pair("transformer.single_transformer_blocks.0.attn.to_q"), path, "an adapter of FLUX")
    refused(pair("transformer.transformer_blocks.0.ff.conv_inverted"), path, "an adapter of Sana")
    refused(pair("lora_unet_down_blocks_0_attentions_0_proj_in"), path, "of Stable Diffusion's UNet")
    mixed = pair("transformer.transformer_blocks.0.attn1.to_q") | pair("transformer.transformer_blocks.0.attn9.to_q")
    refused(mixed, path, r"names that fit no PixArt: transformer\.transformer_blocks\.0\.attn9\.to_q \(1 of 4 names\)")
    lone = {"lora_unet_blocks_0_attn_qkv.lora_down.weight": torch.ones(2, 8)}
    refused(lone, path, "got down, expected down and up")
    both = pair("diffusion_model.blocks.0.attn.qkv") | pair("blocks.0.attn.qkv")
    refused(both, path, "both change blocks.0.attn.qkv")
    with pytest.raises(InputError, match="no such file"):
        read_lora(tmp_path / "nothing")


@pytest.mark.parametrize("format", ["ours", "diffusers", "diffusers-pipeline", "official", "run", "checkpoint"])
def test_a_model_given_as_a_lora_says_where_it_belongs(run, tmp_path, format):
    source = tmp_path / ("x.pth" if format == "official" else "x")
    if format == "run":
        source = run / "base"
    elif format == "checkpoint":
        source = run / "base" / "checkpoints" / "step_00000002"
    else:
        network, card = load_with_card(run / "base")
        if format == "diffusers-pipeline":
            source.mkdir()
            save(network, card, source / "transformer", "diffusers")
            (source / "model_index.json").write_text("{}")
        else:
            save(network, card, source, format)
    with pytest.raises(InputError, match=r"this is a model, not a LoRA; give it as the model \(--model\)") as caught:
        read_lora(source)
    assert "\n" not in str(caught.value)


def test_a_lora_of_every_format_given_as_a_model_names_lora(run, tmp_path):
    for format in FORMATS:
        path = target(tmp_path, format)
        write_lora(read_lora(run / "style"), path, format)
        with pytest.raises(InputError, match=r"as the model, and this (folder )?with --lora") as caught:
            pixart.Pipeline.from_pretrained(path)
        assert "\n" not in str(caught.value)


def test_an_adapter_of_another_width_or_depth_and_a_taken_name_are_refused(network, tmp_path):
    for module, width, match in (
        ("transformer.transformer_blocks.0.attn1.to_q", 1152, "1152 × 1152, the network's is 48 × 48"),
        ("transformer.transformer_blocks.27.attn1.to_q", 48, "blocks.27.attn.qkv.weight, which this network does not"),
    ):
        save_file(pair(module, width), tmp_path / "x.safetensors")
        with pytest.raises(InputError, match=match):
            Loras(network).load("x", read_lora(tmp_path / "x.safetensors"))
    save_file(pair("transformer.transformer_blocks.0.attn1.to_q", 48), tmp_path / "x.safetensors")
    loras = Loras(network)
    loras.load("x", read_lora(tmp_path / "x.safetensors"))
    with pytest.raises(InputError, match="'x' is loaded already"):
        loras.load("x", read_lora(tmp_path / "x.safetensors"))
    with pytest.raises(InputError, match="no 'y' is loaded"):
        loras.unload("y")
    with pytest.raises(InputError, match="strength: got nan"):
        loras.set_strength("x", math.nan)


def test_a_lora_given_as_a_model_says_where_it_belongs(network, tmp_path):
    save_file(pair("transformer.transformer_blocks.0.attn1.to_q"), tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="an adapter and no model; give its base as the model, and this"):
        pixart.load_model(tmp_path / "x.safetensors")


def test_targets_are_the_layers_of_their_names(network):
    attention = set(find_layers(network, "attention"))
    assert attention == {
        f"blocks.{i}.{part}" for i in range(2)
        for part in ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj")
    }  # fmt: skip
    assert {*find_layers(network, "attention+mlp")} - attention == {
        f"blocks.{i}.mlp.fc{j}" for i in (0, 1) for j in (1, 2)
    }
    assert "x_embedder.proj" in find_layers(network, "all")
