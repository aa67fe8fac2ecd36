"""DAS with all numbers of the prediction, by random directions in place of one fixed readout."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..diffusion.conditioned import Examples, as_examples, contents, separate
from ..diffusion.features import FeatureMap, Features
from ..diffusion.noise import PROBES, noise
from ..diffusion.schedule import Schedule
from ..diffusion.storage import tensors_hash
from .kernel import _COLUMNS, DampedKernel
from .products import blocks
from .trak import TRAK


@dataclass(frozen=True)
class ProbeMap(FeatureMap):
    """The gradient of the prediction along random directions: ``psi = M (R D)^{-1/2} sum_r grad_theta u_r . e_theta(x_t, t)``.

    R rows (timesteps and draws of the noise), D numbers in a prediction, u_r of +-1. Directions at different rows are
    independent, so ``E psi psi^T = M mean_r (J_r^T J_r / D) M^T``, J_r the Jacobian of the prediction: the mean over rows is
    not drawn into the square. Directions of different ``probe`` are one random vector times the rows of a Hadamard matrix:
    orthogonal, and of a single row (R = 1) the mean over as many as the next power of two from D is the expectation.

    Args:
        probe: which of the directions at each row.

    Source: Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1990.
    """

    probe: int = 0

    def settings(self) -> dict:
        return {**super().settings(), "loss": "probe"}

    def _function(self):
        return functools.partial(_along, scale=len(self._times()) ** 0.5)

    def _rows(self, x: Examples, ids: Tensor, which: slice) -> dict[str, Tensor]:
        batch = super()._rows(x, ids, which)
        shape, times, draws = batch["noise"].shape[2:], self._times()[which], self._draws()[which]
        random = noise(shape, seed=self.noise_seed, ids=ids[:, None], timesteps=times, draws=draws, purpose=PROBES)
        images, _ = separate(x)
        row = _hadamard_row(self.probe, shape.numel()).to(images).view(shape)
        batch["noise"] = torch.where((random < 0).to(row.device), -row, row)
        return batch


def _along(prediction: Tensor, direction: Tensor, timesteps: Tensor, schedule: Schedule, *, scale: float) -> Tensor:
    count = prediction[0].numel()
    return torch.linalg.vecdot(prediction.flatten(1), direction.flatten(1)) * (scale / count**0.5)  # [B]


def _hadamard_row(row: int, count: int) -> Tensor:
    """The first entries of a row of Sylvester's matrix: -1 to the number of bits that row and column share."""
    shared, signs = torch.arange(count) & row, torch.ones(count, dtype=torch.int64)
    while shared.any():
        signs *= 1 - 2 * (shared & 1)
        shared = shared >> 1
    return signs


class ProbedDAS(TRAK):
    """Which training images change a query's predicted noise most, over all its numbers.

    ``tau(q, n) = (1 / M) sum_m (psi_{q,m}^T (G + lambda I)^{-1} phi_n / 2)^2``, with phi_n the projected gradient of image n's
    training loss (TRAK's features), psi_{q,m} that of the query's prediction along the m-th random direction
    (:class:`ProbeMap`), and ``G = (1 / L) sum_{n,l} psi_{n,l} psi_{n,l}^T`` over L directions for each training image: the
    Gauss-Newton matrix of the training loss, halved. It estimates

        mean_{t, eps} (1 / D) ||J_q (H + 2 lambda I)^{-1} grad f_n||^2,        H = 2 sum_n mean_{t, eps} J_n^T J_n / D,

    the mean squared change of the prediction for q when image n is left out by one Gauss-Newton step, without the leverage of
    n. Given G the directions of queries leave it unbiased. Its relative standard deviation over them is about sqrt(2 / M) for
    a change that is spread over the image, and never above sqrt(2).

    It differs from :class:`DAS` in keeping all numbers of the prediction, in averaging over timesteps outside the square, in a
    kernel that is the model's curvature, and in gradients that keep their size. Costs of features: 1 + L gradients for each
    training image, timestep and draw, and M for each query's.

    Args:
        model, schedule: see :class:`~pyattr.attribution.gradient_method.GradientMethod`.
        probes: M.
        train_probes: L.
        features: as :class:`TRAK`'s, ``lambda_`` included, in the units of G; neither ``normalize`` nor float32 solves.

    Attributes:
        signed: False: a score says how much, not in which direction.
        lambda_, eigenvalues: see :class:`TRAK`; of G.

    Raises:
        ValueError: an argument is not as above.

    Source: Lin, Tao, Dong, Xu, "Diffusion Attribution Score", ICLR 2025, whose definition (before the steps that make it one
    number) this estimates; its kernel as in Martens, "New Insights and Perspectives on the Natural Gradient Method", 2020.
    """

    signed = False
    _images: Examples | None = None  # while they are fitted

    def __init__(self, model: nn.Module, schedule: Schedule, *, probes: int = 8, train_probes: int = 1, **features):
        super().__init__(model, schedule, **features)
        for name, value in (("probes", probes), ("train_probes", train_probes)):
            if value < 1:
                raise ValueError(f"ProbedDAS: {name} must be at least 1, got {value}")
        if self.feature_map.normalize:
            raise ValueError("ProbedDAS: normalize must be False: the scores are sizes of changes")
        if self.solve_dtype != torch.float64:
            raise ValueError(f"ProbedDAS: solve_dtype must be torch.float64, got {self.solve_dtype}")
        self.probes, self.train_probes = probes, train_probes

    def fit(self, train) -> "ProbedDAS":
        """As :meth:`TRAK.fit`, with the features of the directions besides.

        Extra memory: what :class:`~pyattr.attribution.kernel.DampedKernel` takes for N L samples; and 4 N (L + 1) D bytes for
        features where there is no ``directory``.
        """
        self._images = as_examples(train, "ProbedDAS", "train")
        try:
            return super().fit(self._images)
        finally:
            self._images = None

    def scores(self, queries, *, lambda_: float | None = None, ids=None) -> Tensor:
        """The estimated mean squared change of the prediction for each query when an image is left out.

        Args, returns, errors: see :meth:`TRAK.scores`.

        Extra memory: the queries' features, 4 Q M D bytes, and :meth:`CrossKernel.mean_squares`'s.
        """
        return super().scores(queries, lambda_=lambda_, ids=ids)

    def _prepare(self, found: list[Features]) -> None:
        images = self._images
        along = self._along_probes(self.train_probes, self.feature_map, images, torch.arange(len(images)), "train")
        rows = Features.joined(along, self.train_probes**-0.5)  # [L N, D]
        self.progress(0, 1, "eigendecomposition")
        self._take(CrossKernel(rows, found[0], self.device))
        self.progress(1, 1, "eigendecomposition")

    def _grid(self, queries, lambdas: Iterable[float | None], ids) -> Iterator[tuple[float, Tensor]]:
        self._check_fitted()
        self._check_unchanged(0, self.model)
        images, ids, feature_map = self._asked(queries, ids)
        lambdas = [self.lambda_ if value is None else value for value in lambdas]
        key = tensors_hash({**contents(images), "ids": ids})
        if self._queries is None or self._queries[0] != key:
            self._queries = key, self._query_probes(feature_map, images, ids, key)
        means = self._kernel.mean_squares(self._queries[1], lambdas)
        return zip(lambdas, (part.div_(4) for part in means), strict=True)  # exact

    def _query_probes(self, feature_map: FeatureMap, images: Examples, ids: Tensor, key: str) -> Tensor:  # [M, Q, D]
        if len(images) == 0:
            return torch.empty(self.probes, 0, feature_map.proj_dim)
        place = f"queries-{key[:16]}-{feature_map.num_noises}"
        along = self._along_probes(self.probes, feature_map, images, ids, place, "query features")
        return torch.stack([part.tensor() for part in along])

    def _along_probes(
        self, count: int, feature_map: FeatureMap, images: Examples, ids: Tensor, place: str, stage: str = "features"
    ) -> list[Features]:
        """Features along directions 0 to count - 1."""
        fields = {field.name: getattr(feature_map, field.name) for field in dataclasses.fields(FeatureMap)}
        found = []
        for probe in range(count):
            of_probe, where = ProbeMap(**fields, probe=probe), (f"probe-{probe}", place)
            found.append(self._features(probe, self.model, of_probe, images, ids, where, stage, count))
        return found


class CrossKernel(DampedKernel):
    """``phi_q^T (G + lambda I)^{-1} phi_n`` with samples n that G is not made of, read a block at a time.

    Args:
        features: G is their Gram matrix.
        right: phi_n, N rows.
        device: see :class:`DampedKernel`.

    Extra memory: as :class:`DampedKernel`.
    """

    def __init__(self, features: Features, right: Features, device: torch.device | str = "cpu"):
        super().__init__(features, device)
        self.right = right

    def mean_squares(self, queries: Tensor, lambdas: Iterable[float]) -> Iterator[Tensor]:
        """``(1 / M) sum_m (phi_{q,m}^T (G + lambda I)^{-1} phi_n)^2`` for one lambda after the other.

        In the dual form, where the eigenvectors U span less than the features do, by Woodbury's identity
        ``(Psi^T Psi + lambda I)^{-1} = (I - Psi^T U (w + lambda)^{-1} U^T Psi) / lambda``.

        Args:
            queries: phi_{q,m}, [M, Q, D].
            lambdas: positive, in the units of G's eigenvalues.

        Yields:
            [Q, N] float32 on the CPU, rounded once from float64.

        Extra memory: 8 M Q (D + min(D, the rows of G)) bytes, and 2048 (D + 2 M Q) bytes.
        """
        probes, asked, _ = queries.shape
        queries = queries.flatten(0, 1)
        left = self._in_eigenvectors(queries)  # [M Q, the number of eigenvalues]
        for lambda_ in lambdas:
            solved = self._solved(queries, left / (self.eigenvalues + lambda_) @ self.vectors.T, lambda_)  # [M Q, D]
            out = torch.empty(asked, len(self.right), dtype=torch.float32, device="cpu")
            for columns, rows in blocks(self.right, self.device):
                scores = (solved @ rows.T).square_().view(probes, asked, len(rows)).mean(0)
                out[:, columns] = scores.to("cpu", torch.float32)
            yield out

    def _solved(self, queries: Tensor, weighed: Tensor, lambda_: float) -> Tensor:
        """``(G + lambda I)^{-1} phi``: in the primal form the weighed queries, in the dual form what these make of G's rows."""
        if not self.dual:
            return weighed
        out = queries.to(self.device, torch.float64, copy=True)
        for into, theirs in zip(out.split(_COLUMNS, 1), self.rows.split(_COLUMNS, 1), strict=True):
            into.addmm_(weighed, theirs.to(torch.float64), alpha=-1)
        return out.div_(lambda_)
