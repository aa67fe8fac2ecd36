"""Ground truth by leaving out one training image at a time, where data are few enough."""

import numpy as np

from .inputs import as_integers


def leave_one_out_masks(num_images: int, items=None) -> np.ndarray:
    """Masks of :func:`~pyattr.evaluation.build_ground_truth`, each without one image.

    The linear datamodeling score on them is the agreement of scores with leaving one out: a query's sum of scores over all but
    image n orders the models as -scores[q, n] does, so ``lds(scores, masks, outputs)`` is Spearman's correlation, over the
    items, between scores[q, n] and the loss of q without n. What one image changes is small beside the randomness of training;
    average over several model seeds.

    Args:
        num_images: N, at least 2.
        items: [M] distinct images to leave out, in [0, N); None: each in turn.

    Returns:
        [M, N] bool, True = kept.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Extra memory: none beyond the result.
    """
    if num_images < 2:
        raise ValueError(f"leave_one_out_masks: num_images must be at least 2, got {num_images}")
    items = np.arange(num_images) if items is None else as_integers(items, "leave_one_out_masks", "items")
    if items.ndim != 1 or len(np.unique(items)) < len(items):
        raise ValueError(
            f"leave_one_out_masks: items must be distinct integers [M], got {items.size} of shape {list(items.shape)}"
        )
    if len(items) and not (items.min() >= 0 and items.max() < num_images):
        raise ValueError(f"leave_one_out_masks: items must lie in [0, {num_images}), got {items.min()}..{items.max()}")
    masks = np.ones((len(items), num_images), bool)
    masks[np.arange(len(items)), items] = False
    return masks
