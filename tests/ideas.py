"""One idea for every seam, as a user would write them: a file that registers names. Nothing here is in the package."""

import copy

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from pixart.adapters.adapter import ADAPTERS, Adapter
from pixart.data.arrays import ARRAYS
from pixart.data.items import Item
from pixart.data.sources import SOURCES
from pixart.diffusion.guidance import make_denoise
from pixart.diffusion.losses import diffusion_loss, per_image
from pixart.diffusion.objective import OBJECTIVES, Objective
from pixart.diffusion.sampling import SAMPLERS, Sampler
from pixart.evaluate.metric import Declaration, PerImage, Score
from pixart.evaluate.metrics import METRICS
from pixart.model.embed import POSITIONS, Positions
from pixart.model.layers import (
    ATTENTION,
    CONDITIONING,
    MLPS,
    NORMS,
    ROUTING,
    Block,
    Conditioning,
    FinalLayer,
    Routing,
    SelfAttention,
)
from pixart.seeds import Draw
from pixart.train.ema import update_ema


class AdaLNBlock(Block):
    """A modulation of its own in every block, with DiT's names."""

    def add_modulation(self, dim):
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def init_weights(self, generators):
        nn.init.normal_(self.adaLN_modulation[1].weight, std=0.02, generator=generators("adaLN_modulation.1.weight"))

    def modulation(self, time):
        return rearrange(self.adaLN_modulation(time), "b (six d) -> b six d", six=6)


class AdaLNFinal(FinalLayer):
    def add_modulation(self, dim):
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def init_weights(self, generators):
        nn.init.normal_(self.linear.weight, std=0.02, generator=generators("linear.weight"))

    def modulation(self, time):
        return rearrange(self.adaLN_modulation(time), "b (two d) -> b two d", two=2)


CONDITIONING.register("adaln")(Conditioning(AdaLNBlock, AdaLNFinal))


class PlainBlock(Block):
    def add_modulation(self, dim):
        self.register_buffer("rows", torch.tensor([0.0, 0, 1, 0, 0, 1])[None, :, None], persistent=False)

    def init_weights(self, generators):
        pass

    def modulation(self, time):
        return self.rows


class PlainFinal(FinalLayer):
    def add_modulation(self, dim):
        pass

    def init_weights(self, generators):
        nn.init.normal_(self.linear.weight, std=0.02, generator=generators("linear.weight"))

    def modulation(self, time):
        return torch.zeros(1, 2, 1, device=time.device)


class TimeToken(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Linear(dim, dim)

    def forward(self, time):
        return self.proj(time)[:, None]


CONDITIONING.register("clock_token")(Conditioning(PlainBlock, PlainFinal, tokens=TimeToken))


@POSITIONS.register("rope")
class Rope(Positions):
    """Half of a head's pairs rotate with the row, half with the column."""

    def rotary(self, height, width, device=None):
        pairs = self.config.hidden_size // self.config.num_heads // 2
        omega = 100.0 ** (-torch.arange(pairs // 2, device=device) / (pairs // 2))
        rows, columns = torch.meshgrid(
            torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
        )
        angles = torch.cat([rows.flatten()[:, None] * omega, columns.flatten()[:, None] * omega], dim=-1)
        return torch.stack([angles.cos(), angles.sin()])


@NORMS.register("root_mean_square")
def rms_norm(dim):
    return nn.RMSNorm(dim, eps=1e-6, elementwise_affine=False)


@MLPS.register("swish_gated")
class SwiGLU(nn.Module):
    def __init__(self, in_features, hidden_features, out_features):
        super().__init__()
        self.up, self.gate = nn.Linear(in_features, hidden_features), nn.Linear(in_features, hidden_features)
        self.down = nn.Linear(hidden_features, out_features)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


@ATTENTION.register("sharper")
class Sharper(SelfAttention):
    """Attention with a learned temperature, by a number that the config holds in `options`."""

    def __init__(self, config, index):
        super().__init__(config, index)
        self.temperature = nn.Parameter(torch.full((1,), float(config.options.get("temperature", 1.0))))

    def forward(self, x, layout):
        return self.temperature * super().forward(x, layout)


@ROUTING.register("skipping")
class Tread(Routing):
    """A random share of the tokens skips blocks (arXiv 2501.04765)."""

    conditions = {"route": Draw("uniform", "token")}  # noqa: RUF012

    def __init__(self, config):
        self.first, self.last, self.share = 1, config.depth - 2, config.options.get("share", 0.5)

    def choose(self, tokens, conditions):
        if "route" not in conditions or not self.share:
            return None
        return conditions["route"].argsort(dim=1)[:, : tokens - round(self.share * tokens)]


@ROUTING.register("busy")
class Busy(Routing):
    """The tokens with the highest contrast pass through all blocks; the contrast is an array of the data."""

    conditions = {"contrast": None}  # noqa: RUF012

    def __init__(self, config):
        self.first, self.last = 1, 1

    def choose(self, tokens, conditions):
        if "contrast" not in conditions:
            return None
        return conditions["contrast"].argsort(dim=1, descending=True)[:, : tokens // 2]


@ARRAYS.register("patch_contrast")
def patch_contrast(context):
    return lambda pixels, records, mirrored: rearrange(pixels, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2).std(-1)


@ARRAYS.register("patch_colours")
def patch_colours(context):
    return lambda pixels, records, mirrored: rearrange(F.avg_pool2d(pixels, 2), "b c h w -> b (h w) c")


@OBJECTIVES.register("everything")
class Everything(Objective):
    """Denoising, hidden states aligned with an array, and a second call against a target average."""

    draws = {"second": Draw("uniform")}  # noqa: RUF012

    def __init__(self, config, network, *, weight: float = 0.5):
        super().__init__(config, network)
        self.weight = weight
        self.trained["projector"] = nn.Linear(network.config.hidden_size, 3)
        self.state["target"] = copy.deepcopy(network)

    def forward(self, network, example):
        t = self.schedule.draw_times(example.time, self.config)
        x_t = self.schedule.add_noise(example.x0, example.noise, t)
        output, hidden = network(x_t, t, keep=(0,), **example.inputs)
        mse = diffusion_loss(self.schedule, self.config, output, example.x0, example.noise, t)["loss"]
        found = self.trained["projector"](hidden[0])
        aligned = -F.cosine_similarity(found, example.targets["colours"], dim=-1).mean(1)
        s = self.schedule.draw_times(example.draws["second"], self.config)
        x_s = self.schedule.add_noise(example.x0, example.noise, s)
        with torch.no_grad():
            target = self.state["target"](x_s, s, **example.inputs)
        consistent = per_image((network(x_s, s, **example.inputs) - target) ** 2)
        loss = mse + self.weight * (aligned + consistent)
        return {"loss": loss, "mse": mse, "alignment": aligned, "consistency": consistent}

    def after_step(self, network, applied):
        update_ema(self.state["target"], network, 0.9, applied)


class LowRank(nn.Module):
    def __init__(self, linear, rank):
        super().__init__()
        self.down, self.up = (
            nn.Linear(linear.in_features, rank, bias=False),
            nn.Linear(rank, linear.out_features, bias=False),
        )
        linear.register_forward_hook(lambda _, inputs, output: output + self(inputs[0]))

    def init_weights(self, generators):
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.up(self.down(x))


@ADAPTERS.register("low_rank")
class LowRankAdapter(Adapter):
    """Low-rank additions to all queries, keys and values (arXiv 2106.09685)."""

    def __init__(self, network, *, rank: int = 2):
        super().__init__(network)
        self.layers = nn.ModuleList(LowRank(block.attn.qkv, rank) for block in network.blocks)


@SOURCES.register("stripes")
def stripes(path, fields):
    """A source that reads a file of image names and captions."""
    for line in path.read_text().splitlines():
        name, _, caption = line.partition("\t")
        yield Item(name, path.parent / name, fields.take({"text": caption}), f"{path}, {name}")


def one_step(denoise, x, schedule, times, *, callback=None):
    return denoise(x, times[0]).x0


SAMPLERS.register("one_step")(Sampler(one_step, 1, (), 1, 1, flow=True))


class AtOneTime(PerImage):
    """A metric of the clean images that the network predicts at one time, from 0 to 1."""

    def __init__(self, time):
        self.time = 1000 * float(time)

    def denoised(self, held):
        schedule, example = self.subject.objective.schedule, held.example
        alpha, sigma = schedule.alpha_sigma(self.time)
        denoise = make_denoise(held.network, schedule, self.subject.objective.config)
        return denoise(alpha * example.x0 + sigma * example.noise, self.time).x0


@METRICS.register("mae")
class MeanAbsoluteError(AtOneTime):
    def __init__(self, time):
        super().__init__(time)
        self.declaration = Declaration(
            (Score(f"mae_{time}", f"absolute error of clean images at time {time}", "lower"),)
        )

    def measure(self, held):
        return (self.denoised(held) - held.example.x0).abs().flatten(1).mean(1)


@METRICS.register("cosine")
class Likeness(AtOneTime):
    """Cosine similarity, of all channels and of each."""

    declaration = Declaration(
        (
            Score("likeness", "likeness of clean images", "higher"),
            Score("likeness_red", "the same in every channel", "higher", part="red"),
            Score("likeness_blue", "the same in every channel", "higher", part="blue"),
        )
    )

    def measure(self, held):
        found, x0 = self.denoised(held), held.example.x0
        rows = [(found, x0), (found[:, 0], x0[:, 0]), (found[:, 2], x0[:, 2])]
        return torch.stack([F.cosine_similarity(a.flatten(1), b.flatten(1)) for a, b in rows])
