"""From a trained model to images: the pipeline and the command."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import pixart.inference.generate as generate_module
from pixart import commands
from pixart.checkpoint.files import ModelCard, save_model
from pixart.checkpoint.load import load_with_card
from pixart.contact_sheet import contact_sheet
from pixart.diffusion.sampling import SampleConfig
from pixart.diffusion.schedule import DiffusionConfig
from pixart.diffusion.timesteps import chain_times
from pixart.encoders.autoencoder import AutoencoderConfig
from pixart.encoders.text import TextConfig
from pixart.errors import InputError
from pixart.inference.generate import save_samples
from pixart.inference.latents import sample_latents
from pixart.inference.pipeline import Pipeline
from pixart.model import PixArtConfig
from pixart.train.finish import finish
from pixart.train.loop import train
from runs import build, make_pictures, run_command, settings
from toy import TINY, relative, tiny_model

PROMPTS = ["a red square", "two", "a very green square indeed", "blue"]


def make_model(folder: Path, text_encoder: Path, diffusion: DiffusionConfig | None = None, **changes) -> Path:
    model = tiny_model(**{"in_channels": 3, "learn_sigma": False, **changes})
    text = TextConfig(model=str(text_encoder), length=12, clean=False, null=changes.pop("null", "buffer"))
    save_model(folder, model.state_dict(), ModelCard(model.config, diffusion or DiffusionConfig(), text=text))
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, text_encoder) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "model", text_encoder)


@pytest.mark.parametrize("sampler", ["dpm_solver", "iddpm", "ddim"])
def test_an_image_depends_on_its_prompt_and_seed_not_on_its_batch(model_folder, sampler):
    pipeline = Pipeline.from_pretrained(model_folder)
    captions, null = pipeline.encode(PROMPTS)
    config = SampleConfig(sampler=sampler, steps=8, guidance=3.0, eta=1.0 if sampler == "ddim" else 0.0)

    def sample(rows):
        return sample_latents(
            pipeline.model, pipeline.card, [captions[i] for i in rows], null, [10 + i for i in rows], config,
            height=8, width=8,
        )  # fmt: skip

    together = sample([0, 1, 2, 3])
    for i in range(4):
        assert relative(sample([i]), together[i : i + 1]) <= 1e-6
    assert relative(sample([3, 1]), together[[3, 1]]) <= 1e-6
    assert relative(together[0:1], together[1:2]) > 0.1


@pytest.mark.slow
def test_a_compiled_pipeline_draws_the_same_pictures(model_folder):
    plain, compiled = (Pipeline.from_pretrained(model_folder, compile=yes) for yes in (False, True))
    for prompts in (PROMPTS, PROMPTS[:1]):
        expected = plain(prompts, output="pixels")
        assert relative(compiled(prompts, output="pixels"), expected) <= 1e-5
    torch._dynamo.reset()


def test_batch_size_changes_no_picture(model_folder):
    pipeline = Pipeline.from_pretrained(model_folder)
    config = SampleConfig(steps=4)
    one, four = (pipeline(PROMPTS, [1, 2, 3, 4], config, batch_size=size) for size in (1, 4))
    for a, b in zip(one, four, strict=True):
        difference = torch.frombuffer(bytearray(a.tobytes()), dtype=torch.uint8).int() - torch.frombuffer(
            bytearray(b.tobytes()), dtype=torch.uint8
        )
        assert difference.abs().max() <= 1  # of 255: rounding at a step's edge


@pytest.mark.parametrize("null", ["buffer", "empty", "empty_own_mask"])
def test_the_null_caption_follows_the_models_mode(tmp_path, text_encoder, null):
    model = tiny_model(in_channels=3, learn_sigma=False)
    text = TextConfig(model=str(text_encoder), length=12, clean=False, null=null)
    save_model(tmp_path / "m", model.state_dict(), ModelCard(model.config, text=text))
    pipeline = Pipeline.from_pretrained(tmp_path / "m")
    captions, states = pipeline.encode(["a red square"])
    config = SampleConfig(steps=2, guidance=5.0, sampler="ddim")
    result = sample_latents(pipeline.model, pipeline.card, captions, states, [0], config, height=8, width=8)

    # by hand: two network calls a step, the null caption and mask written out
    length = len(captions[0])
    tokens = pipeline.text.tokenizer([""], padding="max_length", max_length=12, return_tensors="pt")
    empty, mask = pipeline.text.model(**tokens).last_hidden_state, tokens["attention_mask"]  # padding has states too
    null_caption, null_mask = {
        "buffer": (model.y_embedder.y_embedding[None, :length], torch.ones(1, length)),
        "empty": (empty[:, :length], torch.ones(1, length)),
        "empty_own_mask": (empty, mask),
    }[null]
    from pixart.diffusion import Prediction
    from pixart.diffusion.samplers import ddim, draw_noise
    from pixart.diffusion.schedule import DiscreteSchedule

    schedule = DiscreteSchedule.linear()

    @torch.no_grad()
    def denoise(x, t):
        times = torch.full((1,), t)
        eps, null_eps = pipeline.model(x, times, captions[0][None]), pipeline.model(x, times, null_caption, null_mask)
        eps = null_eps + 5.0 * (eps - null_eps)
        alpha, sigma = schedule.alpha_sigma(t)
        return Prediction(eps, (x - sigma * eps) / alpha)

    x = draw_noise([torch.Generator().manual_seed(0)], (3, 8, 8))
    assert relative(result, ddim(denoise, x, schedule, chain_times(schedule, 2))) <= 1e-5


def test_a_flow_model_is_never_sampled_as_another(tmp_path, text_encoder):
    flow = DiffusionConfig("flow", "velocity")
    pipeline = Pipeline.from_pretrained(make_model(tmp_path / "flow", text_encoder, flow))
    assert len(pipeline(PROMPTS[:1], [0])) == 1
    with pytest.raises(InputError, match="euler or heun"):
        pipeline(PROMPTS[:1], [0], SampleConfig(sampler="dpm_solver"))


def test_micro_conditions_reach_the_network(tmp_path, text_encoder):
    folder = make_model(tmp_path / "micro", text_encoder, micro_conditions=True)
    pipeline = Pipeline.from_pretrained(folder)
    seen = []
    pipeline.model.csize_embedder.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    image = pipeline(PROMPTS[:1], [0], SampleConfig(steps=2), height=8, width=12)[0]
    assert image.size == (12, 8)
    assert seen[0].tolist() == [8, 12] * 2  # both halves of guidance


def test_micro_conditions_are_the_size_in_pixels_and_height_over_width():
    model = tiny_model(micro_conditions=True)
    card = ModelCard(model.config, vae=AutoencoderConfig("kl", "any"))  # 8 pixels a latent
    seen = []
    model.register_forward_pre_hook(lambda _, inputs, given: seen.append(given), with_kwargs=True)
    captions = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0)).unbind()
    sample_latents(model, card, captions, None, [0, 1], SampleConfig("ddim", 2, guidance=1.0), height=6, width=8)
    for given in seen:
        assert given["size"].tolist() == [[48.0, 64.0]] * 2
        assert given["aspect_ratio"].tolist() == [0.75] * 2


def test_guidance_is_on_at_the_times_of_its_interval_alone():
    model, calls = tiny_model(), []
    model.register_forward_pre_hook(lambda _, inputs: calls.append((inputs[1][0].item(), len(inputs[0]))))
    config = SampleConfig("ddim", 4, guidance_low=333.0, guidance_high=700.0)
    sample_latents(model, ModelCard(model.config), [torch.ones(3, 16)], None, [0], config, height=8, width=8)
    assert calls == [(999.0, 1), (666.0, 2), (333.0, 2), (0.0, 1)]


def test_the_guided_contrast_is_rescaled_as_far_as_the_settings_say():
    model = tiny_model(learn_sigma=False)
    card = ModelCard(model.config, DiffusionConfig("flow", "velocity"))

    def contrast(**options) -> float:
        config = SampleConfig("euler", 1, **options)  # a step from pure noise: the result is the predicted image
        return sample_latents(model, card, [torch.ones(3, 16)], None, [0], config, height=8, width=8).std().item()

    plain, guided = contrast(guidance=1.0), contrast(guidance=6.0)
    assert abs(guided / plain - 1) > 0.01
    assert contrast(guidance=6.0, rescale=1.0) == pytest.approx(plain, rel=1e-5)
    assert contrast(guidance=6.0, rescale=0.5) == pytest.approx((plain + guided) / 2, rel=1e-5)


def test_pngs_carry_their_settings_and_a_contact_sheet_lies_beside_them(model_folder, tmp_path, monkeypatch):
    pipeline, sheets = Pipeline.from_pretrained(model_folder), []
    monkeypatch.setattr(generate_module, "contact_sheet", lambda *given: sheets.append(given) or contact_sheet(*given))
    paths = save_samples(pipeline, PROMPTS[:2], tmp_path, SampleConfig(steps=3, guidance=2.5), seed=7, count=2)
    assert len(paths) == 4
    ((cells, labels),) = sheets
    assert [image.tobytes() for (image,) in cells] == [Image.open(path).tobytes() for path in paths]
    assert labels == [Image.open(path).text["prompt"] for path in paths]
    info = Image.open(paths[3]).text
    assert set(info) - {"model", "parts"} == {"prompt", "seed", "sampler", "steps", "guidance", "size"}
    assert [info[key] for key in ("prompt", "seed", "sampler", "size")] == ["two", "8", "dpm_solver", "8x8"]
    assert [info[key] for key in ("steps", "guidance")] == ["3", "2.5"]
    assert Image.open(tmp_path / "contact_sheet.png").width > 96


def test_a_model_survives_its_files(model_folder):
    model, card = load_with_card(model_folder)
    assert card.model == PixArtConfig(**TINY).__class__(**{**TINY, "in_channels": 3, "learn_sigma": False})
    reference = tiny_model(in_channels=3, learn_sigma=False).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, reference[name]), name
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_the_command_draws_from_a_run_as_it_says(tmp_path, text_encoder):
    pictures = make_pictures(tmp_path / "pictures")
    config = build(settings(tmp_path / "run", pictures, text_encoder), sample={"steps": 2, "guidance": 2.0})
    report = finish(config, train(config))
    assert report.startswith("trained 6 steps;") and f"--model {tmp_path / 'run'}" in report
    (tmp_path / "prompts.txt").write_text("# mine\na blue square\n\n a green one \n")
    result = run_command(
        "sample", "--model", tmp_path / "run", "a red square", "--prompt-file", tmp_path / "prompts.txt",
        "--out", tmp_path / "out", "--set", "sampler=heun", "steps=3", "--device", "cpu",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "out").glob("0*.png"))) == 3
    info = Image.open(next((tmp_path / "out").glob("001*"))).text
    assert info["prompt"] == "a blue square"
    assert (info["sampler"], info["steps"], info["guidance"]) == ("heun", "3", "2.0")
    raw = run_command("sample", "--model", tmp_path / "run", "x", "--raw", "--out", tmp_path / "raw", "--device", "cpu")
    assert raw.returncode == 0, raw.stderr


def damage_config(folder: Path, change) -> None:
    settings = json.loads((folder / "config.json").read_text())
    change(settings)
    (folder / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"<html>"), "a web page"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
        (lambda f: damage_config(f, lambda s: s["model"].update(depth=3)), "missing: blocks.2"),
        (lambda f: damage_config(f, lambda s: s["model"].update(depth=1)), "unknown: blocks.1"),
        (lambda f: damage_config(f, lambda s: s["model"].update(hidden_size=96)), "of another shape"),
        (lambda f: damage_config(f, lambda s: s["model"].update(widht=1)), "unknown key 'model.widht'"),
        (lambda f: (f / "model.safetensors").unlink(), "no model at"),
    ],
)
def test_a_damaged_model_is_refused(tmp_path, text_encoder, damage, match):
    folder = make_model(tmp_path / "model", text_encoder)
    damage(folder)
    with pytest.raises(InputError, match=match):
        load_with_card(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere", "x"], "no model at /nowhere"),
        (["--model", "MODEL", " ".join(["word"] * 30)], "has 32 tokens, but the model takes 12"),
        (["--model", "MODEL", "x", "--height", "9"], "multiples of 2"),
        (["--model", "MODEL"], "0 prompts"),
        (["--model", "MODEL", "x", "--set", "sampler=heun"], "does not fit this model's schedule"),
        (["--model", "MODEL", "x", "--set", "stepz=3"], "did you mean 'steps'?"),
        (["--model", "MODEL", "--prompt-file", "/nowhere.txt"], "prompt file /nowhere.txt"),
        (["--model", "MODEL", "x", "--set", "steps=1"], "got 1 steps, expected at least 2, its order"),
        (["--model", "MODEL", "x", "--out", "MODEL/config.json/a"], "config.json/a: cannot be written (Not a"),
        (["--model", "/nowhere", "x", "--device", "cuda:99"], "device 'cuda:99': torch cannot use it ("),
        (["--model", "/nowhere", "x", "--device", "gpu"], "device 'gpu': torch cannot use it ("),
    ],
)
def test_wrong_commands_get_one_line(model_folder, arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        commands.run("sample", [word.replace("MODEL", str(model_folder)) for word in arguments])
    assert ended.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]
    assert list(tmp_path.iterdir()) == []


def test_a_caption_without_tokens_is_refused(model_folder):
    pipeline = Pipeline.from_pretrained(model_folder)
    with pytest.raises(InputError, match="caption 1 has no token"):
        sample_latents(
            pipeline.model, pipeline.card, [torch.zeros(2, 16), torch.zeros(0, 16)], None, [0, 1], SampleConfig(),
            height=8, width=8,
        )  # fmt: skip


def test_a_pixel_model_needs_no_autoencoder():
    assert AutoencoderConfig().latent_channels == 3
    assert AutoencoderConfig().downsample == 1
