"""Settings carry metadata that says what a change of each means."""

from dataclasses import dataclass, field

import pytest

from pixart.config import flatten, meaning, names_with, resolve_paths, setting, to_dict
from pixart.train.config import TrainConfig
from runs import build, settings


@dataclass(frozen=True)
class Inner:
    plain: int = 1
    own: int = setting(1, resume="quiet")
    mapping: dict[str, float] = setting(factory=dict, compare="images")


@dataclass(frozen=True)
class Outer:
    first: int = setting(resume="free")
    free: Inner = setting(factory=Inner, resume="free")
    strict: Inner = field(default_factory=Inner)


def test_metadata_that_a_setting_lacks_comes_from_its_section_or_is_the_strictest():
    assert Outer(3).first == 3 and Outer(3).free == Inner()
    keys = ("first", "free.plain", "free.own", "strict.plain", "strict.own")
    assert [meaning(Outer, key, "resume") for key in keys] == ["free", "free", "quiet", "fixed", "quiet"]
    assert meaning(Outer, "strict.mapping.any.key", "compare") == "images"
    assert meaning(Outer, "strict.plain", "compare") == "listed"
    assert names_with(Inner, "resume", "quiet") == ["own"]
    with pytest.raises(AssertionError, match="resume='fre'"):
        setting(1, resume="fre")


def test_a_run_is_what_its_settings_say_that_are_fixed():
    config = build(settings("run", "images", "text"))
    keys = flatten(to_dict(config))
    of = {name: {key: meaning(TrainConfig, key, name) for key in keys} for name in ("resume", "compare")}
    for key in ("seed", "model.depth", "diffusion.weighting", "objective.name", "data.flip", "train.batch_size",
                "train.ema", "optimizer.lr", "vae.kind", "text.clean", "init_from", "data.split_seed"):  # fmt: skip
        assert of["resume"][key] == "fixed", key
    for key in ("train.steps", "train.parallel", "sample.steps", "evaluate.metrics", "extract.batch_size", "prompts"):
        assert of["resume"][key] == "free", key
    quiet = {key for key, value in of["resume"].items() if value == "quiet"}
    assert quiet == {"output", "resume", "data.workers", "data.cache"}
    quiet |= {"prompts", "train.trackers", "train.timeout", "train.keep"}
    assert {key for key, value in of["compare"].items() if value == "quiet"} == quiet
    for key in ("diffusion.schedule", "objective.name", "model.learn_sigma"):
        assert of["compare"][key] == "loss", key
    for key in ("data.flip", "data.validation", "vae.kind", "text.model", "model.in_channels"):
        assert of["compare"][key] == "images", key
    assert of["compare"]["seed"] == of["compare"]["model.depth"] == "listed"


def test_held_out_images_are_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    config = build(settings("run", "images", "text"), data__validation_folder="mine")
    assert resolve_paths(config).data.validation_folder == str(tmp_path / "mine")
