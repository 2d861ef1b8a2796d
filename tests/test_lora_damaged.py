"""Adapters whose tensors or settings are damaged, absurd or made to do harm: refused by name, in one line."""

import json

import pytest
import torch
from safetensors.torch import save_file

from pixart.adapters.apply import Loras
from pixart.adapters.lora_files import read_lora
from pixart.errors import InputError
from toy import tiny_model

NAME = "lora_unet_blocks_0_attn_proj"
WIDTH = 48


def lora(down=None, up=None, **more) -> dict[str, torch.Tensor]:
    parts = {
        "lora_down.weight": torch.ones(4, WIDTH) if down is None else down,
        "lora_up.weight": torch.ones(WIDTH, 4) if up is None else up,
        **more,
    }
    return {f"{NAME}.{key}": value for key, value in parts.items()}


def only(**parts) -> dict[str, torch.Tensor]:
    return {f"{NAME}.{key}": value for key, value in parts.items()}


def halves(rows: int, rank: int = 4, other: int | None = None) -> dict[str, torch.Tensor]:
    other = rows if other is None else other
    return {
        "hada_w1_a": torch.ones(rows, rank), "hada_w1_b": torch.ones(rank, WIDTH),
        "hada_w2_a": torch.ones(other, rank), "hada_w2_b": torch.ones(rank, WIDTH),
    }  # fmt: skip


TENSORS = {
    "nan": (lora(torch.full((4, WIDTH), float("nan"))), "down has values that are not finite"),
    "infinite": (lora(up=torch.full((WIDTH, 4), float("inf"), dtype=torch.float16)), "up has values that are not"),
    "rank-0": (
        lora(torch.ones(0, WIDTH), torch.ones(WIDTH, 0)),
        r"(down|up) has the shape \((0, 48|48, 0)\), expected",
    ),
    "vector": (lora(torch.ones(WIDTH)), r"down has the shape \(48,\), expected a matrix"),
    "scalar": (lora(torch.tensor(1.0)), r"down has the shape \(\), expected a matrix"),
    "integers": (lora(torch.ones(4, WIDTH, dtype=torch.int8)), "down is of type int8, expected floating point"),
    "alpha-nan": (lora(alpha=torch.tensor(float("nan"))), r"alpha is \[nan\], expected one finite number"),
    "alpha-two": (lora(alpha=torch.tensor([1.0, 2.0])), r"alpha is \[1.0, 2.0\], expected one finite number"),
    "alpha-alone": (only(alpha=torch.tensor(4.0)), r"got alpha, expected down and up \(LoRA\)"),
    "ranks": (lora(up=torch.ones(WIDTH, 5)), "A has 4 rows, B 5 columns"),
    "dora": (lora(dora_scale=torch.ones(3)), "the magnitude has 3 values, expected 48"),
    "dora-columns": (lora(dora_scale=torch.ones(1, 3)), "the magnitude has 3 values, expected 48"),
    "dora-nan": (lora(dora_scale=torch.full((WIDTH,), float("nan"))), "magnitude has values that are not finite"),
    "loha-half": (only(hada_w1_a=torch.ones(WIDTH, 4), hada_w1_b=torch.ones(4, WIDTH)), "got hada_w1_a, hada_w1_b, ex"),
    "loha-ranks": (only(**{**halves(WIDTH), "hada_w1_b": torch.ones(5, WIDTH)}), "hada_w1_b has 5 rows, .* 4 columns"),
    "loha-shapes": (only(**halves(WIDTH, other=24)), r"its two products are of \(48, 48\) and \(24, 48\)"),
    "lokr-ranks": (
        only(lokr_w1=torch.ones(6, 6), lokr_w2_a=torch.ones(8, 2), lokr_w2_b=torch.ones(3, 8)),
        "lokr_w2_b has 3 rows, lokr_w2_a 2 columns",
    ),
    "difference": (only(diff=torch.full((WIDTH, WIDTH), float("nan"))), "diff has values that are not finite"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_make_no_change_are_named(case, tmp_path):
    state, message = TENSORS[case]
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=f"x.safetensors: {NAME}: {message}") as caught:
        read_lora(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)


SETTINGS = {
    "text": ({"lora_alpha": "much"}, "lora_alpha: got 'much', expected a positive number"),
    "nan": ({"lora_alpha": float("nan")}, "lora_alpha: got nan"),
    "zero": ({"lora_alpha": 0}, "lora_alpha: got 0, expected a positive number"),
    "huge": ({"lora_alpha": 10**400}, "lora_alpha: got 1000"),
    "list": ({"lora_alpha": [4]}, r"lora_alpha: got \[4\]"),
    "patterns": ({"lora_alpha": 4, "alpha_pattern": [1]}, r"alpha_pattern: got \[1\], expected patterns"),
    "pattern": ({"lora_alpha": 4, "alpha_pattern": {"(": 3}}, r"alpha_pattern: '\(' is no regular expression"),
    "pattern-value": ({"lora_alpha": 4, "alpha_pattern": {"attn.proj": None}}, "alpha_pattern: attn.proj: got None"),
}


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("place", ["config", "header"])
def test_settings_that_give_no_strength_are_named(case, place, tmp_path):
    settings, message = SETTINGS[case]
    state = {f"base_model.model.blocks.0.attn.proj.lora_{which}.weight": torch.ones(shape)
             for which, shape in (("A", (4, WIDTH)), ("B", (WIDTH, 4)))}  # fmt: skip
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in settings.items()})}
    name = "adapter_model.safetensors" if place == "config" else "pytorch_lora_weights.safetensors"
    save_file(state, tmp_path / name, header if place == "header" else None)
    if place == "config":
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, **settings}))
    with pytest.raises(InputError, match=f"{name}: its settings: {message}") as caught:
        read_lora(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_header_that_is_no_mapping_and_an_absurd_mark_of_a_base_do_no_harm(tmp_path, recwarn):
    state = {key.replace("blocks_0", "blocks_1"): value for key, value in lora().items()}
    save_file(state, tmp_path / "x.safetensors", {"lora_adapter_metadata": "[1]"})
    with pytest.raises(InputError, match=r"lora_adapter_metadata: expected keys and values, got \[1\]"):
        read_lora(tmp_path / "x.safetensors")
    save_file(state, tmp_path / "y.safetensors", {"pixart_base_weights": "network:" + "9" * 10**5})
    file = read_lora(tmp_path / "y.safetensors")
    assert file.base_weights is None
    Loras(tiny_model()).load("y", file)
    assert not recwarn.list
