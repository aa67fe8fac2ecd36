"""Scores of methods and of samples, with their uncertainty."""

from ..diffusion.likelihood import bits_per_dimension
from .ablation import ClassAblation, Share, class_ablation, share
from .agreement import Agreement, Comparison, PairedComparison, agreement, compare, compare_paired
from .classifier import Classifier
from .clip import clip
from .convergence import Convergence, Principal, convergence, nested_codes, pca
from .counterfactual import counterfactual
from .counterfactual_results import Counterfactuals, Effects
from .distances import Distance, Distances, change_sizes, feature_distances, fid, l2, lpips
from .features import Extractor, inception
from .foreign import read_bergson, read_dattri
from .frechet import frechet_distance
from .ground_truth import GroundTruth, subsets
from .lds import LDS, Interval, LDSDifference, lds, lds_difference
from .leave_one_out import leave_one_out_masks
from .scores import Scores
from .subset_models import build_ground_truth
from .tail_patch import TailPatch, tail_patch
from .tuning import Tuned, tune_on_split, two_folds

__all__ = [
    "LDS",
    "Agreement",
    "ClassAblation",
    "Classifier",
    "Comparison",
    "Convergence",
    "Counterfactuals",
    "Distance",
    "Distances",
    "Effects",
    "Extractor",
    "GroundTruth",
    "Interval",
    "LDSDifference",
    "PairedComparison",
    "Principal",
    "Scores",
    "Share",
    "TailPatch",
    "Tuned",
    "agreement",
    "bits_per_dimension",
    "build_ground_truth",
    "change_sizes",
    "class_ablation",
    "clip",
    "compare",
    "compare_paired",
    "convergence",
    "counterfactual",
    "feature_distances",
    "fid",
    "frechet_distance",
    "inception",
    "l2",
    "lds",
    "lds_difference",
    "leave_one_out_masks",
    "lpips",
    "nested_codes",
    "pca",
    "read_bergson",
    "read_dattri",
    "share",
    "subsets",
    "tail_patch",
    "tune_on_split",
    "two_folds",
]
