"""What may be asked about: images, or generated images with what they were made from."""

import torch
from torch import Tensor

from ..diffusion.conditioned import Examples, as_examples, with_conditions
from ..diffusion.sampling import Samples

# Training image n has noise id n. Queries start here, so that a query shares the noise of a training image only when its id
# is given as that image's.
QUERY_IDS = 1 << 40


def query_images(queries, op: str) -> Examples:
    """The images of queries.

    Args:
        queries: [Q, C, H, W] uint8, or floating point in [-1, 1]; or Conditioned, or Samples.
        op: for the error message.

    Returns:
        [Q, C, H, W]; Conditioned where the queries have conditions.

    Raises:
        TypeError, ValueError: not as above.
    """
    if isinstance(queries, Samples):
        return with_conditions(queries.images, queries.conditions)
    return as_examples(queries, op, "queries")


def query_ids(queries, ids, count: int) -> Tensor:
    """The noise ids of queries: those given, or 2^40 + i for the i-th image, or 2^40 + its own id for a sample, [Q] int64."""
    if ids is not None:
        return torch.as_tensor(ids, dtype=torch.int64)
    return QUERY_IDS + (queries.ids if isinstance(queries, Samples) else torch.arange(count))
