"""Which training images a method would take away from a query, and a control that takes them at random."""

from collections.abc import Mapping

import numpy as np

from .inputs import as_numbers

RANDOM = "random"  # the control's name among the methods
_CONTROL = 0x636F6E74  # key word 1 of its draws


def strongest(scores: np.ndarray, count: int) -> np.ndarray:
    """The columns of the largest scores of each row, largest first, of equal ones the lowest first: [Q, N] -> [Q, count]."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


def random_scores(ids: np.ndarray, num_images: int, seed: int) -> np.ndarray:
    """The control's scores, uniform in [0, 1): a function of (seed, query id), [Q] -> [Q, N]."""
    return np.stack([_random_row(int(i), num_images, seed) for i in ids])


def _random_row(query_id: int, num_images: int, seed: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, _CONTROL], counter=[0, 0, 0, query_id])).random(num_images)


def checked_scores(
    scores: Mapping, num_queries: int, num_images: int, op: str
) -> dict[str, np.ndarray]:  # each [Q, N] float64
    """The methods' scores as arrays.

    Raises:
        TypeError: no mapping, or no numbers.
        ValueError: there are none, a name is the control's, a shape is another, or one is NaN.
    """
    if not isinstance(scores, Mapping):
        raise TypeError(f"{op}: scores must map names of methods to [Q, N], got {type(scores).__name__}")
    if not scores or RANDOM in scores:
        raise ValueError(f"{op}: scores must be of at least one method, and none of the name {RANDOM!r}")
    found = {}
    for name, values in scores.items():
        values = as_numbers(values, op, f"scores of {name!r}")
        if values.shape != (num_queries, num_images):
            raise ValueError(
                f"{op}: scores of {name!r} must have shape [Q, N] = {[num_queries, num_images]}, got {list(values.shape)}"
            )
        if np.isnan(values).any():
            raise ValueError(
                f"{op}: scores of {name!r} must be numbers, got NaN for query {np.isnan(values).any(1).argmax()}"
            )
        found[str(name)] = values
    return found
