"""Several models in place of one: the mean of their scores."""

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from .trak import TRAK


class Ensemble:
    """The mean of the scores of methods that were each given a model of their own.

    ``tau(q, n) = (1 / S) sum_s tau_s(q, n)`` with tau_s the scores of method s from its model, its projection and its lambda.
    Scores are averaged, not features: each model's kernel is inverted by itself, at a lambda in its own units. Whatever noise
    a model's training and projection put into its scores falls as 1 / S where models are independent.

    Methods of one kind and with the same settings belong together; where their sizes differ, the larger lead. Each needs a
    ``directory`` of its own, if any. Models that were trained on half of the images, as the published ensembles are, still
    take the features of all images.

    What is averaged is what each method's ``scores`` gives: of :class:`DAS` the squares. Of ``DAS(squared=False)`` it is the
    numbers before them; the square of that mean is less than the mean of the squares by the variance over the models.

    Args:
        methods: S of them, at least one, with ``fit`` and ``scores``: :class:`TRAK`, :class:`DTRAK` or any other.

    Attributes:
        methods: those given.
        signed: whether negative scores mean opponents: where they do for every method.

    Raises:
        ValueError: no method, one of them twice, or two that share a directory.

    Source: Park et al., "TRAK: Attributing Model Behavior at Scale", ICML 2023, section 3.2, whose models are averaged factor
    by factor; the mean of scores with a lambda for each model is the form of Zheng et al., ICLR 2024 (D-TRAK), table 7.
    """

    def __init__(self, methods: Iterable):
        self.methods = list(methods)
        if not self.methods:
            raise ValueError("Ensemble: methods must hold at least one, got none")
        if len({id(method) for method in self.methods}) < len(self.methods):
            raise ValueError("Ensemble: methods must be different objects, got one of them twice")
        places = [method.directory for method in self.methods if getattr(method, "directory", None) is not None]
        for place in places:
            if places.count(place) > 1:
                raise ValueError(f"Ensemble: each method needs a directory of its own, got {place} twice")
        self.signed = all(method.signed for method in self.methods)

    def fit(self, train) -> "Ensemble":
        """Fit each method to the training images.

        Args:
            train: [N, C, H, W]; see the methods' own.

        Returns:
            self.

        Raises:
            ValueError, DamagedFileError: as the methods.
        """
        for method in self.methods:
            method.fit(train)
        return self

    def scores(self, queries, *, lambda_: Sequence[float] | None = None, **others) -> Tensor:
        """The mean of the methods' scores; positive = proponent.

        Args:
            queries: see the methods' own.
            lambda_: S of them, one for each method, in place of those chosen by :meth:`fit`; for methods that take one.
            others: what the methods' ``scores`` takes besides, the same for all.

        Returns:
            [Q, N] float32, summed in float64.

        Raises:
            RuntimeError, TypeError, ValueError: as the methods; or the number of lambdas is another.

        Extra memory: 12 Q N bytes and what one method takes.
        """
        if lambda_ is None:
            given = [{}] * len(self.methods)
        else:
            given = [{"lambda_": value} for value in self._each("lambda_", lambda_)]
        total = None
        for method, own in zip(self.methods, given, strict=True):
            part = method.scores(queries, **own, **others).double()
            total = part if total is None else total.add_(part)
        return total.div_(len(self.methods)).float()

    def scores_grid(self, queries, lambdas: Iterable[Sequence[float]], **others) -> Iterator[tuple[tuple, Tensor]]:
        """:meth:`scores` for one choice of lambdas after the other, for methods of :class:`TRAK`'s kind.

        Each method decomposes once, and has its queries' share done once for its whole column of lambdas.

        Args:
            queries, others: see :meth:`scores`.
            lambdas: choices, each of S numbers. To choose for each model by itself, ask its ``scores_grid``.

        Returns:
            An iterator over (the S lambdas, [Q, N] float32), the bits of :meth:`scores`.

        Raises:
            TypeError: a method has no grid.
            RuntimeError, ValueError: as :meth:`scores`, before the first is asked for.
        """
        for method in self.methods:
            if not isinstance(method, TRAK):
                raise TypeError(f"Ensemble: {type(method).__name__} has no lambda to take from a grid")
        choices = [tuple(float(value) for value in self._each("lambdas", choice)) for choice in lambdas]
        grids = [
            method.scores_grid(queries, list(column), **others)
            for method, column in zip(self.methods, zip(*choices, strict=True), strict=bool(choices))
        ]
        return self._means(choices, grids)

    def _means(self, choices: list[tuple], grids: list[Iterator]) -> Iterator[tuple[tuple, Tensor]]:
        for choice in choices:
            total = None
            for grid in grids:
                part = next(grid)[1].double()
                total = part if total is None else total.add_(part)
            yield choice, total.div_(len(self.methods)).float()

    def _each(self, name: str, values) -> list:
        """One value for each method."""
        values = list(values) if hasattr(values, "__iter__") else [values]
        if len(values) != len(self.methods):
            raise ValueError(f"Ensemble: {name} must hold {len(self.methods)}, one for each method, got {len(values)}")
        return values
