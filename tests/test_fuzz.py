"""Fuzz tests of everything that is read from users: no exception but InputError, no hang, one line."""

import dataclasses
import io
import itertools
import json
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from checkpoints import HEADS, official
from fuzz import fuzz, fuzzed
from layouts import look
from pixart import (
    ModelCard,
    Pipeline,
    PixArt,
    PixArtConfig,
    Request,
    SampleConfig,
    export_model,
    load_config,
    load_model,
)
from pixart.cli import read_prompts
from pixart.data.config import DataConfig
from pixart.data.decoding import UnreadableImage
from pixart.data.images import load_record
from pixart.diffusion.schedule import DiffusionConfig
from pixart.encoders.vae import VaeAutoencoder
from pixart.errors import InputError
from pixart.extensions import load_extensions
from pixart.features.store import read_manifest
from pixart.inference.generate import save_samples
from pixart.prompt import split_prompt
from pixart.settings import read_settings
from pixart.train import DataConfig as _DataConfig
from pixart.train import LoopConfig, ObjectiveConfig, OptimizerConfig, TrainConfig
from runs import make_model, make_pictures, settings
from test_vae import make_reference
from toy import tiny_model

ODD_NUMBERS = [0, -1, 1.5, 1e-9, 1e300, float("nan"), float("inf"), float("-inf"), 2**31, 2**63, 2**70, 10**400]
ODD_TEXTS = ["", "x", "gpu", "\ud83d", "x\0y", "a" * 5000, "../..", "日本", "1e5", "null", "nan", "$NOPE", "~"]

# ------------------------------------------------------------------------------------------- wrong types from Python

WRONG = [
    None, True, b"x", [], [None], ["a", 3], (), {}, {"a": 1}, {1: 2}, object(), torch.zeros(2), torch.zeros(2, 3, 8, 8),
    torch.int8, torch.float64, torch.bool, Path("nope"), np.int64(3), np.float32(2), np.zeros(3),
    set(), range(3), *ODD_NUMBERS, *ODD_TEXTS,
]  # fmt: skip


@pytest.fixture(scope="module")
def calls(tmp_path_factory) -> dict[str, tuple]:
    """Name → (function, arguments that it takes, parameters to replace)."""
    home = tmp_path_factory.mktemp("wrong")
    folder = make_model(home, SampleConfig(steps=2, guidance=1.0))
    pipeline = Pipeline.from_pretrained(folder)
    model, fresh = pipeline.model, itertools.count()
    card = ModelCard(model.config)
    tensors = {"x": torch.zeros(1, 3, 8, 8), "t": torch.zeros(1), "caption": torch.zeros(1, 3, 16)}
    (home / "sample.yaml").write_text("steps: 3\n")

    def fields(cls: type, **given) -> tuple:
        return cls, given, [field.name for field in dataclasses.fields(cls)]

    drawn = [
        "steps",
        "guidance",
        "sampler",
        "height",
        "width",
        "sizes",
        "null",
        "image",
        "strength",
        "mask",
        "truncate",
        "batch_size",
    ]
    return {
        "call": (pipeline, {"prompts": "a", "output": "latent"}, [
            *drawn, "prompts", "seeds", "config", "aspect_ratio", "negative_prompts", "images_per_prompt", "output",
            "text_embeddings", "conditions", "latents",
        ]),
        "from_pretrained": (Pipeline.from_pretrained, {"source": folder}, [
            "source", "text_encoder", "vae", "ema", "dtype", "device", "revision", "overrides", "load_text",
            "quantize_text", "offload_text", "save_memory", "extensions",
        ]),
        "to": (pipeline.to, {}, ["device"]),
        "encode": (pipeline.encode, {"prompts": ["a"]}, ["prompts", "truncate"]),
        "stream": (lambda **given: list(pipeline.stream(**given)), {"requests": [Request("a")]}, [
            "requests", "config", "steps", "guidance", "sampler", "null", "batch_size", "look_ahead", "output",
        ]),
        "request": (lambda **given: list(pipeline.stream([Request(**given)])), {"prompt": "a"}, [
            field.name for field in dataclasses.fields(Request)
        ]),
        "save_samples": (
            lambda **given: save_samples(pipeline, **{"folder": home / f"s{next(fresh)}", "prompts": ["a"], **given}),
            {}, [*drawn, "prompts", "config", "seed", "negative_prompt", "rank", "ranks"],
        ),
        "load_model": (load_model, {"source": folder}, [
            "source", "ema", "dtype", "device", "overrides", "revision", "extensions", "base",
        ]),
        "PixArt.from_pretrained": (PixArt.from_pretrained, {"source": folder}, ["source", "dtype", "device"]),
        "export_model": (
            lambda **given: export_model(**{"model": model, "target": home / f"e{next(fresh)}", "card": card, **given}),
            {}, ["model", "format", "card"],
        ),
        "load_config": (load_config, {"cls": SampleConfig, "path": home / "sample.yaml"}, ["path", "overrides"]),
        "load_extensions": (load_extensions, {}, ["paths"]),
        "forward": (model, tensors, ["x", "t", "caption", "caption_mask", "size", "aspect_ratio", "keep"]),
        "PixArt": (PixArt, {}, ["config"]),
        "SampleConfig": fields(SampleConfig),
        "PixArtConfig": fields(PixArtConfig, hidden_size=48, num_heads=4, depth=2),
        "DiffusionConfig": fields(DiffusionConfig),
        "DataConfig": fields(_DataConfig),
        "LoopConfig": fields(LoopConfig, steps=2, batch_size=2),
        "OptimizerConfig": fields(OptimizerConfig),
        "ObjectiveConfig": fields(ObjectiveConfig),
        "TrainConfig": fields(TrainConfig, output="x", data=DataConfig(), train=LoopConfig(steps=2, batch_size=2)),
    }  # fmt: skip


def test_an_error_is_short_however_long_the_value():
    lines = str(InputError(f"a.json: width: got {'9' * 10**6}, expected a number\nb.json: no such file")).split("\n")
    assert lines[0].startswith("a.json: width: got 9") and lines[0].endswith(", expected a number")
    assert len(lines[0]) < 1300 and lines[1] == "b.json: no such file"


@fuzzed
def test_wrong_types_and_values_are_one_line_in_every_public_function(calls, examples):
    names = [(name, key) for name, (_, _, keys) in calls.items() for key in keys]

    def target(where: tuple[str, str], value) -> None:
        function, given, _ = calls[where[0]]
        function(**{**given, where[1]: value})

    fuzz(target, st.sampled_from(names), st.sampled_from(WRONG), examples=examples)


# ------------------------------------------------------------------------------------------------------ configs

plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
plain |= st.sampled_from([*ODD_NUMBERS, *ODD_TEXTS])
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def keys_of(cls: type, prefix: str = "") -> list[str]:
    keys = []
    for field in dataclasses.fields(cls):
        inner = field.default_factory if isinstance(field.default_factory, type) else None
        keys.append(prefix + field.name)
        keys += keys_of(inner, f"{prefix}{field.name}.") if dataclasses.is_dataclass(inner) else []
    return keys


@fuzzed
def test_any_value_of_any_field_of_a_config(tmp_path_factory, text_encoder, examples):
    home = tmp_path_factory.mktemp("config")
    base = settings(home / "run", home / "pictures", text_encoder)
    names = {**{f"data.{f.name}": 0 for f in dataclasses.fields(DataConfig)},
             **{f"train.{f.name}": 0 for f in dataclasses.fields(LoopConfig)}}  # fmt: skip

    def target(key: str, value) -> None:
        section, _, name = key.rpartition(".")
        changed = {**base, section: {**base.get(section, {}), name: value}} if section else {**base, name: value}
        try:
            text = yaml.safe_dump(changed, allow_unicode=True)
        except (yaml.YAMLError, UnicodeError, ValueError):
            return
        (home / "config.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
        load_config(TrainConfig, home / "config.yaml")

    fuzz(target, st.sampled_from([*keys_of(TrainConfig), *names]), values, examples=examples)


@fuzzed
def test_any_text_as_a_config_and_as_an_override(tmp_path_factory, examples):
    path = tmp_path_factory.mktemp("yaml") / "c.yaml"
    pieces = st.sampled_from([
        "steps: 3", "\n", "  ", "- ", ": ", "{", "}", "[", "&a", "*a", "!!python/x", "---", "'", '"', "|", ">", "#",
        "\t", "?", "base: c.yaml", "\0", "\ud83d", "<<: *a", "2024-13-45",
    ])  # fmt: skip

    def target(parts: list[str], key: str, value: str) -> None:
        path.write_bytes("".join(parts).encode("utf-8", "surrogatepass"))
        read_settings(path, [f"{key}={value}"])

    words = st.sampled_from(["a", "A.b", "0", " ", "é", "猫", "\x0c", "data.every", "=", "1e5", "x" * 300])
    short = st.lists(words | pieces, max_size=3).map("".join)
    fuzz(target, st.lists(pieces | words, max_size=12), short, short, examples=examples)


# ------------------------------------------------------------------------------------- JSON lines, captions, prompts


@fuzzed
def test_any_row_of_a_list_of_captions(tmp_path_factory, examples):
    folder = make_pictures(tmp_path_factory.mktemp("rows") / "p", 2)
    names = st.sampled_from(["00.png", "01.png", "../x.png", "/etc/passwd", "", "\0", "00.txt", ".", "\ud83d.png"])
    rows = st.dictionaries(st.sampled_from(["file_name", "text", "caption", "x"]), values | names, max_size=4)

    def target(given: list[dict], tail: bytes, name: str) -> None:
        (folder / "metadata.jsonl").unlink(missing_ok=True)
        (folder / "metadata.csv").unlink(missing_ok=True)
        if name.endswith("jsonl"):
            data = "".join(json.dumps(row) + "\n" for row in given).encode() + tail
        else:
            data = "".join(",".join(map(str, row.values())) + "\n" for row in given).encode("utf-8", "replace") + tail
        (folder / name).write_bytes(data)
        look(folder)

    fuzz(target, st.lists(rows, max_size=3), st.binary(max_size=9), st.sampled_from(["metadata.jsonl", "metadata.csv"]),
         examples=examples, lines=9)  # fmt: skip


@fuzzed
def test_any_bytes_as_a_caption_or_a_prompt_file(tmp_path_factory, examples):
    folder = make_pictures(tmp_path_factory.mktemp("bytes") / "p", 2)
    texts = st.text(max_size=20)
    codecs = st.sampled_from(["utf-8", "utf-16", "utf-16-le", "cp1252", "gbk", "shift-jis", "utf-32", "koi8-r"])
    encoded = st.builds(lambda text, codec: text.encode(codec, "ignore"), texts, codecs)

    def target(data: bytes) -> None:
        (folder / "00.txt").write_bytes(data)
        for record in look(folder).records:
            assert all(caption.encode() and "\0" not in caption for caption in record.captions)
        (folder.parent / "prompts.txt").write_bytes(data)
        for prompt in read_prompts(folder.parent / "prompts.txt"):
            prompt.encode()

    fuzz(target, st.binary(max_size=60) | encoded, examples=examples)


@fuzzed
def test_any_text_as_a_prompt(examples):
    pieces = ["a cat", "--ar", "—ar", "--hw", "=", "16:9", " ", "：", "x", "1.5", "0", "-", "–", "\u00a0", "\ud83d"]
    pieces.append("9" * 400)

    def target(parts: list[str]) -> None:
        text, asked = split_prompt("".join(parts))
        Request(text, **{name: value for name, value in asked.items() if name != "aspect_ratio"})

    fuzz(target, st.lists(st.sampled_from(pieces) | st.text(max_size=5), max_size=8), examples=examples)


# ----------------------------------------------------------------------------------------------- images, tensors


def encode(kind: str, mode: str = "RGB", **options) -> bytes:
    data = io.BytesIO()
    Image.new(mode, (8, 8), 100 if mode != "RGB" else "red").save(data, kind, **options)
    return data.getvalue()


IMAGES = [encode(kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000")]
IMAGES += [encode("TIFF", mode) for mode in ("F", "I", "I;16", "1", "CMYK", "P")] + [encode("PNG", "I;16")]
edits = st.lists(st.tuples(st.integers(0, 120), st.integers(0, 255)), min_size=1, max_size=6)


@fuzzed
def test_any_bytes_in_an_images_header(tmp_path_factory, examples):
    folder = make_pictures(tmp_path_factory.mktemp("headers") / "p", 2)

    def target(image: bytes, changes: list[tuple[int, int]], end: int | None, suffix: str) -> None:
        data = bytearray(image[:end])
        for place, value in changes:
            if place < len(data):
                data[place] = value
        for path in folder.glob("x*"):
            path.unlink()
        (folder / f"x{suffix}").write_bytes(data)
        (folder / "x.txt").write_text("a cat")
        for record in look(folder, max_pixels=1 << 20).records:
            with suppress(UnreadableImage):  # such an image is skipped while training
                load_record(record)

    fuzz(target, st.sampled_from(IMAGES), edits, st.none() | st.integers(0, 200), st.sampled_from([".png", ".heic"]),
         examples=examples)  # fmt: skip


@fuzzed
def test_any_header_of_a_file_of_tensors(tmp_path_factory, examples):
    home = tmp_path_factory.mktemp("tensors")
    reference = make_reference()
    reference.save_config(home)
    models = save(official(tiny_model())), save({k: v.contiguous() for k, v in reference.state_dict().items()})
    readers = (lambda path: load_model(path, overrides=HEADS)), VaeAutoencoder.from_pretrained
    entries = st.fixed_dictionaries({}, optional={
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I8", "U8", "F8_E4M3", "BOOL", "X", "", 3, None]),
        "shape": st.lists(st.integers(-2, 2**63), max_size=4) | plain,
        "data_offsets": st.lists(st.integers(-5, 2**40), max_size=3) | plain,
    })  # fmt: skip

    def target(which: int, change: str, place: int, entry: dict, raw: bytes) -> None:
        data = models[which]
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        name = sorted(header)[place % len(header)]
        if change == "entry":
            header[name] = {**header[name], **entry}
        elif change == "lost":
            del header[name]
        elif change == "renamed":
            header["x" * (place + 1)] = header.pop(name)
        text = json.dumps(header).encode()
        body = data[8 + size :]
        if change == "length":
            text = text[: place % len(text)]
        if change == "bytes":
            text = text[:place] + raw + text[place + len(raw) :]
        path = home / "x.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + body[: None if change != "cut" else place])
        readers[which](path)

    changes = st.sampled_from(["entry", "lost", "renamed", "length", "bytes", "cut"])
    fuzz(target, st.integers(0, 1), changes, st.integers(0, 2000), entries, st.binary(max_size=4), examples=examples)


@fuzzed
def test_any_settings_of_a_model_a_vae_and_a_store(tmp_path_factory, examples):
    home = tmp_path_factory.mktemp("json")
    reference, model = make_reference(), tiny_model()
    reference.save_pretrained(home / "vae")
    export_model(model, home / "model", card=ModelCard(model.config))
    files = {
        "vae": (home / "vae" / "config.json", VaeAutoencoder.from_pretrained),
        "model": (home / "model" / "config.json", load_model),
    }
    known = {name: json.loads(path.read_text()) for name, (path, _) in files.items()}

    def target(name: str, place: int, value) -> None:
        path, read = files[name]
        found = json.loads(json.dumps(known[name]))
        places = [(found, key) for key in found]
        places += [(found[key], inner) for key in found if isinstance(found[key], dict) for inner in found[key]]
        where, key = places[place % len(places)]
        where[key] = value
        path.write_text(json.dumps(found))
        read(path.parent)

    fuzz(target, st.sampled_from([*files]), st.integers(0, 60), values, examples=examples)
    store = home / "store"
    store.mkdir()

    def manifest(value) -> None:
        (store / "manifest.json").write_text(json.dumps(value))
        read_manifest(store)

    fuzz(manifest, values, examples=examples // 2)
