"""Estimates of a run's costs against what torch counts, makes and writes."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from features import make_store
from pixart.commands import load, make_parser
from pixart.config import build as build_config
from pixart.diffusion.objective import Denoising
from pixart.errors import InputError
from pixart.model import PixArt, PixArtConfig
from pixart.model.flops import flops_by_part, forward_flops
from pixart.model.memory import CASTS, MemoryTracker, empty, without_data
from pixart.train.config import TrainConfig
from pixart.train.devices import HERE, Device, find_device
from pixart.train.estimate import estimate
from pixart.train.estimate_report import Costs, compare
from pixart.train.loop import train
from pixart.train.optimizer import make_optimizer
from pixart.train.rehearsal import Rehearsal, rehearse
from runs import change, make_pictures, settings
from test_axes_runs import ARMS
from test_flops import CASES


def config(**changes) -> TrainConfig:
    return build_config(TrainConfig, change(settings("unused", "", ""), **changes))


def test_activations_of_a_linear_layer_and_a_gelu_have_a_closed_form():
    """Saved for the backward pass: the first layer's input, GELU's input, the second layer's input."""
    batch, width, hidden = 96, 40, 112
    with torch.device("meta"):
        chain = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
    with without_data():
        empty(chain)
        x = torch.empty(batch, width)
        with MemoryTracker() as tracker:
            tracker.hold(chain.parameters(), "weights", weights=True)
            tracker.hold([x], "input")
            y = chain(x)
            assert tracker.live["activations"] == 4 * batch * (2 * hidden + width)  # with the output, which y holds
            weights = 4 * (2 * width * hidden + width + hidden)
            assert tracker.live == {
                "weights": weights, "input": 4 * batch * width, "activations": 4 * batch * (2 * hidden + width),
            }  # fmt: skip
            tracker.now = "backward"
            y.sum().backward()
            del y
            assert tracker.live["activations"] == 0
            assert tracker.live["backward"] == weights  # the gradients


def test_autocast_keeps_a_copy_of_every_weight_and_half_of_the_activations():
    batch, width = 64, 48
    with torch.device("meta"):
        layer = nn.Linear(width, width)
    with without_data(), MemoryTracker() as tracker:
        tracker.hold(empty(layer).parameters(), "weights", weights=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(torch.empty(batch, width))
            assert tracker.live[CASTS] == 2 * (width**2 + width)
            assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("name", CASES)
def test_flops_by_part_add_up(name):
    model, *shape = CASES[name]
    parts = flops_by_part(model, *shape)
    assert sum(parts.values()) == forward_flops(model, *shape)
    dim, height, width, length = model.hidden_size, *shape
    tokens = height * width // 4
    assert parts["caption projection"] == 2 * length * dim * (model.caption_channels + dim)
    assert parts["final layer"] >= 2 * tokens * dim * 4 * model.out_channels
    if model.conditioning in ("adaln_single", "adaln_per_block") and model.mlp == "gelu":
        assert parts["MLP"] == model.depth * 4 * tokens * dim * int(dim * model.mlp_ratio)
        products = 4 * tokens * dim**2 + 4 * length * dim * (dim + tokens)
        assert parts["cross-attention"] == model.depth * products


@pytest.mark.parametrize("arm", ARMS)
def test_parameters_of_every_axis_are_those_of_its_network(arm):
    found = estimate(config(**ARMS[arm]))
    objective = Denoising(found.config.diffusion, PixArt(found.config.model))
    own = sum(p.numel() for p in PixArt(found.config.model).parameters())
    more = sum(p.numel() for p in objective.trained.parameters())
    assert found.parameters == found.trained_parameters == own + more
    assert sum(found.parameters_by_part.values()) == own + more
    assert found.parameters_by_part.get("objective", 0) == more


@pytest.mark.parametrize(
    ("preset", "total"), [("S/2", None), pytest.param("XL/2", 610_856_096, marks=pytest.mark.slow)]
)
def test_parameters_have_a_closed_form(preset, total):
    """The authors' XL/2 has 611 M parameters."""
    model = PixArtConfig.from_preset(preset)
    data = {"features": "store", "resolution": 256}
    found = estimate(config(model={"preset": preset}, data=data, vae={"kind": "kl", "source": "none"}, diffusion={}))
    dim, half, depth = model.hidden_size, 4 * model.hidden_size, model.depth
    time = 256 * dim + dim + dim**2 + dim + 6 * dim**2 + 6 * dim  # t_embedder and t_block
    assert found.parameters_by_part == {
        "self-attention": depth * 4 * (dim**2 + dim),
        "cross-attention": depth * 4 * (dim**2 + dim),
        "MLP": depth * (2 * dim * half + half + dim),
        "conditioning": time + depth * 6 * dim,
        "patch embedding": (16 + 1) * dim,
        "caption projection": 4096 * dim + dim + dim**2 + dim,
        "final layer": 32 * dim + 32 + 2 * dim,
    }
    assert total in (None, found.parameters)


def test_a_frozen_part_is_neither_trained_nor_has_it_optimizer_state():
    found, usual = estimate(config(train__freeze=["blocks.0.*"])), estimate(config())
    block = sum(p.numel() for p in PixArt(found.config.model).blocks[0].parameters())
    assert found.parameters == usual.parameters
    assert usual.trained_parameters - found.trained_parameters == block
    assert usual.memory.optimizer - found.memory.optimizer == pytest.approx(8 * block, abs=4 * 20)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adamw", {}), ("muon", {}), ("adafactor", {}), ("came", {"lr": 1e-4}), ("prodigy", {"lr": 1.0}),
        ("bnbadamw8bit", {}),
    ],
)  # fmt: skip
def test_optimizer_state_is_what_a_real_step_makes(name, options):
    if name.startswith("bnb"):
        pytest.importorskip("bitsandbytes")
    chosen = config(optimizer__name=name, **{f"optimizer__{key}": value for key, value in options.items()})
    model = PixArt(chosen.model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer = make_optimizer(dict(model.named_parameters()), chosen.optimizer)
    optimizer.step()
    tensors = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
    assert estimate(chosen).memory.optimizer == sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_is_as_large_as_estimated(tmp_path, optimizer):
    chosen = config(
        model__hidden_size=128, model__num_heads=4, model__depth=4, train__steps=1, train__batch_size=2,
        optimizer__name=optimizer, output=str(tmp_path / "run"),
    )  # fmt: skip
    sample = {"latents": torch.zeros(3, 8, 8), "caption": torch.zeros(4, 16)}
    train(chosen, data=[{**sample, "id": str(i)} for i in range(2)])
    [folder] = (tmp_path / "run" / "checkpoints").glob("step_*")
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    found = estimate(chosen)
    assert found.checkpoint_bytes == pytest.approx(written, rel=0.02)
    assert found.model_bytes == pytest.approx((folder / "model" / "model.safetensors").stat().st_size, rel=0.02)


def stored(**changes) -> TrainConfig:
    """A run from a store of latents; nothing of it needs to be there."""
    model = {"caption_channels": 256, "caption_length": 32, "latent_size": 16, **changes.pop("model")}
    data = {"features": "none", "resolution": 128}
    text = {"model": "none", "length": 32}
    vae = {"kind": "kl", "source": "none"}
    return config(model=model, data=data, text=text, vae=vae, diffusion={}, **changes)


# chosen after the simulation was written, and used for nothing else
MEASURED = {
    "fp32": {"model": {"hidden_size": 384, "depth": 8, "num_heads": 6}, "train__batch_size": 12},
    "bf16, SwiGLU, accumulation": {
        "model": {"hidden_size": 512, "depth": 4, "num_heads": 8, "mlp": "swiglu"}, "train__batch_size": 16,
        "train__accumulation": 2, "train__mixed_precision": "bf16",
    },
    "gradient checkpointing, adaLN per block": {
        "model": {"hidden_size": 640, "depth": 4, "num_heads": 10, "conditioning": "adaln_per_block"},
        "train__batch_size": 8, "train__gradient_checkpointing": True,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_memory_is_within_10_percent_of_that_of_a_process_that_trains(name):
    chosen = stored(**MEASURED[name])
    found, measured = estimate(chosen).memory_bytes, rehearse(chosen, device="cpu", steps=2).memory
    assert found == pytest.approx(measured, rel=0.1), f"estimated {found / 2**20:.0f} MiB, {measured / 2**20:.0f} MiB"


def test_a_feature_store_is_as_large_as_estimated(tmp_path, text_encoder):
    base = settings(tmp_path / "run", make_pictures(tmp_path / "images", 8, side=64), text_encoder)
    base["data"]["resolution"], base["model"]["latent_size"] = 64, 64
    make_store(base, tmp_path / "store", extract__mirrored=True)
    files = [path for kind in ("samples", "captions") for path in (tmp_path / "store").glob(f"{kind}-*")]
    chosen = build_config(TrainConfig, change(base, extract__mirrored=True))
    shard = load_file(next((tmp_path / "store").glob("captions-*")))
    tokens = round(len(shard["states"]) / 8)
    found = Costs("", estimate(chosen), images=8, tokens=tokens).store_bytes
    assert found == pytest.approx(sum(path.stat().st_size for path in files), rel=0.02)


def test_time_is_flops_over_the_used_share_of_the_peak():
    found = estimate(config(train__mixed_precision="bf16", train__steps=1000, train__batch_size=8))
    costs = Costs("", found, find_device("a100", torch.bfloat16), 0.25)
    assert costs.device_days == pytest.approx(8000 * found.training_flops / (312e12 * 0.25) / 86400)
    single = Costs("", estimate(config()), find_device("a100", torch.float32), 0.25)
    assert single.device_days == pytest.approx(6 * 4 * found.training_flops / (19.5e12 * 0.25) / 86400)


@pytest.mark.parametrize("peak", [1e3, 1e15])  # below and above the rate of the steps
def test_a_run_takes_as_long_here_as_its_measured_steps(peak):
    chosen = config(train__steps=1000)
    measured = Rehearsal(memory=2**30, seconds=2.0, steps=3, peak=peak)
    costs = Costs("", estimate(chosen), Device(HERE, {torch.float32: 7.0}), measured=measured)
    assert costs.device_days == pytest.approx(1000 * 2.0 / 86400)


def test_shards_divide_what_is_permanent():
    one, two = (estimate(config(train__parallel="fsdp"), processes=n).memory.at_peak for n in (1, 2))
    for kind in ("weights", "average", "optimizer state"):
        assert two[kind] == -(-one[kind] // 2)
    assert one["gathered weights"] == two["gathered weights"] > 0
    assert estimate(config()).memory.at_peak["gathered weights"] == 0


def test_an_objective_that_cannot_be_simulated_is_said_to_be_counted_as_denoising():
    found = estimate(config(objective={"name": "repa", "options": {"block": 0, "size": 8}}))
    assert "objective repa is counted as denoising" in found.memory.notes[0]
    assert found.parameters_by_part["objective"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["openmoji", "--device", "a10"], r"device a10: not known; did you mean 'a100'\? \(there are v100, a100"),
        (["openmoji", "--device", "a100", "--utilisation", "0"], "utilisation: got 0, expected more than 0"),
        (["openmoji", "--utilisation", "1.5"], r"utilisation: got 1.5, expected .* at most 1"),
        (["finetune_512", "--device", "v100"], "device v100: no bf16 units, only fp16, fp32"),
        (["openmojo"], "config openmojo: there is no such file"),
        (["openmoji", "--processes", "3"], "processes: got 3, expected a number that divides train.batch_size 64"),
        (["openmoji", "--measure", "--processes", "2"], "--measure: takes its steps in one process"),
        (["--paper", "--measure"], "--measure: takes its steps in one process"),
        (["openmoji", "--images", "0"], "--images 0: expected a positive number"),
        ([], "CONFIG: expected a YAML file"),
    ],
)
def test_wrong_input_is_one_line(words, message):
    command = load("estimate")
    with pytest.raises(InputError, match=message) as caught:
        command.main(make_parser("estimate").parse_intermixed_args(words))
    assert "\n" not in str(caught.value)


def test_the_command_prints_tables_and_writes_all_numbers(tmp_path, capsys):
    command, file = load("estimate"), tmp_path / "costs.json"
    words = ["openmoji", "train.steps=1000", "--device", "a100", "--json", str(file)]
    command.main(make_parser("estimate").parse_intermixed_args(words))
    said = capsys.readouterr().out
    assert "| MLP | 3,153,408 |" in said and "utilisation 40%, assumed" in said
    [written] = json.loads(file.read_text())
    assert written["images"] == 64_000 and written["run_flops"] == 64_000 * written["training_flops"]
    assert written["memory_bytes"] == sum(written["memory_by_kind"].values())


def test_several_rows_have_what_was_measured_and_the_shares_that_were_used():
    found, measured = estimate(config()), Rehearsal(memory=2**30, seconds=1.0, steps=2, peak=1e12)
    device = find_device("a100", torch.float32)
    said = compare([Costs("a", found, device, 0.25), Costs("b", found, device, measured=measured)])
    reached = found.training_flops * 4 / 1e12
    assert "(measured 1.00 GiB)" in said and f"a100 days at {reached:.0%} to 25%" in said
