"""First-order methods: inner products and cosines of gradients, of one network or over its checkpoints."""

import copy
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from ..diffusion.checkpoint import identity, load_model
from ..diffusion.schedule import Schedule
from .gradient_method import GradientMethod
from .products import inner_products


class GradientDot(GradientMethod):
    """Which training images point the gradient where the query's points.

    ``tau(q, n) = phi_q^T phi_n``, phi the projected gradient of the training loss averaged over timesteps. The projection is
    unscaled: a score is D times an unbiased estimate of the inner product of the gradients, with a standard deviation of at
    most ``sqrt(2 / D)`` times the product of their norms for the dense projections.

    Sign: a small step of gradient descent on image n lowers the query's loss by the step times grad f_q^T grad f_n to first
    order. So the raw number is positive where training on n helps the query: a proponent. No conversion is needed.

    Args, attributes, errors: see :class:`~pyattr.attribution.gradient_method.GradientMethod`.

    Source: Charpiat et al., "Input Similarity from the Neural Network Perspective", NeurIPS 2019; as a baseline of
    Zheng et al., ICLR 2024 (D-TRAK).
    """

    cosine = False

    def scores(self, queries, *, ids=None) -> Tensor:
        """Scores of all training images for each query; positive = proponent.

        The features of the last queries are kept.

        Args:
            queries: images [Q, C, H, W] (uint8, or floating point in [-1, 1]) or :class:`~pyattr.diffusion.Samples`.
            ids: [Q] distinct noise ids. None: 2^40 + i for the i-th query, or 2^40 + its id for a sample, so that no query
                shares its noise with a training image.

        Returns:
            [Q, N] float32; products are taken in float64.

        Raises:
            RuntimeError: :meth:`fit` was not called.
            ValueError: an argument is not as above, or the model has changed since :meth:`fit`.

        Extra memory: the queries' features, :func:`~pyattr.attribution.products.inner_products`'s, and the scores once more
        where there are several checkpoints.
        """
        total, found = None, self._query_features(queries, ids)
        for ours, theirs in zip(found, self._train, strict=True):
            part = inner_products(ours, theirs, cosine=self.cosine, device=self.device)
            total = part if total is None else total.add_(part)
        return total.div_(len(found))


class GradientCosine(GradientDot):
    """Which training images point the gradient where the query's points, however long it is.

    ``tau(q, n) = phi_q^T phi_n / (||phi_q|| ||phi_n||)``, 0 where either is zero. Sign, arguments, attributes, errors: as in
    :class:`GradientDot`.

    Source: Charpiat et al., NeurIPS 2019; as a baseline of Zheng et al., ICLR 2024 (D-TRAK).
    """

    cosine = True


class TracInCP(GradientDot):
    """:class:`GradientDot` averaged over checkpoints of the training.

    ``tau(q, n) = (1 / C) sum_c phi_q^T phi_n`` with the gradients at checkpoint c and one projection for all. Every checkpoint
    counts the same: learning rates do not weigh them, as in the published evaluation on diffusion models.

    Sign: as in :class:`GradientDot`, for the steps of a whole training.

    Args:
        model: the network that checkpoints are loaded into; a copy of it, itself left alone. With a ``directory`` the features
            of a checkpoint that it equals lie where the methods of one network find them.
        schedule: the one it was trained with.
        checkpoints: files (:func:`pyattr.diffusion.checkpoints` lists a training's; the moving average of the weights where
            there is one) or state dicts, at least one.
        features: see :class:`~pyattr.attribution.gradient_method.GradientMethod`. Progress counts an image once for each
            checkpoint.

    Attributes:
        signed: True: negative scores mean opponents.

    Raises:
        TypeError, ValueError: an argument is not as above. :meth:`fit` and :meth:`scores` raise where a checkpoint cannot be
            read or does not fit the model.

    Extra memory: the network once more.

    Source: Pruthi et al., "Estimating Training Data Influence by Tracing Gradient Descent", NeurIPS 2020; without
    its learning rates, as in Zheng et al., ICLR 2024 (D-TRAK).
    """

    def __init__(self, model: nn.Module, schedule: Schedule, *, checkpoints: Iterable, **features):
        super().__init__(model, schedule, **features)
        name = type(self).__name__
        if isinstance(checkpoints, (str, os.PathLike, Mapping)):
            raise TypeError(
                f"{name}: checkpoints must be a list of files or state dicts, got a single {type(checkpoints).__name__}"
            )
        self.checkpoints = list(checkpoints)
        for checkpoint in self.checkpoints:
            if not isinstance(checkpoint, (str, os.PathLike, Mapping)):
                raise TypeError(f"{name}: checkpoints must be files or state dicts, got a {type(checkpoint).__name__}")
        if not self.checkpoints:
            raise ValueError(f"{name}: checkpoints must hold at least one, got none")

    def _networks(self) -> Iterator[nn.Module]:
        for number, checkpoint in enumerate(self.checkpoints):
            network = copy.deepcopy(self.model)
            try:
                if isinstance(checkpoint, Mapping):
                    network.load_state_dict(checkpoint)
                else:
                    network = load_model(checkpoint, into=network)
            except RuntimeError as error:
                # Of these, what load_state_dict has to say of names and shapes is not a subclass.
                if type(error) is not RuntimeError:
                    raise
                raise ValueError(
                    f"{type(self).__name__}: checkpoint {number} does not fit the model: {error}"
                ) from error
            yield network

    def _num_networks(self) -> int:
        return len(self.checkpoints)

    def _place(self, model: nn.Module) -> str:
        own = identity(model)
        if own == identity(self.model):
            return ""
        return f"checkpoint-{hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]}"


class GAS(TracInCP):
    """:class:`GradientCosine` averaged over checkpoints of the training.

    ``tau(q, n) = (1 / C) sum_c phi_q^T phi_n / (||phi_q|| ||phi_n||)``. The rest: as in :class:`TracInCP`.

    Source: Hammoudeh, Lowd, "Identifying a Training-Set Attack's Target Using Renormalized Influence Estimation", CCS 2022
    (gradient aggregated similarity); as a baseline of Zheng et al., ICLR 2024 (D-TRAK).
    """

    cosine = True
