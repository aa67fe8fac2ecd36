"""Scores of methods and of samples, with their uncertainty."""

from .ablation import ClassAblation, Share, class_ablation, share
from .agreement import Agreement, Comparison, agreement, compare
from .classifier import Classifier
from .clip import clip
from .convergence import Convergence, Principal, convergence, nested_codes, pca
from .distances import Distance, Distances, feature_distances, fid, l2, lpips
from .features import Extractor, inception
from .frechet import frechet_distance

__all__ = [
    "Agreement",
    "ClassAblation",
    "Classifier",
    "Comparison",
    "Convergence",
    "Distance",
    "Distances",
    "Extractor",
    "Principal",
    "Share",
    "agreement",
    "class_ablation",
    "clip",
    "compare",
    "convergence",
    "feature_distances",
    "fid",
    "frechet_distance",
    "inception",
    "l2",
    "lpips",
    "nested_codes",
    "pca",
    "share",
]
