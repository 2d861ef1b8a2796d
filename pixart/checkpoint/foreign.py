"""What files and folders of other models and tools are: by their tensors' names, by the files of a folder."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pixart.errors import InputError
from pixart.files import read_json

SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".index.json")  # of files of weights
_ADAPTERS = (  # (pattern of a tensor's name, what it is a part of)
    (r"lora_|_lora\.|\.lora\.|\.dora_|^lora_", "LoRA matrices"),
    (r"\.hada_w", "LoHa matrices"),
    (r"\.lokr_w", "LoKr matrices"),
    (r"(^|\.)b?oft_|\.oft_", "OFT matrices"),
    (r"\.ia3_l|\.on_input$", "(IA)³ scales"),
    (r"vera_lambda", "VeRA vectors"),
    (r"^lycoris_|^lora_unet_", "a LyCORIS adapter"),
)
_PARTS = re.compile(
    r"(^|\.)(first_stage_model|cond_stage_model|conditioner|text_encoders|vae)\."
)  # of all-in-one files
_NETWORK = re.compile(
    r"(^|\.)(blocks\.0|transformer_blocks\.0|input_blocks\.0|down_blocks\.0|double_blocks\.0|joint_blocks\.0)\."
)
_CAUSES = (
    (r"(^|\.)controlnet", "this is a ControlNet checkpoint (PixArt-δ), not its base model; load that"),
    (r"(^|\.)(ip_adapter|image_proj)\.", "this is an IP-Adapter, not a PixArt"),
    (r"^adapter\.(body|conv_in)\.", "this is a T2I-Adapter, not a PixArt"),
    (r"^<[^>]*>$|^emb_params$|^clip_[lg]$", "this is a textual inversion (an embedded word), not a model"),
    (r"^(320|640|768|1024|1280)\.\d\.linear", "this is a hypernetwork of Stable Diffusion, not a model"),
    (
        r"(^|\.)(down_blocks\..*attentions\..*attn2|input_blocks\.|time_embed\.0\.)",
        "this is the UNet of Stable Diffusion",
    ),
    (
        r"(^|\.)(encoder|decoder)\.(down_blocks|up_blocks|conv_in|down\.|up\.)",
        "this is a VAE, not a PixArt: give it as vae.source, or --vae",
    ),
    (r"encoder\.block\.\d+\.layer|^shared\.weight$", "this is a T5 text encoder, not a PixArt: give it as text.model"),
    (r"(text|vision)_model\.encoder\.layers\.", "this is a CLIP encoder, not a PixArt"),
    (
        r"joint_|double_blocks|single_blocks|single_transformer_blocks|context_embedder\.|add_k_proj",
        "this is another kind of transformer (SD3, FLUX), not a PixArt",
    ),
    (r"\.Wqkv\.|cap_embedder\.|caption_norm\.", "this is another kind of transformer (HunyuanDiT, Lumina, Sana)"),
    (r"lm_head\.|embed_tokens\.|layers\.\d+\.self_attn\.q_proj", "this is a language model, not a PixArt"),
)
_DIT_OUTER = ("t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.adaLN_modulation.1", "final_layer.linear")
# DiT's tensors outside its blocks, without its position table
_DIT = (
    "x_embedder.proj.weight",
    "y_embedder.embedding_table.weight",
    *(f"{module}.{kind}" for module in _DIT_OUTER for kind in ("weight", "bias")),
)
_DIT_BLOCK = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")


def is_dit(names: Mapping[str, Any] | set[str]) -> bool:
    """Whether these are exactly a DiT's names; a network with DiT's modulation plus cross-attention is not a DiT."""
    inside = {name for name in names if name.startswith("blocks.")}
    depth = len({name.split(".")[1] for name in inside})
    modules = [f"blocks.{i}.{part}" for i in range(depth) for part in _DIT_BLOCK]
    blocks = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    return depth > 0 and inside == blocks and all(name in names for name in _DIT)


def cause(names: Iterable[str]) -> str | None:
    """What a set of tensor names suggests the file is, if it is not a PixArt; None if nothing is recognised."""
    names = set(names)
    if is_dit(names):
        return "this is DiT, not PixArt: use init_from in a training config to start from it"
    parts = sorted({match[2] for name in names if (match := _PARTS.search(name))})
    if parts and any(map(_NETWORK.search, names)):
        return (
            f"this is an all-in-one file of a network and its {', '.join(parts)}; save the network's tensors alone, "
            "and give the other parts with --vae and --text-encoder"
        )
    for sign, what in _ADAPTERS:
        if any(re.search(sign, name) for name in names):
            return f"this file holds {what}, an adapter and no model; give its base as the model, and this with --lora"
    return next((text for sign, text in _CAUSES if any(re.search(sign, name) for name in names)), None)


def what_else(folder: Path) -> str:
    """Why a folder is no model, by the files in it, and what to do."""
    files = sorted(path.name for path in folder.iterdir())
    if not files:
        return "the folder is empty"
    if told := _of_a_tool(folder, files):
        return told
    if shards := [file for file in files if "-of-" in file]:
        return f"holds shards ({shards[0]}, …) but no index (NAME.index.json); fetch it"
    if named := [file for file in files if file.endswith(SUFFIXES)]:
        return f"the folder holds {', '.join(named[:6])}; name the file that you mean"
    deeper = [path for path in sorted(folder.glob("*/*")) if path.name.endswith(SUFFIXES)]
    if deeper:
        return f"its weights are one folder deeper; name {deeper[0].parent}, or {deeper[0]}"
    expected = (
        "model.safetensors and config.json, a run's checkpoints, or diffusers' diffusion_pytorch_model.safetensors"
    )
    return f"expected {expected} and config.json; found {', '.join(files[:6])}"


def _of_a_tool(folder: Path, files: list[str]) -> str | None:
    """What another program's folder is."""
    if "adapter_config.json" in files:
        of = _base_of(folder / "adapter_config.json")
        return f"an adapter of PEFT{of}; give its base as the model, and this folder with --lora"
    if any(re.fullmatch(r"pytorch_lora_weights\.(safetensors|bin)", file) for file in files):
        return "LoRA matrices that diffusers saved; give their base as the model, and this folder with --lora"
    if "zero_to_fp32.py" in files or any(re.fullmatch(r"(mp_rank|zero_pp_rank)_.*\.pt", file) for file in files):
        return "a checkpoint of DeepSpeed; gather it first: python FOLDER/zero_to_fp32.py FOLDER weights.pth"
    sharded = next((path.parent for path in [*folder.glob("*.distcp"), *folder.glob("*/*.distcp")]), None)
    if sharded is not None:
        return (
            "a sharded torch.distributed checkpoint; gather it first: "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {sharded} weights.pth"
        )
    if any(re.fullmatch(r"random_states_\d+\.pkl|optimizer\.bin", file) for file in files):
        weights = next((file for file in ("model.safetensors", "pytorch_model.bin") if file in files), None)
        return f"a state that accelerate saved; {f'give {folder / weights}' if weights else 'it holds no weights'}"
    if gguf := next((file for file in files if file.endswith(".gguf")), None):
        return f"{gguf} is quantised (GGUF); load the model that it was made of"
    if {"config.yaml", "metrics.jsonl"} & set(files) and not (folder / "checkpoints").is_dir():
        return "a run without a checkpoint; train it until its first save"
    if "model.safetensors" in files:
        return f"model.safetensors without config.json, so not a model of this package; give {folder}/model.safetensors"
    return None


def _base_of(path: Path) -> str:
    try:
        settings = read_json(path)
    except InputError:
        return ""
    return f" ({settings.get('peft_type')} on {settings.get('base_model_name_or_path')})"
