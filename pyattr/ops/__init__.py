"""The kernels: one function per op, on every backend."""

from ._topk import TopK
from .attention_jvp import AttentionJvp, attention_jvp
from .code_topk import code_topk
from .conv2d_grad_project import conv2d_grad_project
from .gaussian_project import gaussian_project, normal_matrix
from .group_norm_silu_jvp import GroupNormJvp, group_norm_silu_jvp
from .hadamard_project import hadamard_project
from .kron_grad_project import kron_grad_project
from .linear_grad_project import linear_grad_project
from .mask_project import mask_indices, mask_project
from .multisketch_project import multisketch_project
from .patch_mean import PatchMean, patch_mean
from .patch_topk import PatchTopK, Winners, patch_topk
from .rademacher_project import rademacher_project, sign_matrix
from .sparse_project import sketch_entries, sparse_project, sparse_project_transpose

__all__ = [
    "AttentionJvp",
    "GroupNormJvp",
    "PatchMean",
    "PatchTopK",
    "TopK",
    "Winners",
    "attention_jvp",
    "code_topk",
    "conv2d_grad_project",
    "gaussian_project",
    "group_norm_silu_jvp",
    "hadamard_project",
    "kron_grad_project",
    "linear_grad_project",
    "mask_indices",
    "mask_project",
    "multisketch_project",
    "normal_matrix",
    "patch_mean",
    "patch_topk",
    "rademacher_project",
    "sign_matrix",
    "sketch_entries",
    "sparse_project",
    "sparse_project_transpose",
]
