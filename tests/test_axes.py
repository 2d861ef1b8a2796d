"""Each axis of an ablation: off, the network is the usual one; on, it is what its paper defines."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pixart.checkpoint import load_model
from pixart.checkpoint.files import ModelCard
from pixart.checkpoint.init_from import start_from, start_from_dit
from pixart.checkpoint.save import save
from pixart.errors import InputError
from pixart.model import PRESETS, PixArt, PixArtConfig
from pixart.model.compression import average, uniform, uniform_every
from pixart.model.embed import POSITIONS
from pixart.model.flops import forward_flops
from pixart.model.layers import MLPS, Layout, rotate
from test_start import dit_block, dit_weights
from toy import TINY, relative, tiny_inputs, tiny_model

ON = {
    "adaLN per block": {"conditioning": "adaln_per_block"},
    "time token": {"conditioning": "time_token"},
    "DiT": {"conditioning": "dit"},
    "learned positions": {"positions": "learned"},
    "2-D RoPE": {"positions": "rope2d"},
    "time token and RoPE": {"conditioning": "time_token", "positions": "rope2d"},
    "RMSNorm of queries and keys": {"qk_norm": "rms_norm"},
    "ave": {"kv_compression": "ave", "kv_blocks": (1,)},
    "uniform_every": {"kv_compression": "uniform_every", "kv_blocks": (0, 1)},
    "SwiGLU": {"mlp": "swiglu"},
    "RMSNorm": {"norm": "rms_norm"},
    "TREAD": {"routing": "tread", "route_blocks": (1, 1)},
}


@pytest.mark.parametrize("axis", ON)
def test_an_axis_trains_every_weight_saves_and_loads(axis, tmp_path):
    model = tiny_model(**ON[axis])
    inputs = tiny_inputs(model)
    output = model(**inputs, **({"route": torch.rand(2, 16)} if model.routing else {}))
    output.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    assert relative(output, tiny_model()(**inputs)) > 1e-4
    save(model, ModelCard(model.config), tmp_path / "model", "ours")
    again = load_model(tmp_path / "model")
    assert again.config == model.config
    with torch.no_grad():
        assert torch.equal(again(**inputs), model(**inputs))
    wide = {**inputs, "x": torch.randn(2, 4, 8, 12)}
    assert model(**wide).shape == (2, 8, 8, 12)


@pytest.mark.parametrize("axis", ON)
def test_a_new_network_predicts_zero_and_shares_the_start_of_all_other_weights(axis):
    def start(**changes) -> PixArt:
        torch.manual_seed(3)
        return PixArt(PixArtConfig(**{**TINY, **changes}))

    usual, model = start().state_dict(), start(**ON[axis])
    assert not model(**tiny_inputs(model)).any()  # its final layer starts at zero, as the authors'
    state = model.state_dict()
    shared = [name for name in usual if name in state and usual[name].shape == state[name].shape]
    assert len(shared) >= 0.6 * len(usual)
    assert all(torch.equal(usual[name], state[name]) for name in shared)


def test_the_values_for_off_are_the_usual_network():
    words = {
        "qk_norm": "none",
        "conditioning": "adaln_single",
        "positions": "sincos",
        "mlp": "gelu",
        "norm": "layer_norm",
        "kv_compression": None,
        "routing": None,
    }
    assert PixArtConfig(**TINY, **words) == PixArtConfig(**TINY)
    assert PixArtConfig(**TINY, qk_norm="layer_norm") == PixArtConfig(**TINY, qk_norm=True)


# ------------------------------------------------------------------------------------------------------- conditioning


def test_adaln_per_block_is_diffusers_block_of_dit():
    attention = pytest.importorskip("diffusers.models.attention")
    model = tiny_model(conditioning="adaln_per_block")
    ours, dim = model.blocks[1], 48
    theirs = attention.BasicTransformerBlock(
        dim, 4, 12, activation_fn="gelu-approximate", num_embeds_ada_norm=10, attention_bias=True,
        norm_type="ada_norm_zero", norm_elementwise_affine=False,
    )  # fmt: skip
    time = torch.randn(2, dim)

    class Given(nn.Module):  # in place of their embedding of times and classes
        def forward(self, *_, **__):
            return time

    theirs.norm1.emb = Given()
    parts = ours.attn.qkv.weight.chunk(3), ours.attn.qkv.bias.chunk(3)
    for layer, weight, bias in zip((theirs.attn1.to_q, theirs.attn1.to_k, theirs.attn1.to_v), *parts, strict=True):
        layer.weight.data, layer.bias.data = weight, bias
    for layer, source in (
        (theirs.norm1.linear, ours.adaLN_modulation[1]),
        (theirs.attn1.to_out[0], ours.attn.proj),
        (theirs.ff.net[0].proj, ours.mlp.fc1),
        (theirs.ff.net[2], ours.mlp.fc2),
    ):
        layer.load_state_dict(source.state_dict())
    for parameter in ours.cross_attn.proj.parameters():
        parameter.data.zero_()  # DiT has no captions
    x = torch.randn(2, 16, dim)
    found = ours(x, time, torch.randn(2, 5, dim), None, Layout((4, 4)))
    # their second norm divides by sqrt(variance + 1e-5), ours and the authors' by sqrt(variance + 1e-6)
    theirs.norm3.eps = 1e-6
    assert relative(found, theirs(x, timestep=torch.zeros(2), class_labels=torch.zeros(2))) <= 1e-6


def test_without_the_time_token_the_image_does_not_depend_on_the_time():
    model = tiny_model(conditioning="time_token")
    inputs = tiny_inputs(model)
    later = {**inputs, "t": inputs["t"] + 300}
    assert relative(model(**later), model(**inputs)) > 1e-3
    with torch.no_grad():
        for block in model.blocks:  # the image's tokens see one another alone
            block.attn.proj.weight.zero_()
    assert torch.equal(model(**later), model(**inputs))


def test_dits_weights_are_taken_as_they_are_with_adaln_per_block_at_every_time():
    state = dit_weights(48, 2)
    model = tiny_model(conditioning="adaln_per_block")
    start_from_dit(model, state)
    for i, block in enumerate(model.blocks):
        for name in ("adaLN_modulation.1.weight", "attn.qkv.weight", "mlp.fc2.bias"):
            assert torch.equal(block.state_dict()[name], state[f"blocks.{i}.{name}"])
    assert not any(p.any() for block in model.blocks for p in block.cross_attn.proj.parameters())
    with pytest.raises(InputError, match="does not fit the new model"):
        start_from_dit(tiny_model(conditioning="time_token"), state)


def test_dit_is_dit_whose_class_is_the_captions_mean():
    state = dit_weights(48, 2)
    model = tiny_model(conditioning="dit")
    start_from_dit(model, state)
    model = model.double()
    ours = {name: tuple(t.shape) for name, t in model.state_dict().items() if not name.startswith("y_embedder.")}
    theirs = {name: tuple(t.shape) for name, t in state.items() if not name.startswith(("y_embedder.", "pos_embed"))}
    assert ours == theirs
    state = {name: tensor.double() for name, tensor in state.items()}
    inputs = tiny_inputs(model)
    x, caption = inputs["x"].double(), inputs["caption"].double()
    found = model(x, inputs["t"], caption, inputs["caption_mask"])
    tokens = model.y_embedder(caption)
    label = torch.stack([tokens[0].mean(0), tokens[1, :2].mean(0)])  # the second caption has two tokens
    c = model.embed_time(inputs["t"], None, None) + label
    stream = model.x_embedder(x) + model.positions(4, 4)
    for i in range(2):
        stream = dit_block(state, i, stream, c, 4)
    modulation = F.linear(F.silu(c), *(state[f"final_layer.adaLN_modulation.1.{kind}"] for kind in ("weight", "bias")))
    shift, scale = modulation[:, None].chunk(2, dim=-1)
    last = F.layer_norm(stream, (48,), eps=1e-6) * (1 + scale) + shift
    last = F.linear(last, state["final_layer.linear.weight"], state["final_layer.linear.bias"])
    assert relative(found, last.view(2, 4, 4, 2, 2, 8).permute(0, 5, 1, 3, 2, 4).reshape(2, 8, 8, 8)) <= 1e-6
    context = model.encode_caption(caption, inputs["caption_mask"])
    assert relative(model(x, inputs["t"], context), found) <= 1e-12


def test_a_dit_trained_here_starts_a_pixart_re_parametrised_without_its_classes(tmp_path):
    source = tiny_model(conditioning="dit", qk_norm=True)
    save(source, ModelCard(source.config), tmp_path / "source", "ours")
    model = tiny_model(seed=5, qk_norm=True)
    notes = start_from(model, str(tmp_path / "source"))
    assert "new: cross-attention (with zero output), the caption's MLP, the null caption" in notes
    with torch.no_grad():
        source.y_embedder.y_proj.fc2.weight.zero_()  # no class
        source.y_embedder.y_proj.fc2.bias.zero_()
    inputs = {**tiny_inputs(model), "t": torch.tensor([500.0, 500.0])}
    assert relative(model(**inputs), source(**inputs)) <= 1e-5
    again = tiny_model(seed=5, conditioning="dit", qk_norm=True)
    assert start_from(again, str(tmp_path / "source")) == []


def test_adaln_per_block_re_parametrised_is_the_same_network_at_t_500(tmp_path):
    source = tiny_model(conditioning="adaln_per_block")
    save(source, ModelCard(source.config), tmp_path / "source", "ours")
    model = tiny_model(seed=5)
    notes = start_from(model, str(tmp_path / "source"))
    assert any(note.startswith("re-parametrised") for note in notes)
    inputs = {**tiny_inputs(model), "t": torch.tensor([500.0, 500.0])}
    assert relative(model(**inputs), source(**inputs)) <= 1e-5
    inputs["t"] = torch.tensor([20.0, 900.0])
    assert relative(model(**inputs), source(**inputs)) > 1e-3


# ---------------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_2d_rope_depends_on_relative_positions_alone(scale):
    table = POSITIONS["rope2d"](PixArtConfig(**TINY, position_scale=scale)).rotary(4, 4)
    q, k = torch.randn(1, 1, 1, 12), torch.randn(1, 1, 1, 12)

    def score(first: tuple[int, int], second: tuple[int, int]) -> float:
        a, b = (table[:, row * 4 + column][:, None] for row, column in (first, second))
        return (rotate(q, a) * rotate(k, b)).sum().item()

    assert score((0, 1), (1, 3)) == pytest.approx(score((2, 0), (3, 2)), abs=1e-5)
    assert abs(score((0, 1), (1, 3)) - score((0, 1), (3, 2))) > 1e-3
    # the first pair of the rows' half turns by one radian a native token, divided by the scale
    assert torch.allclose(table[0, 4 * 3, 0].acos(), torch.tensor(3 / scale))


def test_2d_rope_of_any_size_covers_the_native_range():
    rope = POSITIONS["rope2d"](PixArtConfig(**TINY))
    native, double = rope.rotary(4, 4), rope.rotary(8, 8)
    assert torch.allclose(double.view(2, 8, 8, -1)[:, ::2, ::2], native.view(2, 4, 4, -1), atol=1e-6)


def test_learned_positions_are_a_table_that_is_interpolated_to_other_sizes():
    learned = POSITIONS["learned"](PixArtConfig(**TINY))
    ramp = torch.arange(4.0)[:, None].expand(4, 4).reshape(16, 1).expand(16, 48)
    learned.table.data.copy_(ramp)
    assert torch.equal(learned.added(4, 4), learned.table)
    rows = learned.added(8, 4).view(8, 4, 48)[:, 0, 0]
    assert (rows.diff() > 0).all()
    assert torch.allclose(rows + rows.flip(0), torch.tensor(3.0))  # symmetric about the ramp's middle


def test_learned_positions_start_as_the_fixed_ones_of_the_network_they_start_from(tmp_path):
    source = tiny_model()
    save(source, ModelCard(source.config), tmp_path / "source", "ours")
    model = tiny_model(positions="learned")
    assert "new: pos_embed.table, which starts as the sin-cos positions" in start_from(model, str(tmp_path / "source"))
    assert torch.equal(model(**tiny_inputs(model)), source(**tiny_inputs(model)))


def test_learned_positions_go_to_another_native_size(tmp_path):
    source = tiny_model(positions="learned")
    save(source, ModelCard(source.config), tmp_path / "source", "ours")
    model = tiny_model(positions="learned", latent_size=16)
    assert "pos_embed.table: interpolated from 16 to 64 tokens" in start_from(model, str(tmp_path / "source"))
    assert torch.equal(model.pos_embed.table, source.pos_embed.added(8, 8))


# ------------------------------------------------------------------------------------- attention, norms, MLP, routing


def test_kept_tokens_of_every_kind_of_compression():
    tokens = torch.arange(24.0).view(1, 24, 1)  # 4 rows of 6
    assert uniform(tokens, (4, 6), 2).flatten().tolist() == [0, 2, 4, 12, 14, 16]
    assert uniform_every(tokens, (4, 6), 2).flatten().tolist() == list(range(0, 24, 2))
    assert average(tokens, (4, 6), 2).flatten().tolist() == [3.5, 5.5, 7.5, 15.5, 17.5, 19.5]


def test_a_new_convolution_compresses_as_the_mean_does_but_for_its_norm():
    torch.manual_seed(0)
    attention = PixArt(PixArtConfig(**TINY, kv_compression="conv", kv_blocks=(0,))).blocks[0].attn
    tokens = torch.randn(2, 16, 48)
    expected = F.layer_norm(average(tokens, (4, 4), 2), (48,))
    assert relative(attention.compress(tokens, Layout((4, 4))), expected) <= 1e-5


def test_qk_rms_norm_is_its_formula():
    attention = tiny_model(qk_norm="rms_norm").blocks[0].attn
    x = torch.randn(2, 16, 48)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attention.q_norm.weight
    assert relative(attention.q_norm(x), expected) <= 1e-6
    assert dict(attention.q_norm.named_parameters()).keys() == {"weight"}


def test_swiglu_is_its_formula_and_has_the_parameters_of_the_gelu_mlp():
    mlp = MLPS["swiglu"](6, 24, 6)
    x = torch.randn(5, 6)
    gate = x @ mlp.gate.weight.T + mlp.gate.bias
    expected = (gate / (1 + (-gate).exp()) * (x @ mlp.up.weight.T + mlp.up.bias)) @ mlp.down.weight.T + mlp.down.bias
    assert relative(mlp(x), expected) <= 1e-6
    for name in ("XL/2", "L/2", "B/2", "S/2"):
        c = PRESETS[name]
        with torch.device("meta"):
            counts = [
                sum(p.numel() for p in MLPS[kind](c.hidden_size, 4 * c.hidden_size, c.hidden_size).parameters())
                for kind in ("gelu", "swiglu")
            ]
        assert counts[1] == pytest.approx(counts[0], rel=2e-3)


def test_tread_routes_its_share_and_at_ratio_0_nothing_bit_for_bit():
    routed = tiny_model(depth=4, routing="tread", route_blocks=(1, 2), route_ratio=0.25)
    route = torch.rand(2, 16)
    sizes = []
    for block in routed.blocks:
        block.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[1]))
    inputs = tiny_inputs(routed)
    output = routed(**inputs, route=route)
    assert sizes == [16, 12, 12, 16]
    usual, off = tiny_model(depth=4), tiny_model(depth=4, routing="tread", route_blocks=(1, 2), route_ratio=0.0)
    assert torch.equal(off(**inputs, route=route), usual(**inputs))
    assert torch.equal(routed(**inputs), usual(**inputs))  # sampling brings no random numbers
    assert not torch.equal(output, usual(**inputs))
    full = forward_flops(routed.config, 8, 8, 5)
    assert full > forward_flops(routed.config, 8, 8, 5, conditions={"route": (16,)})
    assert full == forward_flops(usual.config, 8, 8, 5)


# ------------------------------------------------------------------------------------------------- exports and errors


@pytest.mark.parametrize(
    ("axis", "official", "diffusers"),
    [
        ("adaLN per block", "conditioning adaln_per_block", "conditioning adaln_per_block"),
        ("time token", "conditioning time_token", "conditioning time_token"),
        ("DiT", "conditioning dit", "conditioning dit"),
        ("learned positions", "positions learned", "positions learned"),
        ("2-D RoPE", "positions rope2d", "positions rope2d"),
        ("RMSNorm of queries and keys", "qk_norm rms_norm", "qk_norm rms_norm"),
        ("ave", r"key compression \(ave\)", r"key compression \(ave\)"),
        ("uniform_every", None, r"key compression \(uniform_every\)"),
        ("SwiGLU", "mlp swiglu", "mlp swiglu"),
        ("RMSNorm", "norm rms_norm", "norm rms_norm"),
        ("TREAD", None, None),
    ],
)
def test_an_axis_is_exported_where_the_format_has_a_place_and_refused_by_name_where_not(
    axis, official, diffusers, tmp_path
):
    model = tiny_model(**ON[axis])
    model.eval().requires_grad_(False)
    card = ModelCard(model.config)
    inputs = tiny_inputs(model)
    for format, refused, target in (("official", official, "a.pth"), ("diffusers", diffusers, "b")):
        if refused:
            with pytest.raises(InputError, match=f"PixArt has no {refused}"):
                save(model, card, tmp_path / target, format)
        else:
            save(model, card, tmp_path / target, format)
            assert torch.equal(load_model(tmp_path / target)(**inputs), model(**inputs))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"positions": "rope2d", "num_heads": 8}, "a head has width 6, expected a multiple of 4"),
        ({"positions": "rope2d", "kv_compression": "ave", "kv_blocks": (0,)}, "none can be merged"),
        ({"qk_norm": "rmsnorm"}, "qk_norm: got 'rmsnorm', expected one of none, layer_norm, rms_norm"),
        ({"kv_compression": "mean", "kv_blocks": (1,)}, "kv_compression: got 'mean', expected one of conv, ave"),
        ({"routing": "tread"}, "needs the first and last block"),
        ({"routing": "tread", "route_blocks": (1, 2)}, "of the blocks 0 to 1"),
        ({"routing": "tread", "route_blocks": (1, 1), "route_ratio": 1.0}, "route_ratio: got 1.0"),
        ({"routing": "tread", "route_blocks": (0, 1), "kv_compression": "ave", "kv_blocks": (1,)}, r"kv_blocks \[1\]"),
    ],
)
def test_axes_that_exclude_each_other_are_refused_in_one_line(change, match):
    with pytest.raises(InputError, match=match):
        PixArt(PixArtConfig(**{**TINY, **change}))
