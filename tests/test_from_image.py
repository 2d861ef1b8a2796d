"""Images from images: image-to-image and in-painting through the pipeline, by hand and against text-to-image."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pixart.checkpoint import ModelCard
from pixart.diffusion import Prediction
from pixart.diffusion.samplers import ddim, draw_noise
from pixart.diffusion.sampling import SampleConfig
from pixart.diffusion.schedule import DiffusionConfig, DiscreteSchedule
from pixart.diffusion.timesteps import chain_times
from pixart.encoders.autoencoder import AutoencoderConfig
from pixart.encoders.text import TextConfig, TextEncoder
from pixart.encoders.vae import AutoencoderKL, VaeAutoencoder, VaeConfig
from pixart.errors import InputError
from pixart.inference.pipeline import Pipeline
from runs import make_text_encoder
from toy import relative, tiny_model

KINDS = ["alpha", "sigma", "flow", "pixels"]
DDIM = SampleConfig("ddim", 10, guidance=3.0)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> TextEncoder:
    folder = make_text_encoder(tmp_path_factory.mktemp("text") / "encoder")
    return TextEncoder.load(TextConfig(model=str(folder), length=12, clean=False))


@pytest.fixture(scope="module")
def pipelines(text):
    """α (with micro-conditions) and Σ in the latents of a VAE, 8 px each; flow and discrete models of pixels."""
    made = {}
    for kind in KINDS:
        vae = AutoencoderConfig("kl", "tiny") if kind in ("alpha", "sigma") else AutoencoderConfig()
        own = {"micro_conditions": True} if kind == "alpha" else {}
        if vae.kind == "identity":
            own = {"in_channels": 3, "learn_sigma": False}
        model = tiny_model(**own).eval()
        diffusion = DiffusionConfig("flow", "velocity") if kind == "flow" else DiffusionConfig()
        card = ModelCard(model.config, diffusion, vae, text.config, SampleConfig(steps=5))
        made[kind] = Pipeline(model, card, make_autoencoder(vae), text)
    return made


def make_autoencoder(config: AutoencoderConfig):
    if config.kind == "identity":
        from pixart.encoders.autoencoder import IdentityAutoencoder

        return IdentityAutoencoder()
    torch.manual_seed(4)
    return VaeAutoencoder(AutoencoderKL(VaeConfig(block_out_channels=(8, 8, 8, 8), norm_num_groups=4)).eval())


def photo(height: int, width: int, mode: str = "RGB") -> Image.Image:
    """Smooth noise, every pixel another."""
    values = np.random.default_rng(height * width).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(values).convert("RGBA") if mode == "RGBA" else Image.fromarray(values[..., :3])


def side(pipeline: Pipeline) -> int:
    return 8 * pipeline.autoencoder.downsample


def white_square(size: int) -> Image.Image:
    """Black, white in the middle half, with an edge of grey."""
    values = np.zeros((size, size), np.uint8)
    values[size // 4 : size * 3 // 4, size // 4 : size * 3 // 4] = 255
    values[size // 4] //= 2
    return Image.fromarray(values)


@pytest.mark.parametrize("kind", KINDS)
def test_strength_one_without_a_mask_is_text_to_image_bit_for_bit(pipelines, kind):
    pipeline = pipelines[kind]
    image = photo(side(pipeline), side(pipeline))
    for output in ("latent", "pixels"):
        expected = pipeline(["two", "a red square"], [3, 4], output=output)
        found = pipeline(["two", "a red square"], [3, 4], output=output, image=image, strength=1.0)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_less_strength_stays_nearer_to_the_image_and_takes_its_share_of_the_steps(pipelines, kind):
    pipeline = pipelines[kind]
    image, distances = photo(side(pipeline), side(pipeline)), []
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    latents = pipeline.autoencoder.encode(pixels)
    for strength, steps in ((0.2, 4), (0.6, 12), (0.99, 19)):
        seen = []
        found = pipeline("two", 3, steps=20, image=image, strength=strength, output="latent",
                         callback=lambda rows, step, x, x0, seen=seen: seen.append(step))  # fmt: skip
        assert seen == list(range(steps))
        distances.append(relative(found, latents))
    assert distances[0] < distances[1] < distances[2]
    default = pipeline("two", 3, steps=20, image=image, output="latent")
    assert torch.equal(default, pipeline("two", 3, steps=20, image=image, strength=0.6, output="latent"))


def test_in_painting_is_the_loop_by_hand(pipelines):
    pipeline = pipelines["alpha"]
    image, mask = photo(64, 64), white_square(64)
    found = pipeline("a red square", 5, DDIM, image=image, mask=mask, strength=0.65, output="latent")

    (caption,), _ = pipeline.encode(["a red square"])
    null = pipeline.model.y_embedder.y_embedding[: len(caption)]
    micro = {"size": torch.tensor([[64.0, 64.0]]), "aspect_ratio": torch.tensor([1.0])}
    schedule, model = DiscreteSchedule.linear(), pipeline.model

    @torch.no_grad()
    def denoise(x, t):
        eps, away = (model(x, torch.full((1,), t), c[None], **micro)[:, :4] for c in (caption, null))
        eps = away + 3.0 * (eps - away)
        alpha, sigma = schedule.alpha_sigma(t)
        return Prediction(eps, (x - sigma * eps) / alpha)

    times = chain_times(schedule, 10)[-6:]
    clean = pipeline.autoencoder.encode(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1)
    noise = draw_noise([torch.Generator().manual_seed(5)], (4, 8, 8))
    keep = torch.from_numpy(np.array(mask)[::8, ::8].copy())[None, None] < 127.5

    def noised(t):
        alpha, sigma = schedule.alpha_sigma(t)
        return alpha * clean + sigma * noise

    def blend(step, x, x0):
        return torch.where(keep, noised(times[step + 1]) if step + 1 < len(times) else clean, x)

    expected = ddim(denoise, noised(times[0]), schedule, times, callback=blend)
    assert relative(found, expected) <= 1e-5
    assert torch.equal(torch.where(keep, found, 0.0), torch.where(keep, clean, 0.0))
    assert 0 < keep.float().mean() < 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [None, 0.5])
def test_outside_the_mask_every_pixel_is_the_originals(pipelines, kind, strength):
    pipeline = pipelines[kind]
    size = side(pipeline)
    image, mask = photo(size, size), white_square(size)
    kept, new = np.array(mask) == 0, np.array(mask) == 255
    drawn = np.array(pipeline("two", 1, image=image, mask=mask, strength=strength)[0])
    original = np.array(image)
    assert (drawn[kept] == original[kept]).all()
    assert (drawn[new] != original[new]).mean() > 0.5
    pixels = pipeline("two", 1, image=image, mask=mask, strength=strength, output="pixels")[0].permute(1, 2, 0)
    assert torch.equal(pixels[torch.from_numpy(kept)], (torch.from_numpy(original) / 127.5 - 1)[torch.from_numpy(kept)])


def test_a_soft_edge_blends_the_two(pipelines):
    pipeline = pipelines["alpha"]
    image, mask = photo(64, 64), torch.linspace(0, 1, 64).expand(64, 64)
    original = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    latents = pipeline("two", 1, image=image, mask=mask, output="latent")
    expected = mask * pipeline.autoencoder.decode(latents)[0] + (1 - mask) * original
    assert relative(pipeline("two", 1, image=image, mask=mask, output="pixels")[0], expected) <= 1e-6
    kept = F.interpolate((mask >= 0.5).float()[None, None], (8, 8)) == 0
    clean = pipeline.autoencoder.encode(original[None])
    assert torch.equal(torch.where(kept, latents, 0.0), torch.where(kept, clean, 0.0))


def test_a_mask_without_a_strength_owes_nothing_to_what_was_there(pipelines):
    pipeline = pipelines["pixels"]
    mask = white_square(8)
    given = torch.from_numpy(np.array(mask) >= 128)
    one, other = photo(8, 8), photo(8, 8)
    values = np.array(other)
    values[given.numpy()] = 255 - values[given.numpy()]
    found = [pipeline("two", 1, image=i, mask=mask, output="latent") for i in (one, Image.fromarray(values))]
    assert torch.equal(*found)


def test_latents_in_the_images_place_give_the_same(pipelines):
    pipeline = pipelines["sigma"]
    images = [photo(64, 64), photo(64, 64).transpose(Image.Transpose.ROTATE_90)]
    pixels = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) / 127.5 - 1 for i in images])
    latents = torch.cat([pipeline.autoencoder.encode(p[None]) for p in pixels])
    expected = pipeline(["a", "b"], 7, image=images, output="latent", images_per_prompt=2)
    assert torch.equal(pipeline(["a", "b"], 7, latents=latents, output="latent", images_per_prompt=2), expected)
    assert torch.equal(pipeline(["a", "b"], 7, image=pixels, output="latent", images_per_prompt=2), expected)
    alone = pipeline("b", 7, latents=latents[1:], output="latent")
    assert relative(alone[0], expected[2]) <= 1e-5
    kept = pipeline("b", 7, latents=latents[1:], mask=white_square(64), output="latent")
    assert torch.equal(kept[0, :, 0], latents[1, :, 0]) and not torch.equal(kept, latents[1:])


def test_an_image_keeps_its_size_or_is_fitted_to_the_one_asked_for(pipelines, tmp_path):
    pipeline = pipelines["pixels"]  # 8 px native, in steps of 2
    photo(10, 6).save(tmp_path / "image.png")
    assert pipeline("two", image=tmp_path / "image.png")[0].size == (6, 10)
    with pytest.raises(InputError, match="size 11 × 7 px: both sides must be multiples of 2; or set sizes to 'offic"):
        pipeline("two", image=photo(11, 7))
    official = pipeline("two", image=photo(22, 14), sizes="official", strength=0.2)[0]
    assert official.size == (6, 10)  # of the table at 8 px, ratio 1.67 to 11 / 7 = 1.57
    asked = pipeline("two", image=photo(11, 7), mask=Image.new("L", (7, 11)), height=8, width=8)[0]
    cover = photo(11, 7).resize((8, 13), Image.Resampling.BICUBIC).crop((0, 2, 8, 10))  # 8 / 7 of 11 is 12.57
    assert asked.tobytes() == cover.tobytes()  # a black mask keeps all


def test_an_image_is_turned_as_its_exif_says_and_what_is_transparent_is_white_said_once(pipelines, tmp_path):
    pipeline, black = pipelines["pixels"], Image.new("L", (8, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    photo(8, 10).save(tmp_path / "turned.png", exif=exif)
    turned = pipeline("two", image=str(tmp_path / "turned.png"), mask=black)[0]
    assert turned.tobytes() == photo(8, 10).transpose(Image.Transpose.ROTATE_270).tobytes()
    clear = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        drawn = pipeline(["a", "b"], image=[clear, clear.copy()], mask=Image.new("L", (8, 8)))
    assert [str(w.message) for w in said] == ["image: its transparent parts become white"]
    assert set(drawn[0].tobytes()) == {255}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline("a", image=photo(8, 8).convert("RGBA"))  # opaque: nothing to say


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"strength": 0.0}, "strength: got 0.0, expected a number above 0, up to 1"),
        ({"strength": 1.5}, "strength: got 1.5, expected a number above 0, up to 1"),
        ({"strength": "0.5"}, "strength: got '0.5', expected a number"),
        ({"strength": 0.1}, "strength 0.1 of 5 steps leaves none; raise strength or steps"),
        ({"image": None, "strength": 0.5}, "strength without an image"),
        ({"image": None, "mask": Image.new("L", (8, 8))}, "mask without an image"),
        ({"mask": Image.new("L", (8, 10))}, "mask: it is 10 × 8 px, the image 8 × 8 px; expected the same size"),
        ({"mask": torch.full((8, 8), 2.0)}, "mask: got values from 2 to 2, expected 0 to 1"),
        ({"image": "FILE"}, "FILE: cannot be read as an image"),
        ({"image": "/nowhere.png"}, r"image /nowhere.png: cannot be read as an image \(No such file"),
        ({"image": 3}, "image: got 3, expected Image, str, Path, Tensor"),
        ({"image": torch.zeros(8, 8)}, r"image: got a tensor of shape \(8, 8\) and float32, expected pixels"),
        ({"image": torch.zeros(3, 8, 8, dtype=torch.uint8)}, "and uint8, expected pixels"),
        ({"image": torch.zeros(3, 8, 10), "height": 8}, "a tensor of 8 × 10 px is not resized to 8 × 8 px"),
        ({"image": [photo(8, 8)] * 3}, "image: got 3 for 2 prompts, expected one, or one for each"),
        ({"latents": torch.zeros(2, 3, 8, 8)}, "image and latents: both say what to start from"),
        ({"image": None, "latents": torch.zeros(3, 3, 8, 8)}, "latents: got 3 for 2 prompts"),
        ({"image": None, "latents": torch.zeros(1, 4, 8, 8)}, r"latents: got shape \(4, 8, 8\) and float32, expected"),
        ({"image": None, "latents": torch.zeros(1, 3, 8, 8), "height": 10}, "latents: 8 × 8 px cannot be resized"),
        ({"sampler": "dmd", "steps": 1, "guidance": 1}, "'dmd' does one step from noise and cannot start from"),
    ],
)
def test_what_cannot_be_started_from_is_refused_before_anything_is_encoded(
    pipelines, tmp_path, monkeypatch, options, match
):
    pipeline = pipelines["pixels"]
    (tmp_path / "FILE").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline.text, "encode", None)
    with pytest.raises(InputError, match=match) as caught:
        pipeline(["a", "b"], **{"image": photo(8, 8), **options})
    assert "\n" not in str(caught.value)
