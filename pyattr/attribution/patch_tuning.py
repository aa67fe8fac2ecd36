"""Choosing NDA's settings by how well its scores predict the losses of models trained on parts of the data."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from .. import arrays
from ..diffusion.storage import tensors_hash
from .patch_matches import Term
from .patch_options import check_patch_size, integer, nearest_patch_size, number, sequence
from .patch_tables import load_table, save_table

if TYPE_CHECKING:
    from .nda import NDA

SIZES = (3, 5, 7, 11, 15, 21)  # at 32 x 32 pixels, as are the coarse ones
COARSE_SIZES = (6, 10, 14, 18, 22)
KS = (10, 100)
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Tuning:
    """What :func:`tune` chose, and what it tried.

    Attributes:
        lds: the linear datamodeling score of the choice on the validation queries, in [-1, 1]: a mean of Spearman correlations.
            It is the largest of many tries on these very queries, so it flatters; report that of others.
        timesteps, patch_sizes, coarse_patch_sizes, alpha: one for each timestep, as :class:`NDA` takes them.
        k: likewise.
        tried: the scores of each table alone, ``(timestep, patch size, coarse, k) -> LDS``.
    """

    lds: float
    timesteps: tuple[int, ...]
    patch_sizes: tuple[int, ...]
    coarse_patch_sizes: tuple[int, ...]
    alpha: tuple[float, ...]
    k: int
    tried: dict[tuple[int, int, bool, int], float]


def tune(
    method: NDA,
    masks,
    losses,
    queries,
    *,
    timesteps: Sequence[int] | None = None,
    patch_sizes: Sequence[int] | None = None,
    coarse_patch_sizes: Sequence[int] | None = None,
    ks: Sequence[int] = KS,
    alphas: Sequence[float] = ALPHAS,
) -> Tuning:
    """Choose patch sizes, k, timesteps and alpha by the linear datamodeling score on a validation set, and use them.

    Scores tau predict the loss of a model that was trained on the subset m of the images as ``-sum_n m_n tau(q, n)``; the
    linear datamodeling score of a query is the Spearman correlation, over subsets, of these with the losses. Since the
    prediction is linear in tau, one pass over the training images for each (timestep, patch size, scale, k) serves every
    mixture: mixing weights and sets of timesteps are then tried at no cost.

    For each k and each timestep the patch size of either scale is the one whose table does best alone, and alpha the one that
    mixes the two best; the timesteps are the first ones up to the one where their mean does best; and k is the one with which
    all of this does best. Of equals the first is taken.

    Args:
        method: fitted on the N training images. Its border, noise and schedule are kept.
        masks: [M, N], 1 where subset m holds image n and 0 elsewhere.
        losses: [M, Q], of the model trained on each subset, for each query; their scale does not matter.
        queries: Q validation images, as for :meth:`NDA.scores`.
        timesteps: rising; None: those of ``method``, in rising order.
        patch_sizes, coarse_patch_sizes: to choose from; None: 3, 5, 7, 11, 15, 21 and 6, 10, 14, 18, 22 at 32 x 32 pixels, in
            proportion to the shorter side elsewhere.
        ks: to choose from.
        alphas: to choose from, in [0, 1]. Without 1 the coarse scale is always mixed in, without 0 the fine one.

    Returns:
        :class:`Tuning`. With a ``directory`` the predictions of each table are kept there and found again.

    Raises:
        RuntimeError: the method was not fitted.
        TypeError, ValueError: an argument is not as above.

    Extra memory: 8 M Q bytes for each (timestep, patch size, scale, k), and that of :meth:`NDA.scores`.

    Source: the procedure of the NDA paper (tuning on the validation set by the linear datamodeling score); the order in which
    settings are chosen is ours. The score: Park et al. 2023, definition 2.2.
    """
    images = method.images_of(queries)
    masks, losses = _checked(masks, losses, method.shape[0], len(images))
    timesteps = sorted(method.timesteps) if timesteps is None else sequence("timesteps", timesteps, integer)
    last = method.schedule.num_timesteps
    if not timesteps or timesteps != sorted(set(timesteps)) or not all(0 <= t < last for t in timesteps):
        raise ValueError(f"NDA: timesteps to choose from must rise and lie in [0, {last}), got {timesteps}")
    side = min(method.shape[-2:])
    fine = _sizes(patch_sizes, SIZES, side, "patch_sizes", coarse=False)
    coarse = _sizes(coarse_patch_sizes, COARSE_SIZES, side, "coarse_patch_sizes", coarse=True)
    ks = _grid(sequence("ks", ks, integer), "ks", lambda k: k >= 1)
    alphas = _grid(sequence("alphas", alphas, number), "alphas", lambda a: 0 <= a <= 1)
    fine, coarse = fine if max(alphas) > 0 else [], coarse if min(alphas) < 1 else []

    kinds = [(p, False) for p in fine] + [(p, True) for p in coarse]
    tables = [(k, Term(t, p, is_coarse, 1.0)) for k, t, (p, is_coarse) in itertools.product(ks, timesteps, kinds)]
    for _, term in tables:
        method.check_size(term)
    ranks = stats.rankdata(-losses, axis=0)
    predictions, tried, k_before = {}, {}, method.k
    try:
        for place, (k, term) in enumerate(tables):
            method.k = k
            found = _predictions(method, masks, images, term, place, len(tables))
            key = (term.timestep, term.patch_size, term.coarse, k)
            predictions[key], tried[key] = found, _lds(found, ranks)
    finally:
        method.k = k_before
    chosen = max(
        (_best(predictions, tried, ranks, timesteps, fine, coarse, k, alphas) for k in ks), key=lambda c: c.lds
    )
    method.timesteps = list(chosen.timesteps)
    method.patch_sizes, method.coarse_patch_sizes = list(chosen.patch_sizes), list(chosen.coarse_patch_sizes)
    method.alpha, method.k = list(chosen.alpha), chosen.k
    method.settle()
    return chosen


def _best(predictions, tried, ranks, timesteps, fine, coarse, k, alphas) -> Tuning:
    """The best settings with this k."""
    sizes, mixtures, weights = [], [], []
    for t in timesteps:
        pair = [
            max(of, key=lambda p: tried[t, p, is_coarse, k]) if of else None
            for of, is_coarse in ((fine, False), (coarse, True))
        ]
        mixed = {}
        for alpha in alphas:
            parts = zip((alpha, 1 - alpha), pair, (False, True), strict=True)
            mixed[alpha] = sum(share * predictions[t, p, scale, k] for share, p, scale in parts if share)
        alpha = max(alphas, key=lambda a: _lds(mixed[a], ranks))
        sizes.append(pair)
        weights.append(alpha)
        mixtures.append(mixed[alpha])
    sums = np.cumsum(mixtures, axis=0)  # [T, M, Q]
    values = [_lds(total, ranks) for total in sums]
    count = int(np.argmax(values)) + 1
    # A scale without a part still needs a size; it is never used.
    fines, coarses = zip(*((p or 1, r or 2) for p, r in sizes[:count]), strict=True)
    return Tuning(values[count - 1], tuple(timesteps[:count]), fines, coarses, tuple(weights[:count]), k, tried)


def _predictions(method: NDA, masks: np.ndarray, images: Tensor, term: Term, place: int, tables: int) -> np.ndarray:
    """``sum_n m_n tau(q, n)`` of one table, averaged over draws of the noise, [M, Q] float64, computed or found."""
    directory, draws, path, record = method.directory, method.num_noises, None, {}
    counters = [method.counter("tuning", place * draws + draw, tables * draws, len(images)) for draw in range(draws)]
    if directory is not None:
        record = {
            "kind": "patch predictions",
            "inputs": tensors_hash({"masks": torch.from_numpy(masks), "queries": images}),
            "num_noises": draws,
            **method.record(term, 0),
        }
        path = directory / f"tuning-{record['inputs'][:16]}" / f"{term}-k{method.k}.safetensors"
        found = load_table(path, record)
        if found is not None:
            counters[-1](len(images))
            return found["predictions"].numpy()
    total = np.zeros((len(masks), len(images)))
    for draw, count in enumerate(counters):
        weights, _ = method.compute(images, term, draw, count)
        total += masks @ weights.numpy().T.astype(np.float64) / draws
    if path is not None:
        save_table(path, {"predictions": torch.from_numpy(total)}, record)
    return total


def _lds(predictions: np.ndarray, ranks: np.ndarray) -> float:
    """Mean over queries of the Spearman correlation over subsets; 0 where either side is constant.

    Args:
        predictions: [M, Q].
        ranks: of what is predicted, [M, Q].
    """
    ours, theirs = (values - values.mean(0) for values in (stats.rankdata(predictions, axis=0), ranks))
    norms = np.sqrt((ours**2).sum(0) * (theirs**2).sum(0))
    return float(np.divide((ours * theirs).sum(0), norms, out=np.zeros_like(norms), where=norms > 0).mean())


def _checked(masks, losses, images: int, queries: int) -> tuple[np.ndarray, np.ndarray]:
    masks, losses = _numbers("masks", masks), _numbers("losses", losses)
    if masks.ndim != 2 or masks.shape[1] != images or len(masks) < 2:
        raise ValueError(f"NDA: masks must have shape [M, {images}] with M at least 2, got {list(masks.shape)}")
    if not np.isin(masks, (0, 1)).all():
        raise ValueError("NDA: masks must hold 0 and 1 alone")
    if losses.shape != (len(masks), queries) or queries == 0:
        raise ValueError(
            f"NDA: losses must have shape [{len(masks)}, {queries}] with Q at least 1, got {list(losses.shape)}"
        )
    if not np.isfinite(losses).all():
        raise ValueError("NDA: losses must be finite")
    return masks, losses


def _numbers(name: str, values) -> np.ndarray:
    """An array of any library, or nested lists, as float64."""
    try:
        if hasattr(values, "dtype"):
            return arrays.to_torch(values, "NDA", name)[0].detach().to("cpu", torch.float64).numpy()
        return np.asarray(values, np.float64)
    except (ValueError, RuntimeError):
        raise TypeError(f"NDA: {name} must be an array or lists of numbers, got {type(values).__name__}") from None


def _grid(values: list, name: str, fits) -> list:
    if not values or not all(map(fits, values)):
        raise ValueError(f"NDA: {name} to choose from must be possible and at least one, got {values}")
    return values


def _sizes(given: Sequence[int] | None, known: tuple[int, ...], side: int, name: str, coarse: bool) -> list[int]:
    if given is None:
        return sorted({nearest_patch_size(p * side / 32, coarse) for p in known})
    sizes = _grid(sequence(name, given, integer), name, lambda p: True)
    for size in sizes:
        check_patch_size(name, size, coarse)
    return sizes
