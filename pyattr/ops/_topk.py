"""What every top-k search returns."""

from typing import NamedTuple

import torch


class TopK(NamedTuple):
    """The best of many, best first; ties by lowest index."""

    values: torch.Tensor  # [..., k]
    indices: torch.Tensor  # [..., k] int64
