"""Patch attribution by definition: softmax over all patches of the bank, the k largest weights of each image summed.

For a query's patch x[u] and the bank's patches y_n[v], w(u, n, v) = exp(-|x[u] - s y_n[v]|^2 / (2 sigma^2)) / Z(u),
Z(u) the sum over all n and v that u may match; weights[q, n] = sum over u of the sum of the k largest w(u, n, .). The
bank is walked twice: for Z, then for the weights. Everything in float64.
"""

import torch

from .patches import Softmax, distances, slices


def patch_topk(queries, bank, patch_size, k, sigma, scale, border, lowres, return_winners):
    """See :func:`pyattr.ops.patch_topk`; ``bank`` a re-iterable of tensors [n, C, H, W], ``sigma`` one float a query.

    Returns:
        weights [Q, N], log_normaliser [Q, U] and, where winners are wanted, their images [Q, U], flat positions [Q, U]
        and weights [Q, U]; float64.
    """
    results = [
        _one_query(query[None], bank, patch_size, k, s, scale, border, lowres, return_winners)
        for query, s in zip(queries, sigma, strict=True)
    ]
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


def _one_query(query, bank, patch_size, k, sigma, scale, border, lowres, return_winners):
    def blocks():
        return distances(query, slices(bank), patch_size, scale, border, lowres)

    softmax, nearest = Softmax(sigma), {}  # the nearest by first position
    for u, first, d, _ in blocks():
        softmax.add(u, d)
        if return_winners:
            nearest[u] = _nearer(nearest.get(u), d, first)
    weights = []
    for u, _, d, _ in blocks():
        shares = softmax.shares(u, d)  # [u, n, L]
        image_sums = shares.topk(min(k, shares.shape[2]), dim=2).values.sum((0, 2))
        if u == 0:
            weights.append(image_sums)
        else:
            weights[-1] += image_sums
    weights, log_normaliser = torch.cat(weights), softmax.log_normaliser()
    if not return_winners:
        return weights, log_normaliser
    found = [(images, places, softmax.shares(u, d)) for u, (d, images, places) in sorted(nearest.items())]
    return weights, log_normaliser, *(torch.cat(column) for column in zip(*found, strict=True))


def _nearer(best, d, first):
    """(distance, image, position) of the nearest patch of [u, n, L], earlier blocks' first where they are as near."""
    values, length = d.flatten(1), d.shape[2]
    least = values.min(1, keepdim=True).values
    index = torch.arange(values.shape[1], device=d.device).where(values == least, values.shape[1]).min(1).values
    index = index.clamp(max=values.shape[1] - 1)  # a NaN equals nothing
    found = (least[:, 0], first + index // length, index % length)
    if best is None:
        return found
    keep = best[0] <= found[0]
    return tuple(torch.where(keep, old, new) for old, new in zip(best, found, strict=True))
