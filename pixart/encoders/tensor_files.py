"""Files of tensors: what they are by their content, whatever their names; and that they do not claim to hold more than
their bytes can."""

import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pixart.errors import InputError
from pixart.files import open_file

LONGEST = 500  # maximum number of characters of a tensor's name

_OTHERS = (  # (position, first bytes, what it is and what to do)
    (0, b"GGUF", "a GGUF file, whose weights are quantised; load the model that it was made of"),
    (
        0,
        b"version https://git-lfs",
        "a Git-LFS pointer, not the weights; run git lfs pull, or download it",
    ),
    (0, b"7z\xbc\xaf", "a 7z archive; unpack it"),
    (0, b"Rar!", "a RAR archive; unpack it"),
    (0, b"\x1f\x8b", "compressed by gzip; unpack it"),
    (0, b"\xfd7zXZ", "compressed by xz; unpack it"),
    (0, b"BZh", "compressed by bzip2; unpack it"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it"),
    (257, b"ustar", "a tar archive; unpack it"),
    (0, b"\x89HDF", "an HDF5 file, as of Keras; expected torch's or safetensors'"),
    (0, b"\x93NUMPY", "an array of NumPy; expected torch's or safetensors' tensors by name"),
    (0, b"\x89PNG", "an image, not weights"),
    (0, b"\xff\xd8\xff", "an image, not weights"),
)


def sniff(path: Path) -> str:
    """ "safetensors", "zip" (torch since 1.6) or "pickle" (before), by the first bytes.

    Raises:
        InputError: it cannot be read, or is something else: an archive, another format, a failed download.
    """
    try:
        with open_file(path) as file:
            head = file.read(512)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not head:
        raise InputError(f"{path}: the file is empty; fetch it again")
    for place, start, what in _OTHERS:
        if head[place:].startswith(start):
            raise InputError(f"{path}: {what}")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise InputError(f"{path}: a web page, not weights; the download failed or needs a login. Fetch it again")
    if head.startswith(b"PK\x03\x04"):
        _check_zip(path)
        return "zip"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 30:
        return "safetensors"
    if head.startswith(b"\x80"):
        return "pickle"
    if not head.strip(b"\0"):
        raise InputError(f"{path}: begins with zeros, as unfinished downloads do; fetch it again")
    text = " ".join(head[:80].decode("utf-8", "replace").split())
    if (head.isascii() and text.isprintable()) or head.lstrip().startswith((b"{", b"[")):
        raise InputError(f"{path}: a text, not weights ({text!r}); name the file of weights, or fetch it again")
    raise InputError(f"{path}: neither a torch nor a safetensors file; it starts with {head[:8]!r}")


def _check_zip(path: Path) -> None:
    """Refuse archives that torch.save did not write, by what is in them."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError):  # the reader says what is damaged
        return
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return
    if names and all(name.endswith(".npy") for name in names):
        raise InputError(f"{path}: arrays of NumPy (.npz); expected torch's or safetensors' tensors by name")
    raise InputError(f"{path}: an archive of {', '.join(names[:3]) or 'nothing'}; unpack it, and name a file in it")


def load_torch(path: Path, kind: str) -> Any:
    """What torch.save wrote into a file of this kind (see `sniff`), without running code in it; of a "zip", tensors are
    memory-mapped.

    Raises:
        InputError: an archive that torch.save did not write.
        Exception: whatever torch raises on damaged files.
    """
    if kind == "zip":
        check_stored(path)
    if path.suffix == ".safetensors":  # where torch.load would go by the name
        with open_file(path) as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "zip")


def find_variant(folder: Path, stems: Sequence[str]) -> tuple[Path, str] | None:
    """The one file of weights of a variant, as diffusers and transformers save it, and the variant's name; None if
    there is none.

    For a stem "model" and a variant "fp16" it is model.fp16.safetensors, or the index of its shards, which is
    model.safetensors.index.fp16.json, or the same with .bin; safetensors take precedence.

    Raises:
        InputError: there are several variants.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    for suffix in ("safetensors", "bin"):
        found: dict[str, str] = {}
        for stem in map(re.escape, stems):
            for pattern in (rf"{stem}\.([\w-]+)\.{suffix}", rf"{stem}\.{suffix}\.index\.([\w-]+)\.json"):
                matches = [match for name in names if (match := re.fullmatch(pattern, name)) and "-of-" not in name]
                found |= {match[1]: match[0] for match in matches}
        if len(found) > 1:
            raise InputError(f"{folder}: variants {', '.join(sorted(found))}; name the file that you mean")
        if found:
            ((variant, name),) = found.items()
            return folder / name, variant
    return None


def check_stored(path: Path) -> None:
    """Refuse an archive that could unpack to more than its size; torch.save never compresses."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if packed := [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]:
        raise InputError(
            f"{path}: {packed[0]} in it is compressed, which torch.save never does; save it again with torch.save"
        )
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise InputError(f"{path}: claims to hold more than its {path.stat().st_size:,} bytes; download it again")


def check_tensors(state: Mapping[Any, torch.Tensor], path: Path) -> None:
    """Refuse tensors that are not plain, or have more values than a file of this size can hold, since processing them
    may never end.

    Tensors may share values, e.g. tied weights, so their total may be a few times the size of the file.
    """
    for name, tensor in state.items():
        if not isinstance(name, str) or len(name) > LONGEST:
            raise InputError(f"{path}: a tensor is called {str(name)[:40]!r}…, expected at most {LONGEST} characters")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_nested:
            raise InputError(f"{path}: {name} is a {tensor.layout} tensor on {tensor.device}, expected plain values")
    size, claimed = path.stat().st_size, sum(tensor.numel() * tensor.itemsize for tensor in state.values())
    if claimed > 4 * size:
        largest = max(state, key=lambda name: state[name].numel())
        raise InputError(
            f"{path}: its tensors claim {claimed:,} bytes, but the file has {size:,} ({largest} has shape "
            f"{tuple(state[largest].shape)}); it is damaged or malicious: download it again"
        )
