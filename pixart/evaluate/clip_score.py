"""CLIP score: max(cosine of image and prompt, 0) × 100, averaged (Hessel et al. 2021 without their factor of 2.5)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pixart.encoders.fingerprint import fingerprint
from pixart.errors import InputError
from pixart.evaluate.image_metric import ImageMetric, Rows, Task
from pixart.evaluate.interval import Estimate, mean_estimate
from pixart.evaluate.metric import Declaration, Score


class ClipScore(ImageMetric):
    """CLIP score by any CLIP of transformers: `clip_score:MODEL`, a folder or a Hub id in the cache."""

    declaration = Declaration((Score("clip_score", "CLIP score", "higher"),), needs=("images",))

    def __init__(self, model: str = "openai/clip-vit-large-patch14"):
        self.model = model

    def open(self, task: Task) -> None:
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        super().open(task)
        prompts = task.needed_prompts("clip_score")
        try:
            self.network = CLIPModel.from_pretrained(self.model, local_files_only=True).eval().requires_grad_(False)
            self.tokenizer = AutoTokenizer.from_pretrained(self.model, local_files_only=True, trust_remote_code=False)
            self.processor = CLIPImageProcessor.from_pretrained(self.model, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InputError(
                f"clip_score:{self.model}: not a CLIP that is here ({str(error).splitlines()[0][:120]}); download it "
                f"with: hf download {self.model}, or name a folder"
            ) from None
        self.weights = fingerprint(self.network)
        self.network.to(task.device)
        self.length = self.network.config.text_config.max_position_embeddings
        counts = [len(ids) for ids in self.tokenizer(prompts)["input_ids"]]
        if (long := sum(count > self.length for count in counts)) and not task.truncate:
            raise InputError(
                f"clip_score:{self.model} reads {self.length} tokens, {long} of {len(prompts)} prompts have up to "
                f"{max(counts)}; --truncate cuts them, and the record says so"
            )
        self.cut = long

    def rows(self) -> Mapping[str, Rows]:
        return {f"clip:{self.model}": self.score}

    @torch.no_grad()
    def score(self, images: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
        """The score of each image with its prompt, (B,) float32."""
        device = self.task.device
        text = self.tokenizer(
            [self.task.items[i].prompt for i in numbers],
            padding=True,
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        pixels = self.processor(list(images), return_tensors="pt")["pixel_values"]
        out = self.network(pixel_values=pixels.to(device), **{name: value.to(device) for name, value in text.items()})
        cosine = torch.nn.functional.cosine_similarity(out.image_embeds.float(), out.text_embeds.float())
        return (cosine.clamp(min=0) * 100).cpu().numpy()

    def estimate(self, rows: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
        return {"clip_score": mean_estimate(rows[f"clip:{self.model}"], self.task.groups, low=0.0, high=100.0)}

    def facts(self) -> dict[str, Any]:
        return {"clip": Path(self.model).name, "clip_weights": self.weights, "prompts_cut": self.cut}
