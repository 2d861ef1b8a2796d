"""Claims about speed that need no clock: no repeated work, no device synchronisation, no repeated compilation."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

from pixart.benchmark.measure import count_flops
from pixart.benchmark.networks import call_diffusers, network_in_diffusers
from pixart.checkpoint import ModelCard
from pixart.cpu import use_onednn
from pixart.data.buckets import bucket_table
from pixart.diffusion.objective import Denoising
from pixart.diffusion.sampling import SampleConfig
from pixart.encoders.autoencoder import AutoencoderConfig, IdentityAutoencoder
from pixart.inference.latents import sample_latents
from pixart.model import PixArt, PixArtConfig
from pixart.model.flops import forward_flops, training_flops
from pixart.train.ema import make_ema, update_ema
from pixart.train.random_batch import random_batch
from pixart.train.step import make_example
from runs import build, settings
from toy import TINY, relative, tiny_inputs, tiny_model

GUIDED = SampleConfig(sampler="dpm_solver", steps=6, guidance=4.5)


def with_torch(model: PixArt) -> PixArt:
    return model


def with_onednn(model: PixArt) -> PixArt:
    use_onednn(model)
    return model


both_products = pytest.mark.parametrize("multiply", [with_torch, with_onednn])


def captions_of(model: PixArt, *lengths: int) -> list[torch.Tensor]:
    device = model.y_embedder.y_embedding.device
    return [torch.randn(length, model.config.caption_channels).to(device) for length in lengths]


def draw(model: PixArt, captions, config: SampleConfig = GUIDED, side: int = 8, null=None, **changes):
    card = ModelCard(model=model.config, vae=AutoencoderConfig("kl", "none"), **changes)
    return sample_latents(model, card, captions, null, range(len(captions)), config, height=side, width=side)


def caption_flops(config: PixArtConfig, tokens: int) -> int:
    """The caption's own layers: a two-layer projection, and every block's keys and values."""
    width = config.hidden_size
    return 2 * tokens * (config.caption_channels * width + width**2 + config.depth * 2 * width**2)


def losses_of(model: PixArt, batch, config) -> dict[str, torch.Tensor]:
    return Denoising(config.diffusion, model)(model, make_example(batch, model, IdentityAutoencoder(), config))


def train_settings(tmp_path, **changes):
    return build(settings(tmp_path / "run", tmp_path / "none", tmp_path / "none"), **changes)


# ------------------------------------------------------------------------------------------------------ no work twice


@both_products
def test_a_forward_on_the_cpu_does_the_flops_of_the_formula(multiply):
    model = multiply(tiny_model())
    with torch.no_grad():
        found = count_flops(lambda: model(**tiny_inputs(model)))
    assert found == forward_flops(model.config, 8, 8, 5, batch=2)


@pytest.mark.parametrize("lengths", [(5, 5), (5, 3)])
def test_a_sampling_call_works_on_the_captions_once(lengths):
    model = tiny_model()
    captions, rows = captions_of(model, *lengths), 2 * len(lengths)  # under the captions and under the null caption
    found = count_flops(lambda: draw(model, captions))
    caption = rows * caption_flops(model.config, 5)
    assert found == 6 * (forward_flops(model.config, 8, 8, 5, batch=rows) - caption) + caption


def test_outside_the_guidance_interval_half_the_work_is_done_and_the_captions_are_not_encoded_again():
    model = tiny_model()
    captions = captions_of(model, 5, 5)
    found = count_flops(lambda: draw(model, captions, replace(GUIDED, guidance_high=500.0)))
    caption = 2 * caption_flops(model.config, 5)
    step = forward_flops(model.config, 8, 8, 5, batch=2) - caption
    assert found == 3 * 2 * step + 3 * step + 2 * caption  # times 999, 832.5 and 666 lie above 500


@both_products
def test_a_training_step_is_three_forwards_but_for_the_gradients_of_the_inputs(tmp_path, multiply):
    config = train_settings(tmp_path)
    model, batch = multiply(PixArt(config.model)), random_batch(config)
    ema = make_ema(model)

    def step():
        losses = losses_of(model, batch, config)
        losses["loss"].mean().backward()
        update_ema(ema, model, 0.9, torch.tensor(True, device=next(model.parameters()).device))

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel's backward repeats a product
        found = count_flops(step)
    c = config.model
    shape = (8, 8, 12, config.train.batch_size)
    unneeded = 2 * c.hidden_size * (16 * c.in_channels * c.patch_size**2 + 12 * c.caption_channels + 256)
    assert found == training_flops(c, *shape) - config.train.batch_size * unneeded


def test_captions_of_one_length_are_drawn_without_a_mask():
    model = tiny_model()
    masks = []
    for block in model.blocks:
        block.cross_attn.register_forward_pre_hook(lambda _module, arguments: masks.append(arguments[2]))
    draw(model, captions_of(model, 5, 5))
    assert masks
    assert all(mask is None for mask in masks)
    masks.clear()
    draw(model, captions_of(model, 5, 3))
    assert all(mask.shape == (4, 1, 1, 5) for mask in masks)


def test_the_residual_stream_is_contiguous():
    model = tiny_model()
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0].is_contiguous()))
    model(**tiny_inputs(model))
    assert seen == [True] * len(model.blocks)


# ------------------------------------------------------------------------------------------- nothing waits for a device


@pytest.mark.parametrize("micro", [False, True])
@pytest.mark.parametrize(
    ("sampler", "steps"), [("dpm_solver", 5), ("iddpm", 5), ("ddim", 5), ("sa_solver", 5), ("lcm", 4), ("dmd", 1)]
)
def test_the_sampling_loop_runs_on_the_meta_device(sampler, steps, micro):
    # a meta tensor has no values: any .item(), host-side mask or copy to the CPU raises
    with torch.device("meta"):
        model = PixArt(PixArtConfig(**TINY, micro_conditions=micro))
    latents = draw(model, captions_of(model, 5, 3), SampleConfig(sampler=sampler, steps=steps))
    assert latents.device.type == "meta"
    assert latents.shape == (2, 4, 8, 8)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("schedule", ["flow", "linear"])
def test_losses_gradients_and_averages_run_on_the_meta_device(tmp_path, schedule, checkpointing):
    diffusion = {"schedule": schedule, "prediction": "x0" if schedule == "flow" else "epsilon"}
    config = train_settings(tmp_path, diffusion=diffusion, model__learn_sigma=schedule == "linear")
    with torch.device("meta"):
        model = PixArt(config.model)
        model.gradient_checkpointing = checkpointing
        ema = make_ema(model)
    batch = random_batch(config).to("meta")
    losses = losses_of(model, batch, config)
    losses["loss"].mean().backward()
    update_ema(ema, model, 0.9, torch.tensor(True, device=next(model.parameters()).device))
    assert all(parameter.grad is not None for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------- compiled once, whole


@contextmanager
def no_break_and_no_recompilation():
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert not counters["graph_break"]
    torch._dynamo.reset()


def test_the_network_is_one_graph():
    torch._dynamo.reset()
    model = with_onednn(tiny_model(qk_norm=True, kv_compression="conv", kv_blocks=(1,)))
    assert torch._dynamo.explain(model)(**tiny_inputs(model)).graph_break_count == 0


def test_compiled_blocks_are_compiled_once_for_all_steps_of_a_sampling_call():
    model = with_onednn(tiny_model()).eval()
    captions = captions_of(model, 5, 3)
    expected = draw(model, captions)
    with no_break_and_no_recompilation():
        model.compile_blocks(backend="aot_eager", dynamic=False)
        assert relative(draw(model, captions), expected) <= 1e-5
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_blocks_are_compiled_once_for_all_steps_of_training(tmp_path):
    config = train_settings(tmp_path)
    model = with_onednn(PixArt(config.model))
    batch = random_batch(config)
    with no_break_and_no_recompilation():
        model.compile_blocks(backend="aot_eager", dynamic=False)
        for step in range(3):
            batch.time.fill_(0.1 + 0.3 * step)
            losses = losses_of(model, batch, config)
            losses["loss"].mean().backward()


@pytest.mark.parametrize("variant", [{}, {"qk_norm": True, "kv_compression": "conv", "kv_blocks": (1,)}])
def test_few_compilations_serve_all_buckets_and_captions_of_training(variant):
    model = tiny_model(**variant)
    torch._dynamo.reset()
    counters.clear()
    model.compile_blocks(backend="aot_eager")
    for i, bucket in enumerate(bucket_table(256, 16)[::2]):
        length = (16, 32, 64, 120)[i % 4]
        caption, mask = torch.randn(3, length, model.config.caption_channels), torch.ones(3, length)
        x = torch.randn(3, 4, bucket.height // 8, bucket.width // 8)
        model(x, torch.full((3,), 500.0), caption, mask).mean().backward()
    kinds = 1 + bool(variant)  # of blocks: with compression and without
    assert counters["stats"]["unique_graphs"] <= 3 * kinds
    torch._dynamo.reset()


def test_compiled_blocks_take_whatever_sampling_brings():
    # one more size than torch expects of a function is an error, not a slow call, where graphs must be whole
    model = tiny_model().eval()
    torch._dynamo.reset()
    model.compile_blocks(backend="aot_eager")
    for lengths in ((5,), (1,), (4, 2), (1, 1), (5, 3, 7), (6, 6, 6)):
        for side in (8, 12, 16):
            draw(model, captions_of(model, *lengths), replace(GUIDED, steps=2, guidance_high=900.0), side=side)
    torch._dynamo.reset()


@pytest.mark.slow
def test_blocks_compiled_by_inductor_give_the_same_numbers_and_gradients():
    model, twin = tiny_model(), with_onednn(tiny_model())
    inputs = tiny_inputs(model)
    with no_break_and_no_recompilation():
        twin.compile_blocks(dynamic=False)
        for _ in range(2):
            model.zero_grad()
            twin.zero_grad()
            output, compiled = model(**inputs), twin(**inputs)
            output.square().mean().backward()
            compiled.square().mean().backward()
            assert relative(compiled, output) <= 1e-6
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert relative(two.grad, one.grad) <= 1e-5


# ----------------------------------------------------------------------------------------------------- the same numbers


def test_bf16_is_as_near_to_fp32_as_in_diffusers():
    pytest.importorskip("diffusers")
    model = tiny_model(depth=4)
    inputs = tiny_inputs(model)
    with torch.no_grad():
        exact = model(**inputs)
        half = {k: v if k in ("t", "caption_mask") else v.bfloat16() for k, v in inputs.items()}
        model.bfloat16()
        ours = relative(model(**half), exact)
        theirs = relative(call_diffusers(network_in_diffusers(model), **half), exact)
    assert ours <= 0.02
    assert ours <= 1.1 * theirs
