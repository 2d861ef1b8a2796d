"""The public surface: names for editors, types, and pipelines and networks that move and save themselves."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pixart
import pixart.train
from pixart import ModelCard, Pipeline, PixArt, SampleConfig
from pixart.checkpoint import load_with_card
from pixart.checkpoint.save import export_model
from pixart.errors import InputError
from runs import ROOT, make_model
from toy import tiny_model

CONFIG = SampleConfig(sampler="ddim", steps=3, guidance=3.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model of pixels with its text encoder."""
    return make_model(tmp_path_factory.mktemp("model"), CONFIG)


@pytest.fixture(scope="module")
def pipeline(folder) -> Pipeline:
    return Pipeline.from_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("package", [pixart, pixart.train])
def test_every_name_is_there_for_users_for_editors_and_on_the_page(package):
    tree = Path(package.__file__).read_text()
    listed = set(re.findall(r"^    from \S+ import (.+)$", tree.split("_PLACES")[0], re.MULTILINE))
    typed = {name.strip() for line in listed for name in line.split(",")}
    page = (ROOT / "pixart" / "README.md").read_text()
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name in typed or name == "__version__", f"{name} is not imported under TYPE_CHECKING"
        assert f"`{name}`" in page, f"{name} has no line in pixart/README.md"
    assert set(package.__all__) <= set(dir(package))
    assert typed <= set(package.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = package.no_such_name


def test_the_version_stands_once():
    assert 'version = { attr = "pixart.__version__" }' in (ROOT / "pyproject.toml").read_text()
    assert re.fullmatch(r"\d+\.\d+\.\d+", pixart.__version__)


@pytest.mark.slow
def test_the_public_surface_passes_a_strict_type_checker(tmp_path):
    pytest.importorskip("mypy", reason="the type checker of this test; extra: test")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------------------ a network


def test_a_network_saves_itself_and_comes_back_with_all_that_sampling_needs(folder, tmp_path):
    model = PixArt.from_pretrained(folder)
    model.save_pretrained(tmp_path / "copy")
    again, card = load_with_card(tmp_path / "copy")
    assert isinstance(model, PixArt) and not model.training
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert card.sample == CONFIG and card.text.length == 12
    half = PixArt.from_pretrained(tmp_path / "copy", dtype=torch.bfloat16)
    assert next(half.parameters()).dtype == torch.bfloat16


def test_a_network_made_in_python_asks_for_a_card_and_an_adapter_is_not_left_behind(tmp_path):
    model = tiny_model(in_channels=3, learn_sigma=False)
    with pytest.raises(InputError, match=r"card: .*ModelCard"):
        model.save_pretrained(tmp_path / "copy")
    model.save_pretrained(tmp_path / "copy", card=ModelCard(sample=CONFIG))
    found, card = load_with_card(tmp_path / "copy")
    assert (found.config, card.sample) == (model.config, CONFIG)
    with pytest.raises(InputError, match="already there"):
        model.save_pretrained(tmp_path / "copy", card=ModelCard())
    export_model(model, tmp_path / "model.pth", "official", card=ModelCard(sample=CONFIG))
    assert PixArt.from_pretrained(tmp_path / "model.pth").config == model.config
    import ideas  # registers the adapter
    from pixart.adapters.adapter import AdapterConfig, adapt

    assert ideas.LowRankAdapter
    adapt(model, AdapterConfig("low_rank"))
    with pytest.raises(InputError, match="adapter 'low_rank'"):
        model.save_pretrained(tmp_path / "adapted", card=ModelCard())


def test_names_of_diffusers_are_refused_with_ours_where_models_are_loaded(folder):
    for load in (PixArt.from_pretrained, Pipeline.from_pretrained, pixart.load_model):
        with pytest.raises(InputError, match="torch_dtype is diffusers' name; here it is dtype"):
            load(folder, torch_dtype=torch.float16)
        with pytest.raises(InputError, match=r"dtype: got 'float16', expected torch\.dtype"):
            load(folder, dtype="float16")
        with pytest.raises(InputError, match="source: got None, expected str or Path"):
            load(None)
    with pytest.raises(TypeError, match="dtipe"):
        pixart.load_model(folder, dtipe=3)


# ----------------------------------------------------------------------------------------------------------- a pipeline


def test_a_pipeline_saves_itself_and_draws_the_same(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "copy")
    again = Pipeline.from_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "text_encoder").is_dir()  # it is on this machine alone
    first, second = (pipe("a red square", 5, output="latent") for pipe in (pipeline, again))
    assert torch.equal(first, second)
    with pytest.raises(InputError, match="already there"):
        pipeline.save_pretrained(tmp_path / "copy")
    pipeline.save_pretrained(tmp_path / "model.pth", format="official")
    assert (tmp_path / "model.pth").is_file()


def test_a_pipeline_says_what_it_is(pipeline, folder):
    said = repr(pipeline)
    assert said.startswith("Pipeline(") and said.isprintable() is False  # several lines
    for part in ("0.1 M parameters", "torch.float32", "cpu", "8 × 8 px", "12 tokens", "text", "identity", "ddim", "3"):
        assert part in said, part
    assert "no text encoder" in repr(Pipeline.from_pretrained(folder, load_text=False))


def test_a_pipeline_moves_whole_and_says_where_it_is(folder, monkeypatch):
    pipe = Pipeline.from_pretrained(folder)
    assert pipe.device == torch.device("cpu")
    moved = []
    monkeypatch.setattr(pipe.text, "to", lambda device: moved.append(("text", device)))
    monkeypatch.setattr(pipe.autoencoder, "to", lambda device: moved.append(("autoencoder", device)), raising=False)
    assert pipe.to("meta") is pipe
    assert pipe.device.type == "meta" and moved == [("autoencoder", "meta"), ("text", "meta")]
    moved.clear()
    pipe.offload_text = True  # stays where it is
    pipe.to(torch.device("meta"))
    assert moved == [("autoencoder", torch.device("meta"))]


def test_a_pipeline_that_cannot_move_stays_whole(folder):
    pipe = Pipeline.from_pretrained(folder)
    with pytest.raises(InputError, match="device 'cuda:77'"):
        pipe.to("cuda:77")
    with pytest.raises(InputError, match=r"device: got a dtype, expected torch\.device or str"):
        pipe.to(torch.float16)
    pipe.text.model.is_quantized = True
    with pytest.raises(InputError, match="8 or 4 bits"):
        pipe.to("meta")
    assert pipe.device.type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": None}, "seeds: got None, expected int or a sequence of int"),
        ({"seeds": torch.Generator()}, "seeds: got a Generator, expected int or a sequence of int"),
        ({"prompts": 3}, "prompts: got 3, expected str, a sequence of str or None"),
        ({"prompts": ["a", None]}, r"prompts: got \['a', None\], expected"),
        ({"steps": 2.5}, "steps: got 2.5, expected int or None"),
        ({"config": {"steps": 3}}, "config: got {'steps': 3}, expected SampleConfig or None"),
        ({"height": "8"}, "height: got '8', expected int or None"),
        ({"callback": 3}, "callback: got 3, expected a function or None"),
        ({"num_inference_steps": 20}, "num_inference_steps is diffusers' name; here it is steps"),
        ({"guidance_scale": 20}, "guidance_scale is diffusers' name; here it is guidance"),
        ({"generator": torch.Generator()}, "generator is diffusers' name; here it is seeds"),
        ({"negative_prompt": ""}, "negative_prompt is diffusers' name; here it is negative_prompts"),
    ],
)
def test_wrong_types_and_other_words_are_one_line_before_any_work(pipeline, monkeypatch, arguments, message):
    monkeypatch.setattr(pipeline.text, "encode", None)
    with pytest.raises(InputError, match=f"^{message}") as caught:
        pipeline(**{"prompts": "a", **arguments})
    assert "\n" not in str(caught.value)


def test_seeds_of_numpy_are_seeds(pipeline):
    one = pipeline("a", 7, output="latent")
    assert torch.equal(one, pipeline("a", np.int64(7), output="latent"))
    assert torch.equal(one, pipeline("a", range(7, 8), output="latent"))


def test_images_are_a_list_that_says_so_to_whoever_looks_for_diffusers_output(pipeline):
    images = pipeline("a")
    assert isinstance(images, list) and len(images) == 1
    with pytest.raises(AttributeError, match=r"returns the list of images itself.*pipeline\(…\)\[0\]"):
        _ = images.images
    assert not hasattr(images, "images")
