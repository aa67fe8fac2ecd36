"""Feature rows in memory or in checksummed shards on disk; ``docs/feature-store.md`` describes the layout."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..files import whole_file
from .storage import DamagedFileError, differences

FORMAT, VERSION = "pyattr-features", 1
MANIFEST = "manifest.json"
KEYS = {"version": int, "settings": dict, "data": dict, "rows": int, "shard_rows": int, "shards": list}
SHARD_KEYS = {"file": str, "first_row": int, "rows": int, "dtype": str, "dim": int, "bytes": int, "sha256": str}


class Features:
    """Rows of features in order.

    Attributes:
        ids: [N] int64, the sample ids that the noise of each row is a function of.
        dim: D.
        dtype: of the features.
    """

    def __init__(self, ids: Tensor, dim: int, dtype: torch.dtype, read_block, starts: list[int]):
        self.ids, self.dim, self.dtype = ids, dim, dtype
        self._read_block, self._starts = read_block, starts

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def from_tensor(cls, features: Tensor, ids: Tensor) -> "Features":
        """Features [N, D] that lie in memory."""
        return cls(ids, features.shape[1], features.dtype, lambda start: features, [0])

    @classmethod
    def joined(cls, parts: Sequence["Features"], scale: float) -> "Features":
        """The rows of several, one after the other and times a number, read as they are asked for; numbered anew."""
        firsts = [sum(map(len, parts[:number])) for number in range(len(parts))]
        places = {
            first + start: (part, start) for first, part in zip(firsts, parts, strict=True) for start in part._starts
        }

        def read(start: int) -> Tensor:
            part, own = places[start]
            return part._read_block(own) * scale

        count = sum(map(len, parts))
        return cls(torch.arange(count), parts[0].dim, parts[0].dtype, read, [*places])

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, [R, D]) until all rows have come; one block is in memory at a time.

        Raises:
            DamagedFileError: a shard is missing or its bytes changed.
        """
        for start in self._starts:
            yield start, self._read_block(start)

    def tensor(self) -> Tensor:
        """All rows, [N, D].

        Extra memory: the features, 4 N D bytes in float32, and one block.
        """
        out = torch.empty(len(self), self.dim, dtype=self.dtype, device="cpu")
        for start, block in self.blocks():
            out[start : start + len(block)] = block
        return out


class FeatureDirectory:
    """A directory of shards with one manifest that lists them.

    Args:
        path: the directory; created when it is missing.
        settings: everything that decides the value of a row but the image and its id.
        data: what identifies the images and their ids.
        rows: N.
        shard_rows: rows in each shard but the last. A directory that exists keeps its own.

    Raises:
        ValueError: the directory was made with other settings or data; the message says what differs.
        DamagedFileError: its manifest cannot be read.
    """

    def __init__(self, path: str | os.PathLike, *, settings: dict, data: dict, rows: int, shard_rows: int):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        asked = {"settings": settings, "data": data, "rows": rows}
        if (self.path / MANIFEST).exists():
            self.manifest = read_manifest(self.path)
            differ = differences(
                {**self.manifest["settings"], "rows": self.manifest["rows"]}, {**settings, "rows": rows}
            )
            differ = differ or differences(self.manifest["data"], data)
            if differ:
                raise ValueError(f"features: {path} was made otherwise: {differ}; use another directory or delete it")
        else:
            self.manifest = {"format": FORMAT, "version": VERSION, **asked, "shard_rows": shard_rows, "shards": []}
            self._write_manifest()
        self.starts = list(range(0, rows, self.manifest["shard_rows"]))
        self._checked: set[str] = set()

    def missing(self) -> list[tuple[int, int]]:
        """(first row, end) of the shards that are still to be made, or to be made again."""
        there = {shard["first_row"] for shard in self.manifest["shards"] if (self.path / shard["file"]).is_file()}
        rows, size = self.manifest["rows"], self.manifest["shard_rows"]
        return [(start, min(start + size, rows)) for start in self.starts if start not in there]

    def write(self, start: int, features: Tensor, ids: Tensor, batch_size: int) -> None:
        """Add one shard: first its file, then the manifest that lists it.

        Extra memory: the shard twice.
        """
        content = safetensors.torch.save({"features": features.cpu().contiguous(), "ids": ids.contiguous()})
        name = f"shard-{start:012d}.safetensors"
        with whole_file(self.path / name) as stream:
            stream.write(content)
        shard = {
            "file": name,
            "first_row": start,
            "rows": len(features),
            "dtype": str(features.dtype).removeprefix("torch."),
            "dim": features.shape[1],
            "batch_size": batch_size,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        others = [s for s in self.manifest["shards"] if s["first_row"] != start]
        self.manifest["shards"] = sorted([*others, shard], key=lambda s: s["first_row"])
        self._write_manifest()
        self._checked.add(name)

    def _write_manifest(self) -> None:
        with whole_file(self.path / MANIFEST) as stream:
            stream.write(json.dumps(self.manifest, indent=1, sort_keys=True).encode())

    def read(self, start: int) -> dict[str, Tensor]:
        """The tensors of the shard that begins at a row; checked against its checksum the first time."""
        shard = next(s for s in self.manifest["shards"] if s["first_row"] == start)
        path = self.path / shard["file"]
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise DamagedFileError(f"{path} is missing: compute the features again into the same directory") from None
        if shard["file"] not in self._checked:
            if hashlib.sha256(content).hexdigest() != shard["sha256"]:
                raise DamagedFileError(
                    f"{path} is damaged (its checksum does not match): delete it and compute the features again"
                )
            self._checked.add(shard["file"])
        try:
            tensors = safetensors.torch.load(content)
            return {name: tensors[name] for name in ("features", "ids")}
        except (safetensors.SafetensorError, KeyError) as error:  # changed since it was checked, or not written by us
            raise DamagedFileError(f"{path} is damaged ({error}): delete it and compute the features again") from None

    def features(self) -> Features:
        """The rows, once none is missing; every shard is read and checked."""
        if self.missing():
            raise ValueError(f"features: {self.path} is not complete: {len(self.missing())} shards are missing")
        first = self.manifest["shards"][0]
        ids = torch.cat([self.read(start)["ids"] for start in self.starts])
        dtype = getattr(torch, first["dtype"])
        return Features(ids, first["dim"], dtype, lambda start: self.read(start)["features"], self.starts)


def read_manifest(path: str | os.PathLike) -> dict:
    """The manifest of a directory of features.

    Raises:
        FileNotFoundError: there is none.
        DamagedFileError: it cannot be parsed, or something is missing from it.
        ValueError: it is of another format or a newer version.
    """
    file = Path(path) / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except ValueError as error:
        raise DamagedFileError(f"{file} is damaged ({error}): delete {path} and compute the features again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"features: {file} is not a manifest of pyattr's features")
    if manifest.get("version", VERSION) != VERSION:
        raise ValueError(f"features: {file} has version {manifest['version']}, this pyattr reads version {VERSION}")
    lacks = _lacks(manifest, KEYS, "")
    for number, shard in enumerate(manifest["shards"] if not lacks else ()):
        lacks = lacks or _lacks(shard, SHARD_KEYS, f"shard {number}'s ")
    if lacks:
        raise DamagedFileError(f"{file} is damaged ({lacks}): delete {path} and compute the features again")
    return manifest


def _lacks(entry, keys: dict[str, type], where: str) -> str:
    """What is missing from a part of a manifest, or of another type; empty when nothing is."""
    if not isinstance(entry, dict):
        return f"{where}entry is not an object"
    return next((f"no valid {where}{name}" for name, kind in keys.items() if type(entry.get(name)) is not kind), "")


def open_features(path: str | os.PathLike) -> tuple[Features, dict]:
    """The finished features in a directory, and its manifest.

    Raises:
        FileNotFoundError, DamagedFileError, ValueError: see :func:`read_manifest`; also when shards are still missing.
    """
    manifest = read_manifest(path)
    made = {name: manifest[name] for name in ("settings", "data", "rows", "shard_rows")}
    return FeatureDirectory(path, **made).features(), manifest
