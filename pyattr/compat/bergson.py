"""bergson's random projections (bergson 2.5, its PROJECTION_VERSION 2) on our kernels: the same matrices, never stored.

    import bergson, bergson.collector.collector
    from pyattr.compat.bergson import project_global
    bergson.collector.collector.project_global = project_global  # that of every collector, from here on
    processor = bergson.GradientProcessor(projection_dim=512, projection_target="global")
    bergson.collect_gradients(model=model, data=data, processor=processor, cfg=cfg)

A matrix belongs to its name: the first eight bytes of the name's MD5 are the Philox key, our (seed, stream). Signs are
bergson's bit for bit on every device. Normal entries are those of the same formula within 2e-6; so are bergson's, but for one
in 50,000, which its float32 logarithm puts up to 5e-5 off. Features made with either fit the same index. bergson itself is not
needed.
"""

import functools
import hashlib
import math

import torch

from ..ops import normal_matrix
from ..ops._arguments import check_integer
from ..ops._precision import full_float32
from ..reference.philox import philox4x32_10
from ._dense import OPS

# bergson starts a new matrix, named "identifier/start", at every block of columns; a block has this many entries.
BLOCK_ENTRIES = 1 << 27
# float32 entries of the gradients that are formed at a time: 32 MB, and as much again for what is formed of narrower factors.
TILE_ENTRIES = 1 << 23
# A piece of a matrix that is written out, at 4 bytes an entry by the kernel and at most 150 in torch. Two are alive at a time.
WRITTEN_BYTES = 1 << 24
SCALES = ("jl", "row_norm")


def random_matrix(identifier, m, n, device, projection_type, dtype=torch.float32):
    """The matrix of a name, written out; for the small per-module projections, which bergson applies by matmul.

    Args:
        identifier: the name, "layer/left" or "layer/right/seed3".
        m, n: rows and columns, each below 2^31.
        device, dtype: of the result.
        projection_type: "rademacher" (+-1) or "normal" (variance 1).

    Returns:
        [m, n] tensor, unscaled: signs exact, normal entries within 2e-6 of their float64 value before they are rounded to
        ``dtype``. An entry depends on the name, its row and its column alone.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Extra memory: 50 MB, or three columns where one has over 2^22 rows.
    """
    _check_type(projection_type)
    m, n = (check_integer("random_matrix", name, size, 0, 2**63) for name, size in (("m", m), ("n", n)))
    if max(m, n) >= 1 << 31:
        raise ValueError(f"random_matrix: m and n must be below 2^31, got [{m}, {n}]")
    out = torch.empty(m, n, dtype=dtype, device=device)
    for rows, columns, entries in _written(identifier, m, n, out.device, projection_type):
        out[rows, columns] = entries
    return out


@torch.no_grad()
def project_global(identifier, P, m, projection_type="normal", projection_scale="jl"):
    """Project gradients, formed or as factors, with the matrix R [m, n] of a name: ``Y = P R^T / scale``.

    R is made of blocks of ``2^27 div m`` columns, each the matrix of the name "identifier/start". None is held: the kernels
    make its entries where they are used, in place of bergson's buffer of 512 MB.

    Args:
        identifier: the name, "layer/single".
        P: [N, n] tensor, or the factors of such gradients, bergson's ``OuterProductGradients`` or any object with its
            attributes: ``(g^T a) / divisor + bias bias_col^T``, row-major, with g [N, S, O] and a [N, S, W] (one gradient for
            each example, summed over S) or [N, O] and [N, W] (one for each token), bias [N, O] and bias_col [W] or None,
            divisor [O, W] or None.
        m: the width D, 1 to 2^31 - 1.
        projection_type: "normal" or "rademacher".
        projection_scale: "jl", the scale sqrt(m), so that inner products are kept in expectation, with the variance that
            ``pyattr.ops.rademacher_project`` and ``gaussian_project`` state; or "row_norm", for each column of Y the norm of
            its row of R: sqrt(n) for signs, so that inner products are kept times m / n.

    Returns:
        [N, m] of the dtype and on the device of P (of g), with no autograd history. Sums are in float32 over all blocks,
        whatever autocast and TF32 are set to, and rounded once; bergson sums in the dtype of P, and rounds its normal entries
        to it. The bits of a row of formed gradients are as fixed as those of ``pyattr.ops.rademacher_project``; factors are
        first multiplied by a library's matmul, whose bits may depend on the thread count.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Extra memory: [N, m] float32 and that of one projection; for factors 64 MB besides (more only if a single column of the
    gradients has over 2^23 rows). "row_norm" with normal entries writes R out a piece at a time (as `random_matrix`, and twice
    as much again), once for each name and shape: the norms of the last 1024 are kept, 8 m bytes each.
    """
    _check_type(projection_type)
    if projection_scale not in SCALES:
        raise ValueError(f"project_global: projection_scale must be one of {list(SCALES)}, got {projection_scale!r}")
    m = check_integer("project_global", "m", m, 1, (1 << 31) - 1)
    factors = None if isinstance(P, torch.Tensor) else _Factors(P)
    if factors is None and P.dim() != 2:
        raise ValueError(f"project_global: P must have shape [N, n], got {list(P.shape)}")
    g = P if factors is None else factors.g
    num_columns = P.shape[1] if factors is None else factors.width
    wide = torch.float64 if g.dtype == torch.float64 else torch.float32
    out = torch.zeros(g.shape[0], m, dtype=wide, device=g.device)
    for start, stop, name in _blocks(identifier, m, num_columns):
        seed, stream = _key(name)
        tiles = [(start, P[:, start:stop])] if factors is None else factors.tiles(start, stop)
        with full_float32(g.device):
            for column, tile in tiles:
                out += OPS[projection_type](tile, m, seed=seed, stream=stream, column_offset=column - start)
    if projection_scale == "jl":
        out /= math.sqrt(m)
    elif projection_type == "rademacher":
        out /= math.sqrt(num_columns)
    else:
        out /= _row_norms(identifier, m, num_columns, BLOCK_ENTRIES).to(out)
    return out.to(g.dtype)


class _Factors:
    """Gradients [N, O * W] as the factors that bergson keeps them in."""

    def __init__(self, P):
        try:
            self.g, self.a, self.bias, self.bias_col, self.divisor = P.g, P.a, P.bias, P.bias_col, P.divisor
        except AttributeError:
            message = "project_global: P must be a tensor or have the attributes g, a, bias, bias_col and divisor, got "
            raise TypeError(message + type(P).__name__) from None
        shapes = f"g {list(self.g.shape)} and a {list(self.a.shape)}"
        if self.g.dim() not in (2, 3) or self.g.shape[:-1] != self.a.shape[:-1]:
            raise ValueError(
                f"project_global: P must have g [N, S, O] and a [N, S, W], or [N, O] and [N, W], got {shapes}"
            )
        if self.g.dim() == 2:  # one gradient for each token: a sum of one
            self.g, self.a = self.g[:, None], self.a[:, None]
        (num_samples, _, height), columns = self.g.shape, self.a.shape[2]
        self.width = height * columns
        expected = {"bias": [num_samples, height], "bias_col": [columns], "divisor": [height, columns]}
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is not None and list(value.shape) != shape:
                raise ValueError(
                    f"project_global: P.{name} must have shape {shape} for {shapes}, got {list(value.shape)}"
                )
        if (self.bias is None) != (self.bias_col is None):
            raise ValueError("project_global: P must have both bias and bias_col, or neither")

    def tiles(self, start, stop):
        """(first column, [N, columns]) of the gradients' columns start to stop, formed in a bounded buffer."""
        limit = max(1, TILE_ENTRIES // max(1, self.g.shape[0]))
        for rows, columns in _rectangles(start, stop, self.a.shape[2], limit):
            yield rows.start * self.a.shape[2] + columns.start, self._form(rows, columns).flatten(1)

    def _form(self, rows, columns):  # -> [N, rows, columns]
        g, a = self.g[..., rows], self.a[..., columns]
        wide = torch.float64 if g.dtype == torch.float64 else torch.float32
        if g.dtype == wide:
            tile = g.mT @ a
        else:  # samples that together widen to no more than a tile
            samples = max(1, TILE_ENTRIES // max(1, g.shape[1] * (g.shape[2] + a.shape[2])))
            tile = torch.empty(g.shape[0], g.shape[2], a.shape[2], dtype=wide, device=g.device)
            for first in range(0, g.shape[0], samples):
                part = slice(first, first + samples)
                torch.matmul(g[part].to(wide).mT, a[part].to(wide), out=tile[part])
        if self.divisor is not None:
            tile /= self.divisor[rows, columns]
        if self.bias is not None:
            tile.addcmul_(self.bias[:, rows, None].to(wide), self.bias_col[columns].to(wide))
        return tile


def _rectangles(start, stop, width, limit):
    """(rows, columns) slices of a matrix that hold its row-major entries start to stop, at most ``limit`` in each."""
    while start < stop:
        row, column = divmod(start, width)
        if column or min(limit, stop - start) < width:  # within one row
            size = min(width - column, stop - start, limit)
            yield slice(row, row + 1), slice(column, column + size)
        else:
            height = min(limit, stop - start) // width
            size = height * width
            yield slice(row, row + height), slice(0, width)
        start += size


def _blocks(identifier, m, num_columns):
    """(start, stop, name) of the blocks of columns, each a matrix of its own."""
    width = max(1, BLOCK_ENTRIES // m)
    for start in range(0, num_columns, width):
        yield start, min(num_columns, start + width), f"{identifier}/{start}"


def _written(identifier, m, n, device, projection_type):
    """(rows, columns, [rows, columns] entries) of a name's matrix, in pieces."""
    key = _key(identifier)
    if device.type == "cpu" and (projection_type == "normal" or n <= 256):
        # The kernel times the identity, which is exact, makes normal entries several times faster than torch can write them
        # out, and a few signs in one call. Elsewhere a kernel's rounding may exceed 2e-6.
        width = min(512 if m < 32 else 128, max(1, WRITTEN_BYTES // (4 * max(m, 1))))
        identity = torch.eye(width, dtype=torch.float32, device=device)
        for start in range(0, n if m else 0, width):
            piece = identity[: n - start, : n - start]
            entries = OPS[projection_type](piece, m, seed=key[0], stream=key[1], column_offset=start)
            yield slice(0, m), slice(start, start + width), entries.T
        return
    write = _signs if projection_type == "rademacher" else normal_matrix
    height = min(max(m, 1), 512)
    width = max(128, WRITTEN_BYTES // (150 * height) // 128 * 128)  # whole Philox calls
    for row in range(0, m, height):
        rows = torch.arange(row, min(m, row + height), device=device)
        for start in range(0, n, width):
            columns = torch.arange(start, min(n, start + width), device=device)
            yield slice(row, row + height), slice(start, start + width), write(rows, columns, *key)


def _signs(rows, columns, seed, stream):  # [R], [C] -> [R, C] int32
    """``sign_matrix`` of consecutive columns from a multiple of 128 on: each Philox call is unpacked whole."""
    words = torch.stack(
        philox4x32_10((columns[::128] // 128, rows[:, None], 0, 0), (seed, stream)), dim=2
    )  # [R, calls, 4]
    bits = torch.arange(32, dtype=torch.int32, device=words.device)
    signs = (words.to(torch.int32)[..., None] >> bits).bitwise_and_(1).mul_(2).sub_(1)  # [R, calls, 4, 32]
    return signs.flatten(1)[:, : len(columns)]


@functools.lru_cache(maxsize=1024)
def _row_norms(identifier, m, num_columns, block_entries):
    """[m] float64 norms of the rows of a matrix of normals. They depend on nothing else, so one batch pays for all."""
    squares = torch.zeros(m, dtype=torch.float64, device="cpu")
    for start, stop, name in _blocks(identifier, m, num_columns):
        for rows, _, entries in _written(name, m, stop - start, squares.device, "normal"):
            squares[rows] += torch.linalg.vector_norm(entries, dim=1, dtype=torch.float64).square()
    return squares.sqrt()


def _check_type(projection_type):
    if projection_type not in OPS:
        raise ValueError(f"Unknown projection type: {projection_type}; there are {sorted(OPS)}")


def _key(name):
    """The (seed, stream) of a name: the first eight bytes of its MD5, little endian."""
    digest = hashlib.md5(name.encode(), usedforsecurity=False).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
