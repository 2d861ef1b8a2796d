"""The FLOP formula against torch's own counter, which watches every operation of a real forward."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pixart.errors import InputError
from pixart.model import PRESETS, PixArt
from pixart.model.flops import forward_flops, training_flops

COMPRESSED = replace(PRESETS["sigma-1024"], kv_compression="conv", kv_blocks=tuple(range(14, 28)))
CASES = {
    "alpha-256": (PRESETS["alpha-256"], 32, 32, 120),
    "alpha-512, wide": (PRESETS["alpha-512"], 48, 84, 77),
    "alpha-1024, micro-conditions": (PRESETS["alpha-1024"], 128, 128, 120),
    "sigma-2k": (PRESETS["sigma-2k"], 256, 256, 300),
    "S/2": (PRESETS["S/2"], 32, 32, 1),
    "one caption token, no variance": (replace(PRESETS["B/2"], learn_sigma=False, in_channels=3), 32, 16, 9),
    "KV compression by convolution": (COMPRESSED, 128, 96, 300),
    "by picking, an odd grid, qk-norm": (
        replace(COMPRESSED, kv_compression="uniform", qk_norm=True, kv_ratio=4),
        54,
        70,
        300,
    ),
    "by convolution, an odd grid": (replace(COMPRESSED, kv_ratio=4), 54, 70, 300),
    "adaLN per block, RMSNorm": (replace(PRESETS["B/2"], conditioning="adaln_per_block", norm="rms_norm"), 32, 32, 120),
    "DiT": (replace(PRESETS["XL/2"], conditioning="dit"), 32, 32, 1),
    "a time token, RoPE": (replace(PRESETS["B/2"], conditioning="time_token", positions="rope2d"), 32, 48, 120),
    "learned positions, SwiGLU": (replace(PRESETS["L/2"], positions="learned", mlp="swiglu"), 48, 32, 120),
    "by every fourth token": (replace(COMPRESSED, kv_compression="uniform_every", kv_ratio=4), 64, 64, 300),
    "by the mean, qk-RMSNorm": (replace(COMPRESSED, kv_compression="ave", qk_norm="rms_norm"), 64, 64, 300),
    "a fractional MLP ratio": (replace(PRESETS["S/2"], mlp_ratio=2.7), 32, 32, 20),
}


def counted(config, height: int, width: int, length: int, batch: int, *, train: bool = False, **given) -> int:
    with torch.device("meta"):
        model = PixArt(config)
        inputs = [
            torch.empty(batch, config.in_channels, height, width),
            torch.empty(batch),
            torch.empty(batch, length, config.caption_channels),
            torch.ones(batch, length, dtype=torch.bool),
        ]
        if config.micro_conditions:
            inputs += [torch.empty(batch, 2), torch.empty(batch)]
        # exactly the products that our formula means: a fused attention's backward repeats one of them
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            output = model(*inputs, **{name: value.to("meta") for name, value in given.items()})
            if train:
                output.sum().backward()
    return counter.get_total_flops()


def test_flops_of_routed_tokens_equal_torchs_count():
    config = replace(PRESETS["B/2"], routing="tread", route_blocks=(2, 8), route_ratio=0.5)
    found = forward_flops(config, 32, 48, 120, batch=2, conditions={"route": (16 * 24,)})
    assert found == counted(config, 32, 48, 120, 2, route=torch.rand(2, 16 * 24))
    usual = forward_flops(replace(config, routing=None), 32, 48, 120, batch=2)
    assert found < 0.75 * usual  # 7 of 12 blocks have half of the tokens
    assert forward_flops(config, 32, 48, 120, batch=2) == usual


def test_adaln_single_has_the_papers_fewer_parameters():
    """PixArt-α, section 2.3: 26 % fewer than with adaLN in every block."""
    with torch.device("meta"):
        single, per_block = (
            sum(p.numel() for p in PixArt(replace(PRESETS["XL/2"], conditioning=kind)).parameters())
            for kind in ("adaln_single", "adaln_per_block")
        )
    assert 1 - single / per_block == pytest.approx(0.26, abs=0.01)


@pytest.mark.parametrize("name", CASES)
def test_forward_flops_equal_torchs_count(name):
    config, *shape = CASES[name]
    assert forward_flops(config, *shape, batch=3) == counted(config, *shape, batch=3)


def test_training_is_three_forwards_but_for_the_gradients_of_the_inputs():
    config = replace(PRESETS["B/2"], micro_conditions=True)
    dim = config.hidden_size
    # what has no gradient to pass on: patches, caption states, and the sinusoids of the time, two sides and the ratio
    unneeded = 2 * 2 * (256 * 16 * dim + 20 * config.caption_channels * dim + 256 * dim + 3 * 256 * dim // 3)
    found = counted(config, 32, 32, 20, batch=2, train=True)
    assert training_flops(config, 32, 32, 20, batch=2) - unneeded == found


def test_checkpointing_adds_a_forward_of_the_blocks():
    config = PRESETS["XL/2"]
    extra = training_flops(config, 32, 32, 120, checkpointing=True) - training_flops(config, 32, 32, 120)
    shallow = forward_flops(replace(config, depth=1), 32, 32, 120)
    assert extra == 28 * (forward_flops(replace(config, depth=2), 32, 32, 120) - shallow)


def test_a_size_that_is_no_multiple_of_the_patch_is_refused():
    with pytest.raises(InputError, match=r"31 × 32.*patch size 2"):
        forward_flops(PRESETS["XL/2"], 31, 32, 120)
