"""The denoising error of a finished model on the images of a data set; no images are drawn.

The same quantity as a run's `validation_error` (`pixart.diffusion.denoising_error`), with different noise.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pixart.data.images import Record, load_record
from pixart.diffusion import make_schedule
from pixart.diffusion.denoising_error import RATIOS, denoising_errors, mean_error
from pixart.encoders.fingerprint import autoencoder_fingerprint, fingerprint
from pixart.evaluate.denoising_error import BY_RATIO, KEY, DenoisingError
from pixart.evaluate.image_metric import ImageMetric, Rows
from pixart.evaluate.interval import Estimate, jackknife, mean_estimate
from pixart.files import digest_text, to_json
from pixart.inference.pipeline import Pipeline
from pixart.seeds import derive_seed


@dataclass(frozen=True)
class DataImages:
    """Images of a data set, in the role of drawn ones."""

    records: Sequence[Record]
    pipeline: Pipeline

    def describe(self) -> dict[str, Any]:
        return {
            "model": fingerprint(self.pipeline.model),
            "autoencoder": autoencoder_fingerprint(self.pipeline.autoencoder),
            "data": digest_text(to_json([record.id for record in self.records])),
        }

    def draw(self, batches: Iterable[Sequence[int]]) -> Iterator[np.ndarray]:
        for batch in batches:
            yield np.stack([load_record(self.records[i]) for i in batch])


class ModelDenoisingError(ImageMetric):
    """`denoising_error` of a pipeline's network."""

    declaration = DenoisingError.declaration

    def __init__(self, pipeline: Pipeline):
        self.pipeline = pipeline

    def rows(self) -> Mapping[str, Rows]:
        return {"denoising_errors": self.errors}

    @torch.no_grad()
    def errors(self, images: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
        """The error of each image at each noise-to-signal ratio: (B, ratios)."""
        pipeline, card = self.pipeline, self.pipeline.card
        model, device, dtype = pipeline.model, pipeline.device, next(pipeline.model.parameters()).dtype
        pixels = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
        x0 = pipeline.autoencoder.encode(pixels.to(device)).float()
        noise = torch.stack(
            [
                torch.randn(x0.shape[1:], generator=torch.Generator().manual_seed(derive_seed(i, "denoising_error")))
                for i in numbers
            ]
        ).to(device)
        states, _ = pipeline.encode([self.task.items[i].prompt for i in numbers], truncate=self.task.truncate)
        lengths = torch.tensor([len(state) for state in states])
        caption = torch.nn.utils.rnn.pad_sequence([state.to(device, dtype) for state in states], batch_first=True)
        inputs = {"caption_mask": (torch.arange(caption.shape[1]) < lengths[:, None]).to(device)}
        if card.model.micro_conditions:
            height, width = self.task.size
            inputs["size"] = torch.tensor([[height, width]], dtype=torch.float32, device=device).expand(len(x0), 2)
            inputs["aspect_ratio"] = torch.full((len(x0),), height / width, device=device)

        def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return model(x.to(dtype), t, caption, **inputs)

        found = denoising_errors(network, make_schedule(card.diffusion), card.diffusion, x0, noise)
        return found.T.cpu().numpy()

    def estimate(self, rows: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
        errors, groups = rows["denoising_errors"].astype(np.float64), self.task.groups

        def without(group: int) -> float:
            return mean_error(errors[groups != group].mean(0).tolist())

        return {
            KEY: jackknife(mean_error(errors.mean(0).tolist()), without, groups, low=0.0),
            **{BY_RATIO[ratio]: mean_estimate(errors[:, i], groups, low=0.0) for i, ratio in enumerate(RATIOS)},
        }

    def facts(self) -> dict[str, Any]:
        return {"ratios": list(RATIOS)}
