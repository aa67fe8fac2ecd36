"""Codes of an ensemble's training items: argument checks, and files of codes."""

import os
from typing import NamedTuple

import numpy as np
import torch

from .. import arrays

FEWEST_MEMBERS, MOST_MEMBERS = 2, 64
ASYMMETRY = 1e-6  # of the largest entry: what products in float32 leave
_CHECKED = 1 << 20  # codes at a time


class Codes(NamedTuple):
    """Codes as a kernel takes them."""

    bits: torch.Tensor  # [N] int64, whatever the strides
    from_file: bool


def check_gram(op: str, gram) -> torch.Tensor:
    """[n, n] float64 on the CPU."""
    gram, _ = arrays.to_torch(gram, op, "gram")
    _check_dense(op, "gram", gram)
    if gram.dtype != torch.float64:
        raise TypeError(f"{op}: gram must be float64, got {gram.dtype}")
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or not FEWEST_MEMBERS <= len(gram) <= MOST_MEMBERS:
        raise ValueError(
            f"{op}: gram must have shape [n, n] with n from {FEWEST_MEMBERS} to {MOST_MEMBERS}, got {list(gram.shape)}"
        )
    gram = gram.detach().cpu()
    finite = gram.isfinite()
    if not finite.all():
        i, j = (~finite).nonzero()[0].tolist()
        raise ValueError(f"{op}: gram must be finite, got {gram[i, j].item()} at [{i}, {j}]")
    size = gram.abs().max().item()
    apart = (gram / 2 - gram.T / 2).abs()  # halves cannot overflow
    if apart.max().item() > ASYMMETRY / 2 * size:
        i, j = divmod(int(apart.argmax()), len(gram))
        raise ValueError(
            f"{op}: gram must be symmetric, got {gram[i, j].item()} at [{i}, {j}] and {gram[j, i].item()} at [{j}, {i}]"
        )
    return gram


def check_codes(op: str, codes):
    """Codes, and the function that turns a result back into their kind; a path is a file."""
    if isinstance(codes, (str, os.PathLike)):
        return Codes(_mapped(op, codes), True), lambda tensor: tensor
    codes, restore = arrays.to_torch(codes, op, "codes")
    _check_dense(op, "codes", codes)
    if codes.dtype not in (torch.uint64, torch.int64):
        raise TypeError(f"{op}: codes must be uint64, or int64 of the same bits, got {codes.dtype}")
    if codes.dim() != 1:
        raise ValueError(f"{op}: codes must have shape [N], got {list(codes.shape)}")
    return Codes(codes.detach().view(torch.int64), False), restore


def _check_dense(op: str, name: str, tensor: torch.Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{op}: {name} must be a dense (strided) tensor")


def _mapped(op: str, path) -> torch.Tensor:
    """The codes of a .npy file, memory-mapped."""
    wanted = f"{op}: codes must be a .npy file of uint64 [N]"
    with open(path, "rb") as stream:
        try:
            version = np.lib.format.read_magic(stream)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, _, dtype = read(stream)
        except (ValueError, KeyError, EOFError) as error:
            raise ValueError(f"{wanted}, got {os.fspath(path)!r}, whose header cannot be read: {error}") from None
        start, size = stream.tell(), os.fstat(stream.fileno()).st_size
    if dtype.str != "<u8" or len(shape) != 1:
        raise ValueError(f"{wanted}, little-endian, got {os.fspath(path)!r} of {dtype.str} {list(shape)}")
    if size != start + 8 * shape[0]:
        raise ValueError(
            f"{op}: codes must be a whole file: {os.fspath(path)!r} has {size} bytes, its header of {shape[0]} codes "
            f"wants {start + 8 * shape[0]}"
        )
    if shape[0] == 0:
        return torch.empty(0, dtype=torch.int64)
    mapped = np.memmap(path, dtype=np.int64, mode="r", offset=start, shape=shape)
    return arrays.to_torch(mapped, op, "codes")[0]


def refuse_code(op: str, code: int, index: int, n: int) -> None:
    """Raise for a code that is none of n members, or that leaves no member without the item."""
    code %= 1 << 64
    if code >> n:
        raise ValueError(f"{op}: codes must have no bit from n = {n} on, got {code} at [{index}]")
    if code == (1 << n) - 1:
        raise ValueError(f"{op}: codes must leave a member without the item, got all {n} bits set at [{index}]")


def first_bad(codes: torch.Tensor, n: int) -> int | None:  # [N] int64
    """The first of the codes that :func:`refuse_code` refuses."""
    every = (1 << n) - 1 if n < 64 else -1
    bad = (codes == every) | ((codes & ~every) != 0)
    return int(bad.nonzero()[0]) if bool(bad.any()) else None


def refuse_bad(op: str, codes: torch.Tensor, n: int) -> None:
    """Raise for the first such code of all."""
    for first in range(0, len(codes), _CHECKED):
        piece = codes[first : first + _CHECKED]
        bad = first_bad(piece, n)
        if bad is not None:
            refuse_code(op, int(piece[bad]), first + bad, n)
