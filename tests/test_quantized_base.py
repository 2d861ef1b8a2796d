"""A LoRA's base in 8 and 4 bits: the formats by their definitions, runs on them, and what is refused."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import pixart
from chaos import tensors
from pixart.adapters.load import load_merged, load_model, read_settings
from pixart.adapters.lora import TARGETS, find_layers
from pixart.adapters.lora_files import FORMATS, read_lora, write_lora
from pixart.checkpoint.files import checkpoints
from pixart.errors import InputError
from pixart.quantize import QUANTIZED, QuantizedLinear
from pixart.train.estimate import estimate
from pixart.train.loop import train
from pixart.train.setup import start
from runs import build, change, make_pictures, settings
from test_lora_runs import run_two
from toy import relative

# NF4's 16 values (arXiv 2305.14314, appendix E)
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def kinds() -> list:
    four = pytest.mark.skipif(not _has_bitsandbytes(), reason="needs bitsandbytes")
    return ["int8", pytest.param("nf4", marks=four)]


def _has_bitsandbytes() -> bool:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return False
    return True


def by_definition(weight: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "int8":
        scale = weight.abs().amax(1, keepdim=True) / 127
        return (weight / scale).round() * scale
    blocks = weight.reshape(-1, 64)
    scale, table = blocks.abs().amax(1, keepdim=True), torch.tensor(NF4)
    nearest = (blocks / scale)[..., None].sub(table).abs().argmin(-1)
    return (table[nearest] * scale).view_as(weight)


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(96, 80).requires_grad_(False)  # whose rows are no multiple of a block


@pytest.mark.parametrize("kind", kinds())
def test_a_layer_computes_with_the_weight_of_its_definition(layer, kind):
    x, found = torch.randn(3, 5, 96, requires_grad=True), QuantizedLinear(layer, kind)
    weight = by_definition(layer.weight, kind)
    assert relative(found.weight, weight) <= 1e-6
    y, upstream = found(x), torch.randn(3, 5, 80)
    assert relative(y, F.linear(x, weight, layer.bias)) <= 1e-6
    (gradient,) = torch.autograd.grad(y, x, upstream)
    assert relative(gradient, upstream @ weight) <= 1e-6
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            half = found(x)
            assert half.dtype == dtype and relative(half.float(), y) <= 0.01
        (gradient,) = torch.autograd.grad(half, x, upstream.to(dtype))
        assert gradient.dtype == torch.float32 and relative(gradient, upstream @ weight) <= 0.01


@pytest.mark.parametrize("kind", kinds())
def test_a_layer_keeps_no_dequantised_weight_for_the_gradient(layer, kind):
    found, kept = QuantizedLinear(layer, kind), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found(torch.randn(2, 96, requires_grad=True))
    assert {tensor.data_ptr() for tensor in kept} <= {buffer.data_ptr() for buffer in found.buffers()}
    held = sum(buffer.numel() * buffer.element_size() for buffer in found.buffers())
    assert held == {"int8": 80 * 96 + 80 * 4, "nf4": 80 * 96 // 2 + 80 * 96 // 64 * 4}[kind]
    assert [name for name, _ in found.named_parameters()] == ["bias"]


def test_four_bits_are_those_of_bitsandbytes_own_layer():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    theirs = bitsandbytes.nn.Linear4bit(128, 80, True, torch.float32, compress_statistics=False, quant_type="nf4")
    torch.manual_seed(0)
    layer = nn.Linear(128, 80).requires_grad_(False)  # with rows of 96 its kernel for a CPU (0.50) takes wrong scales
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(4, 128, requires_grad=True)  # without a gradient it has a kernel of its own on some CPUs
    assert relative(QuantizedLinear(layer, "nf4")(x), theirs.to("cpu")(x)) <= 1e-6


@pytest.fixture(scope="module")
def base(tmp_path_factory, text_encoder) -> dict:
    """Settings of a LoRA on a small network that was trained for two steps."""
    home = tmp_path_factory.mktemp("quantized")
    found = settings(home / "base", make_pictures(home / "pictures"), text_encoder)
    found["data"] |= {"validation": 0.25}
    found["train"] |= {"keep": 9}
    train(build(found, train__steps=2))
    adapter = {"kind": "lora", "rank": 3, "dropout": 0.2}
    return change(found, init_from=str(home / "base"), adapter=adapter, optimizer__lr=0.02)


def on(base: dict, kind: str, output: Path, **changes):
    return build(base, adapter={**base["adapter"], "base_dtype": kind}, output=str(output), **changes)


def losses(run: Path) -> torch.Tensor:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([row["loss"] for row in rows if "loss" in row])


@pytest.mark.parametrize("kind", kinds())
def test_a_run_trains_the_adapter_of_one_on_the_whole_base_and_is_used_like_it(base, tmp_path, kind, recwarn):
    more = {"train__validate_every": 3, "train__sample_every": 6, "prompts": ["a red square"], "sample": {"steps": 2}}
    whole, run = (train(on(base, each, tmp_path / each, **more)).run for each in ("float32", kind))
    assert relative(losses(run), losses(whole)) < {"int8": 0.002, "nf4": 0.05}[kind]
    assert not torch.equal(losses(run), losses(whole))
    last = checkpoints(run)[-1]
    assert tensors(last).keys() == tensors(checkpoints(whole)[-1]).keys()  # the adapter and nothing else
    assert read_settings(last / "model")[3] == read_settings(checkpoints(whole)[-1] / "model")[3]
    adapted = pixart.Pipeline.from_pretrained(run)  # on the base in full precision, and as such without a warning
    expected = adapted("a red square", steps=2, output="latent")
    assert not [warning for warning in recwarn if "other weights" in str(warning.message)]
    merged, _ = load_merged(run)
    adapted.model = merged
    assert relative(adapted("a red square", steps=2, output="latent"), expected) <= 1e-4
    weight = load_model(base["init_from"]).blocks[0].attn.qkv.weight
    lora = load_file(last / "ema" / "adapter.safetensors")
    up, down = (lora[f"layers.blocks-0-attn-qkv.{part}"] for part in ("up", "down"))
    assert relative(merged.blocks[0].attn.qkv.weight, weight + up @ down) <= 1e-6  # in full precision; the scale is 1
    drawer = pixart.Pipeline.from_pretrained(base["init_from"])
    for format in FORMATS:
        path = tmp_path / (f"{format}.safetensors" if format == "kohya" else format)
        write_lora(read_lora(run), path, format)
        drawer.load_lora(path)
        assert relative(drawer("a red square", steps=2, output="latent"), expected) <= 1e-4, format
        drawer.unload_lora()
    assert not [warning for warning in recwarn if "was trained on" in str(warning.message)]


@pytest.mark.parametrize("kind", kinds())
def test_a_run_goes_on_bit_for_bit_and_its_average_shares_the_base(base, tmp_path, kind):
    run = train(on(base, kind, tmp_path / "run")).run
    again = shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(checkpoints(again)[-1])
    train(on(base, kind, again))
    found, expected = (tensors(checkpoints(place)[-1]) for place in (again, run))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    parts = start(on(base, kind, tmp_path / "another")).state.parts
    changed = {name for name, layer in parts.network.named_modules() if isinstance(layer, QuantizedLinear)}
    assert changed == find_layers(load_model(base["init_from"]), TARGETS["attention+mlp"]).keys()
    pairs = zip(parts.network.buffers(), parts.average.buffers(), strict=True)
    assert all(one.data_ptr() == other.data_ptr() for one, other in pairs)
    assert not any(parameter.requires_grad for parameter in parts.network.parameters())


@pytest.mark.parametrize("kind", kinds())
def test_dora_checkpointing_bf16_and_accumulation_go_with_it(base, tmp_path, kind):
    dora = {**base, "adapter": {**base["adapter"], "dora": True}}
    more = {"train__gradient_checkpointing": True, "train__mixed_precision": "bf16", "train__accumulation": 2}
    whole, run = (train(on(dora, each, tmp_path / each, **more)).run for each in ("float32", kind))
    assert relative(losses(run), losses(whole)) < 0.05
    parts = start(on(dora, kind, tmp_path / "start")).state.parts
    layer = parts.network.blocks[0].attn.qkv
    magnitude = parts.trained["adapter"].layers["blocks-0-attn-qkv"].magnitude
    assert relative(magnitude, layer.weight.norm(dim=1)) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds())
def test_two_processes_train_the_adapter_of_one(base, tmp_path, kind):
    adapter = {"kind": "lora", "rank": 3, "base_dtype": kind}
    one = train(build(base, adapter=adapter, output=str(tmp_path / "one"))).run
    two = run_two(base, tmp_path, adapter=adapter)
    found, expected = (
        load_file(checkpoints(run)[-1] / "model" / "adapter.safetensors") for run in (two, one)
    )  # fmt: skip
    assert max(relative(found[name], expected[name]) for name in found) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds())
def test_compiled_blocks_train_to_the_same_numbers(base, tmp_path, kind):
    plain, compiled = (
        train(on(base, kind, tmp_path / str(flag), train__compile=flag, train__steps=3)).run for flag in (False, True)
    )
    assert relative(losses(compiled), losses(plain)) < 1e-4


@pytest.mark.parametrize("kind", QUANTIZED)
def test_the_estimate_counts_the_quantised_bytes_without_bitsandbytes(base, tmp_path, kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    found, whole = (estimate(on(base, each, tmp_path)) for each in (kind, "float32"))
    assert found.parameters == whole.parameters and found.parameters_by_part == whole.parameters_by_part
    assert found.trained_parameters == whole.trained_parameters
    layers = find_layers(load_model(base["init_from"]), TARGETS["attention+mlp"]).values()
    count, rows = sum(layer.weight.numel() for layer in layers), sum(layer.out_features for layer in layers)
    blocks = sum(-(-layer.weight.numel() // 64) for layer in layers)
    held = {"int8": count + 4 * rows, "nf4": sum(-(-layer.weight.numel() // 2) for layer in layers) + 4 * blocks}[kind]
    saved = whole.memory.at_peak["weights"] - found.memory.at_peak["weights"]
    assert saved == 4 * count - held
    assert found.memory_bytes < whole.memory_bytes and found.checkpoint_bytes == whole.checkpoint_bytes


def test_what_cannot_be_is_one_line_before_any_work(base, tmp_path, monkeypatch):
    for kind in QUANTIZED:
        with pytest.raises(InputError, match=rf"adapter\.base_dtype {kind} does not work with train\.parallel fsdp"):
            on(base, kind, tmp_path / "run", train__parallel="fsdp")
    with pytest.raises(InputError, match=r"adapter\.base_dtype: .*'int4'.*int8"):
        on(base, "int4", tmp_path / "run")
    wanted = on(base, "nf4", tmp_path / "run", data__folder="none")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(InputError, match=r"adapter\.base_dtype nf4 needs the package 'bitsandbytes': .*quantize"):
            train(wanted)
    functional = pytest.importorskip("bitsandbytes").functional

    def lacking(*_, **__):
        raise NotImplementedError("no kernel for the backend 'cpu'\nand more")

    monkeypatch.setattr(functional, "quantize_4bit", lacking)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"adapter\.base_dtype nf4 needs CUDA: bitsandbytes [\d.]+") as caught:
        train(wanted)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
