"""Patches of images and the distances between them, written out: what the patch operations are defined by."""

import torch
from torch.nn import functional

BLOCK = 2**22  # distances held at a time
IMAGES = 64  # of the bank, likewise


def border_cuts(size: int, patch_size: int) -> torch.Tensor:  # -> [L, 2] int64
    """Along one axis, how many pixels of each window the border cuts off before the image and after it."""
    pad = (patch_size - 1) // 2
    first = torch.arange(size + 2 * pad - patch_size + 1) - pad  # the pixel that the window starts at
    return torch.stack([-first, first + patch_size - size], dim=1).clamp(min=0)


def may_match(height: int, width: int, patch_size: int) -> torch.Tensor:  # -> [L, L] bool
    """border="class": whether a query's patch may match a bank's patch, both cut off alike."""
    rows, columns = (border_cuts(size, patch_size) for size in (height, width))
    same_rows, same_columns = ((cuts[:, None] == cuts[None]).all(-1) for cuts in (rows, columns))
    same = same_rows[:, None, :, None] & same_columns[None, :, None, :]  # [H', W', H', W']
    return same.flatten(2).flatten(0, 1)


def patches(images, patch_size: int, border: str, lowres: bool):  # [n, C, H, W] -> [n, L, K]
    """All windows as rows, the border filled with zeros; with ``lowres`` each 2 x 2 block of a window summed, times 1/2."""
    pad = 0 if border == "inside" else (patch_size - 1) // 2
    columns = functional.unfold(images, patch_size, padding=pad)  # [n, C p p, L]
    if lowres:
        half = patch_size // 2
        columns = columns.unflatten(1, (images.shape[1], half, 2, half, 2)).sum((3, 5)).flatten(1, 3) / 2
    return columns.mT


def decode(images):  # [n, C, H, W] uint8 or floating point -> float64
    """uint8 value b stands for (2 b - 255) / 255."""
    if images.dtype == torch.uint8:
        return (2 * images.double() - 255) / 255
    return images.double()


def slices(bank):
    """The bank in pieces of at most :data:`IMAGES` images, as float64, with the number of the first."""
    first = 0
    for chunk in bank:
        for piece in chunk.split(IMAGES) if len(chunk) else ():
            yield first, decode(piece)
            first += len(piece)


class Softmax:
    """The softmax over patches of -d / (2 sigma^2) at each position, taken relative to the least distance so far.

    Relative to nothing, d / (2 sigma^2) and log Z would be subtracted, which leaves no digit where both are large.
    """

    def __init__(self, sigma: float):
        self.inverse = 1 / (2 * sigma**2)
        self.parts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # first position -> least [u], total [u]

    def add(self, first: int, d) -> None:  # d [u, ...]
        """Count the distances of a block of positions in."""
        flat = d.flatten(1)
        before, total = self.parts.get(first, (torch.full_like(flat[:, 0], torch.inf), torch.zeros_like(flat[:, 0])))
        least = torch.minimum(before, flat.amin(1))
        added = self._relative(flat, least[:, None]).sum(1)
        self.parts[first] = least, self._relative(before, least) * total + added

    def _relative(self, d, least):
        """exp(-(d - least) / (2 sigma^2)), 0 of an infinite d."""
        return torch.exp((least.masked_fill(least == torch.inf, 0) - d) * self.inverse)

    def shares(self, first: int, d):  # [u, ...]
        """What part of the total falls on each of d, once all are counted in."""
        least, total = (part.view(-1, *[1] * (d.dim() - 1)) for part in self.parts[first])
        return self._relative(d, least) / total

    def log_normaliser(self):  # [U]
        """log Z at every position."""
        return torch.cat([total.log() - least * self.inverse for _, (least, total) in sorted(self.parts.items())])


def distances(query, pieces, patch_size: int, scale: float, border: str, lowres: bool):
    """Squared distances of one query [1, C, H, W] to every patch, block by block.

    Yields:
        the first position and the first image of the block; d [u, n, L] float64, infinite where patches may not match; the
        piece [n, C, H, W].
    """
    x = patches(query.double(), patch_size, border, lowres)[0]  # [U, K]
    allowed = may_match(*query.shape[2:], patch_size).to(x.device) if border == "class" else None
    for first, piece in pieces:
        y = patches(scale * piece, patch_size, border, lowres)  # [n, L, K]
        rows = max(1, BLOCK // (IMAGES * y.shape[1]))  # the same of every piece, so that blocks of positions meet again
        for u in range(0, len(x), rows):
            # Not by the expansion |a|^2 - 2ab + |b|^2, which cancels.
            d = torch.cdist(x[u : u + rows], y.flatten(0, 1), compute_mode="donot_use_mm_for_euclid_dist").square()
            d = d.unflatten(1, y.shape[:2])
            if allowed is not None:
                d = d.masked_fill(~allowed[u : u + rows, None], torch.inf)
            yield u, first, d, piece
