"""What the projections share: argument checks and backend records."""

from typing import NamedTuple

import torch

from .. import arrays, backends, threads
from ..backends import Backend
from ._arguments import check_integer, check_scale
from ._linear import register_pair

DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # pyattr::Dtype


class Matrix(NamedTuple):
    """A dense random matrix with its scale: everything that defines it but its width."""

    seed: int
    stream: int
    column_offset: int
    scale: float


def check_grads(op: str, grads, name: str = "grads", shape: str = "[B, P]"):
    """``grads`` as a tensor [B, P] of floating-point numbers, and what turns the result back into its kind of array."""
    grads, restore = arrays.to_torch(grads, op, name)
    if grads.layout != torch.strided or grads.is_nested:
        layout = "nested" if grads.is_nested else grads.layout
        raise TypeError(f"{op}: {name} must be a dense (strided) tensor, got layout {layout}")
    if grads.dim() != 2:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {list(grads.shape)}")
    if grads.dtype not in DTYPES and grads.dtype != torch.float64:
        raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {grads.dtype}")
    return grads, restore


def check_matrix(op: str, matrix, max_offset: int):
    """The same matrix with those of its parameters checked that several kinds have; a kind's own come checked by its op."""
    limits = {"seed": 2**32 - 1, "stream": 2**32 - 1, "column_offset": max_offset}
    checked = {
        name: check_integer(op, name, getattr(matrix, name), 0, limits[name])
        for name in limits
        if name in matrix._fields
    }
    return matrix._replace(scale=check_scale(op, matrix.scale), **checked)


class Projection:
    """One random matrix M [D, P] as an op: ``Y = scale * G M^T``, its transpose, and their derivatives.

    Args:
        name: the op's name.
        definition: ``(grads, proj_dim, *matrix) -> [B, D]``, the reference.
        adjoint: ``(coefficients, num_columns, *matrix) -> [B, P]``, the transpose.
        max_columns: the largest ``column_offset + P`` that the generator's 32-bit counter reaches.
        matrix: the named tuple of the parameters; seed, stream and scale among them.
        max_proj_dim: the largest D.
        transposes: by backend, kernels of the transpose, with the arguments of ``adjoint``, which serves all others.
    """

    def __init__(
        self,
        name: str,
        definition,
        adjoint,
        max_columns: int,
        matrix: type = Matrix,
        max_proj_dim: int = 2**32,
        transposes: dict | None = None,
    ):
        self.transposes = transposes or {}
        self.max_proj_dim = max_proj_dim
        self.name, self.definition, self.adjoint, self.max_columns = name, definition, adjoint, max_columns
        backends.register(
            name,
            [
                Backend("reference", definition, backends.always, lambda *args: []),
                Backend("cpu", self._run_cpu, backends.cpu_unavailable(f"{name}_cpu"), self._unsupported("cpu")),
                Backend("cuda", self._run_cuda, backends.cuda_unavailable(f"{name}_cuda"), self._unsupported("cuda")),
                Backend("triton", self._run_triton, backends.triton_unavailable, self._unsupported("triton")),
            ],
        )
        self._op, self._transpose_op = register_pair(name, self._project, self._transpose, matrix)

    def __call__(self, grads, proj_dim, matrix, backend):
        """Check the arguments, choose the backend, run. Public ops carry the documentation."""
        grads, restore = check_grads(self.name, grads)
        proj_dim = check_integer(self.name, "proj_dim", proj_dim, 1, self.max_proj_dim)
        matrix = check_matrix(self.name, matrix, self.max_columns - grads.shape[1])
        return restore(self._op(grads, proj_dim, *matrix, backend))

    def transpose(self, op: str, coefficients, num_columns, matrix, backend):
        """The same for the public op of the transpose, ``op``."""
        coefficients, restore = check_grads(op, coefficients, "coefficients", "[B, D]")
        num_columns = check_integer(op, "num_columns", num_columns, 0, self.max_columns)
        matrix = check_matrix(op, matrix, self.max_columns - num_columns)
        return restore(self._transpose_op(coefficients, num_columns, *matrix, backend))

    # Backends. All take (grads [B, P], proj_dim, *matrix).

    def _unsupported(self, name: str):
        return lambda grads, *_: backends.placement_unsupported(name, grads=grads)

    def _address_and_sizes(self, grads):
        return (grads.data_ptr(), DTYPES[grads.dtype], *grads.shape, *grads.stride())

    def _run_cpu(self, grads, proj_dim, *matrix):
        out = torch.empty(grads.shape[0], proj_dim, dtype=torch.float32, device=grads.device)
        run = getattr(backends.extension(), f"{self.name}_cpu")
        run(*self._address_and_sizes(grads), out.data_ptr(), proj_dim, *matrix, threads.usable(torch.get_num_threads()))
        return out

    def _run_cuda(self, grads, proj_dim, *matrix):
        module, device = backends.extension(), grads.device
        out = torch.empty(grads.shape[0], proj_dim, dtype=torch.float32, device=grads.device)
        arguments = (*self._address_and_sizes(grads), out.data_ptr(), proj_dim, *matrix)
        size = getattr(module, f"{self.name}_cuda_workspace")(*arguments)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
        getattr(module, f"{self.name}_cuda")(*arguments, workspace.data_ptr(), size, stream, device.index)
        return out

    def _run_triton(self, grads, proj_dim, *matrix):
        from importlib import import_module

        out = torch.empty(grads.shape[0], proj_dim, dtype=torch.float32, device=grads.device)
        getattr(import_module(f"pyattr.triton_kernels.{self.name}"), self.name)(grads, out, *matrix)
        return out

    def _project(self, grads, proj_dim, *matrix_and_backend):
        *matrix, backend = matrix_and_backend
        return backends.choose(self.name, backend, grads, proj_dim, *matrix).run(grads, proj_dim, *matrix)

    def _transpose(self, coefficients, num_columns, *matrix_and_backend):
        """[B, D] -> [B, P]: the adjoint's definition on the input's device, or a kernel of the backend's where there is one."""
        *matrix, backend = matrix_and_backend
        if self.transposes:
            chosen = backends.choose(self.name, backend, coefficients, num_columns, *matrix).name
            if chosen in self.transposes:
                return self.transposes[chosen](coefficients, num_columns, *matrix)
        return self.adjoint(coefficients, num_columns, *matrix)
