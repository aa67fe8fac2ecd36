"""Diffusion models: schedules, training, sampling with every random number kept, and gradient features."""

from . import analytic, features, latent, losses
from .checkpoint import checkpoints, load_model, save_model
from .conditioned import Conditioned
from .guidance import Guided
from .likelihood import Likelihood, bits_per_dimension, dequantise, log_likelihood
from .losses import Loss
from .noise import noise
from .presets import PRESETS, unet
from .progress import Progress
from .sampling import Samples, sample
from .schedule import ScaledLinearSchedule, Schedule
from .scorenet import ScoreLoss, ScoreNet
from .sde import NoiseScore, VarianceExploding, VariancePreserving
from .storage import DamagedFileError
from .train import Training, train

__all__ = [
    "PRESETS",
    "Conditioned",
    "DamagedFileError",
    "Guided",
    "Likelihood",
    "Loss",
    "NoiseScore",
    "Progress",
    "Samples",
    "ScaledLinearSchedule",
    "Schedule",
    "ScoreLoss",
    "ScoreNet",
    "Training",
    "VarianceExploding",
    "VariancePreserving",
    "analytic",
    "bits_per_dimension",
    "checkpoints",
    "dequantise",
    "features",
    "latent",
    "load_model",
    "log_likelihood",
    "losses",
    "noise",
    "sample",
    "save_model",
    "train",
    "unet",
]
