"""Training as a pure function of the weights of its items, and the pull of derivatives back through one step of it."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from .rows import Rows, take

SCHEDULES = ("constant", "cosine", "linear")
_ORDER, _STEP = 0x6D6F7264, 0x6D737470  # key word 1 of the data order and of the draws of a step

# (model, rows of B items, random numbers) -> [B], the loss of each item
Loss = Callable[[nn.Module, Rows, np.random.Generator], Tensor]


@dataclass(frozen=True)
class Adam:
    """``theta -= rate (mhat / (sqrt(vhat + eps_root) + eps) + weight_decay theta)``, with a derivative at vhat = 0.

    Args:
        learning_rate: its peak.
        betas: decays of the moving averages m of the gradient and v of its square, both corrected for their start.
        eps: outside the root.
        eps_root: inside, positive: at vhat = 0 the root itself has no derivative. It also bounds how fast the step of a
            parameter with tiny gradients can change, so a larger one makes training smoother in the weights of its items.
        weight_decay: decoupled, as in AdamW.
        schedule: after the warmup, "constant", or to 0 along a "cosine" or a "linear" slope.
        warmup: fraction of the steps in which the rate rises linearly, in [0, 1].

    Raises:
        ValueError: an argument is not as above.

    Source: Kingma, Ba, "Adam", ICLR 2015; Loshchilov, Hutter, "Decoupled Weight Decay Regularization", ICLR 2019; Engstrom
    et al., "Optimizing ML Training with Metagradient Descent", 2025, for eps_root and for the defaults of betas and eps.
    """

    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.95, 0.975)
    eps: float = 1e-6
    eps_root: float = 1e-8
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.1

    def __post_init__(self):
        for name in ("learning_rate", "eps_root"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"Adam: {name} must be positive, got {getattr(self, name)}")
        for name in ("eps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"Adam: {name} must not be negative, got {getattr(self, name)}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"Adam: betas must be two numbers in [0, 1), got {self.betas}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"Adam: schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"Adam: warmup must lie in [0, 1], got {self.warmup}")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, 0 to ``steps`` - 1."""
        warmup = math.ceil(self.warmup * steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / (steps - warmup)
        left = {"constant": 1.0, "cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done}
        return self.learning_rate * left[self.schedule]


class State(NamedTuple):
    """Of a training between two steps; or adjoints, derivatives in it of several values, with a leading dimension."""

    theta: Tensor  # [P]
    m: Tensor  # [P]
    v: Tensor  # [P]


class WeightedTraining:
    """``s_{t+1} = h_t(s_t, w)``: steps of Adam on ``(1 / B) sum_{j in slots of t} w_{i(t, j)} loss_{i(t, j)}(theta_t)``.

    Items go through the B slots of each step in one permutation of all N after the other, so that all steps have B items and
    the normaliser never changes; an item is dropped by weight 0. What a slot sees, its random numbers and dropout are functions
    of (seed, step, slot), not of the weights.

    Args:
        model: where training starts; copied. Parameters that require a gradient are trained, all of one dtype on one device.
        loss: ``loss(model, rows, rng)`` gives the B items' own losses, [B], with random numbers from ``rng`` and torch alone.
        train: the N items.
        steps: T.
        batch_size: B.
        optimiser: :class:`Adam`.
        seed: in [0, 2^32).

    Raises:
        TypeError, ValueError: an argument is not as above, or the model gathers statistics while it trains, which would make a
            step more than a function of the state.
    """

    def __init__(self, model: nn.Module, loss: Loss, train: Rows, *, steps, batch_size, optimiser: Adam, seed: int):
        check_numbers("MAGIC", steps=steps, batch_size=batch_size)
        if len(train) == 0:
            raise ValueError("MAGIC: train must hold at least one item, got none")
        if not 0 <= seed < 2**32:
            raise ValueError(f"MAGIC: seed must lie in [0, {2**32 - 1}], got {seed}")
        for name, module in model.named_modules():
            if module.training and getattr(module, "track_running_stats", False):
                raise ValueError(f"MAGIC: model must not gather running statistics, got {name} in training mode")
        model = copy.deepcopy(model)
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        check_parameters(trained)
        self.model = model.requires_grad_(False)
        self.loss, self.train, self.optimiser, self.seed = loss, train, optimiser, seed
        self.steps, self.batch_size = steps, batch_size
        self._shapes = {name: p.shape for name, p in trained.items()}
        self._start = torch.cat([p.reshape(-1) for p in trained.values()])
        self._bound = _Bound(self.model)
        self._order: tuple[int, Tensor | None] = (-1, None)  # the last permutation, and its number

    @property
    def num_parameters(self) -> int:
        """P."""
        return self._start.numel()

    @property
    def state_bytes(self) -> int:
        """Of one state."""
        return 3 * self._start.numel() * self._start.element_size()

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return self._start.device

    def initial(self) -> State:
        """s_0."""
        return State(self._start, torch.zeros_like(self._start), torch.zeros_like(self._start))

    def slots(self, step: int) -> Tensor:  # -> [B] int64
        """The items of a step."""
        numbers = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, positions = numbers // len(self.train), numbers % len(self.train)
        found = torch.empty_like(numbers)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            found[here] = self._permutation(epoch)[positions[here]]
        return found

    def call(self, theta: Tensor, function: Callable, *args):
        """``function(model, *args)`` with the parameters theta [P] in the model.

        Derivatives in them have to be taken within: a model that checkpoints its activations looks its parameters up again
        on the way back.
        """
        pieces = theta.split([shape.numel() for shape in self._shapes.values()])
        parameters = {
            f"model.{name}": piece.view(shape)
            for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)
        }
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            return functional_call(self._bound, parameters, (function, *args))

    def network(self, theta: Tensor) -> nn.Module:
        """A copy of the model with these parameters, which do not require a gradient."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.call(theta, lambda bound: {k: t.clone() for k, t in bound.state_dict().items()}))
        return model

    def advance(self, state: State, step: int, weights: Tensor) -> tuple[State, float]:
        """``h_t``.

        Args:
            weights: w, [N] on the device.

        Returns:
            The next state, and the weighted loss of this one.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        with torch.enable_grad():
            theta = state.theta.detach().requires_grad_()
            slots = self.slots(step)

            def gradient(model):
                total = self._objective(model, step, slots, weights[slots.to(weights.device)])
                return torch.autograd.grad(total, theta, materialize_grads=True)[0], total.detach()

            gradient, total = self.call(theta, gradient)
        loss = float(total)
        if not math.isfinite(loss):
            raise FloatingPointError(f"MAGIC: the loss is {loss} at step {step}: lower learning_rate")
        return self._update(state, gradient, step), loss

    def pull(self, state: State, step: int, weights: Tensor, adjoints: State, into: Tensor) -> None:
        """Derivatives of Q values in s_{t+1} become those in s_t, in place; what the step adds of those in w goes to ``into``.

        Adam's part is written down, since it acts on each parameter alone. With a = dphi/ds_{t+1} pulled back to the gradient g
        of the objective, what remains is ``H a`` (H its Hessian in theta) and ``a . dg/dw``: one double backward pass for each
        value, through one graph of loss and gradient that all values share. A value's derivatives do not depend on the others.

        Args:
            adjoints: [Q, P] each.
            into: [Q, N] float64.

        Extra memory: that graph, and about ten vectors of P.
        """
        with torch.enable_grad():
            theta = state.theta.detach().requires_grad_()
            slots = self.slots(step).to(weights.device)
            used = weights[slots].detach().requires_grad_()

            def pull(model):
                total = self._objective(model, step, slots.cpu(), used)
                (gradient,) = torch.autograd.grad(total, theta, create_graph=True, materialize_grads=True)
                through = _Through(self.optimiser, state, gradient.detach(), step, self.steps)
                for number in range(len(into)):
                    row = State(*(part[number] for part in adjoints))
                    towards = through.pull(row)
                    if (
                        not gradient.requires_grad
                    ):  # the loss is linear in theta, or does not see it, and no weight counts
                        continue
                    curved, gained = torch.autograd.grad(
                        gradient,
                        (theta, used),
                        towards,
                        retain_graph=number + 1 < len(into),
                        materialize_grads=True,
                    )
                    row.theta.add_(curved)
                    into[number].index_add_(0, slots.to(into.device), gained.to(into))

            self.call(theta, pull)

    def _objective(self, model: nn.Module, step: int, slots: Tensor, weights: Tensor) -> Tensor:
        rng = _rng(self.seed, _STEP, step)
        devices = [] if self.device.type == "cpu" else [self.device]
        with torch.random.fork_rng(devices):
            seed = int(rng.integers(2**63))
            (torch.cuda.manual_seed if devices else torch.default_generator.manual_seed)(seed)
            losses = self.loss(model, take(self.train, slots, self.device), rng)
        if losses.shape != weights.shape:
            raise ValueError(
                f"MAGIC: loss must give one number for each of {len(weights)} items, got shape {list(losses.shape)}"
            )
        return (weights * losses).sum() / self.batch_size

    def _update(self, state: State, gradient: Tensor, step: int) -> State:
        rate = self.optimiser.rate(step, self.steps)
        with torch.no_grad():
            m, v, mhat, root = _moments(self.optimiser, state, gradient, step)
            change = mhat / (root + self.optimiser.eps)
            if self.optimiser.weight_decay:
                change += self.optimiser.weight_decay * state.theta
            return State(state.theta - rate * change, m, v)

    def _permutation(self, epoch: int) -> Tensor:
        if self._order[0] != epoch:
            order = _rng(self.seed, _ORDER, epoch).permutation(len(self.train))
            self._order = epoch, torch.from_numpy(order)
        return self._order[1]


class _Bound(nn.Module):
    """Lets functional_call put parameters into a model for the time of any function of it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable, *args):
        return function(self.model, *args)


class _Through:
    """The transpose of Adam's derivative at a step.

    With ``u = mhat / d``, ``d = sqrt(vhat + eps_root) + eps``, and the corrections ``mhat = m' / c1``, ``vhat = v' / c2``:
    ``du/dm' = 1 / (c1 d)`` and ``du/dv' = -mhat / (2 c2 d^2 sqrt(vhat + eps_root))``.
    """

    def __init__(self, optimiser: Adam, state: State, gradient: Tensor, step: int, steps: int):
        self.betas = optimiser.betas
        rate = optimiser.rate(step, steps)
        with torch.no_grad():
            _, _, mhat, root = _moments(optimiser, state, gradient, step)
            below = root + optimiser.eps
            first, second = (1 - beta ** (step + 1) for beta in self.betas)
            self.by_m = -rate / (first * below)  # d theta' / d m', [P]
            self.by_v = rate * mhat / (2 * second * below.square() * root)
            self.of_square = 2 * (1 - self.betas[1]) * gradient  # d v' / d g
        self.kept = 1 - rate * optimiser.weight_decay

    def pull(self, row: State) -> Tensor:
        """Derivatives in (theta', m', v') become, in place, those in (theta, m, v) with g held fixed; returns those in g."""
        with torch.no_grad():
            row.m.addcmul_(self.by_m, row.theta)
            row.v.addcmul_(self.by_v, row.theta)
            towards = torch.addcmul((1 - self.betas[0]) * row.m, self.of_square, row.v)
            row.theta.mul_(self.kept)
            row.m.mul_(self.betas[0])
            row.v.mul_(self.betas[1])
        return towards


def _moments(optimiser: Adam, state: State, gradient: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """m', v', mhat and sqrt(vhat + eps_root)."""
    first, second = optimiser.betas
    m = first * state.m + (1 - first) * gradient
    v = second * state.v + (1 - second) * gradient.square()
    root = (v / (1 - second ** (step + 1)) + optimiser.eps_root).sqrt()
    return m, v, m / (1 - first ** (step + 1)), root


def _rng(seed: int, purpose: int, number: int) -> np.random.Generator:
    """Random numbers of one epoch or step, independent of all others."""
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, 0, number]))


def check_numbers(op: str, **numbers) -> None:
    """Refuse what is not an integer of at least 1.

    Raises:
        TypeError, ValueError: the message names it.
    """
    for name, value in numbers.items():
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{op}: {name} must be at least 1, got {value}")


def check_parameters(trained: dict[str, Tensor]) -> None:
    """Refuse parameters that cannot be one vector."""
    if not trained:
        raise ValueError("MAGIC: model must have parameters that require a gradient, got none")
    kinds = sorted({f"{p.dtype} on {p.device}" for p in trained.values()})
    if len(kinds) > 1 or not next(iter(trained.values())).is_floating_point():
        raise ValueError(
            f"MAGIC: model must have trained parameters of one floating-point dtype on one device, got {', '.join(kinds)}"
        )


def check_weights(weights, count: int, like: Tensor) -> Tensor:
    """Weights of items as the training takes them: 1 where None is given.

    Returns:
        [N] in the dtype and on the device of ``like``.

    Raises:
        ValueError: they are not N finite numbers.
    """
    if weights is None:
        return torch.ones(count, dtype=like.dtype, device=like.device)
    weights = torch.as_tensor(weights).to(like)
    if weights.shape != (count,) or not bool(weights.isfinite().all()):
        raise ValueError(
            f"MAGIC: weights must be {count} finite numbers, one for each item, got shape {list(weights.shape)}"
        )
    return weights
