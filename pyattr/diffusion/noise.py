"""Gaussian noise that is a function of (seed, sample id, timestep) alone.

Normal number i of a draw comes from Philox4x32-10 with counter (i div 4, label, id mod 2^32, id div 2^32) and key
(seed, purpose), turned into normals as in :func:`pyattr.ops.normal_matrix`; ``label`` holds the timestep and the number of
the draw. So it cannot depend on batches, order, threads, or the device: it is made on the CPU in float64, rounded once to
float32, and then moved. (Two builds of the C library may differ in the last bit of a float64 logarithm, which changes about
one float32 in 10^9.)
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..reference.philox import philox4x32_10

# Key word 1, so that the noise of features, samples and projections is independent under one seed (projections use the
# key (seed, stream) with counter words 2 and 3 zero).
FEATURES = 0x66656174
SAMPLES = 0x73616D70
PATCHES = 0x70617463
PROBES = 0x70726F62  # signs of directions in the space of predictions
TRACES = 0x74726163  # directions along which divergences are estimated
DEQUANTISATION = 0x64657175
LOSSES = 0x6C6F7373  # of the models that scores are judged by: a method that met the same noise would be favoured

MAX_TIMESTEPS = 1 << 20
MAX_DRAWS = 1 << 12
_BLOCK = 1 << 16  # numbers made at a time, so that the words stay in the cache


def noise(shape, *, seed: int, ids, timesteps, draws=0, purpose: int = FEATURES) -> Tensor:
    """Standard normal noise, one tensor of ``shape`` for each (id, timestep, draw).

    Args:
        shape: (C, H, W) or any other; at most 2^34 numbers.
        seed: in [0, 2^32).
        ids: sample ids in [0, 2^63), int64 tensor or int.
        timesteps: in [0, 2^20), int64 tensor or int.
        draws: in [0, 2^12), int64 tensor or int; different draws of one (id, timestep) are independent.
        purpose: :data:`FEATURES`, :data:`SAMPLES`, :data:`PATCHES`, :data:`PROBES` or :data:`LOSSES`; they are independent.

    Returns:
        [*B, *shape] float32 on the CPU, B the broadcast shape of ``ids``, ``timesteps`` and ``draws``.

    Raises:
        ValueError: an argument is out of its range.

    Extra memory: about 10 MB.

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011; Box and Muller 1958.
    """
    return _draw("noise", _normals, shape, seed, ids, timesteps, draws, purpose)


def uniform(shape, *, seed: int, ids) -> Tensor:
    """Uniform noise in (0, 1), one tensor of ``shape`` for each id.

    Args:
        shape, seed, ids: as in :func:`noise`.

    Returns:
        [*ids.shape, *shape] float32 on the CPU: (2 k + 1) / 2^24 with k of 23 bits, each equally probable.

    Raises:
        ValueError: an argument is out of its range.

    Extra memory: about 10 MB.
    """
    return _draw("uniform", _uniforms, shape, seed, ids, 0, 0, DEQUANTISATION)


def _draw(op: str, numbers: Callable, shape, seed: int, ids, timesteps, draws, purpose: int) -> Tensor:
    if not 0 <= seed < 2**32:
        raise ValueError(f"{op}: seed must lie in [0, {2**32 - 1}], got {seed}")
    ids = _in_range("ids", ids, 2**63)
    timesteps = _in_range("timesteps", timesteps, MAX_TIMESTEPS)
    draws = _in_range("draws", draws, MAX_DRAWS)
    ids, label = torch.broadcast_tensors(ids, timesteps + draws * MAX_TIMESTEPS)
    count = math.prod(shape)
    calls = -(-count // 4)
    if calls > 2**32:
        raise ValueError(f"{op}: shape must hold at most 2^34 numbers, got {tuple(shape)}")
    out = torch.empty(ids.numel(), calls * 4, dtype=torch.float32, device="cpu")  # [B, calls * 4]
    rows, columns = max(1, _BLOCK // (4 * max(calls, 1))), _BLOCK // 4
    flat_ids, flat_label = ids.reshape(-1, 1), label.reshape(-1, 1)
    for r in range(0, out.shape[0], rows):
        i, k = flat_ids[r : r + rows], flat_label[r : r + rows]
        for c in range(0, calls, columns):
            call = torch.arange(c, min(c + columns, calls), device="cpu")
            words = philox4x32_10((call, k, i & 0xFFFFFFFF, i >> 32), (seed, purpose))  # 4 x [rows, calls]
            out[r : r + rows, 4 * c : 4 * (c + columns)] = numbers(words).flatten(1)
    return out[:, :count].reshape(*ids.shape, *shape)


def _normals(words) -> Tensor:  # 4 x [R, calls] -> [R, calls, 4] float32
    pairs = []
    for a, b in (words[:2], words[2:]):
        radius = a.to(torch.float64).add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
        angle = b.to(torch.float64).mul_(2 * math.pi * 2.0**-32)
        pairs += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(pairs, -1).to(torch.float32)


def _uniforms(words) -> Tensor:  # 4 x [R, calls] -> [R, calls, 4] float32
    return torch.stack([(2 * (word >> 9) + 1).to(torch.float32) * 2.0**-24 for word in words], -1)


def _in_range(name: str, value, limit: int) -> Tensor:
    value = torch.as_tensor(value, dtype=torch.int64).cpu()
    if value.numel() and not (0 <= int(value.min()) and int(value.max()) < limit):
        raise ValueError(f"noise: {name} must lie in [0, {limit}), got {int(value.min())}..{int(value.max())}")
    return value
