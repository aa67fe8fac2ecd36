"""What may be asked about: images, or generated images with what they were made from."""

import torch
from torch import Tensor

from ..diffusion.images import as_images
from ..diffusion.sampling import Samples

# Training image n has noise id n. Queries start here, so that a query shares the noise of a training image only when its id
# is given as that image's.
QUERY_IDS = 1 << 40


def query_images(queries, op: str) -> Tensor:
    """The images of queries.

    Args:
        queries: [Q, C, H, W] uint8, or floating point in [-1, 1]; or Samples.
        op: for the error message.

    Returns:
        [Q, C, H, W].

    Raises:
        TypeError, ValueError: not as above.
    """
    return queries.images if isinstance(queries, Samples) else as_images(queries, op, "queries")


def query_ids(queries, ids, count: int) -> Tensor:
    """The noise ids of queries: those given, or 2^40 + i for the i-th image, or 2^40 + its own id for a sample, [Q] int64."""
    if ids is not None:
        return torch.as_tensor(ids, dtype=torch.int64)
    return QUERY_IDS + (queries.ids if isinstance(queries, Samples) else torch.arange(count))
