"""dattri's random projections on our kernels: 0.3.0's ``random_project``, its later form, and the projector classes.

dattri's attributors hold ``random_project`` by name, so that one line in front of a program that uses one turns it over::

    import dattri.algorithm.trak
    from pyattr.compat.dattri import random_project
    dattri.algorithm.trak.random_project = random_project

and by itself::

    import torch
    from pyattr.compat.dattri import random_project
    gradients = {"weight": torch.randn(8, 300, 20), "bias": torch.randn(8, 300)}
    project = random_project(gradients, 8, proj_dim=512, proj_max_batch_size=16, proj_type="sjlt")
    features = project(gradients, ensemble_id=0)  # [8, 512]

Scales, shapes and dtypes are dattri's; the random numbers are ours. No matrix is stored, a dict is never concatenated, every
``proj_type`` runs on the CPU too, and one seed gives one matrix on every device and however the features are cut into a dict.
"""

import enum
from functools import reduce
from itertools import accumulate, pairwise

import torch

from .. import ops
from ..ops._arguments import check_integer
from ._dense import width

try:
    from dattri.func.projection import AbstractProjector, ProjectionType
except ModuleNotFoundError as missing:
    if missing.name.partition(".")[0] != "dattri":
        raise
    AbstractProjector = object

    class ProjectionType(str, enum.Enum):
        """What to project by; the names are the values."""

        identity = "identity"
        normal = "normal"
        rademacher = "rademacher"
        sjlt = "sjlt"
        random_mask = "random_mask"
        grass = "grass"


ENSEMBLE_STRIDE = 100_000  # seeds of successive ensemble members are this far apart
GRASS_MULTIPLIER = 4


class _Projector(AbstractProjector):
    """One random matrix per (seed, ensemble_id), of one of six types."""

    def __init__(
        self, feature_dim, proj_dim, seed, proj_type, device, dtype=torch.float32, grass_multiplier=GRASS_MULTIPLIER
    ):
        name = type(self).__name__
        self.feature_dim = check_integer(name, "feature_dim", feature_dim, 1, 2**39)
        self.proj_type, self.grass_multiplier = _projection_type(name, proj_type, grass_multiplier)
        # Nothing is projected by the identity, for which dattri's attributors pass -1.
        least = -1 if self.proj_type == "identity" else 1
        self.proj_dim = check_integer(name, "proj_dim", proj_dim, least, 2**31)
        self.seed = check_integer(name, "seed", seed, -(2**63), 2**64 - 1)
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"{name}: dtype must be a floating-point torch.dtype, got {dtype}")
        self.device, self.dtype = torch.device(device), dtype

    def project(self, features, ensemble_id):
        """Project features by the matrix of one member of an ensemble.

        Args:
            features: [B, P] tensor, or dict of tensors [B, ...] that hold P numbers per row together, columns in the dict's
                order; float16, bfloat16, float32 or float64, on any device.
            ensemble_id: non-negative integer; the seed is ``seed + 10^5 * ensemble_id``.

        Returns:
            [B, proj_dim] of the projector's dtype on its device ([B, P] for identity, [B, min(proj_dim, P)] for random_mask).
            Sums are float32, or float64 where the features or the projector are. Differentiable in both modes.

        Raises:
            TypeError, ValueError: ``features`` is not as above.

        Extra memory: one piece of the dict at a time if it has to be moved or made contiguous, the sum of [B, proj_dim], and
        that of the kernel; nothing that grows as P times proj_dim.
        """
        pieces = features if isinstance(features, dict) else {"features": features}
        name = type(self).__name__
        _check_tensors(name, "features", pieces.values())
        rows = {len(piece) for piece in pieces.values()}
        if len(rows) != 1:
            raise ValueError(f"{name}: features must all have the same number of rows, got {sorted(rows)}")
        if not isinstance(features, dict) and features.dim() != 2:
            raise ValueError(f"{name}: features must have shape [B, P], got {list(features.shape)}")
        columns = sum(width(piece) for piece in pieces.values())
        if columns != self.feature_dim:
            raise ValueError(f"{name}: features must have {self.feature_dim} numbers per row, got {columns}")
        member = check_integer(name, "ensemble_id", ensemble_id, 0, 2**62)
        key = (self.seed + ENSEMBLE_STRIDE * member) % 2**64
        return self._run(list(pieces.values()), seed=key % 2**32, stream=key >> 32).to(self.dtype)

    def free_memory(self):
        """Does nothing: nothing is held."""

    def _run(self, pieces, **key):
        dense = {"normal": ops.gaussian_project, "rademacher": ops.rademacher_project}
        kind = self.proj_type.value
        if kind == "identity":
            return torch.cat([self._matrix(piece) for piece in pieces], 1)
        if kind in dense:
            return self._add_up(dense[kind], pieces, self.proj_dim, scale=self.proj_dim**-0.5, **key)
        if kind == "sjlt":
            return self._add_up(ops.sparse_project, pieces, self.proj_dim, num_columns=self.feature_dim, **key)
        kept = min(self.proj_dim * (self.grass_multiplier if kind == "grass" else 1), self.feature_dim)
        masked = self._mask(pieces, kept, **key)
        return masked if kind == "random_mask" else ops.sparse_project(masked, self.proj_dim, **key)

    def _mask(self, pieces, kept, **key):
        if len(pieces) == 1:
            return ops.mask_project(self._matrix(pieces[0]), kept, **key)
        # As the pieces' own masks add up, but with the coordinates found once.
        columns = ops.mask_indices(self.feature_dim, kept, **key)
        dtype = reduce(torch.promote_types, (piece.dtype for piece in pieces), self.dtype)
        masked = torch.zeros(len(pieces[0]), kept, dtype=dtype, device=self.device)
        for piece, start in zip(pieces, _starts(pieces), strict=False):
            places = ((columns >= start) & (columns < start + width(piece))).nonzero()[:, 0]
            values = self._matrix(piece).index_select(1, (columns[places] - start).to(self.device))
            masked = masked.index_copy(1, places.to(self.device), values.to(masked.dtype))
        return masked

    def _add_up(self, op, pieces, proj_dim, **options):
        """The projection of the pieces side by side, from that of each."""
        parts = (
            op(self._matrix(piece), proj_dim, column_offset=start, **options)
            for piece, start in zip(pieces, _starts(pieces), strict=False)
        )
        return reduce(torch.add, parts)

    def _matrix(self, piece):  # [B, ...] -> [B, P]
        return _flat(piece).to(self.device, torch.float64 if self.dtype == torch.float64 else None)


class BasicProjector(_Projector):
    """dattri's ``BasicProjector``: here the same as :class:`CudaProjector`, on any device.

    Args:
        feature_dim: P, numbers per row, 1 to 2^39.
        proj_dim: width of the result, 1 to 2^31; without effect for identity.
        seed: of the random matrix, in [-2^63, 2^64).
        proj_type: "identity", "normal", "rademacher", "sjlt", "random_mask" or "grass" (or "grass_N"), or a ProjectionType.
        device: where features are moved to and projected.
        block_size: dattri's; without effect, as nothing is kept in blocks.
        dtype: of the result.
        ensemble_id: of the next call, as dattri has it; every call names its own.

    Raises:
        TypeError, ValueError: an argument is not as above.

    The scales are dattri's: normal and rademacher ``proj_dim ** -0.5`` times independent N(0, 1) or +-1, for which
    ``E <y, y'> = <x, x'>``; sjlt one +-1 per column, likewise; random_mask and identity 1; grass a mask of
    ``4 * proj_dim`` coordinates (at most P), then sjlt of those. With a mask the mean is ``<x, x'>`` times the share kept.

    The variance of ``<y, y'>`` is ``(|x|^2 |x'|^2 + <x, x'>^2) / proj_dim`` for normal, less ``2 sum_p x_p^2 x'_p^2 /
    proj_dim`` for rademacher and (at most) sjlt; a mask's is stated at ``pyattr.ops.mask_project``, and grass has it and that
    of the sketch of what is kept.
    """

    def __init__(
        self,
        feature_dim,
        proj_dim,
        seed,
        proj_type,
        device,
        block_size=100,
        dtype=torch.float32,
        ensemble_id=0,
    ):
        super().__init__(feature_dim, proj_dim, seed, proj_type, device, dtype)
        self.block_size, self.ensemble_id = block_size, ensemble_id


class CudaProjector(_Projector):
    """dattri's ``CudaProjector``, on any device.

    Args:
        feature_dim, proj_dim, seed, proj_type, device, dtype: those of :class:`BasicProjector`.
        grass_multiplier: of grass, which keeps ``grass_multiplier * proj_dim`` coordinates, at most P.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """


class ChunkedCudaProjector:
    """dattri's ``ChunkedCudaProjector``: successive columns, each chunk by a projector of its own, added up.

    Args:
        projector_per_chunk: one projector per chunk, all of one ``proj_dim``; with ``project(dict, ensemble_id)``.
        max_chunk_size, feature_batch_size: dattri's, for a buffer that is not needed here.
        dim_per_chunk: columns of each chunk.
        device, dtype: of the result.

    Raises:
        ValueError: there is not one projector for each chunk, or one is the identity.

    Scale and variance are those of its projectors, extra memory that of one of them and a second result.
    """

    def __init__(self, projector_per_chunk, max_chunk_size, dim_per_chunk, feature_batch_size, device, dtype):
        if not projector_per_chunk or len(projector_per_chunk) != len(dim_per_chunk):
            counts = f"{len(projector_per_chunk)} projectors for {len(dim_per_chunk)} chunks"
            raise ValueError(f"ChunkedCudaProjector: every chunk must have a projector, got {counts}")
        if any(projector.proj_type == "identity" for projector in projector_per_chunk):
            raise ValueError("ChunkedCudaProjector: the identity has no sum over chunks")
        self.projector_per_chunk, self.dim_per_chunk = projector_per_chunk, dim_per_chunk
        self.proj_dim, self.proj_type = projector_per_chunk[0].proj_dim, projector_per_chunk[0].proj_type
        self.max_chunk_size, self.feature_batch_size = max_chunk_size, feature_batch_size
        self.device, self.dtype = torch.device(device), dtype

    def project(self, features, ensemble_id):
        """[B, P] -> [B, proj_dim]; see :meth:`dict_project`, which takes a dict, where this raises TypeError."""
        if isinstance(features, dict):
            raise TypeError(
                "ChunkedCudaProjector.project() only accepts Tensor inputs; dict_project() and random_project() take a dict"
            )
        return self.dict_project({"features": features}, ensemble_id)

    def dict_project(self, features, ensemble_id):
        """Project a dict of tensors [B, ...], side by side in its order, as :meth:`BasicProjector.project` does.

        Any batch will do, and the border of a chunk may lie within a tensor.

        Returns:
            [B, proj_dim] of the dtype and on the device that were asked for.

        Raises:
            TypeError, ValueError: as there, or the tensors do not hold as many numbers per row as the chunks.
        """
        _check_tensors("ChunkedCudaProjector", "features", features.values())
        pieces = list(features.values())
        starts = _starts(pieces)
        borders = list(accumulate(self.dim_per_chunk, initial=0))
        if starts[-1] != borders[-1]:
            sizes = f"{borders[-1]} numbers per row as in dim_per_chunk, got {starts[-1]}"
            raise ValueError(f"ChunkedCudaProjector: features must have {sizes}")
        out = None
        for projector, (low, high) in zip(self.projector_per_chunk, pairwise(borders), strict=True):
            chunk = {
                index: _flat(piece)[:, max(low - start, 0) : high - start]
                for index, (piece, (start, end)) in enumerate(zip(pieces, pairwise(starts), strict=True))
                if start < high and end > low
            }
            part = projector.project(chunk, ensemble_id).to(self.device)
            out = part if out is None else out + part
        return out.to(self.dtype)

    def free_memory(self):
        """Does nothing: nothing is held."""


def random_project(
    feature,
    feature_batch_size=None,
    proj_dim=None,
    proj_max_batch_size=None,
    proj_seed=0,
    proj_type="normal",
    *,
    device="cpu",
    proj_params=None,
):
    """dattri's ``random_project``, in both of its signatures.

    ``random_project(feature, feature_batch_size, proj_dim, proj_max_batch_size, proj_seed=0, proj_type="normal", *,
    device="cpu")`` as in 0.3.0, or ``random_project(feature, proj_params)`` as after it, where ``proj_params`` has the rest as
    attributes (dattri's ``RandomProjectionParams``, or any object with them).

    Args:
        feature: tensor or dict of tensors like those to be projected: gives P and the dtype of results (that of the dict's
            first tensor).
        feature_batch_size: B of ``feature``, whose P is its number of entries div B: of named parameters themselves, B is 1.
        proj_max_batch_size: dattri's, by which it cuts up its work; without effect, any batch will do.
        proj_dim, proj_seed, proj_type: those of :class:`BasicProjector`.
        device: "cpu", "cuda" or a torch.device of these, where features are moved to and projected.

    Returns:
        ``f(feature, ensemble_id=0) -> [B, proj_dim]`` for [B, P] tensors and dicts of tensors [B, ...] of any B, which is
        :meth:`BasicProjector.project`: formulas, scales, variances and memory are stated there and at :class:`BasicProjector`.

    Raises:
        TypeError, ValueError: an argument is not as above, or missing.
    """
    if proj_params is None and hasattr(feature_batch_size, "proj_dim"):
        proj_params, feature_batch_size = feature_batch_size, None
    if proj_params is not None:
        if (feature_batch_size, proj_dim, proj_max_batch_size) != (None, None, None):
            raise TypeError("random_project: proj_params must come without the arguments that it holds")
        feature_batch_size = proj_params.feature_batch_size
        proj_dim, proj_seed = proj_params.proj_dim, proj_params.proj_seed
        proj_type, device = proj_params.proj_type, proj_params.device
    elif None in (feature_batch_size, proj_dim):  # dattri's LoGra passes None on for a proj_max_batch_size left out
        raise TypeError("random_project: feature_batch_size and proj_dim, or proj_params, must be given")
    pieces = list(feature.values()) if isinstance(feature, dict) else [feature]
    if not pieces:
        raise ValueError("random_project: feature must hold at least one tensor")
    _check_tensors("random_project", "feature", pieces)
    rows = check_integer("random_project", "feature_batch_size", feature_batch_size, 1, 2**62)
    for piece in pieces:
        if piece.numel() % rows:
            raise ValueError(f"random_project: feature_batch_size must divide shape {list(piece.shape)}, got {rows}")
    if torch.device(device).type not in ("cpu", "cuda"):
        raise ValueError(f"random_project: device must be 'cpu' or 'cuda', got {device}")
    columns = sum(piece.numel() // rows for piece in pieces)
    projector = CudaProjector(columns, proj_dim, proj_seed, proj_type, device, pieces[0].dtype)

    def project(feature, ensemble_id=0):
        return projector.project(feature, ensemble_id)

    return project


def _check_tensors(name, argument, pieces):
    for piece in pieces:
        if not isinstance(piece, torch.Tensor):
            raise TypeError(f"{name}: {argument} must be a tensor or a dict of tensors, got {type(piece).__name__}")


def _starts(pieces):
    """Where each piece begins in the row that they make up together, and where the last one ends."""
    return list(accumulate((width(piece) for piece in pieces), initial=0))


def _flat(piece):  # [B, ...] -> [B, P]
    return piece[:, None] if piece.dim() == 1 else piece.flatten(1)


def _projection_type(name, proj_type, grass_multiplier):
    """The type by its name, and the multiplier that "grass_N" has in it."""
    value = str(getattr(proj_type, "value", proj_type))
    base, _, number = value.partition("_")
    if base == "grass" and number.isdecimal():
        value, grass_multiplier = base, int(number)
    if value not in [kind.value for kind in ProjectionType]:
        names = ", ".join(repr(kind.value) for kind in ProjectionType)
        raise ValueError(f"{name}: proj_type must be one of {names} or 'grass_N', got {value!r}")
    return ProjectionType(value), check_integer(name, "grass_multiplier", grass_multiplier, 1, 2**31)
