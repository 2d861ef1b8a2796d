"""Append-only files for work that may be killed at any moment: complete frames are kept, an incomplete last one is cut
off.

A file is a sequence of frames: length of the payload (8 bytes, little endian), its blake2b digest (16 bytes), and the
payload, which is itself a safetensors file.
"""

import contextlib
import fcntl
import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from pixart.errors import InputError

HEAD = struct.Struct("<Q16s")


class PartFile:
    """Frames of tensors in one file, to which one process at a time may append."""

    def __init__(self, path: Path):
        """Open or create; cut off an incomplete last frame.

        Raises:
            InputError: another process has it open, or it cannot be created.
        """
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b")  # noqa: SIM115
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error})") from None
        try:
            # lockf locks belong to the process, not to the open file, so workers that survive a kill do not hold it
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise InputError(
                f"{path.name} is being written by another process. If another extraction is writing to "
                f"{path.parents[1]}, wait for it, or give each process its own share: --rank I --ranks N"
            ) from None
        ends = [0, *(end for _, end in self._scan())]
        self.frames = len(ends) - 1
        self._file.truncate(ends[-1])

    def append(self, tensors: dict[str, Tensor]) -> None:
        """Add a frame, which is on the disk when this returns.

        Raises:
            OSError: e.g. the disk is full; the earlier frames are intact.
        """
        payload = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        end = self._file.seek(0, os.SEEK_END)
        try:
            self._file.write(HEAD.pack(len(payload), _digest(payload)) + payload)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise
        self.frames += 1

    def read(self) -> Iterator[dict[str, Tensor]]:
        """The frames, in order."""
        for payload, _ in self._scan():
            yield load(payload)

    def close(self, *, remove: bool = False) -> None:
        if remove:
            self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a full disk may fail again on bytes that were discarded
            self._file.close()

    def _scan(self) -> Iterator[tuple[bytes, int]]:
        """(payload, end offset) of every complete frame."""
        self._file.seek(0)
        while len(head := self._file.read(HEAD.size)) == HEAD.size:
            length, digest = HEAD.unpack(head)
            end = self._file.tell() + length
            if end > os.fstat(self._file.fileno()).st_size:  # check before reading: a torn length can be any number
                return
            payload = self._file.read(length)
            if _digest(payload) != digest:
                return
            yield payload, end
            self._file.seek(end)


def _digest(payload: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=16).digest()
