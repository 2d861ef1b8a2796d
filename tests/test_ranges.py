"""Numbers of every setting: each is taken, or refused in one line that names its key. Paths with variables."""

import dataclasses
import math
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from pixart.config import build, load_config
from pixart.errors import InputError
from pixart.train.config import GroupConfig, TrainConfig

NUMBERS = {"negative": -1, "zero": 0, "huge": 10**30, "nan": math.nan, "inf": math.inf, "minus inf": -math.inf}
LEAST = {"output": "runs/x", "data": {"folder": "images"}, "train": {"steps": 10, "batch_size": 4}}
# what would be refused for another reason than the number's
NEEDED = {
    "vae": {"kind": "kl", "source": "vae"},
    "model.kv_blocks": {"kv_compression": "conv"},
    "sample.times": {"order": 1},
    "dreambooth": {"instance_prompt": "a photo of sks dog", "class_prompt": "a photo of a dog"},
}


def numbers(cls: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, "int" or "float") of every setting that is or holds a number, through all dataclasses."""
    for name, hint in typing.get_type_hints(cls).items():
        kinds = {hint, *typing.get_args(hint)}
        kinds |= {inside for kind in kinds for inside in typing.get_args(kind)}
        for kind in kinds:
            if dataclasses.is_dataclass(kind) and kind is not GroupConfig:
                yield from numbers(kind, f"{prefix}{name}.")
            elif kind in (int, float):
                yield f"{prefix}{name}", kind.__name__


FIELDS = sorted(set(numbers(TrainConfig)))


def wrap(cls: type, key: str, value) -> object:
    """`value` as the setting holds it: alone, in a list, in a list of pairs, or under a name."""
    for part in key.split("."):
        hint = typing.get_type_hints(cls)[part]
        inside = [kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)]
        cls = inside[0] if inside else cls
    text = str(hint)
    if "dict[" in text:
        return {"name": value}
    if "tuple[tuple" in text:
        return [[value, value]]
    return [value] if "tuple" in text else value


def refusal(settings: dict) -> str | None:
    try:
        build(TrainConfig, settings)
    except InputError as error:
        return str(error)
    return None


def test_there_are_fields_to_walk():
    assert len(FIELDS) > 50 and ("optimizer.lr", "float") in FIELDS and ("data.buckets", "int") in FIELDS


@pytest.mark.parametrize("word", NUMBERS)
def test_every_number_out_of_range_is_one_line_that_names_its_key(word):
    taken = set()
    for key, kind in FIELDS:
        number = NUMBERS[word]
        if kind == "int" and not isinstance(number, int):
            continue
        value = wrap(TrainConfig, key, float(number) if kind == "float" else number)
        settings = {name: dict(section) if isinstance(section, dict) else section for name, section in LEAST.items()}
        section, _, name = key.rpartition(".")
        if section:
            settings[section] = {
                **settings.get(section, {}),
                **NEEDED.get(section, {}),
                **NEEDED.get(key, {}),
                name: value,
            }
        else:
            settings[name] = value
        if section == "dreambooth":
            settings["init_from"] = "model"
        said = refusal(settings)
        assert said is None or (name in said and "\n" not in said and len(said) < 300), (key, said)
        taken |= {key} if said is None else set()
    if word in ("nan", "minus inf"):
        assert taken == set(), taken
    if word == "inf":
        assert taken == {"optimizer.clip"}, "which is no clipping"
    if word == "huge":
        whole = {key for key, kind in FIELDS if kind == "int"}
        assert taken & whole == {"seed", "data.split_seed"}, "seeds may be of any size"
    if word == "negative":
        assert taken == {
            "seed",
            "data.split_seed",
            "diffusion.logit_mean",
            "sample.guidance",
            "sample.guidance_low",
            "optimizer.options",
        }


def test_groups_of_parameters_and_options_are_checked_too():
    for wrong in ({"lr_factor": math.inf}, {"lr_factor": -1.0}, {"weight_decay": -0.5}):
        with pytest.raises(InputError, match=rf"optimizer.groups.{next(iter(wrong))}: got"):
            GroupConfig(("a",), **wrong)
    with pytest.raises(InputError, match=r"optimizer.options.momentum: got inf, expected a finite number"):
        build(TrainConfig, {**LEAST, "optimizer": {"options": {"momentum": math.inf}}})


# ------------------------------------------------------------------------------------------------------------- places


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "c.yaml") -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def error(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(TrainConfig, path, overrides)
    return str(caught.value)


BASE = """\
output: runs/x
data:
  folder: images
train:
  steps: 10
  batch_size: 4
"""


def test_an_error_names_the_line_that_holds_the_value_also_where_it_comes_from_a_base(write):
    base = write(BASE + "  sample_every: 5\noptimizer:\n  betas:\n    - 0.9\n    - 1.5\n", "base.yaml")
    path = write("base: base.yaml\ntrain: {steps: 20}\noptimizer: {warmup: 3}\n")
    assert error(path).startswith(f"{base}:11: optimizer.betas[1]: got 1.5, expected a number from 0 to below 1")
    assert error(path, "optimizer.betas=null").startswith(f"{base}:7: train.sample_every is set, but there are no prom")
    path = write("base: base.yaml\noptimizer:\n  betas: null\n  lr:\n    .inf\n")
    assert error(path).startswith(f"{path}:5: optimizer.lr: got inf, expected a positive number, and finite")
    path = write("base: base.yaml\noptimizer:\n  betas:\n    - 0.9\n    - fast\n")
    assert error(path).startswith(f"{path}:5: optimizer.betas[1]: got 'fast', expected a number")
    path = write("base: base.yaml\noptimizer: {betas: null}\ntext:\n  clean: false\n  length: 300\n")
    assert error(path, "train.sample_every=0").startswith(
        f"{path}:5: text.length 300 is more than model.caption_length"
    )
    assert error(path, "train.keep=0").startswith("override train.keep=0: train.keep: got 0, expected at least 1")


# --------------------------------------------------------------------------------------------------------------- paths


def test_variables_in_paths_are_the_environments(write, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/fast/disk")
    monkeypatch.setenv("BASES", ".")
    write(BASE, "base.yaml")
    text = "base: $BASES/base.yaml\noutput: $SCRATCH/run\ndata: {folder: '${SCRATCH}/images', mix: {$SCRATCH/s: 1}}\n"
    config = load_config(TrainConfig, write(text), ["init_from=$SCRATCH/base"])
    assert (config.output, config.data.folder) == ("/fast/disk/run", "/fast/disk/images")
    assert (config.data.mix, config.init_from) == ({"/fast/disk/s": 1.0}, "/fast/disk/base")
    text = "base: base.yaml\nprompts: [costs $5]\ndata: {folder: a$$b}\n"
    config = load_config(TrainConfig, write(text))
    assert (config.prompts, config.data.folder) == (("costs $5",), "a$b"), "of paths alone; $$ is the character"


def test_a_variable_that_is_not_set_is_named_with_its_line(write, monkeypatch):
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.setenv("NOTHING", "")
    path = write(BASE + "vae:\n  kind: kl\n  source: $NOWHERE/vae\n")
    assert error(path).startswith(
        f"{path}:9: vae.source: '$NOWHERE/vae' uses the environment variable $NOWHERE, which is not set"
    )
    assert "$NOTHING" in error(path, "vae.source=a", "output=$NOTHING/run"), "an empty one would name the root"
    assert error(path, "vae.source=a$/b").startswith(
        "override vae.source=a$/b: vae.source: 'a$/b' has a $ that does not start"
    )


def test_what_lies_in_a_run_was_expanded_when_the_run_began(write, monkeypatch):
    monkeypatch.delenv("b", raising=False)
    assert load_config(TrainConfig, write(BASE + "init_from: a$b\n"), run_code=False).init_from == "a$b"
