"""What NDA keeps on disk, and the checks of options that its parts share."""

import operator
from pathlib import Path

from torch import Tensor

from ..diffusion.storage import differences, load_tensors, save_tensors
from ..ops import LARGEST_PATCH

FORMAT = 1  # of the tables; another one holds other tensors, or means others by them


def load_table(path: Path, record: dict) -> dict[str, Tensor] | None:
    """The tensors of a table that :func:`save_table` wrote, None where there is no such file.

    Raises:
        DamagedFileError: its bytes changed.
        ValueError: it is of another format, or was made with other settings than ``record``.
    """
    if not path.exists():
        return None
    tensors, found = load_tensors(path)
    if found.get("format") != FORMAT:
        raise ValueError(
            f"NDA: {path} has format {found.get('format')}, of another version of pyattr, and this one reads {FORMAT}; "
            "use another directory or delete it"
        )
    differ = differences(found, {**record, "format": FORMAT})
    if differ:
        raise ValueError(f"NDA: {path} was made otherwise: {differ}; use another directory or delete it")
    return tensors


def save_table(path: Path, tensors: dict[str, Tensor], record: dict) -> None:
    """Write a table with what decides it, whole or not at all, and its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, tensors, {**record, "format": FORMAT})


def integer(name: str, value, kind: str = "an integer") -> int:
    """``value`` as an int; ``kind`` says in the error what ``name`` must be."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"NDA: {name} must be {kind}, got {value!r}") from None


def number(name: str, value) -> float:
    """``value`` as a float, which text is not."""
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"NDA: {name} must be a number or several, got {value!r}") from None


def patch_size_error(name: str, size: int, coarse: bool) -> str:
    """Why this cannot be a patch size of the scale, empty where it can."""
    step = 2 if coarse else 1
    if step <= size <= LARGEST_PATCH and size % step == 0:
        return ""
    even = " and be even" if coarse else ""
    return f"NDA: {name} must lie in [{step}, {LARGEST_PATCH // step * step}]{even}, got {size}"
