"""Diffusion models: schedules, training, sampling with every random number kept, and gradient features."""

from . import analytic, features, losses
from .checkpoint import checkpoints, load_model, save_model
from .losses import Loss
from .noise import noise
from .presets import PRESETS, unet
from .progress import Progress
from .sampling import Samples, sample
from .schedule import Schedule
from .storage import DamagedFileError
from .train import Training, train

__all__ = [
    "PRESETS",
    "DamagedFileError",
    "Loss",
    "Progress",
    "Samples",
    "Schedule",
    "Training",
    "analytic",
    "checkpoints",
    "features",
    "load_model",
    "losses",
    "noise",
    "sample",
    "save_model",
    "train",
    "unet",
]
