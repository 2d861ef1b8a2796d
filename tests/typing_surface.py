"""The public surface as a user calls it: type-checked with --strict, never run. `assert_type` checks return types."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from typing_extensions import assert_type

import pixart
from pixart import InputError, ModelCard, Pipeline, PixArt, PixArtConfig, SampleConfig
from pixart.train import (
    DataConfig,
    Example,
    LoopConfig,
    Objective,
    RunResult,
    StepResult,
    TrainConfig,
    TrainingSample,
    train,
)


def load(source: Path) -> PixArt:
    assert_type(pixart.__version__, str)
    assert_type(pixart.PRESETS, dict[str, PixArtConfig])
    model = pixart.load_model(source, ema=False, dtype=torch.bfloat16, device="cuda", extensions=["mine.py"])
    assert_type(model, PixArt)
    assert_type(PixArt.from_pretrained("owner/name"), PixArt)
    assert_type(model.config, PixArtConfig)
    model.save_pretrained(source / "copy", card=ModelCard())
    assert_type(pixart.export_model(model, "model.pth", "official"), list[str])
    return PixArt(PixArtConfig(hidden_size=48, depth=2, num_heads=4))


def draw(prompts: Sequence[str]) -> None:
    pipeline = Pipeline.from_pretrained("runs/mine", dtype=torch.float16).to("cuda:0")
    assert_type(pipeline, Pipeline)
    assert_type(pipeline.device, torch.device)
    pipeline.save_pretrained("copy", format="diffusers-pipeline")
    images = pipeline(prompts, [1, 2], SampleConfig(sampler="ddim"), steps=20, guidance=3)
    if not isinstance(images, Tensor):
        assert_type(images[0], Image.Image)
    try:
        pipeline("a cat", num_inference_steps=20)  # type: ignore[call-arg]
        pipeline("a cat", None)  # type: ignore[arg-type]
    except InputError:
        pass


class Mine(Objective):
    def forward(self, network: Any, example: Example) -> dict[str, Tensor]:
        t = self.schedule.draw_times(example.time, self.config)
        x_t = self.schedule.add_noise(example.x0, example.noise, t)
        return {"loss": (network(x_t, t, **example.inputs) - example.noise).square().flatten(1).mean(1)}


def learn(model: PixArt) -> RunResult:
    sample: TrainingSample = {"latents": torch.zeros(4, 8, 8), "caption": torch.zeros(3, 4096), "id": "first"}
    config = TrainConfig("runs/mine", DataConfig(), LoopConfig(steps=2, batch_size=1))
    assert_type(pixart.load_config(TrainConfig, "config.yaml", ["train.steps=3"]), TrainConfig)

    def on_step(step: int, report: StepResult) -> None:
        assert_type(report.loss, Tensor)

    result = train(
        config,
        data=[sample],
        model=model,
        objective=lambda network: Mine(config.diffusion, network),
        on_step=on_step,
        should_stop=lambda: False,
    )
    assert_type(result.finished, bool)
    train("config.yaml")  # type: ignore[arg-type]
    return result
