"""WebDataset shards as img2dataset writes them: tar files of `key.jpg`, `key.txt` and `key.json`.

One pass over a shard's headers finds where each picture lies; from then on it is read from there, in any order. Only
plain tar can do that, not a compressed one.
"""

import io
import json
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pixart.data.images import IMAGE_SUFFIXES
from pixart.data.items import Fields, Item
from pixart.errors import InputError

PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # by first bytes
PACKED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True)
class Member:
    """A file within a tar: `length` bytes from `offset` on."""

    shard: str
    offset: int
    length: int

    def open(self) -> BinaryIO:
        return io.BufferedReader(_Window(self))


class _Window(io.RawIOBase):
    """A part of a file, as a file of its own: a picture's header is read without the rest of it."""

    def __init__(self, member: Member):
        self.member, self.at = member, 0
        self.file = open(member.shard, "rb", buffering=0)  # noqa: SIM115 (closed with this)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.member.length}[whence]
        if start + offset < 0:
            raise OSError(f"seek to {start + offset}, before the start")
        self.at = start + offset
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer) -> int:
        count = max(min(len(buffer), self.member.length - self.at), 0)
        self.file.seek(self.member.offset + self.at)
        count = self.file.readinto(memoryview(buffer)[:count])
        self.at += count
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


def read_webdataset(path: Path, fields: Fields) -> Iterator[Item]:
    """The pictures of all shards in a folder, or of one; ids are `shard/key.ext`.

    Fields are `text` (`key.txt`), FIELD (`key.FIELD.txt`), and the keys of `key.json`. Of a torn shard the good part is
    kept, and the shard is a problem.

    Raises:
        InputError: no shard, or a compressed one.
    """
    shards = [path] if path.is_file() else sorted(path.rglob("*.tar"))
    packed = [] if path.is_file() else [p for p in path.rglob("*") if p.name.endswith(PACKED_SUFFIXES)]
    if packed:
        raise _packed(packed[0], packed[0].suffix[1:])
    if not shards:
        raise InputError(f"data folder {path}: no .tar shard in it")
    root = path.parent if path.is_file() else path
    for shard in shards:
        yield from _read_shard(shard, shard.relative_to(root).with_suffix("").as_posix(), fields)


def _read_shard(shard: Path, name: str, fields: Fields) -> Iterator[Item]:
    with open(shard, "rb") as file:
        start = file.read(8)
        for magic, kind in PACKED.items():
            if start.startswith(magic):
                raise _packed(shard, kind)
        members, torn = _list_members(file)
        samples: dict[str, dict[str, tarfile.TarInfo]] = defaultdict(dict)
        for member in members:
            folder, slash, base = member.name.removeprefix("./").rpartition("/")
            key, _, extension = base.partition(".")
            if not key or not extension:  # hidden files, and files of no kind
                continue
            if extension.lower() in samples[folder + slash + key]:
                yield _bad(f"{name}/{folder}{slash}{base}", "stands twice in its shard; the second one is left out")
            else:
                samples[folder + slash + key][extension.lower()] = member
        for key, files in samples.items():
            yield _read_sample(file, shard, f"{name}/{key}", files, fields)
    if torn:
        yield _bad(f"{name}.tar", f"torn: {torn}; {len(samples)} samples before it are kept")


def _list_members(file: BinaryIO) -> tuple[list[tarfile.TarInfo], str | None]:
    """The whole files of a tar, and what is wrong with the rest of it."""
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    members: list[tarfile.TarInfo] = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isreg() and member.offset_data + member.size > end:
                    return members, f"it ends at byte {end} within {member.name}"
                if member.isreg() and not member.issparse():
                    members.append(member)
            file.seek(tar.offset)  # tarfile takes a bad header for the end; the true end is a block of zeros
            if file.read(512) != bytes(512):
                return members, f"no header and no end mark at byte {tar.offset}"
    except tarfile.TarError as error:
        return members, str(error)
    return members, None


def _read_sample(file: BinaryIO, shard: Path, name: str, files: dict[str, tarfile.TarInfo], fields: Fields) -> Item:
    images = [extension for extension in files if f".{extension}" in IMAGE_SUFFIXES]
    if len(images) != 1:
        return _bad(name, f"{len(images) or 'no'} images in this sample; there are {', '.join(files)}")
    image = files[images[0]]
    id = name + image.name[-len(images[0]) - 1 :]
    picture = Member(str(shard), image.offset_data, image.size)
    row: dict[str, Any] = {}
    for extension, member in files.items() if fields.wanted else ():
        try:
            if extension == "json":
                row = {**_read_object(file, member), **row}  # a text file goes before a key of the same name
            elif extension == "txt" or extension.endswith(".txt"):
                row[extension.removesuffix("txt").rstrip(".") or "text"] = _read(file, member)
        except ValueError as error:
            return Item(id, picture, {}, id, problem=f"no caption: its .{extension} cannot be read ({error})")
    return Item(id, picture, fields.take(row), id, lack="no caption in its .txt and .json")


def _read_object(file: BinaryIO, member: tarfile.TarInfo) -> dict:
    value = json.loads(_read(file, member))
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {str(value)[:60]}")
    return value


def _read(file: BinaryIO, member: tarfile.TarInfo) -> str:
    file.seek(member.offset_data)
    return file.read(member.size).decode("utf-8-sig")


def _bad(id: str, problem: str) -> Item:
    return Item(id, None, {}, id, problem=problem)


def _packed(shard: Path, kind: str) -> InputError:
    return InputError(
        f"{shard}: compressed ({kind}); pictures are read from within a shard in any order, which needs a plain .tar: "
        "unpack it (as by gunzip)"
    )
