"""Initialisation from other weights: outputs stay equal where they must."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention, silu

from pixart.checkpoint.files import ModelCard
from pixart.checkpoint.foreign import is_dit
from pixart.checkpoint.init_from import start_from, start_from_dit, start_from_pixart
from pixart.checkpoint.save import save
from pixart.diffusion.schedule import DiffusionConfig
from pixart.encoders.autoencoder import AutoencoderConfig
from pixart.errors import InputError
from pixart.model import PixArt, PixArtConfig
from pixart.model.embed import sinusoid
from pixart.model.layers import Layout
from pixart.train.loop import train
from pixart.train.preflight import check_sources
from runs import build, make_pictures, make_text_encoder, settings
from test_model_diffusers import in_diffusers
from toy import TINY, relative, tiny_inputs, tiny_model


def fresh(**changes) -> PixArt:
    torch.manual_seed(7)
    return PixArt(PixArtConfig(**{**TINY, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"latent_size": 16, "position_scale": 2.0},
        {"micro_conditions": True, "latent_size": 16},
        {"caption_length": 30},
        {"caption_length": 5},
    ],
)
def test_another_resolution_or_text_length_changes_no_output_but_by_positions(changes):
    source = tiny_model()
    model = fresh(**changes)
    start_from_pixart(model, source.state_dict())
    inputs = tiny_inputs(model)
    # the reference: the source with the new model's positions
    reference = tiny_model(latent_size=model.config.latent_size, position_scale=model.config.position_scale)
    expected = reference(**{k: v for k, v in inputs.items() if k not in ("size", "aspect_ratio")})
    assert relative(model(**inputs), expected) <= 1e-6


def test_new_micro_conditions_can_learn():
    model = fresh(micro_conditions=True)
    start_from_pixart(model, tiny_model().state_dict())
    model(**tiny_inputs(model)).square().mean().backward()
    for embedder in (model.csize_embedder, model.ar_embedder):
        assert embedder.mlp[2].weight.grad.abs().sum() > 0


def test_new_and_left_out_tensors_are_reported():
    notes = start_from_pixart(
        fresh(kv_compression="conv", kv_blocks=(1,)), tiny_model(micro_conditions=True).state_dict()
    )
    assert any(note.startswith("left out: csize_embedder") for note in notes)
    assert any(note == "new: blocks.1.attn.sr.weight" for note in notes)
    notes = start_from_pixart(fresh(caption_length=30), tiny_model().state_dict())
    assert notes == ["y_embedder.y_embedding: 12 of 30 tokens are taken"]
    state = {**tiny_model().state_dict(), "pos_embed": torch.zeros(1, 16, 48)}
    assert start_from_pixart(fresh(), state) == []


@pytest.mark.parametrize("length", [5, 12, 30])
def test_a_null_caption_is_taken_from_its_first_token_on(length):
    model, source = fresh(caption_length=length), tiny_model().y_embedder.y_embedding
    before = model.y_embedder.y_embedding.clone()
    start_from_pixart(model, tiny_model().state_dict())
    taken = min(length, 12)
    assert torch.equal(model.y_embedder.y_embedding[:taken], source[:taken])
    assert torch.equal(model.y_embedder.y_embedding[taken:], before[taken:])


def test_a_start_takes_the_averaged_weights_of_a_checkpoint_with_both(tmp_path):
    raw, averaged = tiny_model(seed=1), tiny_model(seed=2)
    torch.save({"state_dict": raw.state_dict(), "state_dict_ema": averaged.state_dict()}, tmp_path / "both.pth")
    for options, expected in (({}, averaged), ({"ema": False}, raw)):
        model = fresh()
        start_from(model, str(tmp_path / "both.pth"), **options)
        assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.state_dict().items())


def test_a_null_caption_of_zeros_counts_as_none():
    model = fresh()
    own = model.y_embedder.y_embedding.clone()
    state = {**tiny_model().state_dict(), "y_embedder.y_embedding": torch.zeros(12, 16)}
    assert start_from_pixart(model, state) == ["new: y_embedder.y_embedding"]
    assert torch.equal(model.y_embedder.y_embedding, own)


@pytest.mark.parametrize("changes", [{"depth": 3}, {"depth": 1}, {"hidden_size": 96}, {"learn_sigma": False}])
def test_any_other_difference_is_refused(changes):
    with pytest.raises(InputError, match="do not fit this model"):
        start_from_pixart(fresh(**changes), tiny_model().state_dict())


def dit_weights(width: int, depth: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under DiT's names."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "x_embedder.proj.weight": (width, 4, 2, 2),
        "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (11, width),
        "pos_embed": (1, 16, width),
        "final_layer.linear.weight": (32, width),
        "final_layer.linear.bias": (32,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }
    for i in range(depth):
        for name, rows, columns in (
            ("attn.qkv", 3, 1),
            ("attn.proj", 1, 1),
            ("mlp.fc1", 4, 1),
            ("mlp.fc2", 1, 4),
            ("adaLN_modulation.1", 6, 1),
        ):
            shapes[f"blocks.{i}.{name}.weight"] = (rows * width, columns * width)
            shapes[f"blocks.{i}.{name}.bias"] = (rows * width,)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def dit_block(state: dict, i: int, x: torch.Tensor, c: torch.Tensor, heads: int) -> torch.Tensor:
    """DiT's block (arXiv 2212.09748, adaLN-Zero), written out from the paper."""
    state = {key.removeprefix(f"blocks.{i}."): value for key, value in state.items() if key.startswith(f"blocks.{i}.")}

    def layer(name, value):
        return linear(value, state[f"{name}.weight"], state[f"{name}.bias"])

    shift1, scale1, gate1, shift2, scale2, gate2 = layer("adaLN_modulation.1", silu(c))[:, None].chunk(6, dim=-1)
    width = x.shape[-1]
    h = layer_norm(x, (width,), eps=1e-6) * (1 + scale1) + shift1
    q, k, v = layer("attn.qkv", h).view(*x.shape[:2], 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    h = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + gate1 * layer("attn.proj", h)
    h = layer_norm(x, (width,), eps=1e-6) * (1 + scale2) + shift2
    return x + gate2 * layer("mlp.fc2", gelu(layer("mlp.fc1", h), approximate="tanh"))


@pytest.mark.parametrize(("width", "depth", "heads"), [(48, 2, 4), (96, 3, 6), (1152, 1, 16)])
def test_a_start_from_dit_equals_dit_block_by_block_at_t_500(width, depth, heads):
    state = dit_weights(width, depth)
    assert is_dit(state)
    assert not is_dit(tiny_model().state_dict())
    model = fresh(hidden_size=width, depth=depth, num_heads=heads)
    notes = start_from_dit(model, state)
    assert "left out: y_embedder.embedding_table.weight" in notes

    # in fp64: such weights saturate the attention, which multiplies whatever one fp32 product rounds unlike another
    state, model = {name: tensor.double() for name, tensor in state.items()}, model.double()
    t = torch.tensor([500.0, 500.0])
    hidden = silu(linear(sinusoid(t).double(), state["t_embedder.mlp.0.weight"], state["t_embedder.mlp.0.bias"]))
    c = linear(hidden, state["t_embedder.mlp.2.weight"], state["t_embedder.mlp.2.bias"])
    time = model.embed_time(t, None, None)
    assert relative(time, c) <= 1e-6
    x = torch.randn(2, 16, width, dtype=torch.float64)
    caption = torch.randn(2, 5, width, dtype=torch.float64)
    for i, block in enumerate(model.blocks):
        reference = dit_block(state, i, x, c, heads)
        assert relative(block(x, model.t_block(time), caption, None, Layout((4, 4))), reference) <= 1e-6, i
        x = reference
    shift, scale = linear(
        silu(c), state["final_layer.adaLN_modulation.1.weight"], state["final_layer.adaLN_modulation.1.bias"]
    )[:, None].chunk(2, dim=-1)
    h = layer_norm(x, (width,), eps=1e-6) * (1 + scale) + shift
    reference = linear(h, state["final_layer.linear.weight"], state["final_layer.linear.bias"])
    assert relative(model.final_layer(x, time), reference) <= 1e-6


@pytest.mark.parametrize(
    "lost",
    [
        "x_embedder.proj.weight",
        "y_embedder.embedding_table.weight",
        "blocks.1.mlp.fc2.bias",
        "final_layer.adaLN_modulation.1.weight",
        "blocks.0.adaLN_modulation.1.weight",
    ],
)
def test_only_what_has_all_of_dits_names_and_no_other_in_its_blocks_is_a_dit(lost):
    state = dit_weights(48, 2)
    assert is_dit(state)
    assert not is_dit({**state, "blocks.1.cross_attn.proj.weight": torch.zeros(48, 48)})
    assert not is_dit(tiny_model(conditioning="adaln_per_block").state_dict())
    del state[lost]
    assert not is_dit(state)


def test_a_network_with_dits_modulations_is_started_from_by_its_card_not_taken_for_a_dit(tmp_path):
    source = tiny_model(conditioning="adaln_per_block")
    save(source, ModelCard(source.config), tmp_path / "x", "ours")
    model = fresh(conditioning="adaln_per_block")
    assert start_from(model, str(tmp_path / "x")) == []
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_dit_of_another_size_is_refused():
    with pytest.raises(InputError, match="has 3 blocks of width 48, the new model 2 of width 48"):
        start_from_dit(fresh(), dit_weights(48, 3))
    with pytest.raises(InputError, match="does not fit the new model"):
        start_from_dit(fresh(in_channels=3), dit_weights(48, 2))


def test_differences_that_shapes_do_not_show_are_refused_or_reported(tmp_path):
    source = tiny_model()
    card = ModelCard(source.config, DiffusionConfig(schedule="cosine", prediction="v"))
    save(source, card, tmp_path / "ours", "ours")
    notes = start_from(fresh(position_scale=2.0), str(tmp_path / "ours"), diffusion=DiffusionConfig())
    assert notes == [
        "model.position_scale: 1.0 in the source, 2.0 here",
        "diffusion.schedule: cosine in the source, linear here",
        "diffusion.prediction: v in the source, epsilon here",
    ]
    assert start_from(fresh(), str(tmp_path / "ours"), diffusion=card.diffusion) == []
    with pytest.raises(InputError, match=r"those of 4 heads, model\.num_heads is 8; set it to 4"):
        start_from(fresh(num_heads=8), str(tmp_path / "ours"))
    in_diffusers(source).save_pretrained(tmp_path / "transformer")
    with pytest.raises(InputError, match="those of 4 heads"):
        start_from(fresh(num_heads=8), str(tmp_path / "transformer"))
    torch.save(dit_weights(384, 1), tmp_path / "dit.pt")
    notes = start_from(fresh(hidden_size=384, depth=1), str(tmp_path / "dit.pt"))
    assert notes[0] == "model.num_heads: 4 here; released models of width 384 have 6, the file tells none"


def test_an_official_export_with_heads_of_its_own_says_so_by_its_card(tmp_path):
    source = fresh(hidden_size=384, num_heads=4)
    save(source, ModelCard(source.config, vae=AutoencoderConfig("kl", "x")), tmp_path / "own.pth", "official")
    assert start_from(fresh(hidden_size=384, num_heads=4), str(tmp_path / "own.pth")) == []
    with pytest.raises(InputError, match=r"those of 4 heads, model\.num_heads is 6; set it to 4"):
        start_from(fresh(hidden_size=384, num_heads=6), str(tmp_path / "own.pth"))


def test_weights_that_do_not_fit_or_are_not_finite_are_refused_before_any_work(tmp_path):
    pictures, text = make_pictures(tmp_path / "pictures"), make_text_encoder(tmp_path / "text")
    base = settings(tmp_path / "run", pictures, text)
    source = tiny_model(in_channels=3, learn_sigma=False)
    broken = source.state_dict() | {"blocks.0.mlp.fc1.bias": torch.full((192,), torch.nan)}
    for name, state, match in [
        ("nan", broken, r"init_from: .*blocks\.0\.mlp\.fc1\.bias has NaN"),
        (
            "deep",
            tiny_model(in_channels=3, learn_sigma=False, depth=3).state_dict(),
            r"init_from: the weights to start from do not fit this model; unknown: blocks\.2",
        ),
    ]:
        torch.save({"state_dict": state}, tmp_path / f"{name}.pth")
        with pytest.raises(InputError, match=match):
            check_sources(build(base, init_from=str(tmp_path / f"{name}.pth")))
    assert not (tmp_path / "run").exists()


def test_a_training_run_starts_from_another_model_and_resumes_without_it(tmp_path):
    source = tiny_model(in_channels=3, learn_sigma=False)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "released.pth")
    pictures, text = make_pictures(tmp_path / "pictures"), make_text_encoder(tmp_path / "text")
    base = settings(tmp_path / "run", pictures, text)
    plain = {"optimizer__name": "sgd", "optimizer__lr": 1e-12, "optimizer__weight_decay": 0.0, "train__steps": 1}
    config = build(base, init_from=str(tmp_path / "released.pth"), **plain)
    run = train(config).run
    for kind in ("model", "ema"):
        weights = load_file(run / "checkpoints" / "step_00000001" / kind / "model.safetensors")
        assert all(relative(weights[name], value) <= 1e-6 for name, value in source.state_dict().items())
    (tmp_path / "released.pth").unlink()
    again = build(base, init_from=str(tmp_path / "released.pth"), **{**plain, "train__steps": 2})
    assert train(again).step == 2


def test_a_start_from_a_diffusers_folder_equals_one_from_the_official_file(tmp_path):
    source = tiny_model()
    in_diffusers(source).save_pretrained(tmp_path / "transformer")
    model = fresh()
    notes = start_from(model, str(tmp_path / "transformer"))
    assert notes == ["new: y_embedder.y_embedding"]
    for name, value in source.state_dict().items():
        if name != "y_embedder.y_embedding":
            assert torch.equal(model.state_dict()[name], value), name
    save(source, ModelCard(source.config), tmp_path / "ours", "diffusers")  # with the null caption in its side file
    model = fresh()
    assert start_from(model, str(tmp_path / "ours")) == []
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
