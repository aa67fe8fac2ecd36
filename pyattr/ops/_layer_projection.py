"""What the fused layer projections share: checks, backends, and the walk over a gradient that is never whole in memory."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import arrays, backends
from ..backends import Backend
from ..reference.multisketch_project import WIDTH
from ._arguments import check_integer, check_scale
from ._layers import Layer, written_out
from ._precision import full_float32
from .gaussian_project import MAX_COLUMNS as GAUSSIAN_COLUMNS
from .gaussian_project import gaussian_project
from .rademacher_project import MAX_COLUMNS, rademacher_project
from .sparse_project import check_nonzeros, sparse_project

KINDS = ("rademacher", "gaussian", "sparse", "multisketch")
TILE_BYTES = 32 << 20  # rows of the gradients that are formed at a time
# A dense kernel shares a row of its matrix among so many samples; more would leave a tile fewer rows to gather patches for.
TILE_SAMPLES = 64
SLAB_BYTES = 8 << 20  # float32 copies of the inputs, or sums between the stages of a multisketch, at a time


class Projector(NamedTuple):
    """A projection of flat gradients."""

    proj_dim: int
    bias: bool
    kind: str
    nonzeros: int
    seed: int
    stream: int
    column_offset: int
    scale: float


class LayerProjection:
    """One kind of layer as an op.

    Args:
        name: the op's name.
        definition: ``(acts, errs, *geometry, projector) -> [B, D]``, the reference.
        as_layer: ``(acts, errs, *geometry) -> Layer``.
    """

    def __init__(self, name: str, definition: Callable, as_layer: Callable):
        self.name, self.as_layer = name, as_layer
        parts = ("rademacher_project", "gaussian_project", "sparse_project")
        backends.register(
            name,
            [Backend("reference", definition, backends.always, lambda *args: [])]
            + [
                Backend(part, self._run(part), backends.made_of(part, *parts), self._unsupported(part))
                for part in ("cpu", "cuda", "triton")
            ],
        )

    def __call__(self, acts, errs, geometry: tuple, projector: Projector, num_columns, backend):
        """Check what no kind of layer checks for itself, choose the backend, run."""
        layer = self.as_layer(acts, errs, *geometry)
        columns = errs.shape[2] * (layer.width + int(projector.bias))
        projector = self._check(projector, columns, num_columns)
        chosen = backends.choose(self.name, backend, acts, errs)
        return chosen.run(acts, errs, geometry, projector)

    def _check(self, projector: Projector, columns: int, num_columns) -> Projector:
        op, kind = self.name, projector.kind
        if kind not in KINDS:
            raise ValueError(f"{op}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if not isinstance(projector.bias, bool):
            raise TypeError(f"{op}: bias must be a bool, got {type(projector.bias).__name__}")
        proj_dim = check_integer(op, "proj_dim", projector.proj_dim, 1, 2**32)
        nonzeros = check_integer(op, "nonzeros", projector.nonzeros, 1, 8)
        if kind == "sparse":
            check_nonzeros(op, nonzeros, proj_dim)
        elif nonzeros != 1:
            raise ValueError(f"{op}: nonzeros must be 1 for kind {kind!r}, got {nonzeros}")
        limit = GAUSSIAN_COLUMNS if kind == "gaussian" else MAX_COLUMNS
        if columns > limit:
            raise ValueError(f"{op}: errs and acts must make at most {limit} columns for kind {kind!r}, got {columns}")
        offset = check_integer(op, "column_offset", projector.column_offset, 0, limit - columns)
        if num_columns is None and offset and kind in ("sparse", "multisketch"):
            raise ValueError(f"{op}: num_columns must be given with column_offset, got None")
        if num_columns is not None and check_integer(op, "num_columns", num_columns, 0, limit) < offset + columns:
            raise ValueError(
                f"{op}: num_columns must be at least column_offset + P = {offset + columns}, got {num_columns}"
            )
        key = [check_integer(op, name, getattr(projector, name), 0, 2**32 - 1) for name in ("seed", "stream")]
        return Projector(proj_dim, projector.bias, kind, nonzeros, *key, offset, check_scale(op, projector.scale))

    def _unsupported(self, name: str):
        return lambda acts, errs: backends.placement_unsupported(name, acts=acts, errs=errs)

    def _run(self, name: str):
        def run(acts, errs, geometry, projector):
            copied = 4 * (acts[0].numel() + errs[0].numel()) if len(acts) and acts.dtype != torch.float32 else 0
            held = copied + (4 * WIDTH if projector.kind == "multisketch" else 0)
            step = max(1, SLAB_BYTES // held) if held else max(1, len(acts))
            out = torch.empty(len(acts), projector.proj_dim, dtype=torch.float32, device=acts.device)
            for start in range(0, len(acts), step):
                part = slice(start, start + step)
                # Sums of products of 16-bit numbers need float32, and a library's matmul would round them again.
                layer = self.as_layer(acts[part].float(), errs[part].float(), *geometry)
                with full_float32(acts.device):
                    out[part] = project_layer(layer, projector, name)
            return out

        return run


def project_layer(layer: Layer, projector: Projector, backend: str) -> Tensor:
    """The projection of a layer's weight, and of its bias behind it if there is one.  # [B, D]"""
    key = {"seed": projector.seed, "stream": projector.stream}
    if projector.kind == "multisketch":
        sketch = project_layer(layer, projector._replace(kind="sparse", proj_dim=WIDTH, scale=1.0), backend)
        return rademacher_project(sketch, projector.proj_dim, scale=projector.scale, backend=backend, **key)
    batch, rows, offset = layer.errs.shape[0], layer.errs.shape[2], projector.column_offset
    out = torch.zeros(batch, projector.proj_dim, dtype=torch.float32, device=layer.acts.device)
    layers = [(layer, offset), (Layer.bias(layer.errs), offset + rows * layer.width)][: 1 + projector.bias]
    if projector.kind == "sparse" and backend == "cpu":
        # Tiles of it stay in registers and caches.
        for part, start in layers:
            part.sketch(out, **key, column_offset=start, nonzeros=projector.nonzeros)
        return out.mul_(projector.scale)
    for part, start in layers:
        for samples in range(0, batch, TILE_SAMPLES):
            few = slice(samples, samples + TILE_SAMPLES)
            _project_tiles(part._replace(acts=part.acts[few], errs=part.errs[few]), projector, start, backend, out[few])
    return out


def _project_tiles(layer: Layer, projector: Projector, column_offset: int, backend: str, out: Tensor):
    """Form some rows at a time, project them, add them to ``out [B, D]``."""
    batch, rows, width = layer.errs.shape[0], layer.errs.shape[2], layer.width
    if not (batch and rows and width):
        return
    step = min(rows, max(1, TILE_BYTES // (4 * batch * width)))
    buffer = torch.empty(batch * step * width, dtype=torch.float32, device=out.device)
    for start in range(0, rows, step):
        size = min(step, rows - start)
        tile = buffer[: batch * size * width].view(batch, size, width // layer.taps, *layer.kernel_size)
        layer.put(slice(start, start + size), tile, False)
        out += piece(projector, tile.flatten(1), column_offset + start * width, backend)


def piece(projector: Projector, grads: Tensor, column_offset: int, backend: str | None) -> Tensor:
    """Project the columns from ``column_offset`` on.  # [B, P'] -> [B, D]"""
    settings = {"seed": projector.seed, "stream": projector.stream, "scale": projector.scale, "backend": backend}
    if projector.kind == "sparse":
        settings |= {"nonzeros": projector.nonzeros, "num_columns": column_offset + grads.shape[1]}
    project = {"rademacher": rademacher_project, "gaussian": gaussian_project, "sparse": sparse_project}[projector.kind]
    return project(grads, projector.proj_dim, column_offset=column_offset, **settings)


def check_pair(op: str, acts, errs, shapes: dict[int, tuple[str, str]]):
    """Activations and errors as tensors of one device, and the function that turns the result back.

    Args:
        op: the op's name.
        acts, errs: what the user gave.
        shapes: allowed numbers of dimensions and how they read, for the messages.
    """
    tensors, restores = [], []
    for i, (argument, array) in enumerate((("acts", acts), ("errs", errs))):
        tensor, restore = arrays.to_torch(array, op, argument)
        if tensor.layout != torch.strided or tensor.is_nested:
            raise TypeError(f"{op}: {argument} must be a dense (strided) tensor, got {tensor.layout}")
        if tensor.dim() not in shapes:
            wanted = " or ".join(shape[i] for shape in shapes.values())
            raise ValueError(f"{op}: {argument} must have shape {wanted}, got {list(tensor.shape)}")
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise TypeError(f"{op}: {argument} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: {argument} must not require a gradient, which would be lost: detach it")
        if (
            torch._C._functorch.is_functorch_wrapped_tensor(tensor)
            or forward_ad.unpack_dual(tensor).tangent is not None
        ):
            raise ValueError(f"{op}: {argument} must be a plain tensor: the op has no derivatives and no vmap")
        tensors.append(written_out(tensor))
        restores.append(("torch" if isinstance(array, Tensor) else type(array).__module__.split(".")[0], restore))
    acts, errs = tensors
    if restores[0][0] != restores[1][0]:
        raise TypeError(f"{op}: errs must be of the library of acts, {restores[0][0]}, got {restores[1][0]}")
    for what in ("device", "dtype"):
        if getattr(acts, what) != getattr(errs, what):
            raise ValueError(
                f"{op}: errs must have the {what} of acts, {getattr(acts, what)}, got {getattr(errs, what)}"
            )
    if acts.dim() != errs.dim():
        raise ValueError(f"{op}: errs must have as many dimensions as acts, {acts.dim()}, got {errs.dim()}")
    return acts, errs, restores[0][1]
