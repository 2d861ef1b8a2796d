"""Noise schedules, losses, guidance and samplers: functions of a callable network, whatever it is.

No network, text or file may enter it.
"""

from pixart.diffusion.guidance import Prediction, guide, make_denoise
from pixart.diffusion.losses import diffusion_loss
from pixart.diffusion.schedule import DiffusionConfig, make_schedule

__all__ = ["DiffusionConfig", "Prediction", "diffusion_loss", "guide", "make_denoise", "make_schedule"]
