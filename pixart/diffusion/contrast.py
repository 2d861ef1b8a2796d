"""Contrastive flow matching (arXiv 2506.05350): flows of different images are pushed apart. `diffusion.contrast`."""

from torch import Tensor

from pixart.diffusion.losses import per_image, prediction_target
from pixart.errors import InputError


def contrast(loss: Tensor, output: Tensor, x0: Tensor, noise: Tensor, weight: float) -> dict[str, Tensor]:
    """The loss of the paper (section 3): the loss (B,) minus `weight` times the squared error towards another velocity.
    That is the one of the next image of the batch, whose images are in random order.

    Args:
        output: predicted velocities (B, C, H, W).
        x0, noise: (B, C, H, W).

    Returns:
        fp32 (B,) each: "loss", and "contrast", the error towards the other image.

    Raises:
        InputError: there is no other image.
    """
    if len(x0) < 2:
        raise InputError("diffusion.contrast needs two images at least in a micro-batch; raise train.batch_size")
    other = prediction_target("velocity", x0.float(), noise, 0, 0).roll(1, dims=0)
    error = per_image((output.float() - other) ** 2)
    return {"loss": loss - weight * error, "contrast": error}
