"""The mean of the bank's pixels under the softmax over its patches, by definition.

mean[u] = sum over n, v of w(u, n, v) y_n[centre of v], with w as in :mod:`pyattr.reference.patch_topk` and y itself,
unscaled. The bank is walked twice: for Z, then for the mean. Everything in float64.
"""

import torch

from .patches import Softmax, distances, slices


def centres(images, patch_size, border):  # [n, C, H, W] -> [n, C, L]
    """The pixel at offset (p - 1) // 2 of every window, 0 where it is not finite: the patch has the weight 0 or NaN."""
    first = (patch_size - 1) // 2 if border == "inside" else 0
    height, width = (
        size - patch_size + 1 + (patch_size - 1) // 2 * 2 * (border != "inside") for size in images.shape[2:]
    )
    return images[:, :, first : first + height, first : first + width].flatten(2).nan_to_num(0, 0, 0)


def patch_mean(queries, bank, patch_size, sigma, scale, border):
    """See :func:`pyattr.ops.patch_mean`. Returns mean [Q, C, U] and log_normaliser [Q, U], float64."""
    results = [
        _one_query(query[None], bank, patch_size, s, scale, border) for query, s in zip(queries, sigma, strict=True)
    ]
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


def _one_query(query, bank, patch_size, sigma, scale, border):
    def blocks():
        return distances(query, slices(bank), patch_size, scale, border, lowres=False)

    softmax = Softmax(sigma)
    for u, _, d, _ in blocks():
        softmax.add(u, d)
    log_normaliser = softmax.log_normaliser()
    mean = torch.zeros(query.shape[1], len(log_normaliser), dtype=torch.float64, device=query.device)
    for u, _, d, piece in blocks():
        shares = softmax.shares(u, d)  # [u, n, L]
        mean[:, u : u + len(d)] += torch.einsum("unl,ncl->cu", shares, centres(piece, patch_size, border))
    return mean, log_normaliser
