"""Properties of the network beyond the authors' numbers."""

import math

import pytest
import torch
import torch.nn.functional as F

from pixart.errors import InputError
from pixart.model import PRESETS, PixArt, PixArtConfig
from pixart.model.embed import sinusoid
from toy import TINY, relative, tiny_inputs, tiny_model


@pytest.mark.parametrize(
    ("preset", "millions"), [("XL/2", 610.856096), ("alpha-1024", 611.349152), ("sigma-2k", 610.856096)]
)
def test_presets_have_the_papers_parameters(preset, millions):
    with torch.device("meta"):
        model = PixArt(PRESETS[preset])
    assert sum(p.numel() for p in model.parameters()) == round(millions * 1e6)


@pytest.mark.parametrize("name", ["L/2", "B/2", "S/2"])
def test_smaller_presets_are_dits_sizes(name):
    sizes = {"L/2": (24, 1024, 16), "B/2": (12, 768, 12), "S/2": (12, 384, 6)}
    preset = PRESETS[name]
    assert (preset.depth, preset.hidden_size, preset.num_heads) == sizes[name]


VARIANTS = {
    "alpha": {},
    "micro": {"micro_conditions": True},
    "conv": {"kv_compression": "conv", "kv_blocks": (1,)},
    "uniform": {"kv_compression": "uniform", "kv_blocks": (0, 1)},
    "qk-norm": {"qk_norm": True, "kv_compression": "conv", "kv_blocks": (0,)},
    "pixels": {"in_channels": 3, "patch_size": 4, "learn_sigma": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_never_changes_an_output(variant):
    model = tiny_model(**VARIANTS[variant])
    inputs = tiny_inputs(model)
    reference = model(**inputs)
    for length in (7, 12, 40):
        padding = torch.randn(2, length - 5, model.config.caption_channels) * 100
        padded = {
            **inputs,
            "caption": torch.cat([inputs["caption"], padding], 1),
            "caption_mask": torch.nn.functional.pad(inputs["caption_mask"], (0, length - 5)),
        }
        assert relative(model(**padded), reference) <= 1e-6
    # row 1 keeps two tokens: what the others hold does not matter either
    inputs["caption"][1, 2:] = 1e3
    assert relative(model(**inputs), reference) <= 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_encoded_caption_equals_the_caption(variant):
    model = tiny_model(**VARIANTS[variant])
    inputs = tiny_inputs(model)
    reference = model(**inputs)
    context = model.encode_caption(inputs.pop("caption"), inputs.pop("caption_mask"))
    assert relative(model(caption=context, **inputs), reference) <= 1e-6


def test_an_encoded_caption_saves_its_arithmetic():
    model = tiny_model()
    inputs = tiny_inputs(model)
    calls = []
    for block in model.blocks:
        block.cross_attn.kv_linear.register_forward_hook(lambda *_: calls.append(1))
    context = model.encode_caption(inputs.pop("caption"), inputs.pop("caption_mask"))
    for _ in range(3):
        model(caption=context, **inputs)
    assert len(calls) == len(model.blocks)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing_changes_no_gradient(variant):
    model = tiny_model(**VARIANTS[variant])
    inputs = tiny_inputs(model)
    model(**inputs).square().mean().backward()
    reference = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing = True
    model(**inputs).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, reference[name]), name


def test_every_parameter_gets_a_gradient_and_the_null_caption_none():
    model = tiny_model(**VARIANTS["qk-norm"], micro_conditions=True)
    model(**tiny_inputs(model)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert "y_embedder.y_embedding" in dict(model.named_buffers())


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 12), (10, 6), (2, 2)])
def test_any_multiple_of_the_patch_is_a_size(height, width):
    model = tiny_model()
    inputs = tiny_inputs(model)
    inputs["x"] = torch.randn(2, 4, height, width)
    assert model(**inputs).shape == (2, 8, height, width)


def test_patches_come_back_where_they_were():
    model = tiny_model(learn_sigma=False)
    with torch.no_grad():  # a final layer whose output in a patch is 0 … 15 in the order (p, q, c)
        model.final_layer.linear.weight.zero_()
        model.final_layer.linear.bias.copy_(torch.arange(16.0))
    output = model(**tiny_inputs(model))
    for row in range(2):
        for column in range(2):
            for channel in range(4):
                assert (output[:, channel, row::2, column::2] == (row * 2 + column) * 4 + channel).all()


def test_positions_follow_their_formula():
    model = tiny_model(latent_size=8, position_scale=2.0)  # 4 native tokens a side
    table = model.positions(3, 5)
    quarter = 48 // 4
    for row, column, i in [(0, 0, 0), (2, 4, 3), (1, 3, 11), (2, 0, 5)]:
        omega = 10_000 ** (-i / quarter)
        x, y = column / (5 / 4) / 2, row / (3 / 4) / 2
        expected = [math.sin(x * omega), math.cos(x * omega), math.sin(y * omega), math.cos(y * omega)]
        found = [table[row * 5 + column, k * quarter + i].item() for k in range(4)]
        assert found == pytest.approx(expected, abs=1e-6)


def test_integer_times_are_distinguished_in_bf16():
    # in bf16 the time 951 itself would be 952; through the network's sinusoid the two stay different
    times = torch.tensor([951.0, 952.0])
    assert times.bfloat16()[0] == times.bfloat16()[1]
    model = tiny_model().bfloat16()
    embedded = model.t_embedder(times)
    assert not torch.equal(embedded[0], embedded[1])
    assert sinusoid(times.bfloat16().float()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_fp32(dtype):
    model = tiny_model()
    inputs = tiny_inputs(model)
    reference = model(**inputs)
    low = {k: v.to(dtype) if v.is_floating_point() and k != "t" else v for k, v in inputs.items()}
    output = model.to(dtype)(**low)
    assert output.dtype == dtype
    assert relative(output, reference) <= (2e-2 if dtype == torch.bfloat16 else 3e-3)


def test_a_new_model_starts_as_the_authors_do():
    torch.manual_seed(0)
    model = PixArt(PixArtConfig(**{**TINY, "hidden_size": 240, "caption_channels": 256}, micro_conditions=True))
    zero = ["final_layer.linear", *(f"blocks.{i}.cross_attn.proj" for i in range(2))]
    normal = ["t_embedder", "csize_embedder", "ar_embedder", "t_block", "y_embedder.y_proj"]
    for name, parameter in model.named_parameters():
        if any(name.startswith(prefix) for prefix in zero):
            assert (parameter == 0).all(), name
        elif name.endswith("scale_shift_table"):
            assert parameter.std().item() == pytest.approx(240**-0.5, rel=0.1), name
        elif name.endswith("bias"):
            # the patch convolution keeps PyTorch's uniform start
            assert (parameter == 0).all() == (name != "x_embedder.proj.bias"), name
        elif any(name.startswith(prefix) for prefix in normal):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
        else:  # Xavier: uniform of this bound
            fan_in, fan_out = parameter[0].numel(), parameter.shape[0]
            bound = math.sqrt(6 / (fan_in + fan_out))
            assert parameter.abs().max().item() == pytest.approx(bound, rel=0.02), name
    assert model.y_embedder.y_embedding.std().item() == pytest.approx(1 / 16, rel=0.05)
    inputs = tiny_inputs(model)
    assert (model(**inputs) == 0).all()


@pytest.mark.parametrize(
    "idea",
    [{"depth": 3}, {"learn_sigma": False}, {"micro_conditions": True}, {"qk_norm": True},
     {"kv_compression": "conv", "kv_blocks": (1,)}, {"mlp_ratio": 2.0}],
)  # fmt: skip
def test_networks_that_differ_in_one_idea_start_alike_in_all_else(idea):
    def start(**changes):
        torch.manual_seed(3)
        return PixArt(PixArtConfig(**{**TINY, **changes})).state_dict()

    plain, other = start(), start(**idea)
    shared = [name for name in plain if name in other and plain[name].shape == other[name].shape]
    assert len(shared) > 0.8 * len(plain)
    assert all(torch.equal(plain[name], other[name]) for name in shared)


def test_two_networks_and_two_blocks_of_one_start_apart():
    torch.manual_seed(3)
    first, second = PixArt(PixArtConfig(**TINY)), PixArt(PixArtConfig(**TINY))
    assert not torch.equal(first.blocks[0].mlp.fc1.weight, second.blocks[0].mlp.fc1.weight)
    assert not torch.equal(first.blocks[0].mlp.fc1.weight, first.blocks[1].mlp.fc1.weight)


def test_the_patch_embedding_is_the_convolution():
    model = tiny_model()
    x = torch.randn(2, 4, 6, 10)
    proj = model.x_embedder.proj
    convolved = F.conv2d(x, proj.weight, proj.bias, stride=2).flatten(2).transpose(1, 2)
    assert relative(model.x_embedder(x), convolved) <= 1e-6


def test_conv_compression_starts_as_the_mean_of_a_square():
    torch.manual_seed(0)
    model = PixArt(PixArtConfig(**TINY, kv_compression="conv", kv_blocks=(0,)))
    image = torch.randn(1, 48, 4, 6)
    assert relative(model.blocks[0].attn.sr(image), torch.nn.functional.avg_pool2d(image, 2)) <= 1e-6


@pytest.mark.parametrize("part", [pytest.param("whole", marks=pytest.mark.slow), "blocks"])
def test_compiling_gives_one_graph_for_all_times(part):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    model = tiny_model(depth=4)
    inputs = tiny_inputs(model)
    reference = model(**inputs)
    names = set(model.state_dict())
    if part == "whole":
        model.compile(backend=backend, fullgraph=True)  # fullgraph raises at a graph break
    else:
        model.compile_blocks(backend=backend)
    assert relative(model(**inputs), reference) <= 1e-6
    assert len(graphs) == 1, "blocks share one compilation"
    with torch.no_grad():
        model(**inputs)
    compiled = len(graphs)
    for t in (0.0, 1.0, 500.25, 999.0):
        with torch.no_grad():
            model(**{**inputs, "t": torch.full((2,), t)})
    assert len(graphs) == compiled
    assert set(model.state_dict()) == names, "state-dict names stay as they are"


def test_compiling_takes_an_encoded_caption():
    torch._dynamo.reset()
    model = tiny_model()
    inputs = tiny_inputs(model)
    reference = model(**inputs)
    context = model.encode_caption(inputs.pop("caption"), inputs.pop("caption_mask"))
    model.compile(backend="eager", fullgraph=True)
    assert relative(model(caption=context, **inputs), reference) <= 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_forward_never_reads_a_value(variant):
    # a meta tensor has none: any .item(), mask lookup or host copy raises
    with torch.device("meta"):
        model = PixArt(PixArtConfig(**{**TINY, **VARIANTS[variant]}))
    inputs = {name: value.to("meta") for name, value in tiny_inputs(model).items()}
    assert model(**inputs).shape == (2, model.config.out_channels, 8, 8)


def bad(name, value, match):
    return pytest.param(name, value, match, id=name)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        bad("x", torch.zeros(2, 4, 7, 8), "not a multiple of the patch size 2"),
        bad("x", torch.zeros(2, 3, 8, 8), r"expected \(B, 4, H, W\)"),
        bad("t", torch.zeros(3), "t: got shape"),
        bad("caption", torch.zeros(2, 5, 17), r"expected \(B, L, 16\)"),
        bad("caption_mask", torch.ones(2, 6), "caption_mask: got shape"),
        bad("size", torch.zeros(2, 2), "no micro-conditions"),
        bad("aspect_ratio", torch.zeros(2), "no micro-conditions"),
    ],
)
def test_inputs_of_a_wrong_shape_are_refused(name, value, match):
    model = tiny_model()
    with pytest.raises(InputError, match=match):
        model(**{**tiny_inputs(model), name: value})


def test_micro_conditions_are_required_where_the_model_has_them():
    model = tiny_model(micro_conditions=True)
    inputs = tiny_inputs(model)
    with pytest.raises(InputError, match="size: got None"):
        model(**{**inputs, "size": None})
    with pytest.raises(InputError, match="aspect_ratio: got shape"):
        model(**{**inputs, "aspect_ratio": torch.zeros(2, 1)})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_heads": 5}, "not a multiple of num_heads"),
        ({"hidden_size": 50, "num_heads": 5}, "not a multiple of 4"),
        ({"hidden_size": 64, "micro_conditions": True}, "not a multiple of 3"),
        ({"latent_size": 9}, "not a multiple of patch_size"),
        ({"kv_blocks": (1,)}, "belong together"),
        ({"kv_compression": "conv", "kv_blocks": (2,)}, "blocks 0 to 1"),
        ({"depth": 0}, "depth: got 0, expected a number from 1"),
    ],
)
def test_impossible_models_are_refused(change, match):
    with pytest.raises(InputError, match=match):
        PixArtConfig(**{**TINY, **change})
