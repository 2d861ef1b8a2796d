"""Finding and reading a VAE's files, in diffusers' layout: a folder, a file or a Hub repository."""

import re
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from pixart.encoders.tensor_files import check_tensors, find_variant, load_torch, sniff
from pixart.errors import InputError
from pixart.files import read_json

CONFIG, WEIGHTS = "config.json", ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def find_weights(source: str, subfolder: str | None) -> Path:
    """The weights file for a folder, a file or a Hub id."""
    path, inside = Path(source), subfolder or ""
    if path.is_file():
        if inside:
            raise InputError(f"VAE {path}: a file has no subfolder {inside}")
        return path
    if not path.is_dir():
        match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:/(.+))?", source)
        if not match:
            raise InputError(f"VAE '{source}': no such folder or file, and not a Hub id (owner/name)")
        inside = "/".join(filter(None, [match[2], subfolder]))
    for file in WEIGHTS:
        folder = (path if path.is_dir() else _fetch(match[1], inside, file)) / inside
        if (folder / file).is_file():
            return folder / file
    if (variant := find_variant(folder, [WEIGHTS[0].partition(".")[0]])) is not None:
        return variant[0]
    hint = "; there is a VAE in its subfolder 'vae'" if (folder / "vae" / CONFIG).is_file() else ""
    raise InputError(f"VAE '{source}': expected {' or '.join(WEIGHTS)} in {folder}{hint}")


def read_settings(path: Path) -> dict:
    """A VAE's `config.json`, unchanged."""
    return read_json(path, what="the VAE's config", expected="the settings of a VAE")


def read_weights(path: Path) -> dict[str, Tensor]:
    try:
        kind = sniff(path)
        state = load_file(path) if kind == "safetensors" else load_torch(path, kind)
    except InputError:
        raise
    except Exception as error:  # the readers raise any kind on damaged files
        raise InputError(f"{path}: the VAE's weights cannot be read ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise InputError(f"{path}: expected a VAE's tensors by name, got something else")
    check_tensors(state, path)
    return state


def check_state(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Compare names and shapes with the network's; one error lists the first differences."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = [
        f"{name}: got {found.get(name, 'nothing')}, expected {expected.get(name, 'no such tensor')}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise InputError(f"{path} does not fit its {CONFIG}: {'; '.join(wrong[:4])}{more}")


def _fetch(repository: str, inside: str, file: str) -> Path:
    """Download config and weights `file` of a Hub repository, unless cached → the cached folder."""
    from huggingface_hub import snapshot_download

    patterns = [f"{inside}/{name}" if inside else name for name in (CONFIG, file)]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"VAE '{repository}': no such folder, and not on the Hub or in its cache: {reason}") from None
