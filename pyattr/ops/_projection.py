"""What the dense projections share: argument checks, backend records, autograd and forward-mode rules, registration."""

import operator
from typing import NamedTuple

import torch

from .. import arrays, backends
from ..backends import Backend

DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # pyattr::Dtype


class Matrix(NamedTuple):
    """A random matrix with its scale: everything that defines it but its width."""

    seed: int
    stream: int
    column_offset: int
    scale: float


class Projection:
    """One random matrix M [D, P] as an op: ``Y = scale * G M^T``, its transpose, and their derivatives.

    Args:
        name: the op's name.
        definition: ``(grads, proj_dim, *Matrix) -> [B, D]``, the reference.
        adjoint: ``(coefficients, num_columns, *Matrix) -> [B, P]``, the transpose.
        max_columns: the largest ``column_offset + P`` that the generator's 32-bit counter reaches.
    """

    def __init__(self, name: str, definition, adjoint, max_columns: int):
        self.name, self.definition, self.adjoint, self.max_columns = name, definition, adjoint, max_columns
        backends.register(
            name,
            [
                Backend("reference", definition, backends.always, lambda *args: []),
                Backend("cpu", self._run_cpu, backends.cpu_unavailable(f"{name}_cpu"), self._cpu_unsupported),
                Backend("cuda", self._run_cuda, backends.cuda_unavailable(f"{name}_cuda"), self._cuda_unsupported),
                Backend("triton", self._run_triton, backends.triton_unavailable, self._triton_unsupported),
            ],
        )
        self._register_with_torch()

    def __call__(self, grads, proj_dim, seed, stream, column_offset, scale, backend):
        """Check the arguments, choose the backend, run. Public ops carry the documentation."""
        grads, restore = arrays.to_torch(grads, self.name, "grads")
        if grads.dim() != 2:
            raise ValueError(f"{self.name}: grads must have shape [B, P], got {list(grads.shape)}")
        if grads.dtype not in DTYPES and grads.dtype != torch.float64:
            raise TypeError(f"{self.name}: grads must be float16, bfloat16, float32 or float64, got {grads.dtype}")
        proj_dim = self._integer("proj_dim", proj_dim, 1, 2**32)
        matrix = Matrix(
            self._integer("seed", seed, 0, 2**32 - 1),
            self._integer("stream", stream, 0, 2**32 - 1),
            self._integer("column_offset", column_offset, 0, self.max_columns - grads.shape[1]),
            float(scale),
        )
        if torch.compiler.is_compiling():
            # Dynamo drops a custom Function's jvp, so compiled code sees the registered op, which has reverse mode only.
            return restore(self.library_op(grads, proj_dim, *matrix, backend))
        name = backends.choose(self.name, backend, grads, proj_dim, *matrix).name
        return restore(_Project.apply(grads, self, proj_dim, matrix, name))

    def _integer(self, argument: str, value, low: int, high: int) -> int:
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{self.name}: {argument} must be an integer, got {type(value).__name__}") from None
        if not low <= value <= high:
            raise ValueError(f"{self.name}: {argument} must lie in [{low}, {high}], got {value}")
        return value

    # Backends. All take (grads [B, P], proj_dim, seed, stream, column_offset, scale).

    def _device_and_dtype(self, grads, device: str) -> list[str]:
        reasons = []
        if grads.device.type != device:
            reasons.append(f"grads is on {grads.device}, this backend needs {device}")
        if grads.dtype not in DTYPES:
            reasons.append(f"grads is {grads.dtype}, this backend takes float16, bfloat16 and float32")
        return reasons

    def _cpu_unsupported(self, grads, *_):
        return self._device_and_dtype(grads, "cpu")

    def _cuda_unsupported(self, grads, *_):
        return self._device_and_dtype(grads, "cuda")

    def _triton_unsupported(self, grads, *_):
        return self._device_and_dtype(grads, "cpu" if backends.triton_interpreted() else "cuda")

    def _address_and_sizes(self, grads):
        return (grads.data_ptr(), DTYPES[grads.dtype], *grads.shape, *grads.stride())

    def _run_cpu(self, grads, proj_dim, *matrix):
        out = torch.empty(grads.shape[0], proj_dim)
        run = getattr(backends.extension(), f"{self.name}_cpu")
        run(*self._address_and_sizes(grads), out.data_ptr(), proj_dim, *matrix, torch.get_num_threads())
        return out

    def _run_cuda(self, grads, proj_dim, *matrix):
        module, device = backends.extension(), grads.device
        out = torch.empty(grads.shape[0], proj_dim, device=device)
        arguments = (*self._address_and_sizes(grads), out.data_ptr(), proj_dim, *matrix)
        size = getattr(module, f"{self.name}_cuda_workspace")(*arguments)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
        getattr(module, f"{self.name}_cuda")(*arguments, workspace.data_ptr(), size, stream, device.index)
        return out

    def _run_triton(self, grads, proj_dim, *matrix):
        from importlib import import_module

        out = torch.empty(grads.shape[0], proj_dim, device=grads.device)
        getattr(import_module(f"pyattr.triton_kernels.{self.name}"), self.name)(grads, out, *matrix)
        return out

    def run(self, grads, proj_dim, matrix: Matrix, backend: str | None):
        """Choose the backend and run it."""
        return backends.choose(self.name, backend, grads, proj_dim, *matrix).run(grads, proj_dim, *matrix)

    def run_adjoint(self, coefficients, num_columns, matrix: Matrix):
        """[B, D] -> [B, P]: blocks of the matrix, generated on the input's device, times a library matmul."""
        return self.adjoint(coefficients, num_columns, *matrix)

    def _register_with_torch(self):
        name = f"pyattr::{self.name}"

        def project(
            grads: torch.Tensor,
            proj_dim: int,
            seed: int,
            stream: int,
            column_offset: int,
            scale: float,
            backend: str | None,
        ) -> torch.Tensor:
            return self.run(grads, proj_dim, Matrix(seed, stream, column_offset, scale), backend)

        def transpose(
            coefficients: torch.Tensor, num_columns: int, seed: int, stream: int, column_offset: int, scale: float
        ) -> torch.Tensor:
            return self.run_adjoint(coefficients, num_columns, Matrix(seed, stream, column_offset, scale))

        self.library_op = torch.library.custom_op(name, project, mutates_args=())
        transpose_op = torch.library.custom_op(f"{name}_transpose", transpose, mutates_args=())

        def result_dtype(dtype):
            return torch.float64 if dtype == torch.float64 else torch.float32

        @self.library_op.register_fake
        def _(grads, proj_dim, *_):
            return grads.new_empty((grads.shape[0], proj_dim), dtype=result_dtype(grads.dtype))

        @transpose_op.register_fake
        def _(coefficients, num_columns, *_):
            return coefficients.new_empty((coefficients.shape[0], num_columns), dtype=result_dtype(coefficients.dtype))

        def setup_context(ctx, inputs, output):
            grads, _, *matrix, _ = inputs
            ctx.num_columns, ctx.dtype, ctx.matrix = grads.shape[1], grads.dtype, matrix

        def backward(ctx, out_bar):
            grads_bar = transpose_op(out_bar, ctx.num_columns, *ctx.matrix).to(ctx.dtype)
            return grads_bar, None, None, None, None, None, None

        self.library_op.register_autograd(backward, setup_context=setup_context)


class _Project(torch.autograd.Function):
    """Y = scale * G M^T. Linear in G, so the tangent rule is the op itself and the cotangent rule its transpose."""

    @staticmethod
    def forward(grads, op: Projection, proj_dim: int, matrix: Matrix, backend: str):
        return op.run(grads, proj_dim, matrix, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grads, ctx.op, ctx.proj_dim, ctx.matrix, ctx.backend = inputs
        ctx.num_columns, ctx.dtype = grads.shape[1], grads.dtype

    @staticmethod
    def backward(ctx, out_bar):
        grads_bar = _Transpose.apply(out_bar, ctx.op, ctx.num_columns, ctx.matrix, ctx.backend)
        return grads_bar.to(ctx.dtype), None, None, None, None

    @staticmethod
    def jvp(ctx, grads_dot, *_):
        return _Project.apply(grads_dot, ctx.op, ctx.proj_dim, ctx.matrix, ctx.backend)

    @staticmethod
    def vmap(info, in_dims, grads, op, proj_dim, matrix, backend):
        flat = grads.movedim(in_dims[0], 0).flatten(0, 1)  # [V * B, P]
        return _Project.apply(flat, op, proj_dim, matrix, backend).unflatten(0, (info.batch_size, -1)), 0


class _Transpose(torch.autograd.Function):
    """X = scale * C M, the adjoint of :class:`_Project`; each is the other's derivative."""

    @staticmethod
    def forward(coefficients, op: Projection, num_columns: int, matrix: Matrix, backend: str):
        return op.run_adjoint(coefficients, num_columns, matrix)

    @staticmethod
    def setup_context(ctx, inputs, output):
        coefficients, ctx.op, ctx.num_columns, ctx.matrix, ctx.backend = inputs
        ctx.proj_dim, ctx.dtype = coefficients.shape[1], coefficients.dtype

    @staticmethod
    def backward(ctx, x_bar):
        out = _Project.apply(x_bar, ctx.op, ctx.proj_dim, ctx.matrix, ctx.backend)
        return out.to(ctx.dtype), None, None, None, None

    @staticmethod
    def jvp(ctx, coefficients_dot, *_):
        return _Transpose.apply(coefficients_dot, ctx.op, ctx.num_columns, ctx.matrix, ctx.backend)

    @staticmethod
    def vmap(info, in_dims, coefficients, op, num_columns, matrix, backend):
        flat = coefficients.movedim(in_dims[0], 0).flatten(0, 1)
        out = _Transpose.apply(flat, op, num_columns, matrix, backend)
        return out.unflatten(0, (info.batch_size, -1)), 0


def check_indices(op: str, argument: str, indices, limit: int) -> torch.Tensor:
    """An int64 tensor of row or column numbers in [0, limit)."""
    indices = torch.as_tensor(indices)
    if indices.numel() == 0:
        indices = indices.to(torch.int64)
    if indices.dim() != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
        raise TypeError(f"{op}: {argument} must be a sequence of integers, got {indices.dtype} {list(indices.shape)}")
    if indices.numel() and not (0 <= int(indices.min()) and int(indices.max()) < limit):
        raise ValueError(f"{op}: {argument} must lie in [0, {limit}), got {int(indices.min())}..{int(indices.max())}")
    return indices.to(torch.int64)


def check_key(op: str, seed, stream) -> tuple[int, int]:
    """The two words of a Philox key."""
    for argument, value in (("seed", seed), ("stream", stream)):
        if not isinstance(value, int) or not 0 <= value < 2**32:
            raise ValueError(f"{op}: {argument} must be an integer in [0, {2**32 - 1}], got {value!r}")
    return seed, stream
