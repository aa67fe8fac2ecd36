"""Diffusion models: schedules, training, sampling with every random number kept, and gradient features."""

from . import analytic, features, latent, losses
from .checkpoint import checkpoints, load_model, save_model
from .conditioned import Conditioned
from .guidance import Guided
from .losses import Loss
from .noise import noise
from .presets import PRESETS, unet
from .progress import Progress
from .sampling import Samples, sample
from .schedule import ScaledLinearSchedule, Schedule
from .storage import DamagedFileError
from .train import Training, train

__all__ = [
    "PRESETS",
    "Conditioned",
    "DamagedFileError",
    "Guided",
    "Loss",
    "Progress",
    "Samples",
    "ScaledLinearSchedule",
    "Schedule",
    "Training",
    "analytic",
    "checkpoints",
    "features",
    "latent",
    "load_model",
    "losses",
    "noise",
    "sample",
    "save_model",
    "train",
    "unet",
]
