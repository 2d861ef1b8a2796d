"""Damaged and forged files of every kind: each is read, or refused in one line; none hangs, takes the machine's memory,
starts a program, or makes a reader open what lies outside of its folder."""

import contextlib
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from checkpoints import official
from features import make_store
from guard import guarded, within
from layouts import as_metadata, as_official, as_parquet, as_sam, as_webdataset, from_folder, look
from pixart.adapters.load import load_with_card
from pixart.checkpoint.files import ModelCard, save_model
from pixart.data.decoding import UnreadableImage
from pixart.data.images import load_record
from pixart.errors import InputError
from pixart.features.store import FeatureStore, verify
from runs import change, make_pictures, settings
from toy import tiny_model

ROOM = 3 * 2**30  # bytes that a reader of files of a few kilobytes may take beside what the process holds
# what takes the place of a piece of text in a file
FORGED = [
    b"../secret.png", b"/etc/passwd", b"../../../../etc/passwd", b"file:///etc/passwd", b"https://example.org/x.png",
    b"|id", b"$(id)", b"-1", b"0", b"9" * 400, b"1e999", b"NaN", b"null", b"[]", b"{}", b"[" * 2000, b'"', b"\\ud800",
    b"\xff\xfe", b"\0" * 8, b"true", b"a" * 5000,
]  # fmt: skip


def mutate(data: bytes, draw: random.Random) -> bytes:
    """One to four random faults: bits, cuts, repeats, numbers at their limits, forged text."""
    raw = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(raw)) if raw else 0
        # the beginning says how to read the rest
        at = at if draw.random() < 0.5 else at % 512
        kind = draw.randrange(7)
        if kind == 0 and raw:
            raw[at % len(raw)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del raw[at:]
        elif kind == 2:
            del raw[at : at + draw.randrange(1, 64)]
        elif kind == 3:
            raw[at:at] = raw[at : at + draw.randrange(1, 512)]
        elif kind == 4:
            raw[at : at + 8] = draw.choice([b"\xff" * 8, b"\x7f" + b"\xff" * 7, bytes(8), b"\0\0\0\x80" * 2])
        else:
            replace_text(raw, draw)
    return bytes(raw)


def replace_text(raw: bytearray, draw: random.Random) -> None:
    """Put forged text in the place of a word, a number or a quoted text."""
    ends = [i for i, byte in enumerate(raw[:20_000]) if byte in b'", :[]{}\n']
    if len(ends) > 1:
        i = draw.randrange(len(ends) - 1)
        raw[ends[i] + 1 : ends[i + 1]] = draw.choice(FORGED)


@contextlib.contextmanager
def bounded(room: int) -> Iterator[None]:
    """Allocations beyond `room` bytes fail."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (held + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def read_model(folder: Path) -> None:
    source = next(path for path in folder.iterdir() if path.name.startswith("model"))
    load_with_card(source, overrides=None if source.is_dir() else {"num_heads": 4})


def read_store(folder: Path) -> None:
    verify(folder / "store")
    store = FeatureStore(folder / "store")
    for index in range(len(store)):
        store.get(index)
        store.text(index)


def read_images(source: Path) -> None:
    report = look(source)
    for record in report.records:
        load_record(record)
    if report.problems:
        raise UnreadableImage(report.problems[0][1])


def make_models(kind: str, folder: Path, _: object) -> Callable[[Path], None]:
    model = tiny_model()
    if kind == "pth":
        torch.save(official(model), folder / "model.pth")
    elif kind == "safetensors":
        from safetensors.torch import save_file

        save_file(official(model), folder / "model.safetensors")
    elif kind == "folder":
        save_model(folder / "model", model.state_dict(), ModelCard(model.config))
    else:
        make_shards(folder / "model")
    return read_model


def make_shards(folder: Path) -> None:
    """diffusers' transformer in two files with an index."""
    from checkpoints import in_diffusers

    in_diffusers(tiny_model()).save_pretrained(folder, max_shard_size="60KB")
    assert (folder / "diffusion_pytorch_model.safetensors.index.json").exists()


def make_sets(kind: str, folder: Path, _: object) -> Callable[[Path], None]:
    samples = from_folder(make_pictures(folder.parent / "pictures", 3))
    if kind == "images":
        for suffix in ("png", "jpg", "webp", "tiff", "bmp", "gif"):
            image = Image.new("RGB", (9, 8), "red")
            image.save(folder / f"{suffix}.{suffix}")
            (folder / f"{suffix}.txt").write_text("a red square")
        return read_images
    layouts = {
        "metadata": as_metadata,
        "tar": as_webdataset,
        "parquet": as_parquet,
        "list": as_official,
        "sam": as_sam,
    }
    source = layouts[kind](samples, folder / "set")
    name = Path(source).relative_to(folder)
    return lambda copy: read_images(copy / name)


def make_stores(_kind: str, folder: Path, text_encoder: Path) -> Callable[[Path], None]:
    pictures = make_pictures(folder.parent / "pictures", 4)
    base = change(settings(folder.parent / "run", pictures, text_encoder), extract__latent_dtype="float32")
    make_store(base, folder / "store")
    return read_store


TARGETS = {
    **{f"model {kind}": make_models for kind in ("pth", "safetensors", "folder", "shards")},
    **{f"set {kind}": make_sets for kind in ("images", "metadata", "tar", "parquet", "list", "sam")},
    "store": make_stores,
}


def attack(name: str, count: int, tmp_path: Path, text_encoder: Path) -> None:
    make, kind = TARGETS[name], name.partition(" ")[2]
    (tmp_path / "good").mkdir()
    read = make(kind, tmp_path / "good", text_encoder)
    read(tmp_path / "good")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    files = [path for path in sorted((tmp_path / "good").rglob("*")) if path.is_file()]
    refused = 0
    for number in range(count):
        draw = random.Random(number)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        path = tmp_path / "bad" / draw.choice(files).relative_to(tmp_path / "good")
        path.write_bytes(mutate(path.read_bytes(), draw))
        try:
            with guarded(tmp_path / "bad", tmp_path), within(20), bounded(ROOM):
                read(tmp_path / "bad")
        except (InputError, UnreadableImage) as error:
            refused += 1
            text = str(error)
            assert text and len(text) < 3000, (number, text)
            assert "\n" not in text or name.startswith("set"), (number, text)  # a scan lists what it found
        except BaseException as error:
            raise AssertionError(f"fault {number} of {name} in {path.name}") from error
        shutil.rmtree(tmp_path / "bad")
    assert 0 < refused <= count


def times(name: str) -> int:
    """How many faults a second or two allow; the others are read in a few milliseconds."""
    return {"store": 10, "model shards": 10, "set parquet": 30, "set list": 30}.get(name, 100)


@pytest.mark.parametrize("name", TARGETS)
def test_hundreds_of_damaged_files_are_read_or_refused_in_one_line(name, tmp_path, text_encoder):
    attack(name, times(name), tmp_path, text_encoder)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_thousands_of_damaged_files_are_read_or_refused_in_one_line(name, tmp_path, text_encoder):
    attack(name, 15 * times(name), tmp_path, text_encoder)
