"""Adapters in the page, without a browser: strengths, comparing with and without, records, and what does not fit."""

import asyncio
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pages import make_adapter, served
from pixart import Pipeline, SampleConfig, commands
from pixart.adapters.adapter import AdapterConfig, adapt
from pixart.adapters.base import mark_base, other_base
from pixart.adapters.load import save_adapter
from pixart.app.adapters import Adapters
from pixart.app.drawing import Store
from pixart.app.events import Events
from pixart.app.form import ALONE, CANVAS, FIELDS, WITHOUT, from_list, to_list
from pixart.app.models import Models, Options, Shelf, identity
from pixart.app.settings import Limits, read_form
from pixart.app.worker import Pool
from pixart.checkpoint.files import read_card
from pixart.encoders.fingerprint import fingerprint
from pixart.errors import InputError
from pixart.files import write_folder
from pixart.inference.records import read_loras, write_loras
from pixart.inference.records import read_record as read_png
from runs import make_model

CONFIG = SampleConfig(sampler="ddim", steps=2, guidance=3.0)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a model, the adapters `style` and `other` that fit it, and `wide`, which does not."""
    home = tmp_path_factory.mktemp("home")
    make_model(home, CONFIG)
    make_adapter(home / "style.safetensors")
    make_adapter(home / "other.safetensors", seed=6)
    make_adapter(home / "wide.safetensors", width=64)
    return home


@pytest.fixture
def events(home, tmp_path):
    words = [f"{home}/style.safetensors:0.8", f"{home}/other.safetensors:0", f"{home}/wide.safetensors:0"]
    models = Models([str(home / "model")], words)
    shelf = Shelf(models, "cpu", Options())
    pool = Pool([shelf])
    events = Events(models, pool, Store(tmp_path), Limits(images=4))
    events.shelf = shelf
    yield events
    pool.close()


def draw(events, other=None, prompt="a red square", seed=7, **values):
    """What the page shows in the end, and the results."""

    async def run():
        seen, results = [], []
        async for html, some in events.draw("me", "model", other, None, {"prompt": prompt, "seed": seed, **values}):
            seen.append(html)
            results = results if some is None else some
        return seen[-1], results

    return asyncio.run(run())


def pixels(result) -> np.ndarray:
    return np.array(Image.open(result.path))


def expected(home: Path, strengths: dict[str, float], count: int = 1) -> list[np.ndarray]:
    """The images of a fresh pipeline that loads the adapters from their files."""
    pipeline = Pipeline.from_pretrained(home / "model")
    for name, strength in strengths.items():
        pipeline.load_lora(home / f"{name}.safetensors", strength=strength)
    return [np.array(image) for image in pipeline("a red square", 7, images_per_prompt=count)]


def test_the_page_draws_what_a_pipeline_with_the_adapters_draws_whatever_was_drawn_before(events, home):
    loaded = events.shelf.get("model")
    found = {}
    for strengths in ({"style": 0.8}, {"other": -1.5}, {"style": 0.25, "other": 1}, {}, {"style": 0.8}, {"style": 2}):
        html, (result,) = draw(events, adapters={**dict.fromkeys(("style", "other", "wide"), 0), **strengths})
        assert "done" in html
        assert np.array_equal(pixels(result), expected(home, strengths)[0]), strengths
        found[str(strengths)] = pixels(result).tobytes()
    assert len(set(found.values())) == len(found) == 5
    assert events.shelf.get("model") is loaded  # the pipeline was not built again


def test_with_and_without_an_adapter_side_by_side(events, home):
    _, results = draw(events, other=WITHOUT, count=2, adapters={"style": 0.8, "other": 0.0})
    captions = ["model · seed 7", "model + style:0.8 · seed 7", "model · seed 8", "model + style:0.8 · seed 8"]
    assert [result.caption for result in results] == captions
    for i, images in enumerate((expected(home, {}, 2), expected(home, {"style": 0.8}, 2))):
        for result, image in zip(results[i::2], images, strict=True):
            assert np.array_equal(pixels(result), image)
    assert ["lora" in result.record for result in results] == [False, True] * 2
    assert results[0].record["model"] != results[1].record["model"]
    html, results = draw(events, other=WITHOUT, adapters={"style": 0})
    assert "all adapters are at strength 0" in html and 'role="alert"' in html and not results


def test_a_png_gives_the_strengths_back_and_the_same_settings_draw_the_same_file(events):
    given = {"style": 1 / 3, "other": 0.0, "wide": 0.0}
    _, (result,) = draw(events, adapters=given)
    assert read_png(result.path)["lora"] == f"style:{1 / 3}"
    html, values = events.fill_from(str(result.path))
    assert "role" not in html and values["adapters"] == given
    _, (without,) = draw(events, adapters=dict.fromkeys(given, 0.0))
    assert events.fill(without.record)[1]["adapters"] == dict.fromkeys(given, 0.0)  # all sliders are moved
    values["prompt"], values["seed"] = "a red square", 7
    _, (again,) = draw(events, **values)
    assert again.path.read_bytes() == result.path.read_bytes() != without.path.read_bytes()


def test_adapters_of_a_record_that_the_page_does_not_have_are_said(events):
    record = {"prompt": "a", "seed": "1", "size": "8x8", "sampler": "ddim", "steps": "2"}
    html, values = events.fill({**record, "lora": "style:0.5, subject:0.75"})
    assert "drawn with the adapter subject:0.75, which this page does not have" in html and "\n" not in html
    assert values["adapters"] == {"style": 0.5, "other": 0.0, "wide": 0.0}
    html, values = events.fill({**record, "lora": "style:3"})
    assert "its strength 3 is beyond the slider" in html and values["adapters"]["style"] == 0
    assert "cannot be read" in events.fill({**record, "lora": "style"})[0]


def test_an_adapter_that_does_not_fit_is_said_when_it_is_chosen_and_the_page_goes_on(events):
    async def choose(strengths):
        return await events.choose("me", "model", strengths)

    html, sizes, misfit = asyncio.run(choose({"style": 1, "wide": 0.5}))
    assert "is loaded" in html and sizes
    assert re.search("model: lora &#x27;wide&#x27;: .* network of another width", misfit) and "\n" not in misfit
    assert asyncio.run(choose({"style": 1, "wide": 0}))[2] == ""
    html, results = draw(events, adapters={"style": 0.8, "wide": 0.5})
    assert "another width" in html and not results
    assert "done" in draw(events, adapters={"style": 0.8, "wide": 0})[0]
    for wrong in ("much", float("nan"), float("inf"), True):
        html, _ = draw(events, adapters={"style": wrong})
        assert "strength of style: got" in html and 'role="alert"' in html, wrong


@pytest.mark.filterwarnings("ignore:lora 'style'. it was trained on")
def test_an_adapter_of_another_base_is_said_when_it_is_chosen_and_draws(home, events, monkeypatch):
    async def choose(strength):
        return (await events.choose("me", "model", {"style": strength}))[2]

    files, own = events.models.adapters.files, mark_base(Pipeline.from_pretrained(home / "model").model)
    read = []
    monkeypatch.setattr("pixart.adapters.apply.other_base", lambda *given: read.append(1) or other_base(*given))
    for mark, said in ((own, False), ("network:" + "0123" * 8, True)):
        events.shelf.get("model")._doubts.clear()
        files["style"] = replace(files["style"], base="pixels", base_weights=mark)
        line = asyncio.run(choose(0.5))
        assert ("model: lora &#x27;style&#x27;: it was trained on pixels, whose weights are not" in line) == said
        assert (line == "") == (not said) and asyncio.run(choose(0)) == ""
    read.clear()
    assert asyncio.run(choose(0.4)) == line and not read  # the network is not read for each movement of a slider
    html, results = draw(events, adapters={"style": 0.4})
    assert "done" in html and len(results) == 1


def test_adapters_are_those_named_at_the_start(home, tmp_path):
    found = Adapters([f"{home}/style.safetensors:-3", str(home / "other.safetensors")])
    assert found.at_start == {"style": -3.0, "other": 1.0} and found.names == ["style", "other"]
    assert (found.range("style"), found.range("other")) == ((-3.0, 3.0), (-2.0, 2.0))
    twin = make_adapter(tmp_path / "b" / "style.safetensors")
    assert len(set(Adapters([str(home / "style.safetensors"), str(twin)]).names)) == 2
    with pytest.raises(InputError, match="given twice"):
        Adapters([str(twin), f"{twin}:0.5"])
    for strength in ("nan", "inf", "much"):
        with pytest.raises(InputError, match=f"expected FILE or FILE:STRENGTH, got the strength '{strength}'"):
            Adapters([f"{twin}:{strength}"])
    with pytest.raises(InputError, match="no such file"):
        Adapters([str(tmp_path / "nothing.safetensors")])
    with pytest.raises(InputError, match="this is a model, not a LoRA"):
        Models([str(home / "model")], [str(home / "model" / "model.safetensors")])


@pytest.mark.parametrize("kind", ["file", "peft", "diffusers"])
def test_an_adapter_in_place_of_a_model_is_refused_before_the_page_is_served(home, tmp_path, kind, monkeypatch):
    source = tmp_path / "style.safetensors"
    if kind == "file":
        make_adapter(source)
    else:
        source = tmp_path / "style"
        name = {"peft": "adapter_model.safetensors", "diffusers": "pytorch_lora_weights.safetensors"}[kind]
        make_adapter(source / name)
        if kind == "peft":
            (source / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "base"}')
    monkeypatch.setattr("pixart.app.server.serve", lambda *_: pytest.fail("the page was served"))
    said = []
    for name, *words in (["app", str(home / "model"), str(source)], ["sample", "--model", str(source), "a red square"]):
        with pytest.raises(InputError) as error:
            commands.load(name).main(commands.make_parser(name).parse_intermixed_args(words))
        said.append(str(error.value))
    assert said[0] == said[1] and "\n" not in said[0]
    assert "--lora" in said[0] and str(source) in said[0] and re.search("adapter|LoRA matrices", said[0])


def test_an_adapter_of_ours_that_names_its_base_is_a_model_of_the_page(home, tmp_path):
    network = Pipeline.from_pretrained(home / "model").model
    weights = fingerprint(network)
    adapter = adapt(network, AdapterConfig("lora", {"rank": 2}))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    config, card = AdapterConfig("lora", {"rank": 2}), read_card(home / "model")

    def save(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        save_adapter(folder, adapter.state_dict(), config, card, str(home / "model"), weights)

    steps = tmp_path / "run" / "checkpoints"
    write_folder(steps / "step_00000002", lambda step: save(step / "ema"))
    (tmp_path / "run" / "config.yaml").write_text("output: run\n")
    save(tmp_path / "alone")
    models = Models([str(home / "model"), str(tmp_path / "run"), str(tmp_path / "alone")])
    shelf = Shelf(models, "cpu", Options())
    assert list(models.paths()) == ["model", "run", "run, step 2", "alone"]
    plain = np.array(shelf.get("model").pipeline("a red square", 7)[0])
    for name, source in list(models.paths().items())[1:]:
        mine = Pipeline.from_pretrained(source, load_text=False)
        mine.text = shelf.get("model").pipeline.text
        expected = np.array(mine("a red square", 7)[0])
        assert np.array_equal(np.array(shelf.get(name).pipeline("a red square", 7)[0]), expected), name
        assert not np.array_equal(plain, expected)
    before = identity(str(tmp_path / "run"))
    shutil.copytree(steps / "step_00000002", steps / "step_00000004")
    assert identity(str(tmp_path / "run")) != before  # it trained on


def test_records_of_strengths_are_exact_and_names_may_hold_anything():
    strengths = {"a, b:2": 0.1 + 0.2, "c": -1.0, "d": 1e-05, "f": 1e6}
    assert write_loras({"style": 0.8, "subject": 1}) == "style:0.8, subject:1"
    assert read_loras(write_loras(strengths)) == strengths and read_loras("") == {}
    for text in ("style", "style:", "style:one", "style:1,", ":1"):
        with pytest.raises(ValueError, match="lora"):
            read_loras(text)


def test_the_form_has_one_order_for_the_page_and_its_clients():
    sent = to_list("model", prompt="a", seed="3", strengths=(0.5, 0))
    assert len(sent) == 3 + len(FIELDS) + 2
    model, other, canvas, values = from_list(sent, ["style", "other"])
    assert (model, other, canvas) == ("model", None, CANVAS) and from_list(to_list("a", "b"), [])[1] == "b"
    settings = read_form(values)
    assert (settings.prompt, settings.seed, settings.steps) == ("a", 3, None)
    assert settings.adapters == (("style", 0.5),)


def test_the_served_page_has_a_slider_for_each_adapter_and_draws_with_it(home, tmp_path):
    pytest.importorskip("gradio", reason="the page; extra: app")
    from gradio_client import Client

    models = Models([str(home / "model")], [f"{home}/style.safetensors:0.8", f"{home}/wide.safetensors:0"])
    with served(models, tmp_path, Limits()) as port:
        client = Client(f"http://127.0.0.1:{port}", verbose=False, download_files=False)
        sliders = {c["props"]["label"]: c["props"]["value"] for c in client.config["components"]
                   if c["type"] == "slider" and c["props"].get("elem_id", "").startswith("adapter")}  # fmt: skip
        assert sliders == {"style": 0.8, "wide": 0}
        form = to_list("model", WITHOUT, prompt="a red square", seed="7", strengths=(0.5, 0))
        html, gallery, *_ = client.predict(*form, api_name="/draw")
        captions = [image["caption"] for image in gallery["value"]]
        assert "done" in html and captions == ["model · seed 7", "model + style:0.5 · seed 7"]
        form = to_list("model", ALONE, prompt="a red square", strengths=(0.5, 1))
        assert "another width" in client.predict(*form, api_name="/draw")[0]
        client.close()
