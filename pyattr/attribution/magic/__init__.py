"""MAGIC: derivatives of a function of the trained model in the weights of training items, through the whole training."""

from .functions import LogLikelihood, NegativeLoss, NoiseLoss
from .method import MAGIC
from .schemes import SCHEMES, Scheme
from .smoothness import Recipe, Smoothness, grid, metasmoothness, search
from .training import Adam

__all__ = [
    "MAGIC",
    "SCHEMES",
    "Adam",
    "LogLikelihood",
    "NegativeLoss",
    "NoiseLoss",
    "Recipe",
    "Scheme",
    "Smoothness",
    "grid",
    "metasmoothness",
    "search",
]
