"""The VAE against diffusers' on the same seeded random weights, and what saves memory against what does not."""

import pytest
import torch
import torch.nn.functional as F

from pixart.encoders.vae import AutoencoderKL, VaeAutoencoder, VaeConfig, blend_tiles
from toy import relative

diffusers = pytest.importorskip("diffusers")

SMALL = (32, 32, 64, 64)  # four levels, as the released ones


def make_reference(widths=SMALL, **settings):
    """diffusers' VAE with every weight random, biases and norms too."""
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        **settings,
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "to_" in name:
                parameter.mul_(3)  # else attention is nearly uniform, and a wrong one hardly shows
    return model


def wrap(reference) -> VaeAutoencoder:
    config = VaeConfig.from_diffusers(dict(reference.config))
    model = AutoencoderKL(config)
    model.load_state_dict(reference.state_dict(), strict=True)
    return VaeAutoencoder(model)


def exact(reference) -> VaeAutoencoder:
    """Computing in fp64, where a difference is never one of rounding; inputs and results stay fp32."""
    vae = wrap(reference)
    vae.model.double()
    return vae


def pixels(batch=2, height=32, width=48):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def reference():
    return make_reference()


# against diffusers


@pytest.mark.parametrize("widths", [(32, 64, 64), (32, 32, 64, 64), (64, 64, 128, 128)])
@torch.no_grad()
def test_moments_and_decode_equal_those_of_diffusers(widths):
    reference = make_reference(widths)
    vae = wrap(reference)
    posterior = reference.encode(pixels()).latent_dist
    mean, std = vae.moments(pixels())
    assert relative(mean, 0.18215 * posterior.mean) <= 1e-6
    assert relative(std, 0.18215 * posterior.std) <= 1e-6
    latents = torch.randn(2, 4, 8, 6)
    assert relative(vae.decode(latents), reference.decode(latents / 0.18215).sample) <= 1e-6


@pytest.mark.parametrize("scale", [0.18215, 0.13025])
def test_names_and_shapes_are_those_of_diffusers_at_full_size(scale):
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            scaling_factor=scale,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        ours = AutoencoderKL(VaeConfig(scaling_factor=scale))
    assert VaeConfig.from_diffusers(dict(theirs.config)) == ours.config
    shapes = [{name: tuple(t.shape) for name, t in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert sum(parameter.numel() for parameter in ours.parameters()) == 83_653_863  # as counted in SD's and SDXL's


@pytest.mark.parametrize("scale", [0.18215, 0.13025])
@torch.no_grad()
def test_latents_are_scaled_in_encode_and_unscaled_in_decode(scale):
    reference = make_reference(scaling_factor=scale).double()
    vae = exact(reference)
    posterior, noise = reference.encode(pixels(1, 16, 24).double()).latent_dist, torch.randn(1, 4, 2, 3)
    assert relative(vae.encode(pixels(1, 16, 24)), scale * posterior.mean) <= 1e-6
    assert relative(vae.encode(pixels(1, 16, 24), noise), scale * (posterior.mean + posterior.std * noise)) <= 1e-6
    assert relative(vae.decode(scale * noise), reference.decode(noise.double()).sample) <= 1e-6


@torch.no_grad()
def test_the_log_variance_is_clamped(reference):
    vae = wrap(reference)
    vae.model.quant_conv.bias[4:6], vae.model.quant_conv.bias[6:] = 1e4, -1e4
    std = vae.moments(pixels())[1] / vae.scale
    assert torch.allclose(std[:, :2].log(), torch.tensor(10.0))
    assert torch.allclose(std[:, 2:].log(), torch.tensor(-15.0))


def test_it_computes_in_the_weights_dtype_whatever_autocast_says_and_returns_fp32(reference):
    vae = wrap(reference)
    plain = vae.encode(pixels())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vae.encode(pixels()), plain)
    vae.model.bfloat16()
    rough = vae.encode(pixels())
    assert rough.dtype == torch.float32
    assert 1e-3 < relative(rough, plain) < 0.05


# memory


@torch.no_grad()
def test_slices_give_the_whole_batchs_result(reference):
    vae = exact(reference)  # in fp32 the rounding depends on the batch size, ours and diffusers'
    latents = torch.randn(3, 4, 2, 3)
    whole = *vae.moments(pixels(3, 16, 24)), vae.decode(latents)
    vae.save_memory(tile=None)
    for mine, theirs in zip((*vae.moments(pixels(3, 16, 24)), vae.decode(latents)), whole, strict=True):
        assert relative(mine, theirs) <= 1e-6


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 8), (17, 31), (5, 40)])
def test_blended_tiles_of_a_pointwise_map_give_the_whole(height, width):
    def enlarge(x):
        assert max(x.shape[2:]) <= 8
        return F.interpolate(x, scale_factor=2.0)

    def shrink(x):
        assert max(x.shape[2:]) <= 16
        return F.avg_pool2d(x, 2)

    x = torch.randn(2, 3, height, width)
    whole = F.interpolate(x, scale_factor=2.0)
    assert relative(blend_tiles(enlarge, x, 8, 1, 2), whole) <= 1e-6
    assert relative(blend_tiles(shrink, whole, 8, 2, 1), x) <= 1e-6


def test_tiles_that_differ_are_blended_linearly():
    values = iter([0.0, 1.0])
    x = torch.zeros(1, 1, 8, 14)  # two tiles of 8 that share a quarter
    blend = blend_tiles(lambda part: torch.full_like(part, next(values)), x, 8, 1, 1)
    assert torch.allclose(blend[0, 0, 3], torch.tensor([0.0] * 6 + [0.25, 0.75] + [1.0] * 6))


def waves(channels, side, period):
    """A smooth periodic picture, so that tiles have nearly the whole's norm statistics."""
    angle = 2 * torch.pi / period * (torch.arange(side) + 0.5)
    return torch.stack([0.5 * (angle + i).sin() + 0.4 * (angle[:, None] + 2 * i).cos() for i in range(channels)])[None]


@torch.no_grad()
def test_tiles_are_near_the_whole_on_a_smooth_input(reference):
    """Not the same, as each tile has its own norm statistics, attention and padding: within 15 % here, with random
    weights that carry an edge further than trained ones; a tile in a wrong place is off by more than 100 %."""
    vae = wrap(reference)
    for name, parameter in vae.model.named_parameters():
        if "conv2" in name or "to_out" in name:  # a random network is not smooth: calm it
            parameter.mul_(0.3)
    smooth, latents = waves(3, 192, 16), waves(4, 24, 4)
    whole = *vae.moments(smooth), vae.decode(latents)
    vae.save_memory(tile=128)
    for mine, theirs in zip((*vae.moments(smooth), vae.decode(latents)), whole, strict=True):
        assert 1e-3 < relative(mine, theirs) <= 0.15


def test_a_picture_within_one_tile_is_not_changed_by_tiling(reference):
    vae = wrap(reference)
    whole = vae.encode(pixels())
    assert torch.equal(vae.save_memory(slices=False, tile=64).encode(pixels()), whole)
