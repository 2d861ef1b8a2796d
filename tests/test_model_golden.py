"""The network against the official implementation: outputs, activations and gradients, fp32 on CPU."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pixart.errors import InputError
from pixart.model import PixArt, PixArtConfig
from toy import relative

GOLDEN = Path(__file__).parent / "golden"
RELEASED = {
    "PixArt-XL-2-256x256": "alpha-256",
    "PixArt-XL-2-512x512": "alpha-512",
    "PixArt-XL-2-1024-MS": "alpha-1024",
    "Sigma-XL-2-256x256": "sigma-256",
    "Sigma-XL-2-512-MS": "sigma-512",
    "Sigma-XL-2-1024-MS": "sigma-1024",
    "Sigma-XL-2-2K-MS": "sigma-2k",
}  # weights → preset
SIZE = {"hidden_size": 144, "depth": 2, "num_heads": 4, "caption_channels": 64, "caption_length": 12}
CASES = {
    "model_alpha_256": PixArtConfig(**SIZE),
    "model_alpha_1024ms_24x40": PixArtConfig(**SIZE, latent_size=128, position_scale=2.0, micro_conditions=True),
    "model_sigma_kvcompress_24x40": PixArtConfig(
        **SIZE, latent_size=256, position_scale=4.0, kv_compression="conv", kv_ratio=2, kv_blocks=(1,)
    ),
}


def load(name: str) -> dict[str, torch.Tensor]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)


def official_weights(golden: dict) -> dict:
    return {key.removeprefix("weights."): value for key, value in golden.items() if key.startswith("weights.")}


def run(model: PixArt, golden: dict) -> torch.Tensor:
    micro = {}
    if "in.img_hw" in golden:
        micro = {"size": golden["in.img_hw"], "aspect_ratio": golden["in.aspect_ratio"][:, 0]}
    return model(golden["in.x"], golden["in.t"], golden["in.y"][:, 0], golden.get("in.mask"), **micro)


def activations(model: PixArt, golden: dict, names: Iterable[str]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output, and what the named modules returned, flattened; a module may be called several times."""
    seen: dict[str, list[torch.Tensor]] = {}
    modules = dict(model.named_modules())
    hooks = [
        modules[name].register_forward_hook(lambda _, __, output, name=name: seen.setdefault(name, []).append(output))
        for name in names
    ]
    output = run(model, golden)
    for hook in hooks:
        hook.remove()
    return output, {name: torch.cat([part.flatten() for part in parts]) for name, parts in seen.items()}


@torch.no_grad()
def tolerance(model: PixArt, golden: dict) -> float:
    """1e-6, or 1e-5 where this processor's embeddings of times and sizes are off by more than 1e-6: the last bit of
    `torch.exp` differs between makers of processors, and times and sizes of up to 1,000 and more multiply it."""
    names = [name for name in ("t_embedder", "csize_embedder") if f"act.{name}" in golden]
    _, found = activations(model, golden, names)
    errors = [relative(value, golden[f"act.{name}"].flatten()) for name, value in found.items()]
    return 1e-6 if max(errors) <= 1e-6 else 1e-5


@pytest.mark.parametrize("name", CASES)
def test_output_and_activations_are_the_official_ones(name):
    golden = load(name)
    model = PixArt(CASES[name])
    model.load_state_dict(official_weights(golden), strict=True)
    expected = {key.removeprefix("act."): value for key, value in golden.items() if key.startswith("act.")}
    output, seen = activations(model, golden, expected)
    allowed = tolerance(model, golden)
    assert relative(output, golden["out"]) <= allowed
    for key, reference in expected.items():
        assert relative(seen[key], reference.flatten()) <= allowed, key


def test_gradients_are_the_official_ones():
    golden = load("model_alpha_256")
    model = PixArt(CASES["model_alpha_256"])
    model.load_state_dict(official_weights(golden), strict=True)
    golden["in.x"].requires_grad_()
    allowed = tolerance(model, golden)
    terms = run(model, golden) * golden["in.gw"] * 10
    terms.mean().backward()
    # the mean of terms of both signs nearly cancels: measure its error by the terms' size
    assert abs(terms.mean() - golden["out.loss"]) <= allowed * terms.abs().mean()
    assert relative(golden["in.x"].grad, golden["grad.x"]) <= allowed
    width = SIZE["hidden_size"]
    for name, parameter in model.named_parameters():
        grad, reference = parameter.grad, golden[f"grad.{name}"]
        if name.endswith(("attn.qkv.bias", "kv_linear.bias")):  # a key's bias has no gradient in exact arithmetic
            keys = slice(width, 2 * width) if "qkv" in name else slice(0, width)
            keep = torch.ones(len(grad), dtype=torch.bool)
            keep[keys] = False
            grad, reference = grad[keep], reference[keep]
        assert relative(grad, reference) <= allowed, name


def test_an_official_position_table_is_checked_and_not_loaded():
    golden = load("model_alpha_256")
    state = official_weights(golden)
    assert "pos_embed" in state
    model = PixArt(CASES["model_alpha_256"])
    assert "pos_embed" not in model.state_dict()
    assert relative(model.positions(16, 16)[None], state["pos_embed"]) <= 1e-6
    model.load_state_dict(state, strict=True)
    assert "pos_embed" in state, "the caller's dict is left as it was"
    model.load_state_dict({**state, "pos_embed": state["pos_embed"].half()}, strict=True)


@pytest.mark.parametrize(
    ("change", "text"), [({"position_scale": 0.5}, "position_scale"), ({"latent_size": 64}, "shape")]
)
def test_a_position_table_of_another_model_is_refused(change, text):
    state = official_weights(load("model_alpha_256"))
    model = PixArt(PixArtConfig(**{**SIZE, **change}))
    with pytest.raises(InputError, match=text):
        model.load_state_dict(state, strict=True)


def test_every_released_variant_has_the_official_names_and_shapes():
    shapes = json.loads((GOLDEN / "official_shapes.json").read_text())
    for official, preset in RELEASED.items():
        with torch.device("meta"):
            model = PixArt(PixArtConfig.from_preset(preset))
        ours = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        assert ours == shapes[official], official
    with torch.device("meta"):
        config = PixArtConfig.from_preset("sigma-1024")
        blocks = tuple(range(14, 28))
        compressed = PixArt(PixArtConfig(**{**vars(config), "kv_compression": "conv", "kv_blocks": blocks}))
    ours = {name: list(tensor.shape) for name, tensor in compressed.state_dict().items()}
    assert ours == shapes["Sigma-XL-2-1024-MS-kvcompress"]
