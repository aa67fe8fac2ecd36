"""MAGIC: how a function of the trained model changes with the weight of each training item, through all of its training."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ...diffusion.images import evaluating
from ...diffusion.progress import Pace, Progress, silent
from ...diffusion.storage import DamagedFileError, load_tensors, save_tensors, tensors_hash
from .replay import SAVE_SECONDS, Replay, settings_of
from .rows import Rows, as_rows, take
from .schemes import choose
from .training import Adam, Loss, State, WeightedTraining, check_numbers, check_weights

# (model, rows of Q queries) -> [Q], higher for a likelier query
Phi = Callable[[nn.Module, object], Tensor]
MEMORY = 2 << 30


class MAGIC:
    """Scores that are exact derivatives: ``scores[q, i] = d phi_q(theta_T(w)) / d w_i`` at the weights of the training.

    ``theta_T(w)`` is what ``steps`` steps of Adam make of the model with the loss of item i multiplied by w_i, everything else
    being fixed: initial weights, order, noise, dropout, normaliser. The derivative goes back through the steps, last to
    first; the states it needs are kept, or made again from few that are.

    Sign: phi is higher for a likelier query, so a positive score means that more of the item makes the query likelier. Of a
    loss, give the negative.

    Training is part of the method: it is this training's model that the scores are true for. Whether they also foretell what
    happens when items are left out altogether depends on the recipe; see
    :func:`~pyattr.attribution.magic.metasmoothness`.

    Args:
        model: where training starts; it is copied, and used in the mode that it is in, by phi in eval mode. Its parameters
            that require a gradient are trained, in their dtype: float32 or float64.
        loss: ``loss(model, rows, rng) -> [B]``: the loss of each of B items, twice differentiable in the model's
            parameters. Its random numbers come from the NumPy generator ``rng``, or torch's, in a number that
            depends on the shape of the rows alone. :class:`~pyattr.attribution.magic.NoiseLoss`,
            :class:`~pyattr.diffusion.ScoreLoss`, or any other.
        phi: ``phi(model, queries) -> [Q]``: a number for each query, the same whatever queries are beside it.
            :class:`~pyattr.attribution.magic.NegativeLoss`, :class:`~pyattr.attribution.magic.LogLikelihood`, or any other.
        steps: T.
        batch_size: B.
        optimiser: :class:`~pyattr.attribution.magic.Adam`.
        seed: of order and noise, in [0, 2^32).
        checkpointing: "all", "sqrt", "tree" or "binomial", see :class:`~pyattr.attribution.magic.Scheme`; "auto": all states
            where they fit into ``memory``, else "binomial" with as many as do. The scores are the same to the bit.
        memory: bytes that states may take, 12 for each parameter in float32; for "auto" and "binomial".
        branching: k of "tree".
        queries_at_a_time: how many are pulled back in one replay, which takes 12 bytes for each parameter and query.
        directory: where training and replays keep their states, and scores when they are done, so that an
            interrupted run goes on to the same bits; None: in memory.
        progress: stages "train" and "replay" (steps), "phi" (queries), "retrain" (steps of all trainings).

    Attributes:
        signed: True: negative scores mean opponents.
        model: after :meth:`fit`, the trained network.
        losses: after :meth:`fit`, the weighted loss of each step made in this process, by step.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Extra memory: a copy of the model, the states, and a step's graph of loss and gradient.

    Source: Ilyas, Engstrom, "MAGIC: Near-Optimal Data Attribution for Deep Learning", 2025; Engstrom, Ilyas, Chen,
    Feldmann, Moses, Madry, "Optimizing ML Training with Metagradient Descent", 2025.
    """

    signed = True

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        phi: Phi,
        *,
        steps: int,
        batch_size: int,
        optimiser: Adam | None = None,
        seed: int = 0,
        checkpointing: str = "auto",
        memory: int = MEMORY,
        branching: int = 8,
        queries_at_a_time: int = 8,
        directory: str | os.PathLike | None = None,
        progress: Progress = silent,
    ):
        check_numbers("MAGIC", steps=steps, batch_size=batch_size, queries_at_a_time=queries_at_a_time)
        self._start, self._loss, self._phi = model, loss, phi
        self._recipe = {
            "steps": steps,
            "batch_size": batch_size,
            "optimiser": Adam() if optimiser is None else optimiser,
            "seed": seed,
        }
        self._checkpointing = {"name": checkpointing, "memory": memory, "branching": branching}
        self.queries_at_a_time, self.progress = queries_at_a_time, progress
        self.directory = None if directory is None else Path(directory)
        self._replay: Replay | None = None
        self._end: State | None = None
        # Refused here rather than in fit: the settings are known, and those of the model cost nothing to look at.
        trained = [p for p in model.parameters() if p.requires_grad]
        choose(steps, sum(3 * p.numel() * p.element_size() for p in trained), **self._checkpointing)

    def fit(self, train, weights=None) -> "MAGIC":
        """Train.

        Args:
            train: the N items: an array [N, ...], :class:`~pyattr.diffusion.Conditioned`, or a tuple of arrays of N rows
                each. A loss gets B of them, in the same form and dtype, on the model's device.
            weights: w, [N]; 1 if None.

        Returns:
            self.

        Raises:
            TypeError, ValueError: an argument is not as above, or the directory holds another training.
            FloatingPointError: the loss is not finite.
        """
        train = as_rows(train, "train")
        training = WeightedTraining(self._start, self._loss, train, **self._recipe)
        weights = check_weights(weights, len(train), training.initial().theta)
        scheme = choose(training.steps, training.state_bytes, **self._checkpointing)
        settings = {}
        if self.directory is not None:
            settings = settings_of(self._start, train, weights, self._recipe)
        self._replay = Replay(
            training, weights, scheme, directory=self.directory, settings=settings, progress=self.progress
        )
        self._end = self._replay.train()
        self.model, self.losses = training.network(self._end.theta), self._replay.losses
        return self

    @property
    def replay(self) -> Replay:
        """What keeps and makes the states; says how many steps that took.

        Raises:
            RuntimeError: :meth:`fit` was not called.
        """
        if self._replay is None:
            raise RuntimeError("MAGIC: fit must be called first")
        return self._replay

    def values(self, queries) -> Tensor:
        """phi of the trained network.

        Args:
            queries: as phi takes them: an array [Q, ...], Conditioned, Samples, or a tuple of arrays of Q rows each.

        Returns:
            [Q] float64.

        Raises:
            RuntimeError: :meth:`fit` was not called.
            TypeError, ValueError: an argument is not as above.
        """
        training, queries = self.replay.training, as_rows(queries, "queries")
        return self._values(training, self._end, queries)

    def scores(self, queries) -> Tensor:
        """Scores of all training items for each query; positive = proponent.

        Args:
            queries: see :meth:`values`.

        Returns:
            [Q, N] float32, summed over steps in float64. The same bits for every way of checkpointing, for a query alone and
            among others, and for an interrupted run, on the same machine and number of threads.

        Raises:
            RuntimeError: :meth:`fit` was not called, or a step that was made again came out otherwise.
            TypeError, ValueError: an argument is not as above.

        Extra memory: three vectors of P for each query of a replay, 8 Q N bytes, and what one step takes.
        """
        return self._derivatives(queries).float()

    def predict(self, queries, removed) -> Tensor:
        """phi as it would be of trainings without some of the items: ``phi - sum over removed i of w_i d phi / d w_i``.

        Args:
            queries: see :meth:`values`.
            removed: [M, N] bool, which items each training lacks.

        Returns:
            [M, Q] float64.

        Raises:
            RuntimeError, TypeError, ValueError: see :meth:`scores`.
        """
        removed = self._removed(removed)
        change = removed.double() @ (self._derivatives(queries) * self.replay.weights.double().cpu()).T  # [M, Q]
        return self.values(queries) - change

    def retrain(self, queries, removed) -> Tensor:
        """phi of trainings without some of the items: with their weights 0, and all else as it was.

        Args:
            queries: see :meth:`values`.
            removed: [M, N] bool.

        Returns:
            [M, Q] float64.

        Raises:
            RuntimeError, TypeError, ValueError: see :meth:`scores`.

        Extra memory: two states. Nothing is kept in the directory.
        """
        removed, queries = self._removed(removed), as_rows(queries, "queries")
        training, weights = self.replay.training, self.replay.weights
        found, total = [], len(removed) * training.steps
        for number, row in enumerate(removed):
            found.append(
                train_and_measure(
                    training,
                    weights * ~row.to(weights.device),
                    lambda state: self._values(training, state, queries),
                    lambda step, n=number: self.progress(n * training.steps + step, total, "retrain"),
                )
            )
        return torch.stack([torch.empty(len(queries), dtype=torch.float64), *found])[1:]

    def _removed(self, removed) -> Tensor:
        removed = torch.as_tensor(removed)
        count = len(self.replay.training.train)
        if removed.dtype != torch.bool or removed.dim() != 2 or removed.shape[1] != count:
            raise ValueError(
                f"MAGIC: removed must be bool of shape [M, {count}], got {removed.dtype} of shape {list(removed.shape)}"
            )
        return removed.cpu()

    def _values(self, training: WeightedTraining, state: State, queries: Rows) -> Tensor:
        with torch.no_grad(), evaluating(training.model):
            found = [
                training.call(state.theta, self._measure, take(queries, slice(number, number + 1), training.device))
                for number in range(len(queries))
            ]
        return torch.cat([torch.empty(0, dtype=torch.float64), *(value.double().cpu() for value in found)])

    def _measure(self, model: nn.Module, query) -> Tensor:
        value = self._phi(model, query)
        if value.shape != (1,):
            raise ValueError(f"MAGIC: phi must give one number for each query, got shape {list(value.shape)} for one")
        return value

    def _slopes(self, queries: Rows, some: range) -> Tensor:
        """d phi_q / d theta_T of some of the queries, [Q, P]."""
        training, slopes = self._replay.training, []
        with torch.enable_grad(), evaluating(training.model):
            theta = self._end.theta.detach().requires_grad_()

            def slope(model, query):
                value = self._measure(model, query).sum()
                return torch.autograd.grad(value, theta, materialize_grads=True)[0]

            for number in some:
                query = take(queries, slice(number, number + 1), training.device)
                slopes.append(training.call(theta, slope, query))
                self.progress(number + 1, len(queries), "phi")
        return torch.stack(slopes)

    def _derivatives(self, queries) -> Tensor:  # -> [Q, N] float64
        queries, found = as_rows(queries, "queries"), []
        training, size = self.replay.training, self.queries_at_a_time
        groups = range(0, len(queries), size)
        for number, first in enumerate(groups):
            slopes = self._slopes(queries, range(first, min(first + size, len(queries))))

            def progress(done: int, n=number) -> None:
                self.progress(n * training.steps + done, len(groups) * training.steps, "replay")

            found.append(self._replayed(slopes, progress))
        return torch.cat([torch.empty(0, len(training.train), dtype=torch.float64), *found])

    def _replayed(self, slopes: Tensor, progress: Callable[[int], None]) -> Tensor:
        """Pull derivatives in theta_T back through the training; [Q, P] -> [Q, N] float64."""
        training, weights = self._replay.training, self._replay.weights
        kept = _Kept(self.directory, {"end": self._end.theta, "slopes": slopes}, training)
        done = kept.finished()
        if done is not None:
            progress(training.steps)
            return done
        start, adjoints, into = kept.resumed() or (
            training.steps,
            State(slopes, torch.zeros_like(slopes), torch.zeros_like(slopes)),
            torch.zeros(len(slopes), len(training.train), dtype=torch.float64, device=training.device),
        )
        progress(training.steps - start)
        pace = Pace(SAVE_SECONDS)
        for step, state in self._replay.backwards(start):
            training.pull(state, step, weights, adjoints, into)
            if self.directory is not None and step and pace.due():
                with pace.saving():
                    kept.save(step, adjoints, into)
            progress(training.steps - step)
        kept.finish(into)
        return into.cpu()


class _Kept:
    """What a replay leaves in the directory: derivatives when it is done, before that where it stands.

    Files carry a hash of the final parameters and of phi's derivatives in them, all that a replay of a training depends on.
    """

    def __init__(self, directory: Path | None, asked: dict[str, Tensor], training: WeightedTraining):
        self.device, self.where, self.scores = training.device, None, None
        if directory is not None:
            name = tensors_hash(asked)[:32]
            self.where = directory / f"replay-{name}.safetensors"
            self.scores = directory / f"derivatives-{name}.safetensors"

    def finished(self) -> Tensor | None:
        found = _read(self.scores)
        return found and found[0]["derivatives"]

    def resumed(self) -> tuple[int, State, Tensor] | None:
        found = _read(self.where)
        if found is None:
            return None
        tensors = {name: tensor.to(self.device) for name, tensor in found[0].items()}
        return found[1]["step"], State(*(tensors[name] for name in State._fields)), tensors["into"]

    def save(self, step: int, adjoints: State, into: Tensor) -> None:
        save_tensors(self.where, {**adjoints._asdict(), "into": into}, {"kind": "replay", "step": step})

    def finish(self, into: Tensor) -> None:
        if self.scores is not None:
            save_tensors(self.scores, {"derivatives": into}, {"kind": "derivatives"})
            self.where.unlink(missing_ok=True)


def _read(path: Path | None) -> tuple[dict[str, Tensor], dict] | None:
    """A file's contents; None where there is none, or it is damaged and has to be made again."""
    if path is None or not path.is_file():
        return None
    try:
        return load_tensors(path)
    except DamagedFileError:
        path.unlink()
        return None


def train_and_measure(training: WeightedTraining, weights: Tensor, measure: Callable, progress: Callable):
    """``measure(s_T)`` of a training with other weights, none of whose states are kept."""
    state = training.initial()
    for step in range(training.steps):
        state, _ = training.advance(state, step, weights)
        progress(step + 1)
    return measure(state)
