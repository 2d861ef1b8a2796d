"""The network and DPM-Solver against diffusers on the same weights and noise."""

import pytest
import torch

from pixart.benchmark.networks import call_diffusers
from pixart.diffusion import DiffusionConfig, make_denoise
from pixart.diffusion.samplers import dpm_solver
from pixart.diffusion.schedule import DiscreteSchedule
from pixart.diffusion.timesteps import uniform
from toy import relative, tiny_inputs, tiny_model

diffusers = pytest.importorskip("diffusers", reason="the reference of these tests; extra: test")


def in_diffusers(model):
    """The same network built by diffusers."""
    c = model.config
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=c.num_heads, attention_head_dim=c.hidden_size // c.num_heads, in_channels=c.in_channels,
        out_channels=c.out_channels, num_layers=c.depth, cross_attention_dim=c.hidden_size, sample_size=c.latent_size,
        patch_size=c.patch_size, caption_channels=c.caption_channels, interpolation_scale=c.position_scale,
        use_additional_conditions=c.micro_conditions,
    )  # fmt: skip
    ours, theirs = model.state_dict(), {}
    renamed = {
        "pos_embed.proj": "x_embedder.proj",
        "adaln_single.linear": "t_block.1",
        "proj_out": "final_layer.linear",
        "scale_shift_table": "final_layer.scale_shift_table",
        "caption_projection.linear_1": "y_embedder.y_proj.fc1",
        "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    }
    for theirs_name, ours_name in {
        "timestep_embedder": "t_embedder",
        "resolution_embedder": "csize_embedder",
        "aspect_ratio_embedder": "ar_embedder",
    }.items():
        for i, j in ((1, 0), (2, 2)):
            renamed[f"adaln_single.emb.{theirs_name}.linear_{i}"] = f"{ours_name}.mlp.{j}"
    for name in transformer.state_dict():
        stem, _, kind = name.rpartition(".")
        if name in renamed:
            theirs[name] = ours[renamed[name]]
        elif stem in renamed:
            theirs[name] = ours[f"{renamed[stem]}.{kind}"]
        else:
            theirs[name] = block_tensor(ours, name)
    transformer.load_state_dict(theirs, strict=True)
    return transformer.eval()


def block_tensor(ours: dict, name: str) -> torch.Tensor:
    _, block, *rest = name.split(".")
    path, kind = ".".join(rest[:-1]), rest[-1]
    prefix = f"blocks.{block}"
    if path == "":
        return ours[f"{prefix}.{kind}"]
    plain = {
        "attn1.to_out.0": "attn.proj",
        "attn2.to_q": "cross_attn.q_linear",
        "attn2.to_out.0": "cross_attn.proj",
        "ff.net.0.proj": "mlp.fc1",
        "ff.net.2": "mlp.fc2",
    }
    if path in plain:
        return ours[f"{prefix}.{plain[path]}.{kind}"]
    fused, parts = ("attn.qkv", "qkv") if path.startswith("attn1") else ("cross_attn.kv_linear", "kv")
    return ours[f"{prefix}.{fused}.{kind}"].chunk(len(parts))[parts.index(path[-1])]


@pytest.mark.parametrize("change", [{}, {"micro_conditions": True}, {"position_scale": 2.0, "latent_size": 16}])
def test_the_network_is_diffusers_network(change):
    model = tiny_model(**change)
    transformer = in_diffusers(model)
    inputs = tiny_inputs(model, side=model.config.latent_size)
    inputs["t"] = torch.tensor([951.0, 3.0])
    with torch.no_grad():
        assert relative(model(**inputs), call_diffusers(transformer, **inputs)) <= 1e-6
        # and at another size and aspect ratio
        inputs["x"] = torch.randn(2, 4, 4, 10)
        assert relative(model(**inputs), call_diffusers(transformer, **inputs)) <= 1e-6


def test_gradients_are_diffusers_gradients():
    model = tiny_model()
    transformer = in_diffusers(model)
    inputs = tiny_inputs(model)
    inputs["x"].requires_grad_()
    ours, theirs = (
        torch.autograd.grad(network(**inputs).square().mean(), inputs["x"])[0]
        for network in (model, lambda **kw: call_diffusers(transformer, **kw))
    )
    assert relative(ours, theirs) <= 1e-6


@torch.no_grad()
def test_twenty_steps_of_dpm_solver_end_near_diffusers():
    # diffusers takes whole times and ends at σ = 0: the two differ by discretisation, not by a mistake
    model = tiny_model()
    transformer = in_diffusers(model)
    inputs = tiny_inputs(model)
    caption, mask, x = inputs["caption"], inputs["caption_mask"], inputs["x"]
    denoise = make_denoise(lambda x, t: model(x, t, caption, mask), DiscreteSchedule.linear(), DiffusionConfig())
    schedule = DiscreteSchedule.linear()
    ours = dpm_solver(denoise, x, schedule, uniform(schedule, 20))

    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", algorithm_type="dpmsolver++", solver_order=2
    )
    scheduler.set_timesteps(20)
    for t in scheduler.timesteps:
        output = call_diffusers(transformer, x, t.expand(2), caption, mask)[:, :4]
        x = scheduler.step(output, t, x, return_dict=False)[0]
    # over the size of the result, since an untrained network's is arbitrary
    assert relative(ours, x) <= 0.02
