"""Atomic writes of files and folders, JSON lines that survive a kill, and checksums."""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from pixart.errors import CannotWrite, InputError

MANIFEST = "manifest.json"
NAME_BYTES = 255  # of a file or folder, on every usual file system
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def open_file(path: Path | str, buffering: int = -1) -> Any:
    """Open a file for reading bytes. FIFOs, which may hang, and devices, which may be endless, are refused.

    Raises:
        OSError: it cannot be opened or is not a regular file.
    """
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, f"it is {_KINDS.get(kind, 'something else')}, expected a file", str(path))
    return open(path, "rb", buffering)


def walk(folder: Path) -> Iterator[Path]:
    """All files below a folder, ordered by path, including those in symlinked folders. Each folder is visited once, so
    that cyclic links are safe."""
    seen: set[tuple[int, int]] = set()

    def below(folder: Path) -> Iterator[Path]:
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            yield from below(folder / entry.name) if entry.is_dir() else (folder / entry.name,)

    yield from below(folder)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A lock among the processes of one machine, which the system releases when a process dies."""
    import fcntl  # not on Windows

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def read_bytes(path: Path | str) -> bytes:
    """The content of a regular file. Raises OSError as `open_file` does."""
    with open_file(path) as file:
        return file.read()


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not valid JSON, or malicious: nested thousands of levels deep, numbers of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def inside(path: Any, what: str) -> PurePosixPath:
    """`path` as a path, after checking that it stays within a folder; `what` names it in the error.

    Raises:
        ValueError: it is not a path, or leads outside of the folder.
    """
    if not isinstance(path, str) or not path or "\0" in path:
        raise ValueError(f"{what} is {repr(path)[:100]}, expected a path within the folder")
    name = PurePosixPath(path)
    if any(len(part.encode(errors="surrogatepass")) > NAME_BYTES for part in name.parts):
        raise ValueError(f"{what} is {path[:40]}…, {len(path):,} characters, longer than a file name can be")
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"'{name}' leads outside of the folder; expected a path within it")
    return name


def verify(folder: Path) -> str | None:
    """Check a folder written by `write_folder` → what is wrong with it, or None."""
    name = MANIFEST
    try:
        for name, digest in parse_json(read_bytes(folder / MANIFEST))["blake2b"].items():
            if digest_file(folder / inside(name, "a file")) != digest:
                return f"{name} has changed since it was written"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is damaged: {error}"
    return None


@contextlib.contextmanager
def _whole(target: Path, *, durable: bool, shared: bool = False) -> Iterator[Path]:
    """A context with a temporary path beside `target`, which is renamed to `target` when the file or folder there is
    complete."""
    own = f".{os.uname().nodename}.{os.getpid()}" if shared else ""
    partial = target.with_name(f".{target.name}{own}.partial")
    _remove(partial)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        if durable:
            inside = partial.rglob("*") if partial.is_dir() else ()
            for path in [*(path for path in inside if path.is_file()), partial]:
                sync(path)
        if partial.is_dir() and target.is_dir():
            shutil.rmtree(target)
        os.rename(partial, target)
        if durable:
            sync(target.parent)
    except BaseException as error:
        _remove(partial)
        if type(error).__name__ == "SafetensorError":  # the library's own type for an I/O error
            raise CannotWrite(target, OSError(str(error))) from error
        if isinstance(error, OSError) and not isinstance(error, CannotWrite):
            raise CannotWrite(target, error) from error
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_folder(target: Path, fill: Callable[[Path], None], *, manifest: bool = True, durable: bool = True) -> None:
    """Create or replace the folder `target` atomically: it is filled under another name, then renamed.

    Args:
        manifest: write checksums of all files into it, for `verify`.
        durable: flush everything to the disk before the renaming; without this, the folder survives a kill of the
            process, but perhaps not a crash of the machine.

    Raises:
        OSError: the disk is full or not writable; nothing is left behind, and `target` is unchanged.
    """
    with _whole(target, durable=durable) as partial:
        partial.mkdir()
        fill(partial)
        if manifest:
            files = sorted(path for path in partial.rglob("*") if path.is_file())
            digests = {path.relative_to(partial).as_posix(): digest_file(path) for path in files}
            (partial / MANIFEST).write_text(to_json({"blake2b": digests}, indent=2) + "\n", encoding="utf-8")


def repeat(source: Path, target: Path) -> None:
    """Make `target` a second name of a file, or a folder with second names of its tensors, which takes no space; a file
    system without hard links gets a copy. Small files of a folder are copied, because people edit them.

    Raises:
        OSError: the disk is full or not writable.
    """

    def link(path: str, other: str) -> None:
        if Path(path).suffix == ".safetensors":
            with contextlib.suppress(OSError):
                os.link(path, other)
                return
        shutil.copyfile(path, other)

    if source.is_dir():
        shutil.copytree(source, target, copy_function=link)
    else:
        link(str(source), str(target))


def write_file(target: Path, write: Callable[[Path], None], *, durable: bool = True, shared: bool = False) -> None:
    """Create or replace the file `target` atomically, as `write_folder` does; a reader sees the old or the new file.

    Args:
        durable: as in `write_folder`.
        shared: other processes may write it at the same time; the last one wins.

    Raises:
        OSError: the disk is full or not writable; nothing is left behind, and `target` is unchanged.
    """
    with _whole(target, durable=durable, shared=shared) as partial:
        write(partial)


def write_text(target: Path, text: str, *, durable: bool = True, shared: bool = False) -> None:
    """`write_file` with a text, as UTF-8."""
    write_file(target, lambda path: path.write_text(text, encoding="utf-8"), durable=durable, shared=shared)


def write_png(
    target: Path,
    image: Any,
    texts: Mapping[str, str] = MappingProxyType({}),
    *,
    durable: bool = True,
    shared: bool = False,
) -> None:
    """`write_file` with an image of Pillow, as a PNG with `texts` by their keywords."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in texts.items():
        info.add_itxt(key, value)
    write_file(target, lambda path: image.save(path, format="PNG", pnginfo=info), durable=durable, shared=shared)


def write_json(target: Path, values: Any, *, indent: int = 2, durable: bool = True, shared: bool = False) -> None:
    """`write_file` with JSON made by `to_json`."""
    write_text(target, to_json(values, indent=indent) + "\n", durable=durable, shared=shared)


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Standard JSON (RFC 8259), which has neither NaN nor infinity: they become null."""
    text = json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode(errors="backslashreplace").decode()  # lone surrogates, from file names that are not UTF-8


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def read_json(path: Path, *, what: str = "", expected: str = "keys and values") -> dict:
    """A JSON object from a file; `what` and `expected` describe it in errors.

    Raises:
        InputError: the file cannot be read, is not JSON, or does not hold an object.
    """
    try:
        values = parse_json(read_bytes(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {what + ' ' if what else ''}cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected {expected}, got a {type(values).__name__}")
    return values


def append_rows(path: Path, rows: Iterable[Any], *, durable: bool = False) -> None:
    """Append lines of JSON, all or none; an incomplete last line, left by a kill, is cut off first.

    Args:
        durable: flush them to the disk before returning.

    Raises:
        OSError: the disk is full or not writable.
    """
    mend_lines(path)
    left = memoryview(b"".join(to_json(row).encode() + b"\n" for row in rows))
    with open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            while left:  # a disk that is nearly full takes a part
                left = left[file.write(left) :]
            if durable:
                os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def mend_lines(path: Path) -> None:
    """Cut off an incomplete last line of JSON, or add the newline if only that is missing. Creates the file."""
    with open(path, "a+b") as file:
        end = size = file.seek(0, os.SEEK_END)
        whole = 0
        while end and not whole:
            start = max(end - 65536, 0)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            end, whole = start, start + found + 1 if found >= 0 else 0
        if whole == size:
            return
        file.seek(whole)
        try:
            parse_json(file.read())
        except ValueError:
            file.truncate(whole)
        else:
            file.write(b"\n")


def read_lines(path: Path, *, skip_damaged: bool = False) -> Iterator[tuple[int, Any]]:
    """(number, value) of the lines of a JSON lines file; an incomplete last line, left by a kill, is ignored.

    Raises:
        InputError: any other line is damaged, unless `skip_damaged`.
    """
    with open_file(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = parse_json(line.decode("utf-8-sig"))
            except ValueError as error:
                if skip_damaged or not line.endswith(b"\n"):
                    continue
                raise InputError(f"{path}:{number}: not valid JSON ({error})") from None
            yield number, value


def read_rows(path: Path) -> Iterator[dict]:
    """The rows of a run's JSON lines file that have a step, as in metrics.jsonl; empty if there is no such file."""
    if path.exists():
        for _, row in read_lines(path, skip_damaged=True):
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row


def cut_rows(path: Path, step: int) -> None:
    """Cut off the last rows whose step is after `step`: those of a run that was killed after its last checkpoint.

    The file is truncated in place, not rewritten, so that a full disk costs no rows that should be kept.

    Raises:
        OSError: it cannot be written.
    """
    if not path.exists():
        return
    end = 0
    with open(path, "r+b") as file:
        for line in iter(file.readline, b""):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if json.loads(line)["step"] <= step:
                    end = file.tell()
        file.truncate(end)


def digest_file(path: Path) -> str:
    """blake2b of a file, 16 bytes in hex."""
    digest, buffer = hashlib.blake2b(digest_size=16), bytearray(16 << 20)
    with open_file(path) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def digest_text(text: str) -> str:
    """blake2b of a text, 16 bytes in hex."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
