"""Features and distances of large networks, kept a block at a time, so that an interrupted evaluation goes on from there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..diffusion.images import as_images
from ..diffusion.progress import Progress, silent
from ..diffusion.storage import tensors_hash
from ..evaluation import Distances, Extractor
from .stages import read_npz, write_npz

BLOCK = 256  # images in a file


@dataclass(frozen=True, eq=False, kw_only=True)
class KeptExtractor(Extractor):
    """An extractor that looks into a folder first, where blocks of features are named by a hash of their images.

    Args:
        folder: of this extractor alone; must exist.
        told: stage "image features", counts images.
    """

    folder: Path
    told: Progress = silent

    def __call__(self, images, *, batch_size: int = 64, progress: Progress = silent) -> Tensor:  # -> [N, D]
        """See :class:`~pyattr.evaluation.Extractor`."""
        images = as_images(images, "Extractor", "images")
        parts = []
        for block in images.split(BLOCK):
            path = self.folder / f"features-{tensors_hash({'images': block})}.npz"
            if not path.exists():
                write_npz(path, {"features": super().__call__(block, batch_size=batch_size).numpy()})
            parts.append(torch.from_numpy(read_npz(path)["features"]))
            for tell in (self.told, progress):
                tell(sum(map(len, parts)), len(images), "image features")
        return torch.cat(parts)


def kept(extractor: Extractor, folder: Path, told: Progress) -> KeptExtractor:
    """The same extractor with a folder."""
    return KeptExtractor(
        extractor.name, extractor.module, extractor.prepare, extractor.standard, folder=folder, told=told
    )


def kept_distances(
    measure: Callable[[Tensor, Tensor], Distances], folder: Path, told: Progress
) -> Callable[[Tensor, Tensor], Distances]:
    """A measure of pairs that looks into a folder first.

    Args:
        measure: of corresponding images.
        folder: of this measure alone; must exist.
        told: stage "image distances", counts pairs.
    """

    def measured(first: Tensor, second: Tensor) -> Distances:  # [N, C, H, W] twice
        parts, name = [], ""
        for pair in zip(first.split(BLOCK), second.split(BLOCK), strict=True):
            path = folder / f"distances-{tensors_hash(dict(zip(('first', 'second'), pair, strict=True)))}.npz"
            if not path.exists():
                found = measure(*pair)
                write_npz(path, {"values": found.values, "name": np.array(found.name)})
            block = read_npz(path)
            parts.append(block["values"])
            name = str(block["name"])
            told(sum(map(len, parts)), len(first), "image distances")
        return Distances(name, np.concatenate(parts))

    return measured
