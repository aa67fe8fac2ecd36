"""Lists of the most influential items, without those that are influential for everything."""

import torch
from torch import Tensor

from ..ops import TopK


def distinct_top(scores: Tensor, m: int) -> TopK:
    """The m largest scores of each query, among items that are in no two lists.

    Items in more than one of the lists are deleted, the lists made again, and so on until there is no repeat.

    Args:
        scores: [Q, N].
        m: at least 1.

    Returns:
        TopK of [Q, m]: falling scores, and the items; equal scores by lowest index.

    Raises:
        ValueError: m is not as above, or fewer than m items are left.

    Extra memory: the scores once more.

    Source: Dai, Gifford, "Training Data Attribution for Diffusion Models", arXiv 2306.02174, figure 6.
    """
    if m < 1:
        raise ValueError(f"distinct_top: m must be at least 1, got {m}")
    left = torch.arange(scores.shape[1], device=scores.device)
    while True:
        if len(left) < m:
            raise ValueError(f"distinct_top: m must be at most the {len(left)} items that are left, got {m}")
        values, places = scores[:, left].sort(dim=1, descending=True, stable=True)
        values, lists = values[:, :m], left[places[:, :m]]  # [Q, m]
        items, lists_with = lists.unique(return_counts=True)
        repeated = items[lists_with > 1]
        if len(repeated) == 0:
            return TopK(values, lists)
        left = left[~torch.isin(left, repeated)]
