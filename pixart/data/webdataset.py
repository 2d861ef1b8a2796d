"""WebDataset shards as img2dataset writes them: tar files of `key.jpg`, `key.txt` and `key.json`.

One pass over a shard's headers finds the position of each image, which can then be read directly, in any order. This
needs plain tar files, not compressed ones.
"""

import io
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pixart.data.images import IMAGE_SUFFIXES
from pixart.data.items import Fields, Item
from pixart.errors import InputError
from pixart.files import open_file, parse_json, walk

PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # by first bytes
PACKED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True)
class Member:
    """A file within a tar file: `length` bytes from `offset` on."""

    shard: str
    offset: int
    length: int

    def open(self) -> BinaryIO:
        return io.BufferedReader(_Window(self))


class _Window(io.RawIOBase):
    """A part of a file, as a file object, so that an image's header can be read without the rest."""

    def __init__(self, member: Member):
        self.member, self.at = member, 0
        self.file = open_file(member.shard, buffering=0)  # closed with this

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
    """The images of one shard, or of all shards in a folder; ids are `shard/key.ext`.

    Fields are `text` (`key.txt`), FIELD (`key.FIELD.txt`), and the keys of `key.json`. The intact part of a truncated
    shard is used, and the shard is listed as a problem.

    Raises:
        InputError: there is no shard, or one is compressed.
    """
    files = [path] if path.is_file() else list(walk(path))
    shards = files if path.is_file() else [file for file in files if file.suffix == ".tar"]
    if packed := [file for file in files if file not in shards and file.name.endswith(PACKED_SUFFIXES)]:
        raise _packed(packed[0], packed[0].suffix[1:])
    if not shards:
        raise InputError(f"data folder {path}: no .tar shard in it")
    root = path.parent if path.is_file() else path
    for shard in shards:
        yield from _read_shard(shard, shard.relative_to(root).with_suffix("").as_posix(), fields)


def _read_shard(shard: Path, name: str, fields: Fields) -> Iterator[Item]:
    try:
        file = open_file(shard)
    except OSError as error:
        yield _bad(f"{name}.tar", f"unreadable: {error}")
        return
    with file:
        start = file.read(8)
        for magic, kind in PACKED.items():
            if start.startswith(magic):
                raise _packed(shard, kind)
        members, torn = _list_members(file)
        samples: dict[str, dict[str, tarfile.TarInfo]] = defaultdict(dict)
        for member in members:
            folder, slash, base = member.name.removeprefix("./").rpartition("/")
            key, _, extension = base.partition(".")
            if not key or not extension:  # hidden files, and files without an extension
                continue
            if extension.lower() in samples[folder + slash + key]:
                yield _bad(f"{name}/{folder}{slash}{base}", "is in its shard twice; the second one is left out")
            else:
                samples[folder + slash + key][extension.lower()] = member
        for key, files in samples.items():
            yield _read_sample(file, shard, f"{name}/{key}", files, fields)
    if torn:
        yield _bad(f"{name}.tar", f"torn: {torn}; {len(samples)} samples before it are kept")


def _list_members(file: BinaryIO) -> tuple[list[tarfile.TarInfo], str | None]:
    """The complete files of a tar file, and what is wrong with the rest of it."""
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    members: list[tarfile.TarInfo] = []
    try:
        with tarfile.open(fileobj=_Bounded(file, end), mode="r:") as tar:
            for member in tar:
                if member.isreg() and member.offset_data + member.size > end:
                    return members, f"it ends at byte {end} within {member.name}"
                if member.isreg() and not member.issparse():
                    members.append(member)
            file.seek(tar.offset)  # tarfile treats a bad header as the end, but the true end is a block of zeros
            if file.read(512) != bytes(512):
                return members, f"no header and no end mark at byte {tar.offset}"
            if follows := _find_more(file, end):
                return members, f"its end mark is followed by more data at byte {follows}, which is not read"
    except (tarfile.TarError, ValueError, OverflowError, OSError, RecursionError) as error:
        return members, str(error)
    return members, None


def _find_more(file: BinaryIO, end: int) -> int | None:
    """The position of the first byte other than 0 from here on, as in archives that were simply concatenated."""
    while (start := file.tell()) < end:
        if part := file.read(1 << 20).lstrip(b"\0"):
            return file.tell() - len(part)
        if file.tell() == start:
            break
    return None


class _Bounded:
    """A tar file for `tarfile` that never reads past its end; `tarfile` would read as many bytes as a header says."""

    def __init__(self, file: BinaryIO, end: int):
        self.file, self.end, self.seek, self.tell = file, end, file.seek, file.tell

    def read(self, count: int) -> bytes:
        return self.file.read(max(min(count, self.end - self.file.tell()), 0))


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
                # a text file takes precedence over a key of the same name
                row = {**_read_object(file, member, fields), **row}
            elif extension == "txt" or extension.endswith(".txt"):
                row[extension.removesuffix("txt").rstrip(".") or "text"] = _read(file, member, fields)
        except ValueError as error:
            return Item(id, picture, {}, id, problem=f"unreadable: its .{extension}: {error}")
    return Item(id, picture, fields.take(row), id, lack="no caption in its .txt and .json")


def _read_object(file: BinaryIO, member: tarfile.TarInfo, fields: Fields) -> dict:
    value = parse_json(_read(file, member, fields))
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {str(value)[:60]}")
    return value


def _read(file: BinaryIO, member: tarfile.TarInfo, fields: Fields) -> str:
    file.seek(member.offset_data)
    return fields.decode(file.read(member.size), member.name)


def _bad(id: str, problem: str) -> Item:
    return Item(id, None, {}, id, problem=problem)


def _packed(shard: Path, kind: str) -> InputError:
    return InputError(
        f"{shard}: compressed ({kind}); images are read from a shard in any order, which needs a plain .tar file: "
        "decompress it (e.g. by gunzip)"
    )
