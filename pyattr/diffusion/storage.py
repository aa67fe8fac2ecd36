"""Tensors on disk: written whole, checksummed, refused when damaged; and what identifies models and data."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..files import file_kind, whole_file


class DamagedFileError(RuntimeError):
    """A file is not what was written; the message names it and says what to do.

    Attributes:
        found: what it is instead, in words, for messages to those who named the file; empty: the message says it.
    """

    def __init__(self, message: str, found: str = ""):
        super().__init__(message)
        self.found = found


def _damaged(path: str | os.PathLike, why: object) -> DamagedFileError:
    found = f"damaged ({why})"
    return DamagedFileError(f"{path} is {found}: delete it and make it again", found)


def tensors_hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if tensor.numel():  # an empty one from NumPy has no strides to view it by
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def model_hash(model: nn.Module) -> str:
    """Identifies a model's weights and buffers, wherever they lie."""
    return tensors_hash(model.state_dict())


def data_hash(images: Tensor) -> str:
    """Identifies images in their order."""
    return tensors_hash({"images": images})


def save_tensors(path: str | os.PathLike, tensors: dict[str, Tensor], record: dict) -> None:
    """Write a safetensors file that :func:`load_tensors` can check.

    Args:
        path: the file; its folder must exist.
        tensors: any device.
        record: JSON-serialisable settings, stored beside the tensors.

    Raises:
        OSError: the folder is missing, read-only or full; nothing is left behind.

    Extra memory: the tensors once more.
    """
    tensors = _separate({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    metadata = {"record": json.dumps(record, sort_keys=True), "sha256": tensors_hash(tensors)}
    with whole_file(path) as stream:
        stream.write(safetensors.torch.save(tensors, metadata))


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, copied where two share memory (tied weights, views), which safetensors refuses."""
    seen, separate = set(), {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return separate


def load_record(path: str | os.PathLike) -> dict:
    """The settings in a file of :func:`save_tensors`, without reading its tensors.

    Raises:
        FileNotFoundError, DamagedFileError: see :func:`load_tensors`.
    """
    return json.loads(_metadata(path)["record"])


def load_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict]:
    """Read a file of :func:`save_tensors` and check every byte.

    Returns:
        The tensors (on the CPU) and the record.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it is no safetensors file of ours, or its bytes changed.
    """
    metadata = _metadata(path)
    tensors = safetensors.torch.load_file(path)
    if tensors_hash(tensors) != metadata["sha256"]:
        raise _damaged(path, "its checksum does not match")
    return tensors, json.loads(metadata["record"])


def _metadata(path: str | os.PathLike) -> dict[str, str]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        kind = file_kind(path)
        if kind in (None, "a safetensors file"):  # ours, cut short or overwritten
            raise _damaged(path, error) from None
        raise DamagedFileError(f"{path} is no safetensors file of pyattr: it is {kind}", kind) from None
    if not {"record", "sha256"} <= metadata.keys():
        raise DamagedFileError(
            f"{path} was not written by pyattr: it carries no checksum", "a safetensors file that pyattr did not write"
        )
    return metadata


def differences(made: dict, asked: dict) -> str:
    """What distinguishes two sets of settings, for an error message; empty when they are equal.

    Values pass through JSON first, so that a stored set compares equal to the one it was made from. Where both sets hold a
    dict, its members are compared: "schedule.beta_end was 0.02, now 0.03".
    """
    made, asked = (json.loads(json.dumps(settings)) for settings in (made, asked))
    return "; ".join(_differences(made, asked, ""))


def _differences(made: dict, asked: dict, prefix: str) -> Iterator[str]:
    for name in {**made, **asked}:
        old, new = made.get(name), asked.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name} was {_short(old)}, now {_short(new)}"


def _short(value) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}"
