"""Tensor names in diffusers' format: one table for both directions. Our names are the official ones.

diffusers stores queries, keys and values in separate matrices, the official files as rows of one.
"""

from collections.abc import Mapping

from torch import Tensor

from pixart.errors import InputError

NULL_CAPTION = "y_embedder.y_embedding"  # not part of diffusers' format

# our module → diffusers' modules, which split its rows equally, in this order
_TOP = {
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": ("adaln_single.emb.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("adaln_single.emb.timestep_embedder.linear_2",),
    "t_block.1": ("adaln_single.linear",),
    "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
    "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
    "final_layer.linear": ("proj_out",),
}
_MICRO = {
    "csize_embedder.mlp.0": ("adaln_single.emb.resolution_embedder.linear_1",),
    "csize_embedder.mlp.2": ("adaln_single.emb.resolution_embedder.linear_2",),
    "ar_embedder.mlp.0": ("adaln_single.emb.aspect_ratio_embedder.linear_1",),
    "ar_embedder.mlp.2": ("adaln_single.emb.aspect_ratio_embedder.linear_2",),
}
_BLOCK = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
_TABLE = "scale_shift_table"


def module_parts() -> dict[str, tuple[str, ...]]:
    """Our module → diffusers' modules that are the equal parts of its rows, with # for the number of a block."""
    blocks = {f"blocks.#.{ours}": tuple(f"transformer_blocks.#.{part}" for part in theirs)
              for ours, theirs in _BLOCK.items()}  # fmt: skip
    return {**_TOP, **_MICRO, **blocks}


def diffusers_parts(depth: int, *, micro_conditions: bool) -> dict[str, tuple[str, ...]]:
    """Our name of every tensor except the null caption → diffusers' names of the equal parts of its rows, in order."""
    modules = {**_TOP, **(_MICRO if micro_conditions else {})}
    tables = {f"final_layer.{_TABLE}": (_TABLE,)}
    for i in range(depth):
        for ours, theirs in _BLOCK.items():
            modules[f"blocks.{i}.{ours}"] = tuple(f"transformer_blocks.{i}.{part}" for part in theirs)
        tables[f"blocks.{i}.{_TABLE}"] = (f"transformer_blocks.{i}.{_TABLE}",)
    named = {
        f"{ours}.{kind}": tuple(f"{part}.{kind}" for part in theirs)
        for ours, theirs in modules.items()
        for kind in ("weight", "bias")
    }
    return {**named, **tables}


def to_diffusers(state: Mapping[str, Tensor], depth: int, *, micro_conditions: bool) -> dict[str, Tensor]:
    """Our tensors under diffusers' names, without the null caption; the parts of a matrix are views.

    Raises:
        InputError: a tensor that diffusers' network does not have.
    """
    parts = diffusers_parts(depth, micro_conditions=micro_conditions)
    if homeless := [name for name in state if name not in parts and name != NULL_CAPTION]:
        raise InputError(f"diffusers' PixArt has no place for {', '.join(homeless[:4])}")
    return {
        part: rows
        for name, theirs in parts.items()
        for part, rows in zip(theirs, state[name].chunk(len(theirs)), strict=True)
    }
