"""Lists of the most influential items, without those that are influential for everything."""

import torch

from ..arrays import to_torch
from ..ops import TopK
from ..ops._arguments import check_integer


def distinct_top(scores, m: int) -> TopK:
    """The m largest scores of each query, among items that are in no two lists.

    Items in more than one of the lists are deleted, the lists made again, and so on until there is no repeat.

    Args:
        scores: [Q, N] real numbers; torch tensor, NumPy or CuPy array.
        m: at least 1.

    Returns:
        TopK of [Q, m]: falling scores, and the items; equal scores by lowest index. Of the kind of
            the scores.

    Raises:
        TypeError, ValueError: an argument is not as above, or fewer than m items are left.

    Extra memory: six rows of the scores.

    Source: Dai, Gifford, "Training Data Attribution for Diffusion Models", arXiv 2306.02174, figure 6.
    """
    scores, restore = to_torch(scores, "distinct_top", "scores")
    if scores.dim() != 2:
        raise ValueError(f"distinct_top: scores must have shape [Q, N], got {list(scores.shape)}")
    m = check_integer("distinct_top", "m", m, 1, scores.shape[1])
    values = scores.new_empty(len(scores), m)
    lists = torch.empty(len(scores), m, dtype=torch.int64, device=scores.device)
    left = torch.arange(scores.shape[1], device=scores.device)
    while True:
        if len(left) < m:
            raise ValueError(f"distinct_top: m must be at most the {len(left)} items that are left, got {m}")
        for row, best, items in zip(scores, values, lists, strict=True):
            ordered = row[left].sort(descending=True, stable=True)
            best.copy_(ordered.values[:m])
            items.copy_(left[ordered.indices[:m]])
        items, lists_with = lists.unique(return_counts=True)
        repeated = items[lists_with > 1]
        if len(repeated) == 0:
            return TopK(restore(values), restore(lists))
        left = left[~torch.isin(left, repeated)]
