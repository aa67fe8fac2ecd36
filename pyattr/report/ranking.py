"""The strongest training images of each query."""

import numpy as np


def strongest(scores: np.ndarray, count: int, *, largest: bool = True) -> np.ndarray:
    """Columns of the `count` largest (or smallest) scores of each row, strongest first, ties by lowest index.

    Args:
        scores: [Q, N], finite.
        count: how many, at most N.
        largest: proponents when True, opponents when False.

    Returns:
        [Q, count] int64.

    Raises:
        ValueError: `count` is not in 0..N.

    Extra memory: 12 Q N bytes.
    """
    if not 0 <= count <= scores.shape[1]:
        raise ValueError(f"strongest: count must be in 0..{scores.shape[1]}, got {count}")
    order = np.argsort(-scores if largest else scores, axis=1, kind="stable")
    return order[:, :count].astype(np.int64)


def shown_count(top: int, total: int) -> int:
    """How many proponents, and opponents, are shown: `top`, but never an image as both unless it is the only one."""
    return max(1, min(top, total // 2))
