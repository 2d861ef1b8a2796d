"""Strict configuration: what is accepted, and where an error points."""

import dataclasses
import json
import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pixart.checkpoint.files import ModelCard
from pixart.config import build, build_written, differences, dump_yaml, load_config, override, resolve_paths, to_dict
from pixart.diffusion.sampling import SampleConfig
from pixart.errors import InputError
from pixart.model.pixart import PixArtConfig
from pixart.train.config import TrainConfig

CONFIGS = sorted(
    path for path in (Path(__file__).parents[1] / "configs").rglob("*.yaml") if "\nstudy:" not in path.read_text()
)
MINIMAL = """\
output: runs/x
data:
  folder: pictures
train:
  steps: 10
  batch_size: 4
"""


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    sizes: tuple[int, ...] = (1, 2)
    span: tuple[float, float] | None = None
    mode: Literal["no", "yes", 3] = "yes"
    extra: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        if self.rate < 0:
            raise InputError(f"inner.rate: got {self.rate}, expected at least 0")


@dataclass(frozen=True)
class Outer:
    name: str
    count: int = 1
    flag: bool = False
    inner: Inner = field(default_factory=Inner)
    other: Inner = field(default_factory=Inner)
    maybe: int | None = 7


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "c.yaml") -> Path:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def error(cls, path, overrides=()) -> str:
    with pytest.raises(InputError) as caught:
        load_config(cls, path, overrides)
    return str(caught.value)


def test_a_file_holds_differences_from_the_defaults(write):
    path = write("name: a\ninner:\n  rate: 2\n  sizes: [4]\nmaybe: null\n")
    assert load_config(Outer, path) == Outer("a", inner=Inner(rate=2.0, sizes=(4,)), maybe=None)


def test_an_unknown_key_names_file_line_and_the_nearest_valid_key(write):
    path = write(MINIMAL + "optimizer:\n  # comment\n  warmpu: 5\n")
    text = error(TrainConfig, path)
    assert text.startswith(f"{path}:9: unknown key 'optimizer.warmpu'; did you mean 'optimizer.warmup'?")
    assert "weight_decay" in text  # and all the others


def test_an_unknown_key_like_no_other_gets_no_guess(write):
    text = error(Outer, write("name: a\nzzzzzzzz: 1\n"))
    assert "c.yaml:2: unknown key 'zzzzzzzz' (there are count, flag, inner," in text


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("count: two", "count: got 'two', expected int"),
        ("count: 1.5", "count: got 1.5, expected int"),
        ("count: 1e3", "count: got '1e3', expected int"),
        ("count: true", "count: got True, expected int"),
        ("count: null", "count: got None, expected int"),
        ("flag: 1", "flag: got 1, expected bool"),
        ("name: 5", "name: got 5, expected str"),
        ("name: null", "name: got None, expected str"),
        ("inner: 5", "inner: got 5, expected a section with keys"),
        ("inner: [rate]", "inner: got ['rate'], expected a section with keys"),
        ("inner: {rate: fast}", "inner.rate: got 'fast', expected a number"),
        ("inner: {rate: true}", "inner.rate: got True, expected a number"),
        ("inner: {rate: .nan}", "inner.rate: got nan, expected a number"),
        ("inner: {rate: nan}", "inner.rate: got 'nan', expected a number"),
        ("inner: {sizes: 5}", "inner.sizes: got 5, expected a list"),
        ("inner: {sizes: [1, x]}", "inner.sizes[1]: got 'x', expected int"),
        ("inner: {span: [1]}", "inner.span: got 1 values, expected 2"),
        ("inner: {mode: maybe}", "inner.mode: got 'maybe', expected one of no, yes, 3"),
        ("inner: {mode: 3.0}", "inner.mode: got 3.0, expected one of no, yes, 3"),
        ("inner: {extra: 5}", "inner.extra: got 5, expected keys and values"),
        ("inner: {extra: {a: b}}", "inner.extra.a: got 'b', expected a number"),
        ("when: 2024-13-45", "'2024-13-45' cannot be read as timestamp"),
        ("count: !!int x", "'x' cannot be read as int"),
    ],
)
def test_a_wrong_value_names_line_key_and_what_is_expected(write, line, expected):
    path = write("# a file\n" + line + ("" if "name" in line else "\nname: a") + "\n")
    text = error(Outer, path)
    assert text.startswith(f"{path}:2: ")
    assert expected in text


def test_numbers_in_scientific_notation_are_floats_with_and_without_a_dot(write):
    assert load_config(Outer, write("name: a\ninner: {rate: 1e-4}")).inner.rate == 1e-4
    assert load_config(Outer, write("name: a\ninner: {rate: 1.0e-4}")).inner.rate == 1e-4
    assert load_config(Outer, write("name: a\ninner: {rate: .inf}")).inner.rate == math.inf
    assert load_config(Outer, write("name: 1e-4")).name == "1e-4"


def test_a_fixed_tuple_an_option_and_a_mapping_are_converted(write):
    config = load_config(Outer, write("name: a\ninner: {span: [1, 2e0], mode: 3, extra: {a: 1, b: 1e-2}}"))
    assert config.inner == Inner(span=(1.0, 2.0), mode=3, extra={"a": 1.0, "b": 0.01})
    assert type(config.inner.span[0]) is float


def test_a_duplicate_key_names_its_second_line(write):
    path = write(MINIMAL + "data:\n  folder: other\n")
    assert error(TrainConfig, path) == f"{path}:7: key 'data' is given twice"


def test_missing_keys_are_named_with_their_file_and_section(write):
    path = write("output: x\ndata: {folder: d}\n")
    assert error(TrainConfig, path) == f"{path}: missing key: train"
    path = write("output: x\ndata: {folder: d}\ntrain:\n  accumulation: 2\n")
    assert error(TrainConfig, path) == f"{path}:3: missing keys: train.steps, train.batch_size"
    assert error(TrainConfig, write("")) == f"{path}: missing keys: output, data, train"


def test_a_value_that_the_class_refuses_names_the_line_of_its_key(write):
    path = write("count: 1\nname: a\nother:\n  sizes: []\n  rate: -1\n")
    assert error(Outer, path) == f"{path}:5: inner.rate: got -1.0, expected at least 0"
    # two keys of the file together are wrong: the first that the text names
    path = write(MINIMAL + "\n\n\ntext:\n  length: 130\n")
    assert error(TrainConfig, path).startswith(f"{path}:11: text.length 130 is more than model.caption_length 120")


@pytest.mark.parametrize(
    "text", ["a: [1", "a: b: c", "\tname: a", "name: a\n---\nname: b", "name: !!python/name:os.x ''"]
)
def test_invalid_yaml_is_said_to_be_so(write, text):
    path = write(text)
    message = error(Outer, path)
    assert message.startswith(f"config {path}: not valid YAML")
    assert "line" in message


@pytest.mark.parametrize(("text", "kind"), [("- a\n- b\n", "list"), ("just text\n", "str"), ("5", "int")])
def test_a_file_that_is_no_mapping_is_refused(write, text, kind):
    assert f"expected keys and values, got a {kind}" in error(Outer, write(text))


def test_an_alias_inside_its_own_anchor_is_an_error_and_not_a_crash(write):
    assert "alias" in error(Outer, write("name: &a [*a]\n"))


def test_anchors_are_copied(write):
    config = load_config(Outer, write("name: a\ninner: &i {rate: 3}\nother: *i\n"))
    assert config.inner == config.other == Inner(rate=3.0)


def test_a_file_that_cannot_be_read_is_named(write, tmp_path):
    assert f"config {tmp_path / 'none.yaml'}: cannot be read" in error(Outer, tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    assert "cannot be read" in error(Outer, tmp_path / "latin.yaml")
    assert "cannot be read" in error(Outer, tmp_path)


def test_base_starts_from_another_file_whose_path_is_relative_to_this_one(write):
    write("name: root\ninner: {rate: 1, sizes: [9]}\nmaybe: 1\n", "root.yaml")
    write("base: ../root.yaml\ninner: {rate: 2}\nflag: true\n", "sub/middle.yaml")
    path = write("base: sub/middle.yaml\nname: leaf\ninner: {extra: {a: 1}}\nmaybe: null\n")
    assert load_config(Outer, path) == Outer(
        "leaf", flag=True, inner=Inner(rate=2.0, sizes=(9,), extra={"a": 1.0}), maybe=None
    )


def test_an_error_in_a_base_points_into_the_base(write):
    base = write("\nnmae: a\n", "base.yaml")
    assert error(Outer, write("base: base.yaml\n")).startswith(f"{base}:2: unknown key 'nmae'; did you mean 'name'?")


def test_a_base_that_is_missing_not_a_name_or_circular_is_an_error(write):
    path = write("base: none.yaml\n")
    assert f"none.yaml, the base of {path}: cannot be read" in error(Outer, path)
    assert "c.yaml:1: base: got 5, expected the name of a file" in error(Outer, write("base: 5\n"))
    write("base: c.yaml\n", "round.yaml")
    assert "must not form a cycle" in error(Outer, write("base: round.yaml\n"))
    assert "must not form a cycle" in error(Outer, write("base: c.yaml\n"))


def test_preset_fills_what_the_section_leaves_open(write):
    config = load_config(TrainConfig, write(MINIMAL + "model:\n  preset: sigma-1024\n  depth: 4\n"))
    assert config.model == dataclasses.replace(PixArtConfig.from_preset("sigma-1024"), depth=4)
    overrides = ["model.preset=alpha-1024", "model.qk_norm=true"]
    config = load_config(TrainConfig, write(MINIMAL), overrides)
    assert config.model == dataclasses.replace(PixArtConfig.from_preset("alpha-1024"), qk_norm=True)


def test_a_preset_of_a_later_layer_takes_the_place_of_the_section_below(write):
    write(MINIMAL + "model: {preset: XL/2, depth: 3, caption_channels: 32}\n", "base.yaml")
    small = PixArtConfig.from_preset("S/2")
    path = write("base: base.yaml\nmodel: {preset: S/2}\n")
    assert load_config(TrainConfig, path).model == small
    assert load_config(TrainConfig, write("base: base.yaml\n"), ["model.preset=S/2"]).model == small
    path = write("base: base.yaml\nmodel: {depth: 5}\n", "deep.yaml")
    assert load_config(TrainConfig, path).model == PixArtConfig(depth=5, caption_channels=32)
    overrides = ["model.depth=4", "model.preset=S/2"]  # of one layer, in either order
    expected = dataclasses.replace(small, depth=4)
    assert load_config(TrainConfig, write("base: base.yaml\n"), overrides).model == expected
    assert load_config(TrainConfig, write("base: base.yaml\n"), overrides[::-1]).model == expected


def test_settings_that_a_preset_removes_are_named(write):
    path = write(MINIMAL + "model: {learn_sigma: false}\ndiffusion: {schedule: flow, prediction: x0}\n")
    text = error(TrainConfig, path, ["model.preset=S/2"])
    assert text.startswith("override model.preset=S/2, which resets model: model.learn_sigma must be off")


@pytest.mark.parametrize(("text", "word"), [("no", "no"), ("off", "no"), ("yes", "yes"), ("'no'", "no"), ("3", 3)])
def test_strings_that_yaml_reads_as_booleans_are_accepted_as_strings(write, text, word):
    if text == "off":  # is no word of this field
        assert "expected one of no, yes, 3" in error(Outer, write("name: a\ninner: {mode: 'off'}\n"))
    assert load_config(Outer, write(f"name: a\ninner: {{mode: {text}}}\n")).inner.mode == word
    assert load_config(Outer, write("name: a\n"), [f"inner.mode={text}"]).inner.mode == word


def test_a_path_in_the_home_folder_is_written_out(write, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    path = write("name: ~/a b\n")
    assert load_config(Outer, path).name == "/somewhere/a b"
    assert load_config(Outer, path, ["name=~/c"]).name == "/somewhere/c"
    assert load_config(Outer, path, ["name=a~/c"]).name == "a~/c"


@pytest.mark.parametrize("value", ["sigma-1025", "5", "[a]", "null"])
def test_a_wrong_preset_names_its_line(write, value):
    path = write(MINIMAL + f"model:\n  depth: 3\n  preset: {value}\n")
    assert error(TrainConfig, path).startswith(f"{path}:9: ")


def test_a_preset_where_there_are_none_is_an_unknown_key(write):
    assert "unknown key 'optimizer.preset'" in error(TrainConfig, write(MINIMAL + "optimizer: {preset: fast}\n"))


def test_overrides_come_last_and_reach_into_sections_lists_and_null(write):
    path = write("name: a\ninner: {rate: 1, sizes: [1]}\n")
    config = load_config(
        Outer,
        path,
        ["inner.rate=1e-3", "inner.sizes=[3, 4]", "maybe=null", "flag=true", "other.extra.x=2", "name=b=c"],
    )
    assert config == Outer(
        "b=c", flag=True, inner=Inner(rate=1e-3, sizes=(3, 4)), other=Inner(extra={"x": 2.0}), maybe=None
    )
    assert load_config(Outer, path, ["inner={rate: 4}"]).inner == Inner(rate=4.0)
    assert load_config(Outer, path, ["maybe=", "inner.mode='no'"]).maybe is None
    assert load_config(Outer, path, ["count=1", "count=2"]).count == 2
    assert load_config(Outer, path, ["maybe=#1"]).maybe is None  # to YAML, a comment


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("count", "override 'count': expected key=value"),
        ("countt=1", "override countt=1: unknown key 'countt'; did you mean 'count'?"),
        ("inner.rat=1", "override inner.rat=1: unknown key 'inner.rat'; did you mean 'inner.rate'?"),
        ("rate=1", "override rate=1: unknown key 'rate'; did you mean 'inner.rate' or 'other.rate'?"),
        ("inner..rate=1", "unknown key 'inner.'"),
        ("=1", "unknown key ''"),
        ("count=x", "override count=x: count: got 'x', expected int"),
        ("inner.sizes=[1", "override 'inner.sizes=[1': the value is not valid YAML"),
        ("inner={rate: 1, rate: 2}", "key 'rate' is given twice"),
        ("inner.rate=-1", "override inner.rate=-1: inner.rate: got -1.0"),
        ("name.x=1", "name: got {'x': 1}, expected str"),
    ],
)
def test_a_wrong_override_is_named(write, text, expected):
    assert expected in error(Outer, write("name: a\ninner: {rate: 1}\n"), [text])


def test_override_of_a_dataclass_keeps_everything_else_nested_too():
    start = Outer("a", 5, inner=Inner(rate=3.0, sizes=(8,), extra={"x": 1.0}), maybe=None)
    assert override(start, []) == start
    assert override(start, ["inner.mode='no'"]) == dataclasses.replace(
        start, inner=dataclasses.replace(start.inner, mode="no")
    )
    assert override(start, ["inner.extra.y=2"]).inner.extra == {"x": 1.0, "y": 2.0}
    assert override(SampleConfig(steps=30, guidance=2.0), ["sampler=ddim"]) == SampleConfig("ddim", 30, 2.0)
    with pytest.raises(InputError, match=r"override steps=0: sample.steps: got 0"):
        override(SampleConfig(), ["steps=0"])


@pytest.mark.parametrize("settings", [[], 5, None, "text"])
def test_settings_that_are_no_mapping_are_refused(settings):
    with pytest.raises(InputError, match="expected keys and values"):
        build(ModelCard, settings)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_in_the_repository_loads_and_survives_a_round_trip(path, write):
    config = load_config(TrainConfig, path)
    assert config.output != ""
    assert load_config(TrainConfig, write(dump_yaml(config))) == config
    assert build(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config  # as earlier versions wrote them
    assert build_written(ModelCard, json.loads(json.dumps(differences(config.card)))) == config.card


def test_there_is_a_config_to_load():
    assert "openmoji" in [path.stem for path in CONFIGS]


numbers = st.floats(allow_nan=False, allow_infinity=True)
configs = st.builds(
    Outer,
    name=st.text(alphabet=st.characters(exclude_categories=["Cs"])),
    count=st.integers(),
    flag=st.booleans(),
    maybe=st.none() | st.integers(),
    inner=st.builds(
        Inner,
        rate=st.floats(min_value=0),
        sizes=st.lists(st.integers()).map(tuple),
        span=st.none() | st.tuples(numbers, numbers),
        mode=st.sampled_from(["no", "yes", 3]),
        extra=st.dictionaries(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=9), numbers),
    ),
)


@given(configs)
def test_any_config_survives_dump_and_load(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(Outer, path) == config


@given(configs)
def test_any_config_survives_as_what_differs_from_the_defaults(config):
    assert build(Outer, json.loads(json.dumps(differences(config)))) == config


def test_dump_holds_what_differs_in_the_order_of_the_fields_and_is_plain_yaml():
    plain = yaml.safe_load(dump_yaml(Outer("é", flag=True, inner=Inner(span=(1.0, 2.0), rate=0.25), maybe=None)))
    assert plain == {"name": "é", "flag": True, "inner": {"rate": 0.25, "span": [1.0, 2.0]}, "other": {}, "maybe": None}
    assert list(plain) == ["name", "flag", "inner", "other", "maybe"]
    assert list(plain["inner"]) == ["rate", "span"]
    assert "é" in dump_yaml(Outer("é"))


def test_what_is_there_is_named_by_its_absolute_path_and_nothing_else_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("text", "pictures", "owner/name", "store"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "vae.safetensors").touch()
    settings = yaml.safe_load(MINIMAL)
    settings["data"] |= {"captions": {"text": 1.0}, "mix": {"store": 2.0, "other": 1.0}, "features": "gone"}
    settings |= {
        "text": {"model": "text"},
        "vae": {"kind": "kl", "source": "vae.safetensors"},
        "init_from": "owner/name",
    }
    config, here = build(TrainConfig, settings), str(tmp_path)
    found = resolve_paths(config)
    assert (found.text.model, found.vae.source) == (f"{here}/text", f"{here}/vae.safetensors")
    assert (found.data.folder, found.data.features, found.init_from) == (
        f"{here}/pictures",
        "gone",
        f"{here}/owner/name",
    )
    assert found.data.mix == {f"{here}/store": 2.0, "other": 1.0}
    assert found.data.captions == {"text": 1.0}, "a caption's field is no path"
    monkeypatch.chdir("/")
    assert resolve_paths(found) == found
    assert resolve_paths(config) == config, "names of nothing here stay, as Hub ids do"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").rmdir()
    (tmp_path / "store").rmdir()
    assert resolve_paths(config, found) == found, "what is gone is named as before"


# what a card and a run's config.yaml leave out. A changed default would change what the files of all versions before
# mean: give the new behaviour a new name or word instead. A new field gets a line here, and is off by default.
DEFAULTS = {
    "model": {
        "hidden_size": 1152, "depth": 28, "num_heads": 16, "mlp_ratio": 4.0, "patch_size": 2, "in_channels": 4,
        "learn_sigma": True, "caption_channels": 4096, "caption_length": 120, "micro_conditions": False,
        "latent_size": 32, "position_scale": 1.0, "kv_compression": None, "kv_ratio": 2, "kv_blocks": [],
        "qk_norm": False, "conditioning": "adaln_single", "positions": "sincos", "attention": "softmax",
        "norm": "layer_norm", "mlp": "gelu", "routing": None, "route_blocks": None, "route_ratio": 0.5,
        "options": {},
    },
    "diffusion": {
        "schedule": "linear", "prediction": "epsilon", "times": "uniform", "logit_mean": 0.0, "logit_std": 1.0,
        "time_shift": 1.0, "weighting": "uniform", "min_snr_gamma": 5.0, "contrast": 0.0,
    },
    "text": {"model": "DeepFloyd/t5-v1_1-xxl", "length": 120, "clean": True, "null": "buffer"},
    "vae": {"kind": "identity", "source": "", "scale": None},
    "sample": {
        "sampler": "auto", "spacing": "auto", "times": [],
        "steps": None, "guidance": None, "guidance_low": 0.0, "guidance_high": 1000.0,
        "rescale": 0.0, "order": 2, "ending": "sigma", "eta": 0.0, "tau": 1.0, "clip_x0": False, "shift": 1.0,
    },
    "data": {
        "folder": "pictures", "features": None, "mix": {}, "format": "auto", "captions": {}, "images": None,
        "prepare": None, "resolution": 256, "aspect_ratios": False, "buckets": [], "every": 1, "validation": 0.0,
        "validation_folder": None, "validation_features": None, "split_seed": None,
        "flip": False, "posterior": "sample", "random_crop": False, "max_crop": 0.5, "max_pixels": 1 << 28,
        "leftovers": "drop", "workers": 2,
        "cache": False, "text_dtype": "bfloat16", "shuffle_captions": False,
        "caption": None, "regularization": None, "regularization_caption": None, "regularization_weight": 1.0,
        "conditions": {}, "targets": {}, "draws": None,
    },
    "objective": {"name": "denoising", "options": {}},
    "train": {
        "steps": 10, "batch_size": 4, "accumulation": 1, "parallel": "ddp", "timeout": 1800.0,
        "mixed_precision": "bf16", "gradient_checkpointing": False, "compile": False, "deterministic": False,
        "checkpointing_every": 1,
        "freeze": [], "caption_dropout": 0.1, "ema": 0.9999, "ema_warmup": False, "log_every": 20, "sample_every": 0,
        "validate_every": 0, "evaluate_every": 0, "metrics": ["loss", "denoising_error"],
        "save_every": 1000, "keep": 3, "on_save_error": "continue", "trackers": ["tensorboard"],
        "peak_tflops": None,
    },
    "optimizer": {
        "name": "adamw", "lr": 2e-5, "auto_lr": "none", "schedule": "constant", "final_lr": 0.0, "warmup": 1000,
        "weight_decay": 0.03, "betas": None, "eps": None, "options": {}, "clip": 1.0, "skip_above": None,
        "groups": [],
    },
    "extract": {
        "batch_size": 16, "caption_batch": 64, "mirrored": False, "vae_dtype": "float32", "latent_dtype": "float16",
        "samples_per_file": 4096, "captions_per_file": 2048,
    },
    "evaluate": {
        "metrics": [], "prompts": None, "images": None, "reference": None,
        "reference_fit": "exact", "filter": "clean", "inception": None,
    },
    "extensions": [], "accept_changed_extensions": False,
    "output": "runs/x", "seed": 0, "resume": "auto", "init_from": None, "adapter": None, "dreambooth": None,
    "prompts": [],
}  # fmt: skip


def test_the_defaults_are_those_of_all_files_that_leave_them_out(write):
    config = to_dict(load_config(TrainConfig, write(MINIMAL)))
    assert {name: value for name, value in config.items() if name not in DEFAULTS} == {}
    for name, expected in DEFAULTS.items():
        assert config[name] == expected, name
    assert list(to_dict(ModelCard())) == ["model", "diffusion", "vae", "text", "sample"]
    assert {name: DEFAULTS[name] for name in to_dict(ModelCard())} == to_dict(ModelCard())


def test_what_a_newer_version_wrote_is_read_if_all_that_is_unknown_is_off():
    card = {"model": {"depth": 2}, "text": {}}
    off = {"rope": False, "gate": "none", "time_token": None, "routes": [], "router": {}, "label": ""}
    newer = {**card, "model": {"depth": 2, **off}, "text": {"pooled": False}, "adapter": {}}
    assert build_written(ModelCard, newer) == build_written(ModelCard, card) == ModelCard(PixArtConfig(depth=2))
    for on in (True, 0, 0.0, "rms", [0], {"rank": 4}):
        with pytest.raises(InputError, match=r"unknown key 'model\.rope'"):
            build_written(ModelCard, {"model": {"rope": on}})
    with pytest.raises(InputError, match="unknown key 'adapter'"):
        build_written(ModelCard, {**card, "adapter": {"rank": None}})
    with pytest.raises(InputError, match=r"model: got 5, expected a section with keys"):
        build_written(ModelCard, {"model": 5})
    with pytest.raises(InputError, match="expected keys and values, got a list"):
        build_written(ModelCard, [])


def test_a_key_that_is_off_is_no_less_unknown_where_a_person_wrote_it(write):
    assert "unknown key 'model.rope'" in error(TrainConfig, write(MINIMAL + "model: {rope: false}\n"))
    assert "unknown key 'model.rope'" in error(TrainConfig, write(MINIMAL), ["model.rope=false"])
    assert "unknown key 'rope'" in error(TrainConfig, write(MINIMAL), ["rope="])


def test_the_base_modules_do_not_import_torch():
    modules = "pixart.config, pixart.encoders.caption_cleaning, pixart.data.buckets"
    code = f"import sys, {modules}; assert not {{'torch', 'PIL', 'ftfy'}} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)
