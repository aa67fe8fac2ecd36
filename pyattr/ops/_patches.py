"""What the operations on patches share: argument checks, the bank, and how a query's positions are taken in parts."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .. import arrays, backends
from ._arguments import check_integer, check_scale
from ._layers import written_out

PIXELS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.uint8: 3}  # pyattr::Pixel
BORDERS = {"class": 0, "zero": 1, "inside": 2}  # pyattr::Border
LARGEST_PATCH = 511
SMALLEST_SIGMA, LARGEST_SIGMA = 1e-15, 1e15  # 1 / (2 sigma^2) stays a normal float32
STATISTICS_BYTES = 96 << 20  # of one part of a query's positions, all images
FEWEST_POSITIONS = 64  # of a part, however many images there are: a smaller part would mostly be margin


class Bank:
    """Images to match: one array, or chunks of one that can be walked more than once.

    Args:
        op: for the errors.
        bank: [N, C, H, W] array, or a re-iterable of such chunks.
        device: where the chunks are wanted; those elsewhere are copied, one at a time.
    """

    def __init__(self, op: str, bank, device: torch.device):
        self.op, self.device = op, device
        self.streamed = not (
            isinstance(bank, torch.Tensor) or hasattr(bank, "__array__") or hasattr(bank, "__dlpack__")
        )
        if self.streamed:
            if not hasattr(bank, "__iter__"):
                raise TypeError(
                    f"{op}: bank must be an array [N, C, H, W] or a re-iterable of such chunks, got {type(bank).__name__}"
                )
            if iter(bank) is bank:
                raise TypeError(
                    f"{op}: bank is walked more than once and must be re-iterable (a list, or an object whose __iter__ "
                    f"starts anew), got {type(bank).__name__}"
                )
        self._chunks = bank if self.streamed else (bank,)
        self.num_images, self.shape, self.dtypes = 0, None, set()
        for chunk in self._walk():
            if self.shape not in (None, tuple(chunk.shape[1:])):
                raise ValueError(
                    f"{op}: bank chunks must have one shape, got {list(self.shape)} and {[*chunk.shape[1:]]}"
                )
            self.shape = tuple(chunk.shape[1:])
            self.num_images += len(chunk)
            self.dtypes.add(chunk.dtype)

    def _walk(self) -> Iterator[torch.Tensor]:
        name = "a chunk of bank" if self.streamed else "bank"
        for chunk in self._chunks:
            chunk, _ = arrays.to_torch(chunk, self.op, name)
            if chunk.layout != torch.strided or chunk.is_nested:
                raise TypeError(f"{self.op}: {name} must be a dense (strided) tensor")
            if chunk.dim() != 4:
                raise ValueError(f"{self.op}: {name} must have shape [N, C, H, W], got {list(chunk.shape)}")
            if chunk.dtype not in PIXELS and chunk.dtype != torch.float64:
                raise TypeError(
                    f"{self.op}: {name} must be uint8, float16, bfloat16, float32 or float64, got {chunk.dtype}"
                )
            yield written_out(chunk.detach())

    def __iter__(self) -> Iterator[torch.Tensor]:
        """The chunks [n, C, H, W], on the device."""
        images = 0
        for chunk in self._walk():
            images += len(chunk)
            if images > self.num_images or tuple(chunk.shape[1:]) != self.shape:
                break
            yield chunk.to(self.device)
        if images != self.num_images:
            raise RuntimeError(f"{self.op}: bank changed between two walks: {self.num_images} images, then {images}")


class Geometry(NamedTuple):
    """Which patches there are and which may match; sizes of the query's and the bank's grid of positions."""

    patch_size: int
    border: str
    lowres: bool
    query_grid: tuple[int, int]  # H', W' of the query
    bank_grid: tuple[int, int]  # H', W' of the bank


class Problem(NamedTuple):
    """Checked arguments that every backend takes."""

    queries: torch.Tensor  # [Q, C, H, W]
    bank: Bank
    geometry: Geometry
    sigmas: tuple[float, ...]  # [Q]
    scale: float


def check_problem(op: str, queries, bank, patch_size, sigma, scale, border, lowres, borders):
    """The arguments as a :class:`Problem`, and what turns a result back into the queries' kind of array."""
    queries, restore = arrays.to_torch(queries, op, "queries")
    if queries.layout != torch.strided or queries.is_nested:
        raise TypeError(f"{op}: queries must be a dense (strided) tensor")
    if queries.dim() != 4:
        raise ValueError(f"{op}: queries must have shape [Q, C, H, W], got {list(queries.shape)}")
    if queries.shape[1] == 0:
        raise ValueError(f"{op}: queries must have at least one channel, got {list(queries.shape)}")
    if queries.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"{op}: queries must be float16, bfloat16, float32 or float64, got {queries.dtype}")
    patch_size = check_integer(op, "patch_size", patch_size, 1, LARGEST_PATCH)
    scale = check_scale(op, scale)
    sigmas = _check_sigma(op, sigma, len(queries))
    if border not in borders:
        raise ValueError(f"{op}: border must be one of {', '.join(borders)}, got {border!r}")
    if not isinstance(lowres, bool):
        raise TypeError(f"{op}: lowres must be a bool, got {type(lowres).__name__}")
    if lowres and patch_size % 2:
        raise ValueError(f"{op}: lowres=True needs an even patch_size, got {patch_size}")
    query_grid = _grid(op, "queries", queries.shape[2:], patch_size, border)
    bank = Bank(op, bank, queries.device)
    if bank.shape is None:
        bank.shape = tuple(queries.shape[1:])
    wanted = queries.shape[1:] if border != "inside" else (queries.shape[1], *bank.shape[1:])
    if bank.shape != tuple(wanted):
        raise ValueError(
            f"{op}: bank must have shape [N, {', '.join(map(str, wanted))}], got [N, {', '.join(map(str, bank.shape))}]"
        )
    bank_grid = _grid(op, "bank", bank.shape[1:], patch_size, border)
    geometry = Geometry(patch_size, border, lowres, query_grid, bank_grid)
    return Problem(written_out(queries.detach()), bank, geometry, sigmas, scale), restore


def _check_sigma(op: str, sigma, num_queries: int) -> tuple[float, ...]:
    try:
        if isinstance(sigma, (str, bytes)):
            raise TypeError
        values = torch.as_tensor(sigma, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{op}: sigma must be a real number or one for each query, got {type(sigma).__name__}"
        ) from None
    if values.shape not in ((), (num_queries,)):
        raise ValueError(f"{op}: sigma must be a number or have shape [{num_queries}], got {list(values.shape)}")
    values = values.expand(num_queries) if values.dim() == 0 else values
    for value in values.tolist() or [1.0]:
        if not SMALLEST_SIGMA <= value <= LARGEST_SIGMA:
            raise ValueError(f"{op}: sigma must lie in [{SMALLEST_SIGMA}, {LARGEST_SIGMA}], got {value}")
    return tuple(values.tolist())


def _grid(op: str, argument: str, size, patch_size: int, border: str) -> tuple[int, int]:
    pad = 0 if border == "inside" else (patch_size - 1) // 2
    grid = tuple(int(length) + 2 * pad - patch_size + 1 for length in size)
    if min(grid) < 1:
        smallest = patch_size - 2 * pad
        raise ValueError(
            f"{op}: {argument} must be at least {smallest} x {smallest} pixels for patch_size={patch_size} and "
            f"border={border!r}, got {size[0]} x {size[1]}"
        )
    return grid


def unsupported(name: str):
    """Reasons of a compiled backend."""

    def reasons(problem: Problem, *_):
        found = backends.placement_unsupported(name, queries=problem.queries)
        if torch.float64 in problem.bank.dtypes:
            found.append("bank is torch.float64, this backend takes uint8, float16, bfloat16 and float32")
        return found

    return reasons


class Part(NamedTuple):
    """A rectangle of a query's positions."""

    row_begin: int
    row_end: int
    column_begin: int
    column_end: int

    @property
    def positions(self) -> int:
        return (self.row_end - self.row_begin) * (self.column_end - self.column_begin)


def parts(grid: tuple[int, int], bytes_per_position: int) -> list[Part]:
    """The grid cut into rectangles whose statistics stay within the bounds of the module; cuts across columns come first, since
    a kernel's margin above and below a tile costs more than that beside it."""
    height, width = grid
    most = max(FEWEST_POSITIONS, STATISTICS_BYTES // max(bytes_per_position, 1))
    columns = min(width, max(1, most // height))
    if columns * height > most:  # a single column is too many
        rows = most
        return [Part(r, min(r + rows, height), c, c + 1) for c in range(width) for r in range(0, height, rows)]
    if columns < 8 and width > columns:  # as square as possible
        columns = min(width, max(columns, int(most**0.5)))
        rows = max(1, most // columns)
    else:
        rows = height
    return [
        Part(r, min(r + rows, height), c, min(c + columns, width))
        for r in range(0, height, rows)
        for c in range(0, width, columns)
    ]


def address_and_sizes(query, images, problem: Problem, sigma: float, part: Part):
    """The arguments of a compiled kernel up to its statistics: query [C, H, W] float32, images [n, C, H, W]."""
    geometry = problem.geometry
    return (
        query.data_ptr(), images.data_ptr(), PIXELS[images.dtype], images.stride(), images.shape, query.shape[1:],
        geometry.patch_size, BORDERS[geometry.border], geometry.lowres, problem.scale, 1 / (2 * sigma**2), part,
    )  # fmt: skip
