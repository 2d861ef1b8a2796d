"""The names under which tools store LoRA, LoHa and LoKr: prefixes, modules and suffixes.

A name is `prefix` + a module + `suffix`. Modules are official or diffusers' names, with dots or with underscores in
their place. Underscores cannot be told from dots, so names are looked up in the list of all modules, never split.
"""

import re
from typing import NamedTuple

from pixart.checkpoint.keys import module_parts

# the longest first: one begins another
PREFIXES = (
    "unet.base_model.model.", "base_model.model.", "lora_transformer_", "lora_unet_", "lycoris_", "transformer.",
    "diffusion_model.", "unet.", "",
)  # fmt: skip
_SUFFIX = re.compile(
    r"\.(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up|lora_mid)(\.default)?\.weight$"
    r"|\.(lora_magnitude_vector)(\.default)?(\.weight)?$"
    r"|\.(alpha|dora_scale|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](_[ab])?|lokr_t2|diff|diff_b)$"
)
_SAME = {
    "lora_A": "down", "lora_down": "down", "lora.down": "down", "lora_B": "up", "lora_up": "up", "lora.up": "up",
    "lora_magnitude_vector": "magnitude", "dora_scale": "magnitude",
}  # fmt: skip
_OTHERS = (  # (sign in a name, whose adapter it is)
    (r"single_transformer_blocks|double_blocks|single_blocks|guidance_in", "of FLUX"),
    (r"conv_inverted|conv_depth|conv_point|linear_q_norm", "of Sana"),
    (r"joint_blocks|context_embedder|add_k_proj", "of Stable Diffusion 3"),
    (r"lora_te\d?_|text_model|text_encoder", "of a text encoder"),
    (r"down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block", "of Stable Diffusion's UNet"),
    (r"img_in|txt_in|img_mod|txt_mod", "of Qwen-Image or HunyuanVideo"),
)


class Place(NamedTuple):
    """Where a change goes: one of the equal parts of the rows of a weight (or bias) of ours."""

    module: str
    part: int
    parts: int
    tensor: str = "weight"

    @property
    def name(self) -> str:
        """The name of the whole weight or bias."""
        return f"{self.module}.{self.tensor}"


def split_name(name: str) -> tuple[str, str] | None:
    """A tensor's name → its module's, with the prefix, and what it is; None if it is no adapter's."""
    match = _SUFFIX.search(name)
    if match is None:
        return None
    kind = match[1] or match[3] or match[6]
    return name[: match.start()], _SAME.get(kind, kind)


def find_place(module: str) -> Place | None:
    """Where a module's name, with its prefix, is in our network."""
    for prefix in PREFIXES:
        if module.startswith(prefix):
            flat = module[len(prefix) :].replace(".", "_")
            number = re.search(r"(?:^|_)(?:transformer_)?blocks_(\d+)_", flat)
            at = "" if number is None else number[1]
            key = flat if number is None else flat[: number.start(1)] + "#" + flat[number.end(1) :]
            if found := _PLACES.get(key):
                ours, part, parts = found
                return Place(ours.replace("#", at), part, parts)
    return None


def whose(names: list[str]) -> str | None:
    """Which other model an adapter is of, if its names tell."""
    return next((what for sign, what in _OTHERS if any(re.search(sign, name) for name in names)), None)


def their_names(place_module: str) -> tuple[str, ...]:
    """diffusers' names of the parts of a module of ours."""
    number = re.match(r"blocks\.(\d+)\.", place_module)
    at = "" if number is None else number[1]
    key = place_module if number is None else f"blocks.#.{place_module[number.end() :]}"
    return tuple(name.replace("#", at) for name in _MODULES[key])


_MODULES = module_parts()  # ours → theirs, with # for a block's number
_PLACES: dict[str, tuple[str, int, int]] = {}
for _ours, _theirs in _MODULES.items():
    _PLACES[_ours.replace(".", "_")] = (_ours, 0, 1)
    for _part, _name in enumerate(_theirs):
        _PLACES[_name.replace(".", "_")] = (_ours, _part, len(_theirs))
