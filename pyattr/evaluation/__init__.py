"""Scores of methods and of samples, with their uncertainty."""

from .ablation import ClassAblation, Share, class_ablation, share
from .agreement import Agreement, Comparison, PairedComparison, agreement, compare, compare_paired
from .classifier import Classifier
from .clip import clip
from .convergence import Convergence, Principal, convergence, nested_codes, pca
from .distances import Distance, Distances, change_sizes, feature_distances, fid, l2, lpips
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
    "PairedComparison",
    "Principal",
    "Share",
    "agreement",
    "change_sizes",
    "class_ablation",
    "clip",
    "compare",
    "compare_paired",
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
