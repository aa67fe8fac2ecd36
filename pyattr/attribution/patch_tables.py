"""What NDA keeps on disk: tables with everything that decides them."""

from pathlib import Path

from torch import Tensor

from ..diffusion.storage import differences, load_tensors, save_tensors

FORMAT = 1  # another one holds other tensors, or means others by them


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
