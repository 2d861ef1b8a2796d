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
        replace(COMPRESSED, kv_compression="uniform", qk_norm=True, kv_ratio=4), 54, 70, 300,
    ),
    "by convolution, an odd grid": (replace(COMPRESSED, kv_ratio=4), 54, 70, 300),
    "a fractional MLP ratio": (replace(PRESETS["S/2"], mlp_ratio=2.7), 32, 32, 20),
}  # fmt: skip


def counted(config, height: int, width: int, length: int, batch: int, *, train: bool = False) -> int:
    with torch.device("meta"):
        model = PixArt(config)
        inputs = [
            torch.empty(batch, config.in_channels, height, width), torch.empty(batch),
            torch.empty(batch, length, config.caption_channels), torch.ones(batch, length, dtype=torch.bool),
        ]  # fmt: skip
        if config.micro_conditions:
            inputs += [torch.empty(batch, 2), torch.empty(batch)]
        # exactly the products that our formula means: a fused attention's backward repeats one of them
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            output = model(*inputs)
            if train:
                output.sum().backward()
    return counter.get_total_flops()


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
