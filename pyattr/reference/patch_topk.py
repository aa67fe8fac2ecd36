"""Patch attribution by definition: softmax over all patches of the bank, the k largest weights of each image summed.

For a query's patch x[u] and the bank's patches y_n[v], w(u, n, v) = exp(-|x[u] - s y_n[v]|^2 / (2 sigma^2)) / Z(u),
Z(u) the sum over all n and v that u may match; weights[q, n] = sum over u of the sum of the k largest w(u, n, .). The
bank is walked twice: for Z, then for the weights. Everything in float64.
"""

import torch

from .patches import distances, slices

IMAGES = 64  # at a time


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
        return distances(query, slices(bank, IMAGES), patch_size, scale, border, lowres)

    parts, nearest = {}, {}  # by first position
    for u, first, d, _ in blocks():
        total = torch.logsumexp(-d.flatten(1) / (2 * sigma**2), 1)
        parts[u] = torch.logaddexp(parts[u], total) if u in parts else total
        if return_winners:
            nearest[u] = _nearer(nearest.get(u), d, first)
    order = sorted(parts)
    log_normaliser = torch.cat([parts[u] for u in order])  # [U]
    weights = []
    for u, _, d, _ in blocks():
        shares = torch.exp(-d / (2 * sigma**2) - log_normaliser[u : u + len(d), None, None])  # [u, n, L]
        image_sums = shares.topk(min(k, shares.shape[2]), dim=2).values.sum((0, 2))
        if u == 0:
            weights.append(image_sums)
        else:
            weights[-1] += image_sums
    weights = torch.cat(weights)
    if not return_winners:
        return weights, log_normaliser
    found = [torch.cat(column) for column in zip(*(nearest[u] for u in order), strict=True)]
    return weights, log_normaliser, found[1], found[2], torch.exp(-found[0] / (2 * sigma**2) - log_normaliser)


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
