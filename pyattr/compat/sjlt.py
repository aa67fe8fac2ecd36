"""sjlt's SJLTProjection (0.1.7): on any device, any ``c``, the same bits in every run, and differentiable.

Instead of ``from sjlt import SJLTProjection``::

    import torch
    from pyattr.compat.sjlt import SJLTProjection
    sketch = SJLTProjection(original_dim=1024, proj_dim=128, c=4, device="cpu")
    y = sketch(torch.randn(100, 1024))  # [100, 128]
    x = sketch.transpose(y)  # [100, 1024]

The matrix is the one in the module's buffers, as it is with sjlt: pyattr's own sparse matrix, which no one stores, is
:func:`pyattr.ops.sparse_project`. Here are also ``get_cuda_info``, ``CUDA_AVAILABLE``, ``EXTENSION_AVAILABLE`` and the two
functions of ``sjlt._C``.

How: on the CPU each row adds its entries into its outputs in their order (``scatter_add_``); elsewhere, where that would need
atomics, entries are sorted by output and each output sums its own in that order (``embedding_bag``). Neither keeps anything
between calls, so that what is written into the buffers always counts. The GPU's way was tested on the CPU.
"""

import torch
from torch.nn import functional

from ..ops._arguments import check_integer

CUDA_AVAILABLE, EXTENSION_AVAILABLE = torch.cuda.is_available(), True  # sjlt's; there is nothing here to compile
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Columns and rows worked on at a time. Columns are fixed, so that no other row has a say in a row's bits.
CPU_COLUMNS, GPU_COLUMNS, ROWS = 1 << 16, 1 << 19, 64


class SJLTProjection(torch.nn.Module):
    """Sparse Johnson-Lindenstrauss transform by stored indices and signs, with sjlt's interface.

    ``y[b, k] = c^-1/2 * sum over (p, j) with rand_indices[p, j] = k of rand_signs[p, j] * x[b, p]``. Over random buffers
    ``E <y, y'> = <x, x'>``, and ``Var <y, y'> = (|x|^2 |x'|^2 + <x, x'>^2 - 2/c * sum_p x_p^2 x'_p^2) / K``: the c indices of a
    column are drawn with replacement, as sjlt draws them, so that they may meet.

    Args:
        original_dim: P, at least 1.
        proj_dim: K, at least c.
        c: entries of each column, at least 1 (sjlt's kernel overruns its stack above 16; this does not).
        threads, fixed_blocks: sjlt's launch configuration; kept as attributes, without effect.
        device: where the buffers are drawn, and where inputs are moved to.
        generator: on ``device``; torch's global one by default, from which the buffers come as sjlt's do, so that the same
            ``torch.manual_seed`` gives the same matrix.

    Attributes:
        rand_indices: [P, c] int64 buffer.
        rand_signs: [P, c] int8 buffer of +-1. Both may be overwritten at any time.

    Raises:
        TypeError, ValueError: a dimension is not an integer, or out of its range.
        RuntimeError: ``device`` is a GPU and torch sees none.

    Memory: 9 c bytes per column, as with sjlt.

    Source: Kane, Nelson, "Sparser Johnson-Lindenstrauss Transforms", J. ACM 2014; Hu et al., "GraSS", 2025.
    """

    def __init__(self, original_dim, proj_dim, c=1, threads=1024, fixed_blocks=84, device="cuda", *, generator=None):
        super().__init__()
        sizes = {"original_dim": original_dim, "proj_dim": proj_dim, "c": c}
        original_dim, proj_dim, c = (
            check_integer("SJLTProjection", name, size, 1, 2**63 - 1) for name, size in sizes.items()
        )
        if proj_dim < c:
            raise ValueError(f"SJLTProjection: proj_dim must be at least c = {c}, got {proj_dim}")
        device = torch.device(device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("SJLTProjection: torch sees no CUDA device; pass device='cpu'")
        self.original_dim, self.proj_dim, self.c = original_dim, proj_dim, c
        self.threads, self.fixed_blocks = max(32, threads // 32 * 32), fixed_blocks
        self.normalization_factor = c**-0.5
        drawn = {"size": (original_dim, c), "device": device, "generator": generator}
        self.register_buffer("rand_indices", torch.randint(0, proj_dim, dtype=torch.int64, **drawn))
        self.register_buffer("rand_signs", (torch.randint(0, 2, **drawn) * 2 - 1).to(torch.int8))

    @property
    def device(self) -> torch.device:
        return self.rand_indices.device

    def forward(self, x):
        """Project.

        Args:
            x: [B, P] float16, bfloat16, float32 or float64, any strides.

        Returns:
            [B, K] of the dtype of ``x``; sums are float32 (float64 for float64), their order fixed by the buffers alone. NaN
            and inf propagate. Differentiable in both modes and any order.

        Raises:
            TypeError: the dtype is another, or ``x`` no dense tensor.
            ValueError: the shape is another, or the buffers hold an index outside [0, K).

        Extra memory: copies of pieces, of 64 rows and 2^16 columns on the CPU (34 MB; 67 MB in float64), of 64 rows and 2^19
        columns on a GPU (270 MB and 20 MB c; 540 MB in float64); for 16-bit inputs, the result in float32.
        """
        return self._apply_sketch("forward", x, self.original_dim, self.proj_dim, False)

    def transpose(self, y):
        """The transpose, ``x[b, p] = c^-1/2 * sum_j rand_signs[p, j] * y[b, rand_indices[p, j]]``: [B, K] -> [B, P].

        Dtypes, errors, memory and derivatives are those of :meth:`forward`.
        """
        return self._apply_sketch("transpose", y, self.proj_dim, self.original_dim, True)

    def _apply_sketch(self, method, x, width, out_width, transposed):
        op = f"SJLTProjection.{method}"
        _check_input(op, x, width)
        return _sketch(op, x.to(self.device), self.rand_indices, self.rand_signs, out_width, transposed)

    def extra_repr(self) -> str:
        return f"original_dim={self.original_dim}, proj_dim={self.proj_dim}, c={self.c}, device={self.device}"

    def get_compression_ratio(self) -> float:
        """P / K."""
        return self.original_dim / self.proj_dim

    def get_sparsity_ratio(self) -> float:
        """The share of zeros in the matrix if no column draws an index twice, 1 - c / K."""
        return 1.0 - self.c / self.proj_dim


def sjlt_projection_cuda(x, rand_indices, rand_signs, proj_dim, c, threads=1024, fixed_blocks=84):
    """``sjlt._C.sjlt_projection_cuda``, on any device: [B, P], [P, c], [P, c] -> [[B, proj_dim]].

    Formula, scale, variance, dtypes, errors and memory are those of :meth:`SJLTProjection.forward`; TypeError or ValueError
    besides where a buffer is not int64 (indices) or int8 (signs) [P, c] on the device of ``x``.
    """
    op = "sjlt_projection_cuda"
    _check_buffers(op, x, rand_indices, rand_signs, c)
    _check_input(op, x, rand_indices.shape[0])
    return [_sketch(op, x, rand_indices, rand_signs, proj_dim, False)]


def sjlt_transpose_cuda(y, rand_indices, rand_signs, original_dim, c, threads=1024, fixed_blocks=84):
    """``sjlt._C.sjlt_transpose_cuda``, on any device: [B, K], [P, c], [P, c] -> [[B, P]].

    As :func:`sjlt_projection_cuda`, of :meth:`SJLTProjection.transpose`; ValueError too where ``original_dim`` is not P.
    """
    op = "sjlt_transpose_cuda"
    _check_buffers(op, y, rand_indices, rand_signs, c)
    _check_input(op, y, None)
    if rand_indices.shape[0] != original_dim:
        raise ValueError(f"{op}: original_dim must be {rand_indices.shape[0]} as in rand_indices, got {original_dim}")
    return [_sketch(op, y, rand_indices, rand_signs, original_dim, True)]


def get_cuda_info() -> dict:
    """sjlt's report: ``extension_available`` is True everywhere, since nothing here has to be compiled."""
    info = {"cuda_available": torch.cuda.is_available(), "extension_available": EXTENSION_AVAILABLE}
    if info["cuda_available"]:
        count = torch.cuda.device_count()
        info |= {
            "cuda_version": torch.version.cuda,
            "cudnn_version": torch.backends.cudnn.version(),
            "device_count": count,
        }
        info["current_device"] = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        info["devices"] = [torch.cuda.get_device_name(i) for i in range(count)]
    return info


def _check_input(op, x, width):
    if not isinstance(x, torch.Tensor) or x.layout != torch.strided:
        got = x.layout if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{op}: the input must be a dense tensor, got {got}")
    if x.dim() != 2 or width not in (None, x.shape[1]):
        raise ValueError(
            f"{op}: the input must have shape [B, {'any' if width is None else width}], got {list(x.shape)}"
        )
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: the input must be float16, bfloat16, float32 or float64, got {x.dtype}")


def _check_buffers(op, x, indices, signs, c):
    for name, buffer, dtype in (("rand_indices", indices, torch.int64), ("rand_signs", signs, torch.int8)):
        if buffer.dtype != dtype or buffer.device != x.device:
            raise TypeError(f"{op}: {name} must be {dtype} on {x.device}, got {buffer.dtype} on {buffer.device}")
        if buffer.dim() != 2 or buffer.shape != (indices.shape[0], c):
            raise ValueError(f"{op}: {name} must have shape [P, c = {c}], got {list(buffer.shape)}")


def _sketch(op, x, indices, signs, out_width, transposed):
    outputs = x.shape[1] if transposed else out_width
    if indices.numel():
        low, high = (int(bound) for bound in indices.aminmax())
        if not 0 <= low <= high < outputs:
            raise ValueError(f"{op}: rand_indices must lie in [0, {outputs}), got {low}..{high}")
    return _Sketch.apply(x, indices, signs, out_width, transposed)


class _Sketch(torch.autograd.Function):
    """Linear in x: the tangent rule is the map itself, the cotangent rule its transpose."""

    @staticmethod
    def forward(x, indices, signs, out_width, transposed):
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        out = torch.zeros(x.shape[0], out_width, dtype=kind, device=x.device)
        columns, add = (CPU_COLUMNS, _add_in_order) if x.device.type == "cpu" else (GPU_COLUMNS, _add_sorted)
        for start in range(0, indices.shape[0], columns):
            part = slice(start, min(start + columns, indices.shape[0]))
            rows = [slice(row, row + ROWS) for row in range(0, x.shape[0], ROWS)]
            if transposed:
                _gather(out[:, part], x, indices[part], signs[part], rows)
            else:
                add(out, x[:, part], indices[part], signs[part], rows)
        return out.mul_(indices.shape[1] ** -0.5).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, indices, signs, ctx.out_width, ctx.transposed = inputs
        ctx.width = x.shape[1]
        ctx.save_for_backward(indices, signs)
        ctx.save_for_forward(indices, signs)

    @staticmethod
    def backward(ctx, out_bar):
        return _Sketch.apply(out_bar, *ctx.saved_tensors, ctx.width, not ctx.transposed), None, None, None, None

    @staticmethod
    def jvp(ctx, x_dot, *_):
        return _Sketch.apply(x_dot, *ctx.saved_tensors, ctx.out_width, ctx.transposed)

    @staticmethod
    def vmap(info, in_dims, x, *matrix):
        x = x.movedim(in_dims[0], 0)  # [V, B, P]
        return _Sketch.apply(x.flatten(0, 1), *matrix).unflatten(0, x.shape[:2]), 0


def _add_in_order(out, x, indices, signs, rows):  # [B, K], [B, P], [P, c], [P, c]
    for row in rows:
        piece = x[row].to(out.dtype)
        for index, sign in zip(indices.T, signs.T, strict=True):
            out[row].scatter_add_(1, index.expand(piece.shape), piece * sign)


def _add_sorted(out, x, indices, signs, rows):  # [B, K], [B, P], [P, c], [P, c]
    outputs, order = indices.flatten().sort(stable=True)
    first = torch.searchsorted(outputs, torch.arange(out.shape[1], device=out.device))  # [K], where each output begins
    columns, weights = order // indices.shape[1], signs.flatten()[order].to(out.dtype)
    for row in rows:
        table = x[row].T.contiguous().to(out.dtype)  # [P, B]
        out[row] += functional.embedding_bag(columns, table, first, mode="sum", per_sample_weights=weights).T


def _gather(out, y, indices, signs, rows):  # [B, P], [B, K], [P, c], [P, c]
    for row in rows:
        for index, sign in zip(indices.T, signs.T, strict=True):
            out[row] += y[row].index_select(1, index).to(out.dtype) * sign
