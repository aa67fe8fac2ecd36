"""Where a patch score comes from: maps over the query and over one training image, and the regions that match."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference.patches import may_match, patches


@dataclass(frozen=True)
class Term:
    """One summand of the score.

    Attributes:
        timestep: t.
        patch_size: p, in pixels of the full image on either scale.
        coarse: whether patches are compared after averaging blocks of 2 x 2.
        weight: its share in the score; those of all terms add up to 1.
    """

    timestep: int
    patch_size: int
    coarse: bool
    weight: float

    def __str__(self) -> str:
        return f"t{self.timestep:04d}-p{self.patch_size:02d}-{'coarse' if self.coarse else 'fine'}"


@dataclass(frozen=True)
class Match:
    """A region of the query and the region of the training image that it matches, pixel for pixel.

    Attributes:
        query: (row, column) of the region's first pixel in the query.
        image: likewise in the training image.
        size: (rows, columns), of both.
        weight: what the matches of the region's pixels with their counterparts contribute to the image's score.
    """

    query: tuple[int, int]
    image: tuple[int, int]
    size: tuple[int, int]
    weight: float


@dataclass(frozen=True)
class Explanation:
    """Where the score of one training image for one query comes from.

    Attributes:
        score: the image's score.
        query_map: contribution of the patch centred on each pixel of the query, [H, W] float32; adds up to ``score``.
        image_map: likewise of the patches of the training image.
        matches: pairs of regions, the heaviest first; no two overlap in the query.
    """

    score: float
    query_map: Tensor
    image_map: Tensor
    matches: tuple[Match, ...]


class Explainer:
    """Adds up the patch weights of one training image, term by term.

    A window of even side has its centre between four pixels. The maps give each of them a quarter; the matches, which ask only
    for what goes with what, take the first.

    Args:
        image: y, [C, H, W] float64 in [-1, 1].
        border: "class" or "zero".
        k: weights kept at each position of the query.
    """

    def __init__(self, image: Tensor, border: str, k: int):
        self.image, self.border, self.k = image, border, k
        _, height, width = image.shape
        self.query_map = torch.zeros(height, width, dtype=torch.float64)
        self.image_map = torch.zeros(height, width, dtype=torch.float64)
        self.flow = torch.zeros(height, width, height, width)  # contribution of (query position, image position)

    def add(
        self, noisy: Tensor, log_normaliser: Tensor, term: Term, sigma: float, scale: float, share: float = 1.0
    ) -> None:
        """Add the weights of one term, times ``share`` of its own weight.

        Args:
            noisy: x_t, [C, H, W] float64.
            log_normaliser: log Z(u) over all training images, [H', W'] float64.
            term: says patch size, scale and weight.
            sigma, scale: as in :func:`pyattr.ops.patch_topk`.
        """
        weights = pair_weights(
            noisy, self.image, log_normaliser, term.patch_size, sigma, scale, self.border, term.coarse
        )
        rows, columns = log_normaliser.shape
        if self.k < weights.shape[1]:
            values, places = weights.topk(self.k, 1)
            weights = torch.zeros_like(weights).scatter_(1, places, values)
        weights *= share * term.weight
        self._spread(self.query_map, weights.sum(1).view(rows, columns))
        self._spread(self.image_map, weights.sum(0).view(rows, columns))
        self.flow[:rows, :columns, :rows, :columns] += weights.view(rows, columns, rows, columns)

    @staticmethod
    def _spread(target: Tensor, values: Tensor) -> None:
        """Add [H', W'] values at the centres of their windows to the pixels of a map [H, W]."""
        (height, width), (rows, columns) = target.shape, values.shape
        lower, right = range(height - rows + 1), range(width - columns + 1)  # both 0 and 1 for even windows
        for i in lower:
            for j in right:
                target[i : i + rows, j : j + columns] += values / (len(lower) * len(right))

    def explanation(self, pairs: int, side: int | None) -> Explanation:
        """What has been added up, and at most ``pairs`` pairs of regions of ``side`` pixels."""
        if side is None:
            side = 2 * (min(self.image.shape[1:]) // 7) + 1
        return Explanation(
            float(self.query_map.sum()),
            self.query_map.float(),
            self.image_map.float(),
            tuple(find_matches(self.flow, pairs, side)),
        )


def pair_weights(
    noisy: Tensor,
    image: Tensor,
    log_normaliser: Tensor,
    patch_size: int,
    sigma: float,
    scale: float,
    border: str,
    coarse: bool,
) -> Tensor:
    """``exp(-|x[u] - s y[v]|^2 / (2 sigma^2)) / Z(u)`` for all pairs of positions of two images.

    Args:
        noisy: x, [C, H, W] float64.
        image: y, likewise.
        log_normaliser: log Z, [H', W'] float64.
        others: as in :func:`pyattr.ops.patch_topk`.

    Returns:
        [H' W', H' W'] float64, the query's positions first; 0 where ``border`` forbids the pair.

    Extra memory: 24 (H' W')^2 + 16 C p^2 H' W' bytes.
    """
    ours, theirs = (
        patches(image[None], patch_size, border, coarse)[0] for image in (noisy, scale * image)
    )  # [H' W', D]
    exponents = ours @ theirs.T  # in float64 the expanded square loses nothing that matters
    exponents.mul_(-2).add_((ours * ours).sum(1)[:, None]).add_((theirs * theirs).sum(1)[None])
    exponents.div_(-2 * sigma * sigma).sub_(log_normaliser.reshape(-1, 1))
    if border == "class":
        exponents.masked_fill_(~may_match(*image.shape[1:], patch_size), -torch.inf)
    return exponents.exp_()


def find_matches(flow: Tensor, pairs: int, side: int) -> list[Match]:
    """The pairs of squares whose pixels, one displacement apart, have most weight between them.

    For each centre in the query the best displacement is taken; of these the heaviest centres, each at least ``side`` from
    those before it in one direction. At the image border a region is cut in both images alike.

    Args:
        flow: weight of (query position, image position), [H, W, H, W].
        pairs: how many, at most.
        side: of a region.

    Extra memory: about 50 W H W bytes.
    """
    height, width = flow.shape[:2]
    best = torch.zeros(height, width)
    shift = torch.zeros(height, width, 2, dtype=torch.int64)
    places = torch.arange(width) + torch.arange(1 - width, width)[:, None]  # [2 W - 1, W]: the column across from each
    inside = ((places >= 0) & (places < width))[:, None]
    for down in range(1 - height, height):
        first, rows = max(0, -down), height - abs(down)
        flows = flow[range(first, first + rows), :, range(first + down, first + down + rows)]  # [rows, W, W]
        padded = torch.nn.functional.pad(flows, (width - 1, width - 1))
        # Element (across, row, column) is the flow to column + across - (W - 1).
        skewed = padded.as_strided((2 * width - 1, rows, width), (1, width * (3 * width - 2), 3 * width - 1))
        weight, across = (_box(skewed, side) * inside).max(0)  # [rows, W]
        lines = slice(first, first + rows)
        better = weight > best[lines]
        best[lines][better] = weight[better]
        shift[lines][better] = torch.stack([torch.full_like(across, down), across - (width - 1)], -1)[better]
    found: list[Match] = []
    free = best.clone()
    while len(found) < pairs and float(free.max()) > 0:
        row, column = divmod(int(free.argmax()), width)
        down, across = shift[row, column].tolist()
        spans = []
        for at, by, length in ((row, down, height), (column, across, width)):
            first = max(at - side // 2, 0, -by)
            spans.append((first, min(at - side // 2 + side, length, length - by) - first))
        (top, tall), (left, wide) = spans
        found.append(Match((top, left), (top + down, left + across), (tall, wide), float(best[row, column])))
        free[max(0, row - side + 1) : row + side, max(0, column - side + 1) : column + side] = 0
    return found


def _box(values: Tensor, side: int) -> Tensor:  # [D, H, W] -> [D, H, W]
    """Sums over squares centred on each element, as far as these lie within."""
    before, after = side // 2, side - 1 - side // 2
    padded = torch.nn.functional.pad(values[:, None], (before, after, before, after))
    along_rows = torch.nn.functional.avg_pool2d(padded, (1, side), stride=1)
    return torch.nn.functional.avg_pool2d(along_rows, (side, 1), stride=1)[:, 0] * side**2
