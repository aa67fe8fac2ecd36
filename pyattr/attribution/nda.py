"""NDA: attribution without a model, from the patches of training images that a denoiser would mix into the query."""

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import backends
from ..datasets import ImageDataset, load
from ..diffusion.images import as_images, to_unit
from ..diffusion.noise import MAX_DRAWS, PATCHES, noise
from ..diffusion.progress import Progress, silent
from ..diffusion.sampling import Samples
from ..diffusion.schedule import Schedule
from ..diffusion.storage import tensors_hash
from ..ops import patch_topk
from .patch_matches import Explainer, Explanation, Term
from .patch_options import check_patch_size, integer, nearest_patch_size, number, sequence
from .patch_tables import load_table, save_table
from .patch_tuning import Tuning, tune

# At 32 x 32 pixels, for the five default timesteps. The fine one at t = 100 and the evenness of the coarse ones are the
# authors' own; that patches grow with the noise, and where, is our reading of their text (docs/nda.md).
FINE = (7, 11, 15, 17, 19)
COARSE = (14, 14, 14, 16, 18)
_SIDE = 32
_BATCH = 4  # queries between two reports of progress; they share one check of the training images


class NDA:
    """Which training images hold the patches that the optimal local denoiser would build the query from.

    At timestep t the query is noised, ``x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps``, and the patch at each of its positions u
    is compared with every patch v of every training image n,

        w_t(u, n, v) = exp(-|x_t[u] - sqrt(abar_t) y_n[v]|^2 / (2 (1 - abar_t))) / Z_t(u),        sum over n, v of w_t = 1,

    which is the weight of that patch in the exact score function of a denoiser that sees p x p pixels. An image's score sums,
    over u, its k largest weights over v; a second, coarse scale does the same with patches averaged over blocks of 2 x 2
    pixels; and the score is

        tau(q, n) = mean over t of  alpha_t S_t(q, n) + (1 - alpha_t) S_t^coarse(q, n).

    Sign: positive = proponent: the training image has a hand in what is generated. Scores are shares of a query's positions and
    never negative, so that there are no opponents, and an image near 0 is one that plays no part. No model is asked.

    All queries meet the same noise at a timestep: a function of (``noise_seed``, t, draw) alone, so that the score of a query
    depends neither on the others nor on their order.

    Args:
        schedule: of the diffusion; the default is that of the published models.
        timesteps: distinct, counted from 0; None: five, at 1/10, 2/10, ... 5/10 of the schedule.
        patch_sizes: p on the fine scale, 1 to 511, one for all timesteps or one for each; None: 7, 11, 15, 17, 19 at 32 x 32
            pixels and the default timesteps, interpolated over t elsewhere and in proportion to the shorter side, to the
            nearest odd number from 3 to 511.
        coarse_patch_sizes: p on the coarse scale, even; None: 14, 14, 14, 16, 18 likewise, to the nearest even number from 4
            to 510.
        alpha: weight of the fine scale in [0, 1], one or one for each timestep; 1 leaves the coarse scale out, 0 the fine one.
        k: weights of an image that count at each position; at least the number of positions means all.
        num_noises: draws of the noise, over which the score is averaged.
        noise_seed: of the noise, in [0, 2^32).
        border: "class": a patch cut off by the image border is compared with patches cut off in the same way alone; "zero":
            with all, pixels outside counting as 0. See :func:`pyattr.ops.patch_topk`.
        directory: where the table of each term is kept as it is made and found again; None keeps nothing.
        backend: of :func:`pyattr.ops.patch_topk`.
        progress: stages "patches" (passes of a query over the training images) and "tuning" (the same, in :meth:`tune`).

    Attributes:
        terms: the summands, after :meth:`fit`.
        shape: [N, C, H, W] of the training images, after :meth:`fit`.
        signed: False: no score is negative.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: Zhao, Du, Zheng, Pang, Lin, "Nonparametric Data Attribution for Diffusion Models", arXiv 2510.14269; the scales are
    mixed for each image after its k largest weights, as in the authors' code.
    """

    signed = False

    def __init__(
        self,
        schedule: Schedule | None = None,
        *,
        timesteps: Sequence[int] | None = None,
        patch_sizes: int | Sequence[int] | None = None,
        coarse_patch_sizes: int | Sequence[int] | None = None,
        alpha: float | Sequence[float] = 0.5,
        k: int = 100,
        num_noises: int = 1,
        noise_seed: int = 0,
        border: str = "class",
        directory: str | os.PathLike | None = None,
        backend: str | None = None,
        progress: Progress = silent,
    ):
        if not isinstance(schedule, (Schedule, type(None))):
            raise TypeError(f"NDA: schedule must be a Schedule, got {type(schedule).__name__}")
        self.schedule = Schedule() if schedule is None else schedule
        last = self.schedule.num_timesteps
        timesteps = (
            [last * i // 10 for i in range(1, 6)] if timesteps is None else sequence("timesteps", timesteps, integer)
        )
        if not timesteps or len(set(timesteps)) < len(timesteps) or not all(0 <= t < last for t in timesteps):
            raise ValueError(f"NDA: timesteps must be distinct and lie in [0, {last}), got {timesteps}")
        self.timesteps = timesteps
        self.patch_sizes = None if patch_sizes is None else self._each(patch_sizes, "patch_sizes", integer)
        self.coarse_patch_sizes = (
            None if coarse_patch_sizes is None else self._each(coarse_patch_sizes, "coarse_patch_sizes", integer)
        )
        self.alpha = self._each(alpha, "alpha", number)
        for size in self.patch_sizes or ():
            check_patch_size("patch_sizes", size, coarse=False)
        for size in self.coarse_patch_sizes or ():
            check_patch_size("coarse_patch_sizes", size, coarse=True)
        for value in self.alpha:
            if not 0 <= value <= 1:
                raise ValueError(f"NDA: alpha must lie in [0, 1], got {value}")
        k, num_noises, noise_seed = (
            integer(*option) for option in (("k", k), ("num_noises", num_noises), ("noise_seed", noise_seed))
        )
        for name, value, limit in (("k", k, math.inf), ("num_noises", num_noises, MAX_DRAWS)):
            if not 1 <= value <= limit:
                raise ValueError(
                    f"NDA: {name} must be at least 1{'' if limit == math.inf else f' and at most {limit}'}, got {value}"
                )
        if not 0 <= noise_seed < 2**32:
            raise ValueError(f"NDA: noise_seed must lie in [0, {2**32 - 1}], got {noise_seed}")
        if border not in ("class", "zero"):
            raise ValueError(f"NDA: border must be class or zero, got {border!r}")
        backends.check_name("NDA", "backend", backend)
        self.k, self.num_noises, self.noise_seed, self.border = k, num_noises, noise_seed, border
        self.backend, self.progress = backend, progress
        self.directory = None if directory is None else Path(directory)
        self.terms: list[Term] = []
        self._bank: Tensor | _Stream | None = None
        self._normalisers: dict[str, list[Tensor]] = {}  # of each query last scored

    def _each(self, values, name: str, kind: Callable) -> list:
        """One value for each timestep."""
        if isinstance(values, (str, bytes)) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
            return [kind(name, values)] * len(self.timesteps)
        values = sequence(name, values, kind)
        if len(values) != len(self.timesteps):
            raise ValueError(
                f"NDA: {name} must be one number or one for each of {len(self.timesteps)} timesteps, got {len(values)}"
            )
        return values

    def fit(self, train) -> "NDA":
        """Take the training images; nothing is computed but their number and, with a directory, what identifies them.

        Args:
            train: [N, C, H, W] uint8, or floating point in [-1, 1]; or a folder, .npz file or named set of
                :func:`pyattr.datasets.load`; or an :class:`~pyattr.datasets.ImageDataset`; or chunks [n, C, H, W] of them in
                anything that can be walked through again and again (a list, an object with ``__iter__``), of which one is in
                memory at a time. They are not copied, but float64 is rounded to float32.

        Returns:
            self.

        Raises:
            TypeError, ValueError: ``train`` is not as above.
            pyattr.datasets.DataError: a folder or file cannot be read.
        """
        if isinstance(train, (str, os.PathLike)):
            train = load(train)
        if isinstance(train, ImageDataset):
            train = train.images
        self._bank = _training_images(train) if _is_array(train) else _Stream(train)
        self.shape = tuple(self._bank.shape)
        if self.shape[0] == 0:
            raise ValueError("NDA: train must hold at least one image, got none")
        if 0 in self.shape:
            raise ValueError(f"NDA: train must be images of at least one pixel, got shape {list(self.shape)}")
        self._data = None
        if self.directory is not None:
            self._data = _hash([self._bank] if isinstance(self._bank, Tensor) else self._bank)
        self.settle()
        return self

    def settle(self) -> None:
        """Terms of the options, for images of this size."""
        side = min(self.shape[-2:])
        fine = self.patch_sizes or [self._default_size(FINE, t, side, coarse=False) for t in self.timesteps]
        coarse = self.coarse_patch_sizes or [self._default_size(COARSE, t, side, coarse=True) for t in self.timesteps]
        share = 1 / len(self.timesteps)
        pairs = [
            [Term(t, p, False, share * a), Term(t, r, True, share * (1 - a))]
            for t, p, r, a in zip(self.timesteps, fine, coarse, self.alpha, strict=True)
        ]
        self.terms = [term for pair in pairs for term in pair if term.weight > 0]
        for term in self.terms:
            self.check_size(term)
        self._normalisers = {}

    def check_size(self, term: Term) -> None:
        """Refuse a term that images of this size have no window for.

        Raises:
            ValueError: its windows are of even side, and the images of a single row or column.
        """
        height, width = self.shape[-2:]
        if term.patch_size % 2 == 0 and min(height, width) < 2:
            what = (
                "the coarse scale, which alpha=1 leaves out" if term.coarse else f"patches of {term.patch_size} pixels"
            )
            raise ValueError(f"NDA: train must be images of at least 2 x 2 pixels for {what}, got {height} x {width}")

    def _default_size(self, known: tuple[int, ...], timestep: int, side: int, coarse: bool) -> int:
        """A row of :data:`FINE` or :data:`COARSE` between its timesteps, in proportion to the side."""
        place = min(max(10 * timestep / self.schedule.num_timesteps - 1, 0), len(known) - 1)
        low = min(int(place), len(known) - 2)
        size = (known[low] + (place - low) * (known[low + 1] - known[low])) * side / _SIDE
        return nearest_patch_size(size, coarse)

    def scores(self, queries) -> Tensor:
        """Scores of all training images for each query; none is negative, and large = proponent.

        With k at least the number of positions the scores of a query add up, over all training images, to the mean number of
        its patches, H W where all sizes are odd; a smaller k leaves out what an image scatters over more than k positions.

        Args:
            queries: images [Q, C, H, W] (uint8, or floating point in [-1, 1]) or :class:`~pyattr.diffusion.Samples`.

        Returns:
            [Q, N] float32 on the CPU.

        Raises:
            RuntimeError: :meth:`fit` was not called, or chunks of training images were others when walked through again.
            ValueError: the queries are not as above or not of the size of the training images, or ``directory`` was made
                otherwise.

        Extra memory: 8 Q N bytes; 8 Q H W for each term and draw, which stay for :meth:`explain`; and that of
        :func:`pyattr.ops.patch_topk` for a few queries.
        """
        images = self.images_of(queries)
        out = torch.zeros(len(images), self.shape[0], dtype=torch.float32, device="cpu")
        if len(images) == 0:
            return out
        passes = [(term, draw) for term in self.terms for draw in range(self.num_noises)]
        kept: list[list[Tensor]] = [[] for _ in images]
        for place, (term, draw) in enumerate(passes):
            weights, normaliser = self.table(
                images, term, draw, self.counter("patches", place, len(passes), len(images))
            )
            out += weights * (term.weight / self.num_noises)
            for rows, row in zip(kept, normaliser, strict=True):
                rows.append(row.clone())  # not a view that holds on to the whole
        self._normalisers = dict(zip(map(_key, images), kept, strict=True))
        return out

    def explain(self, query, image: int, *, pairs: int = 3, side: int | None = None) -> Explanation:
        """Where in a query, and where in a training image, its score comes from.

        For the one image the weights of all pairs of positions are formed from the normalisers Z_t(u) that :meth:`scores` found
        over the whole set, the k largest kept at each position of the query, and summed over terms.

        Args:
            query: [C, H, W], as in :meth:`scores`. One of those last scored costs no pass over the training images.
            image: n, its number among them.
            pairs: how many pairs of regions to find, at most.
            side: of the regions, in pixels, at most the longer side of the images; None: the odd number nearest to 2/7 of the
                shorter one.

        Returns:
            :class:`~pyattr.attribution.patch_matches.Explanation`. Either map adds up to the image's score, for any k: to 1e-4
            of it from timestep 10 of 1,000 on, to some percent at the first, where a small sigma^2 divides distances that
            :meth:`scores` has in float32.

        Raises:
            RuntimeError: :meth:`fit` was not called.
            IndexError: there is no such image.
            TypeError, ValueError: an argument is not as above.

        Extra memory: about 40 (H W)^2 bytes; a query not scored last is scored first, and its normalisers stay too.
        """
        query = query[None] if getattr(query, "ndim", 0) == 3 else query
        images = self.images_of(query)
        if len(images) != 1:
            raise ValueError(f"NDA: query must be one image [C, H, W], got {len(images)}")
        image, pairs, total = integer("image", image), integer("pairs", pairs), self.shape[0]
        if pairs < 0:
            raise ValueError(f"NDA: pairs must not be negative, got {pairs}")
        longest = max(self.shape[-2:])
        if side is not None and not 1 <= integer("side", side) <= longest:
            raise ValueError(f"NDA: side must lie in [1, {longest}], got {side}")
        if not 0 <= image < total:
            raise IndexError(f"NDA: image must lie in [0, {total}), got {image}")
        key = _key(images[0])
        if key not in self._normalisers:
            before = self._normalisers
            self.scores(images)
            self._normalisers |= before
        other = self._bank[image : image + 1] if isinstance(self._bank, Tensor) else self._bank.row(image)
        explainer = Explainer(to_unit(other, torch.empty(0, dtype=torch.float64))[0], self.border, self.k)
        passes = ((term, draw) for term in self.terms for draw in range(self.num_noises))
        for (term, draw), normaliser in zip(passes, self._normalisers[key], strict=True):
            sigma, scale = self._sigma_and_scale(term)
            noisy = self._noised(images, term, draw)[0].to("cpu", torch.float64)
            explainer.add(noisy, normaliser.to("cpu", torch.float64), term, sigma, scale, 1 / self.num_noises)
        return explainer.explanation(pairs, side)

    def tune(self, masks, losses, queries, **choices) -> Tuning:
        """Choose timesteps, patch sizes, k and alpha by the linear datamodeling score on validation queries, and use them.

        Args, returns, errors: those of :func:`pyattr.attribution.patch_tuning.tune`.
        """
        return tune(self, masks, losses, queries, **choices)

    def images_of(self, queries) -> Tensor:
        """[Q, C, H, W] float32 in [-1, 1], where the training images lie, or on the CPU."""
        if self._bank is None:
            raise RuntimeError("NDA: fit must be called before scores, explain and tune")
        images = queries.images if isinstance(queries, Samples) else queries
        images = as_images(images, "NDA", "queries")
        if images.shape[1:] != self.shape[1:]:
            raise ValueError(
                f"NDA: queries must have shape [Q, {', '.join(map(str, self.shape[1:]))}] as the training images, "
                f"got {list(images.shape)}"
            )
        return to_unit(images, torch.empty(0, dtype=torch.float32, device=self._bank.device))

    def _sigma_and_scale(self, term: Term) -> tuple[float, float]:
        abar = float(self.schedule.alphas_cumprod[term.timestep])
        return math.sqrt(1 - abar), math.sqrt(abar)

    def _noised(self, images: Tensor, term: Term, draw: int) -> Tensor:  # [Q, C, H, W]
        sigma, scale = self._sigma_and_scale(term)
        # Of no image in particular: id 0 for all.
        eps = noise(images.shape[1:], seed=self.noise_seed, ids=0, timesteps=term.timestep, draws=draw, purpose=PATCHES)
        return scale * images + sigma * eps.to(images)

    def counter(self, stage: str, number: int, passes: int, queries: int) -> Callable[[int], None]:
        """What tells :attr:`progress` how many queries of pass ``number`` are done."""
        return lambda done: self.progress(number * queries + done, passes * queries, stage)

    def record(self, term: Term, draw: int) -> dict:
        """Everything that decides a term's table but the queries, for what is stored."""
        return {
            "data": self._data,
            "schedule": dataclasses.asdict(self.schedule),
            "noise_seed": self.noise_seed,
            "border": self.border,
            "term": [str(term), self.k, draw],
        }

    def table(self, images: Tensor, term: Term, draw: int, count: Callable[[int], None]) -> tuple[Tensor, Tensor]:
        """One term's scores [Q, N] float32 and log-normalisers [Q, H', W'] float64 on the CPU, computed or found."""
        path, record = None, {}
        if self.directory is not None:
            record = {"kind": "patch scores", "queries": tensors_hash({"images": images}), **self.record(term, draw)}
            folder = self.directory / f"queries-{record['queries'][:16]}"
            path = folder / f"{term}-k{self.k}-{draw}.safetensors"
            found = load_table(path, record)
            if found is not None:
                count(len(images))
                return found["weights"], found["log_normaliser"]
        table = self.compute(images, term, draw, count)
        if path is not None:
            save_table(path, dict(zip(("weights", "log_normaliser"), table, strict=True)), record)
        return table

    def compute(self, images: Tensor, term: Term, draw: int, count: Callable[[int], None]) -> tuple[Tensor, Tensor]:
        """The same, computed and not kept."""
        count(0)
        sigma, scale = self._sigma_and_scale(term)
        weights, normalisers = [], []
        for batch in self._noised(images, term, draw).split(_BATCH):
            found = patch_topk(
                batch,
                self._bank,
                patch_size=term.patch_size,
                k=self.k,
                sigma=sigma,
                scale=scale,
                border=self.border,
                lowres=term.coarse,
                backend=self.backend,
            )
            if found.weights.shape[1] != self.shape[0]:
                raise RuntimeError(
                    f"NDA: train changed after fit: {self.shape[0]} images, then {found.weights.shape[1]}"
                )
            weights.append(found.weights.cpu())
            normalisers.append(found.log_normaliser.cpu())
            count(sum(map(len, weights)))
        return torch.cat(weights), torch.cat(normalisers)


def _training_images(images) -> Tensor:
    """[n, C, H, W] of a dtype that compiled backends take."""
    images = as_images(images, "NDA", "train")
    return images.float() if images.dtype == torch.float64 else images


class _Stream:
    """Chunks of images that can be walked through again and again.

    Attributes:
        shape: [N, C, H, W] of the whole.
        device: of the chunks.
    """

    def __init__(self, chunks: Iterable):
        if not isinstance(chunks, Iterable) or isinstance(chunks, Iterator):
            raise TypeError(
                "NDA: train must be an array, a path or chunks that can be walked through more than once, "
                f"got {type(chunks).__name__}"
            )
        self.chunks = chunks
        self.shape, self.device = (0,), torch.device("cpu")
        rows, shape = 0, None
        for chunk in self:
            if shape is not None and chunk.shape[1:] != shape:
                raise ValueError(
                    f"NDA: train must be images of one shape, got {list(shape)} and {list(chunk.shape[1:])}"
                )
            rows, shape, self.device = rows + len(chunk), chunk.shape[1:], chunk.device
        self.shape = (rows, *(shape or ()))

    def __iter__(self) -> Iterator[Tensor]:
        for chunk in self.chunks:
            yield _training_images(chunk)

    def row(self, index: int) -> Tensor:
        """[1, C, H, W]: the chunks before it are read for it."""
        for chunk in self:
            if index < len(chunk):
                return chunk[index : index + 1]
            index -= len(chunk)
        raise ValueError("NDA: train holds fewer images than when it was first walked through")


def _hash(chunks: Iterable[Tensor]) -> str:
    """Identifies images in their order, however they are cut into chunks."""
    digest, rows, kind = hashlib.sha256(), 0, None
    for chunk in chunks:
        digest.update(chunk.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        rows, kind = rows + len(chunk), (str(chunk.dtype), *chunk.shape[1:])
    digest.update(repr((rows, kind)).encode())
    return digest.hexdigest()


def _is_array(value) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _key(image: Tensor) -> str:
    return tensors_hash({"image": image})
