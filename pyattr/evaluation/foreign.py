"""Ground truth that other libraries made, as :class:`~pyattr.evaluation.GroundTruth`."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .ground_truth import GroundTruth

_TARGET = "loss"


def read_dattri(directory: str | os.PathLike, *, num_images: int) -> GroundTruth:
    """The ground truth of a benchmark of dattri, or what its ``calculate_lds_ground_truth`` returned.

    Args:
        directory: holds ``target_values_lds.pt``, the negated losses [M, Q], and ``indices_lds.pt``, the indices [M, s] of the
            images that each model was trained on.
        num_images: N. Indices from there on are left out, as dattri's own metric does.

    Returns:
        One target function, "loss": the negative of the values in the file, which dattri turns round to go with its scores.
        Images and queries are unknown, so the order of both is for the caller to know.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file does not hold such a tensor, or the two do not go together.

    Extra memory: M (N + 8 Q) bytes.

    Source: dattri 0.3, ``dattri.metric.calculate_lds_ground_truth`` and ``dattri.benchmark.load``.
    """
    directory = Path(directory)
    values, indices = (_read(directory / name, "read_dattri") for name in ("target_values_lds.pt", "indices_lds.pt"))
    for name, tensor in (("target_values_lds.pt", values), ("indices_lds.pt", indices)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 2:
            raise ValueError(f"read_dattri: {name} must hold a tensor of two dimensions, got {_kind(tensor)}")
    if len(values) != len(indices):
        raise ValueError(
            f"read_dattri: values and indices must be of as many models, got {len(values)} and {len(indices)}"
        )
    masks = np.zeros((len(indices), num_images), bool)
    for mask, kept in zip(masks, indices.long().numpy(), strict=True):
        if kept.size and kept.min() < 0:
            raise ValueError(f"read_dattri: indices must not be negative, got {kept.min()}")
        mask[kept[kept < num_images]] = True
    return _truth(masks, -values.double().numpy(), "dattri")


def read_bergson(
    directory: str | os.PathLike, *, num_items: int, losses: str | os.PathLike | None = None
) -> GroundTruth:
    """The losses that bergson keeps of a bank of models, each trained without a part of the items.

    Args:
        directory: of the run that made the bank: holds ``subsets.json``, the items that each model was trained without.
        num_items: N.
        losses: the file to read; None: the only one in ``query_loss_cache``. (There is one for each set of queries.)

    Returns:
        One target function, "loss". Masks mark the items that are kept, as everywhere here. Items and queries are unknown. The
        run must have left the items out rather than only weighed them less (its ``subset_weight`` be 0), which the file does
        not say.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it does not hold such losses, there are several, or an item is out of range.

    Extra memory: M (N + 8 Q) bytes.

    Source: bergson 2.5, ``bergson.validate``.
    """
    directory = Path(directory)
    if losses is None:
        found = sorted((directory / "query_loss_cache").glob("losses_*.pt"))
        if len(found) > 1:
            raise ValueError(
                f"read_bergson: losses must be chosen, got {len(found)} files: {', '.join(p.name for p in found)}"
            )
        if not found:
            raise FileNotFoundError(f"read_bergson: {directory / 'query_loss_cache'} holds no losses_*.pt")
        losses = found[0]
    record = _read(Path(losses), "read_bergson")
    values = record.get("per_subset") if isinstance(record, dict) else None
    if not isinstance(values, Tensor) or values.dim() not in (1, 2):
        raise ValueError(
            f"read_bergson: {losses} must hold losses per_subset of one or two dimensions, got {_kind(values)}"
        )
    left_out = json.loads((directory / "subsets.json").read_text(encoding="utf8"))
    if len(left_out) != len(values):
        raise ValueError(
            f"read_bergson: losses and subsets must be of as many models, got {len(values)} and {len(left_out)}"
        )
    masks = np.ones((len(left_out), num_items), bool)
    for mask, items in zip(masks, left_out, strict=True):
        if items and not 0 <= min(items) <= max(items) < num_items:
            raise ValueError(f"read_bergson: items must lie in [0, {num_items}), got {min(items)}..{max(items)}")
        mask[items] = False
    return _truth(masks, values.double().reshape(len(values), -1).numpy(), "bergson")


def _read(path: Path, op: str):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{op}: {path} cannot be read ({error})") from None


def _kind(found) -> str:
    return f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__


def _truth(masks: np.ndarray, losses: np.ndarray, source: str) -> GroundTruth:  # [M, N], [M, Q]
    return GroundTruth(
        masks,
        losses[None, :, None, None],
        (_TARGET,),
        np.arange(losses.shape[1]),
        images=None,
        queries=None,
        settings={"source": source},
    )
