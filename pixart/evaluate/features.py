"""Frozen networks that turn images into features: the Inception of FID, or any vision model of timm or transformers."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pixart.encoders.fingerprint import fingerprint
from pixart.encoders.vision import VisionModel, load_vision_model
from pixart.errors import InputError, missing_extra
from pixart.evaluate.resize import Filter, resize
from pixart.files import digest_file

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"


@dataclass(frozen=True)
class Extractor:
    """A frozen network: images → features."""

    name: str
    weights: str  # fingerprint of its weights
    side: int  # side of its square input images, in pixels
    size: int  # length of a feature vector
    compute: Callable[[Tensor], Tensor]  # (B, 3, side, side) in [0, 255] → (B, size)
    device: torch.device

    @torch.no_grad()
    def __call__(self, images: np.ndarray, filter: Filter) -> np.ndarray:
        """Images (B, H, W, 3) uint8 → (B, size) float32."""
        return self.compute(resize(images, self.side, filter).to(self.device)).float().cpu().numpy()


def load_extractor(name: str, device: torch.device, inception: str | None = None) -> Extractor:
    """Load a network by name.

    Args:
        name: "inception"; "efficientnet_lite0"; the folder of a transformers vision model; a model name of timm, for
            its pretrained weights; or NAME=FILE for weights from a file.
        inception: the file with Inception's weights, by default in torch's cache.

    Raises:
        InputError: there is no such network, or its weights or a package are missing.
    """
    if name == "inception":
        return _load_inception(device, inception)
    return _wrap(load_vision_model(name, "frechet:"), device)


def _load_inception(device: torch.device, file: str | None) -> Extractor:
    path = Path(file) if file else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not path.is_file():
        raise InputError(
            f"inception: there are no weights at {path}; download {INCEPTION_URL} to there, or name the file with "
            "--inception FILE"
        )
    try:
        module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError:
        raise missing_extra("torch-fidelity", "evaluate", "the Inception network of FID") from None
    try:  # refuses pickles with code, which torch-fidelity would run
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise exceptions of many kinds
        raise InputError(
            f"inception: {path} is no file of weights ({str(error).splitlines()[0][:90]}); download {INCEPTION_URL}"
        ) from None
    network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
    network = network.eval().requires_grad_(False).to(device)

    def compute(images: Tensor) -> Tensor:  # it accepts only bytes, so the filter "clean" is rounded
        return network(images.round().to(torch.uint8))[0]

    return Extractor("inception", digest_file(path), 299, 2048, compute, device)


def _wrap(model: VisionModel, device: torch.device) -> Extractor:
    model, weights = model.to(device), fingerprint(model.network)
    network = model.network
    if not model.transformers:
        network.reset_classifier(0)

    def compute(images: Tensor) -> Tensor:
        given = model.normalise(images / 255)
        if not model.transformers:
            return network(given)
        found = network(pixel_values=given)
        pooled = getattr(found, "pooler_output", None)
        return found.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)

    size = network.config.hidden_size if model.transformers else network.num_features
    return Extractor(model.name, weights, model.side, size, compute, device)
