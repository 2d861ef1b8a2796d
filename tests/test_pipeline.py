"""From text to pixels against diffusers' pipelines on the same weights, noise and masks; then each option by itself."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

from pixart import commands
from pixart.checkpoint import ModelCard, save_model
from pixart.diffusion.samplers import draw_noise
from pixart.diffusion.sampling import SampleConfig
from pixart.diffusion.timesteps import chain_times
from pixart.encoders.autoencoder import AutoencoderConfig, IdentityAutoencoder
from pixart.encoders.text import TextConfig, TextEncoder, encode_null
from pixart.errors import InputError
from pixart.inference.generate import save_samples
from pixart.inference.latents import choose_size, official_sizes, resize_and_crop
from pixart.inference.pipeline import Pipeline
from pixart.model import PRESETS
from pixart.prompt import split_prompt
from runs import make_text_encoder
from test_model_diffusers import in_diffusers
from toy import relative, tiny_model

diffusers = pytest.importorskip("diffusers", reason="the reference of these tests; extra: test")
T5 = Path(__file__).parents[2] / "shared" / "t5_tokenizer"
needs_t5 = pytest.mark.skipif(not T5.is_dir(), reason=f"the T5 tokenizer, a test input, is not in {T5}")
PROMPTS = ["an astronaut riding a green horse", "two"]
CONFIG = SampleConfig(sampler="ddim", steps=10, guidance=4.5)


class EvenDDIM(diffusers.DDIMScheduler):
    """DDIM at our respaced times: 10 steps of stride 111 from 999 to 0, after which its own step goes to σ = 0."""

    def set_timesteps(self, num_inference_steps, device=None):
        self.num_inference_steps = num_inference_steps - 1  # 1000 // 9 is the stride, by which `step` finds the next
        self.timesteps = torch.arange(999, -1, -111)
        assert len(self.timesteps) == num_inference_steps


def randomise(module: torch.nn.Module, gain: float = 1.0) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(gain)


def make_diffusers_pipeline(kind: str):
    """diffusers' pipeline of tiny random parts around the real T5 tokenizer, and our network with its weights."""
    alpha = kind == "alpha"
    size = {"latent_size": 128, "position_scale": 2.0, "micro_conditions": True, "caption_length": 120}
    if not alpha:
        size = {"latent_size": 64, "position_scale": 1.0, "caption_length": 300}
    model = tiny_model(caption_channels=32, **size)
    torch.manual_seed(3)
    text = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=32128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.18215 if alpha else 0.13025,
    ).eval()
    randomise(vae)
    scheduler = EvenDDIM(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False, set_alpha_to_one=True
    )
    cls = diffusers.PixArtAlphaPipeline if alpha else diffusers.PixArtSigmaPipeline
    pipeline = cls(
        tokenizer=transformers.AutoTokenizer.from_pretrained(T5),
        text_encoder=text,
        vae=vae,
        transformer=in_diffusers(model),
        scheduler=scheduler,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Folders of diffusers' pipelines, saved by diffusers, with the pipelines themselves."""
    made = {}

    def get(kind: str):
        if kind not in made:
            folder = tmp_path_factory.mktemp("released") / kind
            pipeline = make_diffusers_pipeline(kind)
            pipeline.save_pretrained(folder)
            made[kind] = folder, pipeline
        return made[kind]

    return get


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory) -> Path:
    return make_text_encoder(tmp_path_factory.mktemp("text") / "encoder")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, text_folder) -> Path:
    """A tiny model of pixels; native size 8 px, tokens of 2 px."""
    folder = tmp_path_factory.mktemp("model") / "model"
    model = tiny_model(in_channels=3, learn_sigma=False)
    text = TextConfig(model=str(text_folder), length=12, clean=False)
    save_model(folder, model.state_dict(), ModelCard(model.config, text=text, sample=SampleConfig(steps=3)))
    return folder


@pytest.fixture(scope="module")
def pipeline(model_folder) -> Pipeline:
    return Pipeline.from_pretrained(model_folder)


# ------------------------------------------------------------------------------------------- against diffusers


@needs_t5
@pytest.mark.parametrize("kind", ["alpha", "sigma"])
def test_text_to_latents_to_pixels_is_diffusers_pipeline(released, kind):
    folder, theirs = released(kind)
    ours = Pipeline.from_pretrained(folder)
    assert ours.card.text.null == "empty_own_mask"
    seeds, height, width = [5, 6], 64, 96
    noise = draw_noise([torch.Generator().manual_seed(seed) for seed in seeds], (4, height // 8, width // 8))
    # Σ's captions are raw here and lower-cased by diffusers: the prompts are lower-case
    options = {"num_inference_steps": 10, "guidance_scale": 4.5, "height": height, "width": width,
               "use_resolution_binning": False, "clean_caption": kind == "alpha"}  # fmt: skip
    for output, name in (("latent", "latent"), ("pixels", "pt")):
        expected = theirs(PROMPTS, latents=noise.clone(), output_type=name, **options).images
        result = ours(PROMPTS, seeds, CONFIG, height=height, width=width, output=output)
        if output == "pixels":
            result = (result / 2 + 0.5).clamp(0, 1)
            assert expected.std() > 0.02 and ((expected > 0) & (expected < 1)).float().mean() > 0.5
        assert relative(result, expected) <= 5e-6, output


@needs_t5
def test_a_negative_prompt_is_diffusers_negative_prompt(released):
    folder, theirs = released("alpha")
    noise = draw_noise([torch.Generator().manual_seed(5)], (4, 8, 8))
    expected = theirs(
        PROMPTS[0], negative_prompt="a blurry picture of a cat", latents=noise, num_inference_steps=10, height=64,
        width=64, use_resolution_binning=False, output_type="latent",
    ).images  # fmt: skip
    options = {"height": 64, "width": 64, "output": "latent"}
    ours = Pipeline.from_pretrained(folder)
    result = ours(PROMPTS[:1], [5], CONFIG, negative_prompts="a blurry picture of a cat", **options)
    assert relative(result, expected) <= 5e-6
    assert relative(ours(PROMPTS[:1], [5], CONFIG, **options), expected) > 1e-3


@needs_t5
def test_official_sizes_are_diffusers_resolution_binning(released):
    folder, theirs = released("sigma")
    # at 512 px: 1.46 is the key nearest to 300 / 200, whose size is 608 × 416
    noise = draw_noise([torch.Generator().manual_seed(5)], (4, 608 // 8, 416 // 8))
    options = {"num_inference_steps": 10, "height": 300, "width": 200, "clean_caption": False, "output_type": "pt"}
    expected = theirs(PROMPTS[1], latents=noise, use_resolution_binning=True, **options).images
    ours = Pipeline.from_pretrained(folder)
    result = ours(PROMPTS[1], 5, CONFIG, height=300, width=200, sizes="official", output="pixels")
    assert result.shape == (1, 3, 300, 200)
    # ten steps and a VAE in fp32; how far rounding goes depends on the number of threads
    assert relative((result / 2 + 0.5).clamp(0, 1), expected) <= 3e-5


@needs_t5
def test_other_parts_can_be_given_and_what_is_missing_is_named(released, tmp_path, text_folder):
    folder, _ = released("alpha")
    bare = tmp_path / "bare"
    shutil.copytree(folder / "transformer", bare)
    with pytest.raises(InputError) as caught:  # no network, no cache: the default Hub ids are not found
        Pipeline.from_pretrained(bare)
    message = str(caught.value)
    assert "no VAE: looked for" in message and str(bare) in message and "stabilityai/sd-vae-ft-ema" in message
    assert "--vae" in message
    with pytest.raises(InputError, match=r"no text encoder: looked for .*DeepFloyd/t5-v1_1-xxl.*--text-encoder"):
        Pipeline.from_pretrained(bare, vae=folder / "vae")
    with pytest.raises(InputError, match=r"no text encoder: looked for '/nowhere', as given: "):
        Pipeline.from_pretrained(bare, vae=folder / "vae", text_encoder="/nowhere")
    with pytest.raises(InputError, match="states of width 16, but the model takes captions of width 32"):
        Pipeline.from_pretrained(bare, vae=folder / "vae", text_encoder=text_folder)
    with pytest.raises(InputError, match=r"no VAE: looked for .*scaling factor 0.13025, but vae.scale is 0.18215"):
        Pipeline.from_pretrained(bare, vae=released("sigma")[0] / "vae", text_encoder=folder)
    whole, given = (
        Pipeline.from_pretrained(folder),
        Pipeline.from_pretrained(bare, vae=folder / "vae", text_encoder=folder),
    )
    size = {"height": 32, "width": 32, "output": "pixels"}
    assert torch.equal(whole(PROMPTS, config=CONFIG, **size), given(PROMPTS, config=CONFIG, **size))


@needs_t5
def test_a_hub_id_in_the_cache_brings_its_parts(released, tmp_path, monkeypatch):
    import huggingface_hub.constants

    folder, _ = released("alpha")
    repository = tmp_path / "models--someone--tiny-pixart"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub = Pipeline.from_pretrained("someone/tiny-pixart")
    assert "models--someone--tiny-pixart" in hub.card.vae.source
    size = {"height": 32, "width": 32, "output": "latent"}
    assert torch.equal(
        hub("two", config=CONFIG, **size), Pipeline.from_pretrained(folder)("two", config=CONFIG, **size)
    )
    with pytest.raises(InputError, match="someone/other: not on disk, and not on the Hub or in its cache"):
        Pipeline.from_pretrained("someone/other")


@needs_t5
def test_save_memory_slices_and_tiles_the_vae_and_leaves_small_pictures_as_they_are(released):
    folder, _ = released("alpha")
    plain, saving = Pipeline.from_pretrained(folder), Pipeline.from_pretrained(folder, save_memory=True)
    assert (saving.autoencoder.slices, saving.autoencoder.tile) == (True, 512)
    assert not plain.autoencoder.slices
    options = {"config": SampleConfig(steps=2), "height": 64, "width": 64, "output": "pixels"}
    assert relative(saving(PROMPTS, **options), plain(PROMPTS, **options)) <= 1e-6
    assert IdentityAutoencoder().save_memory().decode(torch.ones(1, 3, 2, 2)).sum() == 12


# --------------------------------------------------------------------------------------------------- the text


def test_embeddings_made_before_give_the_prompts_pictures(pipeline, model_folder):
    states, mask = pipeline.text.encode(["a red square", "two", "a very green square"], padding="max_length")
    without = Pipeline.from_pretrained(model_folder, load_text=False)
    assert without.text is None
    result = without(None, text_embeddings=(states, mask), output="latent")
    assert relative(result, pipeline(["a red square", "two", "a very green square"], output="latent")) <= 1e-6
    with pytest.raises(InputError, match="no text encoder: it was freed or not loaded; give text_embeddings"):
        without("two")
    with pytest.raises(InputError, match=r"got states \(3, 12, 16\) and mask \(3, 11\), expected \(B, L, 16\)"):
        without(None, text_embeddings=(states, mask[:, 1:]))
    with pytest.raises(InputError, match="caption 1 has no tokens"):
        without(None, text_embeddings=(states, mask * torch.tensor([[1], [0], [1]])))
    with pytest.raises(InputError, match="give exactly one of them"):
        pipeline("two", text_embeddings=(states, mask))


def test_negative_prompts_stand_in_the_null_captions_place_under_their_own_mask(pipeline):
    config = SampleConfig(sampler="ddim", steps=2, guidance=5.0)
    prompts, negatives = ["a red square", "two"], ["blue", "a cat"]
    result = pipeline(prompts, [1, 2], config, negative_prompts=negatives, output="latent")
    captions, away = (pipeline.encode(texts)[0] for texts in (prompts, negatives))
    assert len(away[0]) != len(captions[0])
    for i in range(2):  # by hand: a call of the network for each, with nothing padded
        from pixart.diffusion import Prediction
        from pixart.diffusion.samplers import ddim
        from pixart.diffusion.schedule import DiscreteSchedule

        schedule = DiscreteSchedule.linear()

        @torch.no_grad()
        def denoise(x, t, i=i, schedule=schedule):
            times = torch.full((1,), t)
            eps, null_eps = (pipeline.model(x, times, states[i][None]) for states in (captions, away))
            eps = null_eps + 5.0 * (eps - null_eps)
            alpha, sigma = schedule.alpha_sigma(t)
            return Prediction(eps, (x - sigma * eps) / alpha)

        x = draw_noise([torch.Generator().manual_seed(i + 1)], (3, 8, 8))
        assert relative(result[i : i + 1], ddim(denoise, x, schedule, chain_times(schedule, 2))) <= 1e-5
    one = pipeline(prompts, [1, 2], config, negative_prompts="a cat", output="latent")
    assert relative(one[1], result[1]) <= 1e-5 < relative(one[0], result[0])


def test_every_image_has_its_own_prompts_negative_prompt_whatever_the_batches(pipeline):
    config, prompts, negatives = SampleConfig(steps=2), ["a", "b", "c"], ["red", "green square", "blue"]
    options = {"output": "latent", "images_per_prompt": 2}
    alone = [pipeline(p, 7, config, negative_prompts=n, **options) for p, n in zip(prompts, negatives, strict=True)]
    for size in (1, 4, 16):
        together = pipeline(prompts, 7, config, negative_prompts=negatives, batch_size=size, **options)
        assert relative(together, torch.cat(alone)) <= 1e-5, size


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"null": "empty"}, "cannot be combined with null 'empty'"),
        ({"config": SampleConfig(guidance=1.0)}, "have no effect with guidance 1"),
        ({"config": SampleConfig(sampler="lcm")}, "have no effect with guidance 1"),
        ({"negative_prompts": ["a", "b"]}, "got 1 prompts and 2 negative ones"),
    ],
)
def test_a_negative_prompt_without_effect_is_refused(pipeline, options, match):
    with pytest.raises(InputError, match=match):
        pipeline("two", **{"negative_prompts": "a", **options})


def test_the_null_caption_of_the_card_can_be_overridden(pipeline):
    config = SampleConfig(steps=2, guidance=6.0)
    results = {
        mode: pipeline("a red square", 0, config, null=mode, output="latent")
        for mode in (None, "buffer", "empty", "empty_own_mask")
    }
    assert torch.equal(results[None], results["buffer"])  # the card's
    assert relative(results["empty"], results["buffer"]) > 1e-3
    assert relative(results["empty"], results["empty_own_mask"]) > 1e-3
    assert pipeline.card.text.null == "buffer"
    with pytest.raises(InputError, match="null: got 'none', expected buffer, empty or empty_own_mask"):
        pipeline("two", null="none")


def test_the_empty_null_caption_holds_what_the_encoder_makes_of_padding(pipeline):
    tokens = pipeline.text.tokenizer([""], padding="max_length", max_length=12, return_tensors="pt")
    with torch.no_grad():
        expected = pipeline.text.model(**tokens).last_hidden_state[0]
    count = int(tokens["attention_mask"].sum())
    assert count < 12 and expected[count:].abs().min() > 0
    assert torch.equal(encode_null(pipeline.text, "empty"), expected)
    assert torch.equal(encode_null(pipeline.text, "empty_own_mask"), expected[:count])
    assert encode_null(pipeline.text, "buffer") is None


def test_a_model_without_a_null_caption_of_its_own_does_not_take_zeros_for_one(model_folder):
    pipeline = Pipeline.from_pretrained(model_folder)
    pipeline.model.y_embedder.y_embedding = torch.zeros_like(pipeline.model.y_embedder.y_embedding)
    with pytest.raises(InputError, match="no null caption of its own"):
        pipeline("two")
    assert len(pipeline("two", null="empty_own_mask")) == 1
    assert len(pipeline("two", config=SampleConfig(steps=2, guidance=1.0))) == 1


def test_a_freed_text_encoder_leaves_the_null_caption_behind(model_folder):
    pipeline = Pipeline.from_pretrained(model_folder)
    pipeline.card = ModelCard(
        pipeline.card.model,
        text=TextConfig(pipeline.card.text.model, 12, False, "empty_own_mask"),
        sample=pipeline.card.sample,
    )
    expected = pipeline("a red square", output="latent")
    embeddings = pipeline.text.encode(["a red square"])
    pipeline._nulls.clear()
    pipeline.free_text()
    assert pipeline.text is None
    assert torch.equal(pipeline(None, text_embeddings=embeddings, output="latent"), expected)


def test_an_offloaded_text_encoder_is_on_the_models_device_while_it_encodes_only(model_folder, monkeypatch):
    pipeline = Pipeline.from_pretrained(model_folder, offload_text=True)
    events = []
    to, encode = TextEncoder.to, TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "to", lambda self, device: events.append(str(device)) or to(self, device))
    monkeypatch.setattr(TextEncoder, "encode", lambda *a, **k: events.append("encode") or encode(*a, **k))
    pipeline.model.to("meta")
    with pytest.raises(NotImplementedError):  # meta tensors hold no data: moving back cannot work, moving there does
        pipeline.encode(["two"])
    assert events == ["meta", "encode", "cpu"]


def test_equal_prompts_are_encoded_once_and_long_lists_in_parts(pipeline, monkeypatch):
    seen, encode = [], pipeline.text.encode
    monkeypatch.setattr(pipeline.text, "encode", lambda texts, **k: seen.append(list(texts)) or encode(texts, **k))
    pipeline(["a", "b", "a", "c"], [1, 1, 2, 1], SampleConfig(steps=1, sampler="lcm"), batch_size=2)
    assert seen == [["a", "b"], ["c"]]


# ------------------------------------------------------------------------------------- pictures, sizes, outputs


def test_images_of_a_prompt_have_seeds_of_their_own_side_by_side(pipeline):
    many = pipeline(["two", "a red square"], 3, images_per_prompt=2, output="latent", batch_size=3)
    single = pipeline(["two", "two", "a red square", "a red square"], [3, 4, 3, 4], output="latent")
    assert relative(many, single) <= 1e-6
    given = pipeline(["two", "a red square"], [3, 4, 9, 4], images_per_prompt=2, output="latent")
    assert relative(given[[0, 1, 3]], single[[0, 1, 3]]) <= 1e-6 and relative(given[2], single[2]) > 0.1
    with pytest.raises(InputError, match="got 2 seeds, expected one for each of 4 images"):
        pipeline(["two", "a"], [1, 2], images_per_prompt=2)


def test_the_callback_sees_every_step_of_every_batch(pipeline, capsys):
    seen, done = [], []
    result = pipeline(
        ["a", "b", "c"],
        0,
        SampleConfig(steps=3),
        batch_size=2,
        output="latent",
        progress=done.append,
        callback=lambda rows, step, x, x0: seen.append((list(rows), step, x)),
    )
    assert [(rows, step) for rows, step, _ in seen] == [([0, 1], i) for i in range(3)] + [([2], i) for i in range(3)]
    assert torch.equal(torch.cat([seen[2][2], seen[5][2]]), result)
    assert done == [2, 1]
    assert "sampling" not in capsys.readouterr().err
    pipeline("a", 0, SampleConfig(steps=3), progress=True)
    assert "3/3" in capsys.readouterr().err


def test_outputs_are_latents_pixels_and_images_of_the_same_pictures(pipeline):
    latent, pixels, images = (pipeline(["a", "b"], output=output) for output in ("latent", "pixels", "image"))
    assert latent.shape == pixels.shape == (2, 3, 8, 8)
    assert torch.equal(latent, pixels)  # a model of pixels
    for image, tensor in zip(images, pixels, strict=True):
        assert isinstance(image, Image.Image) and image.size == (8, 8)
        value = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(8, 8, 3).permute(2, 0, 1)
        assert torch.equal(value, ((tensor.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    with pytest.raises(InputError, match="output: got 'pil', expected image, latent or pixels"):
        pipeline("a", output="pil")


def test_sizes_are_exact_or_the_nearest_official_one_cut_back(pipeline):
    config = SampleConfig(steps=2)
    made = pipeline("a", 0, config, height=10, width=6, output="latent")
    assert made.shape[2:] == (10, 6)
    official = pipeline("a", 0, config, height=11, width=7, sizes="official", output="latent")
    assert official.shape[2:] == (10, 6)  # of the table at 8 px, ratio 1.67 to 11 / 7 = 1.57
    pixels = pipeline("a", 0, config, height=11, width=7, sizes="official", output="pixels")
    assert pixels.shape[2:] == (11, 7)
    enlarged = F.interpolate(official, size=(11, 7), mode="bilinear", align_corners=False)  # 7 / 6 of 10 × 6: 11 × 7
    assert torch.allclose(pixels, enlarged)
    assert pipeline("a", 0, config, aspect_ratio=11 / 7, output="latent").shape[2:] == (10, 6)


@pytest.mark.parametrize(
    ("preset", "count", "height", "width", "expected"),
    [
        ("alpha-1024", 33, 1024, 1024, (1024, 1024)),
        ("alpha-1024", 33, 1000, 345, (1728, 576)),  # 2.9 is 2.89's, but that is not among α's
        ("sigma-1024", 40, 1000, 345, (1664, 576)),
        ("sigma-2k", 40, 2000, 1000, (2816, 1408)),
        ("alpha-512", 33, 500, 500, (512, 512)),
    ],
)
def test_official_sizes_are_the_authors(preset, count, height, width, expected):
    card = ModelCard(PRESETS[preset], vae=AutoencoderConfig("kl", "any"))
    assert len(official_sizes(card)) == count
    assert choose_size(card, height=height, width=width, sizes="official") == (expected, (height, width))
    assert choose_size(card, aspect_ratio=height / width) == (expected, expected)


def test_resizing_covers_and_cuts_as_diffusers_does():
    generator = torch.Generator().manual_seed(0)
    for size in ((8, 8), (11, 5), (5, 11), (20, 13), (9, 8), (3, 3)):
        pixels = torch.rand(2, 3, 10, 7, generator=generator)
        expected = diffusers.image_processor.PixArtImageProcessor.resize_and_crop_tensor(pixels, size[1], size[0])
        assert torch.equal(resize_and_crop(pixels, size), expected), size


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"height": 9}, "size 9 × 8 px: both sides must be multiples of 2; or set sizes to 'official'"),
        ({"height": 0}, "must be positive"),
        ({"aspect_ratio": 1.0, "width": 8}, "got aspect_ratio and height or width"),
        ({"aspect_ratio": 5.0}, r"aspect_ratio: got 5, expected height / width from 0\.25 to 4\.0"),
        ({"sizes": "near"}, "sizes: got 'near'"),
        ({"images_per_prompt": 0}, "expected at least 1"),
        ({"prompts": []}, "got no prompts"),
        ({"steps": 1}, "got 1 steps, expected at least 2, its order"),
        ({"steps": 0}, "sample.steps: got 0"),
        ({"sampler": "ddmi"}, "sampler: there is no 'ddmi'; did you mean 'ddim'"),
        ({"config": SampleConfig(eta=1.0, sampler="ddim"), "sampler": "heun"}, "does not fit this model's schedule"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_encoded(pipeline, monkeypatch, options, match):
    monkeypatch.setattr(pipeline.text, "encode", None)
    with pytest.raises(InputError, match=match):
        pipeline(**{"prompts": "a", **options})


def test_steps_guidance_and_sampler_given_by_name_replace_those_of_the_config_and_the_card(pipeline):
    def draw(*config, **options):
        return pipeline("a fox", 4, *config, output="latent", **options)

    steps = pipeline.card.sample.steps
    assert torch.equal(draw(), draw(steps=steps, guidance=4.5, sampler="dpm_solver"))
    assert torch.equal(draw(steps=5), draw(SampleConfig(steps=5)))
    assert torch.equal(draw(guidance=3), draw(SampleConfig(steps=steps, guidance=3.0)))
    base = SampleConfig("ddim", 6, guidance=2.0, eta=0.5)
    assert torch.equal(draw(base, steps=4, guidance=1), draw(SampleConfig("ddim", 4, guidance=1.0, eta=0.5)))
    assert torch.equal(draw(sampler="iddpm"), draw(SampleConfig("iddpm", steps)))
    for name in ("seed", "step", "eta"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            pipeline("a fox", **{name: 1})


def test_distilled_samplers_call_the_network_once_a_step_without_guidance(pipeline):
    calls = []
    hook = pipeline.model.x_embedder.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    try:
        for sampler, steps in (("lcm", 4), ("dmd", 1)):
            calls.clear()
            pipeline(["a", "b"], 0, SampleConfig(sampler=sampler))
            assert calls == [2] * steps
    finally:
        hook.remove()


@pytest.mark.parametrize("sampler", ["sa_solver", "lcm", "dmd"])
def test_an_image_depends_on_its_prompt_and_seed_with_the_new_samplers_too(pipeline, sampler):
    config = SampleConfig(sampler=sampler)
    together = pipeline(["a red square", "two", "a"], [4, 5, 6], config, output="latent")
    for i, prompt in enumerate(["a red square", "two", "a"]):
        assert relative(pipeline(prompt, 4 + i, config, output="latent"), together[i : i + 1]) <= 1e-5


# ------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a cat", ("a cat", {})),
        ("a cat --ar 3:4", ("a cat", {"aspect_ratio": 0.75})),
        ("a cat  --ar  1.5:1 ", ("a cat", {"aspect_ratio": 1.5})),
        ("a cat --hw 768:1024", ("a cat", {"height": 768, "width": 1024})),
        ("an art-deco cat -- with -ar and hw", ("an art-deco cat -- with -ar and hw", {})),
    ],
)
def test_a_prompts_end_may_ask_for_a_size(line, expected):
    assert split_prompt(line) == expected


@pytest.mark.parametrize("line", [
    "a cat --ar", "a cat --ar 3,4", "a cat --ar 3:0", "a cat --hw 7.5:8", "--ar 3:4", "a --ar 3:4 cat",
    "a cat --ar 3:4 --hw 768:1024", "a cat --ar -3:4", "an --art deco cat",
])  # fmt: skip
def test_a_prompt_with_half_a_size_is_refused(line):
    with pytest.raises(InputError, match=r"prompt '.*': "):
        split_prompt(line)


def test_samples_of_several_sizes_stand_in_the_prompts_order(pipeline, tmp_path):
    prompts = ["a --hw 10:6", "two", "b --ar 1:2", "c --hw 10:6"]
    paths = save_samples(pipeline, prompts, tmp_path, SampleConfig(steps=2), seed=3, count=2, negative_prompt="blurry")
    opened = [Image.open(path) for path in paths]
    sizes = [(image.height, image.width) for image in opened]
    assert sizes == [(10, 6)] * 2 + [(8, 8)] * 2 + [(6, 12)] * 2 + [(10, 6)] * 2
    assert [image.text["prompt"] for image in opened] == ["a", "a", "two", "two", "b", "b", "c", "c"]
    expected = {"prompt": "two", "seed": "4", "sampler": "dpm_solver", "steps": "2", "guidance": "4.5",
                "negative_prompt": "blurry", "size": "8x8"}  # fmt: skip
    assert {key: value for key, value in opened[3].text.items() if key not in ("model", "parts")} == expected
    for image, seed in zip(opened, [3, 4] * 4, strict=True):
        size, text = {"height": image.height, "width": image.width}, image.text["prompt"]
        alone = pipeline(text, seed, SampleConfig(steps=2), **size, negative_prompts="blurry")[0]
        assert image.text["seed"] == str(seed)
        assert max(abs(a - b) for a, b in zip(alone.tobytes(), image.tobytes(), strict=True)) <= 1, (text, seed)


def test_a_folder_that_cannot_be_written_costs_no_picture(pipeline, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.text, "encode", None)
        for folder in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(InputError, match=f"{folder}: cannot be written .*name another folder"):
                save_samples(pipeline, ["two"], folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    monkeypatch.setattr(Image.Image, "save", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(InputError, match=r"x: cannot be written \(No space left\)"):
        save_samples(pipeline, ["two"], tmp_path / "x", steps=2)


def test_what_is_refused_leaves_no_folder_behind_and_a_folder_with_files_as_it_was(pipeline, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    for folder in (tmp_path / "a" / "b", tmp_path / "mine", tmp_path / "mine" / "c"):
        with pytest.raises(InputError, match="batch_size 0"):
            save_samples(pipeline, ["two"], folder, batch_size=0)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "file"]


def test_a_file_says_with_what_it_was_drawn_wherever_that_was_given(pipeline, tmp_path):
    config = SampleConfig(steps=3, guidance=2.0)
    path = save_samples(pipeline, ["two"], tmp_path, config, steps=2, guidance=3.0, sampler="ddim")[0]
    opened = Image.open(path)
    assert [opened.text[key] for key in ("sampler", "steps", "guidance")] == ["ddim", "2", "3.0"]
    assert pipeline("two", 0, SampleConfig("ddim", 2, guidance=3.0))[0].tobytes() == opened.tobytes()


def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded():
    for device in ("cuda:99", torch.device("cuda", 99), "gpu"):
        with pytest.raises(InputError, match=rf"device '{device}': torch cannot use it \(.*\); expected cpu"):
            Pipeline.from_pretrained("/nowhere", device=device)


def run_sample(*arguments) -> int | None:
    with pytest.raises(SystemExit) as ended:
        commands.run("sample", [*map(str, arguments), "--device", "cpu"])
    return ended.value.code


@needs_t5
def test_the_command_draws_from_a_released_pipeline(released, tmp_path, monkeypatch):
    folder, _ = released("sigma")
    (tmp_path / "prompts.txt").write_text("a boat --hw 64:32\n")
    code = run_sample(
        "a cat", "--model", folder, "--prompt-file", tmp_path / "prompts.txt", "--out", tmp_path / "out",
        "--negative", "blurry", "--height", 50, "--width", 50, "--sizes", "official", "--text-encoder", folder, "--vae",
        folder / "vae", "--low-memory", "--set", "sampler=sa_solver", "steps=2", "position_scale=1.0",
    )  # fmt: skip
    assert not code
    first, second = (Image.open(path) for path in sorted((tmp_path / "out").glob("0*.png")))
    assert (first.size, second.size) == ((50, 50), (32, 64))
    assert first.text["sampler"] == "sa_solver"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["two --ar 3,4"], "expected a text that ends in one --ar h:w or --hw h:w"),
        (["two", "a --hw 9:8"], "size 9 × 8 px: both sides must be multiples of 2"),
        (["two", "--text-encoder", "/nowhere"], "looked for '/nowhere', as given"),
        (["two", "--vae", "/nowhere"], "is a model of pixels, which takes no vae"),
        (["two", "--negative", "a", "--null", "empty"], "cannot be combined with null 'empty'"),
        (["two", "--set", "sampler=lcm", "guidance=3"], "guidance in their weights"),
        (["two", "--strength", "0.5"], "strength without an image"),
        (["two", "--mask", "/nowhere.png"], "mask without an image"),
        (["two", "--model", "/nowhere", "--image", "x.png", "--strength", "2"], "strength: got 2.0, expected a number"),
        (["two", "--image", "/nowhere.png"], "image /nowhere.png: cannot be read as an image (No such file"),
        (["two", "--image", "/nowhere.png", "--set", "sampler=dmd", "steps=1"], "cannot start from an image"),
        (["two", "--image", "/nowhere.png", "--strength", "0.1"], "leaves none; raise strength or steps"),
        (["two", "--rank", "2", "--ranks", "2"], "rank: got 2 of 2"),
        (["two", "--quantize-text", "4bit"], "pip install 'pixart[quantize]'"),
    ],
)
def test_wrong_commands_get_one_line(model_folder, arguments, message, capsys, monkeypatch, tmp_path):
    if "--quantize-text" in arguments:
        without_bitsandbytes(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert run_sample("--model", model_folder, *arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_the_command_starts_from_an_image_and_keeps_what_the_mask_keeps(model_folder, tmp_path, monkeypatch):
    image, mask = Image.new("RGB", (10, 6), "orange"), Image.new("L", (10, 6))
    mask.paste(255, (0, 0, 4, 6))
    image.save(tmp_path / "image.png")
    mask.save(tmp_path / "mask.png")
    code = run_sample(
        "two", "--model", model_folder, "--image", tmp_path / "image.png", "--mask", tmp_path / "mask.png",
        "--strength", "0.7", "--set", "spacing=trailing", "steps=4", "--out", tmp_path / "out", "--no-onednn",
    )  # fmt: skip
    assert not code
    drawn = Image.open(tmp_path / "out" / "000_two_seed0.png")
    assert (drawn.text["strength"], drawn.text["spacing"], drawn.text["size"]) == ("0.7", "trailing", "6x10")
    assert drawn.crop((4, 0, 10, 6)).tobytes() == image.crop((4, 0, 10, 6)).tobytes()
    expected = Pipeline.from_pretrained(model_folder)(
        "two", 0, SampleConfig(steps=4, spacing="trailing"), image=image, mask=mask, strength=0.7
    )[0]
    assert drawn.tobytes() == expected.tobytes()


# ------------------------------------------------------------------------------------------- 8 and 4 bits


def without_bitsandbytes(monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # an import of it fails


def test_quantising_says_what_it_needs(text_folder, monkeypatch):
    import sys
    import types

    config = TextConfig(model=str(text_folder), length=12, clean=False)
    with pytest.raises(InputError, match="quantize: got '2bit', expected 8bit or 4bit"):
        TextEncoder.load(config, quantize="2bit")
    with monkeypatch.context() as patch:
        without_bitsandbytes(patch)
        with pytest.raises(InputError, match=r"a text encoder in 8 bits needs the package 'bitsandbytes': pip install"):
            TextEncoder.load(config, quantize="8bit")
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    with pytest.raises(InputError, match="a text encoder in 4 bits runs on CUDA: got device 'cpu'"):
        TextEncoder.load(config, quantize="4bit")
    with pytest.raises(InputError, match="cannot be moved; use only one"):
        Pipeline.from_pretrained("any", quantize_text="4bit", offload_text=True)


def test_a_quantised_encoder_is_not_moved(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.text.model, "is_quantized", True, raising=False)
    with pytest.raises(InputError, match="cannot be moved off its device"):
        pipeline.text.to("cpu")
