"""The projection of a linear layer's per-sample gradient by definition: form it whole in float64, then project it."""

import torch

from .gaussian_project import gaussian_project
from .multisketch_project import multisketch_project
from .rademacher_project import rademacher_project
from .sparse_project import sparse_project


def linear_grad_project(
    acts, errs, proj_dim, bias=False, kind="rademacher", nonzeros=1, seed=0, stream=0, column_offset=0, scale=1.0
):  # [B, T, I], [B, T, O] -> [B, D]
    wide_acts, wide_errs = acts.to(torch.float64), errs.to(torch.float64)
    weight = torch.einsum("bto,bti->boi", wide_errs, wide_acts)
    out = project_gradient(weight, wide_errs.sum(1), proj_dim, bias, kind, nonzeros, seed, stream, column_offset, scale)
    return out.to(torch.promote_types(torch.promote_types(acts.dtype, errs.dtype), torch.float32))


def project_gradient(
    weight, bias_gradient, proj_dim, bias, kind, nonzeros, seed, stream, column_offset, scale
):  # [B, O, ...], [B, O] -> [B, D]
    """The flat gradient, weight's columns before those of the bias, times the matrix of a kind."""
    flat = torch.cat([weight.flatten(1), bias_gradient], 1) if bias else weight.flatten(1)
    if kind == "sparse":
        return sparse_project(flat, proj_dim, seed, stream, column_offset, nonzeros, scale)
    project = {"rademacher": rademacher_project, "gaussian": gaussian_project, "multisketch": multisketch_project}[kind]
    return project(flat, proj_dim, seed, stream, column_offset, scale)
