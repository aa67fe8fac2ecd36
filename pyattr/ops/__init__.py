"""The kernels: one function per op, on every backend."""

from .gaussian_project import gaussian_project, normal_matrix
from .hadamard_project import hadamard_project
from .mask_project import mask_indices, mask_project
from .rademacher_project import rademacher_project, sign_matrix
from .sparse_project import sketch_entries, sparse_project

__all__ = [
    "gaussian_project",
    "hadamard_project",
    "mask_indices",
    "mask_project",
    "normal_matrix",
    "rademacher_project",
    "sign_matrix",
    "sketch_entries",
    "sparse_project",
]
