"""The probability-flow ODE and its solvers: an image, and the integral of the divergence, from data to noise."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.integrate
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .divergence import Directions, divergence_with_graph, value_and_divergence
from .sde import SDE

Score = Callable[[Tensor, Tensor], Tensor]  # ([B, *shape], [B]) -> [B, *shape]

# Explicit Runge-Kutta methods: the times of the stages in a step, what each adds of the earlier ones, and the final weights.
STEPS = {
    "euler": ((0.0,), ((),), (1.0,)),
    "heun": ((0.0, 1.0), ((), (1.0,)), (0.5, 0.5)),
    "rk4": ((0.0, 0.5, 0.5, 1.0), ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}
SOLVERS = (*STEPS, "rk45")
SPACINGS = ("noise", "time")


@dataclass(frozen=True)
class Solver:
    """How the equation is solved; see :func:`pyattr.diffusion.log_likelihood`."""

    name: str
    steps: int
    rtol: float
    atol: float
    interval: tuple[float, float]  # in the flow's variable


class Flow:
    """``dx/dt = f(t) x - g(t)^2 s(x, t) / 2``, and the divergence of its right side.

    The variable u that it is solved in is t itself, or the noise level l = log(std / scale), for which
    ``dl/dt = g^2 / (2 std^2)``, so that ``dx/dl = 2 std^2 f x / g^2 - std^2 s``.

    Args:
        score: s.
        sde: f and g.
        directions: of the divergence.
        spacing: "time" or "noise": what u is.

    Attributes:
        evaluations: how often the right side was computed.
    """

    def __init__(self, score: Score, sde: SDE, directions: Directions, spacing: str = "time"):
        self.score, self.sde, self.directions, self.spacing = score, sde, directions, spacing
        self.evaluations = 0

    def interval(self, start: float) -> tuple[float, float]:
        """u at t = start and at t = 1."""
        if self.spacing == "time":
            return start, 1.0
        return tuple(self.sde.noise_level(torch.tensor([start, 1.0], dtype=torch.float64)).tolist())

    def velocity(self, x: Tensor, u: float) -> Tensor:  # [B, *shape] -> [B, *shape]
        """The right side."""
        time = torch.tensor(u, dtype=torch.float64)
        if self.spacing == "noise":
            time = self.sde.time_at(time)
        drift, half = float(self.sde.drift(time)), float(self.sde.diffusion(time)) ** 2 / 2
        if self.spacing == "noise":
            variance = float(self.sde.std(time)) ** 2
            drift, half = drift * variance / half, variance
        return drift * x - half * self.score(x, torch.full((len(x),), float(time), dtype=x.dtype, device=x.device))

    def rates(self, x: Tensor, u: float) -> tuple[Tensor, Tensor]:
        """The velocity, and its divergence [B] float64, without a graph."""
        self.evaluations += 1
        return value_and_divergence(functools.partial(self.velocity, u=u), x, self.directions)

    def rates_with_graph(self, x: Tensor, u: float) -> tuple[Tensor, Tensor]:
        """The same, differentiable."""
        self.evaluations += 1
        field = functools.partial(self.velocity, u=u)
        return field(x), divergence_with_graph(field, x, self.directions)

    def forward(self, x: Tensor, solver: Solver) -> tuple[Tensor, Tensor]:
        """Along the solver's interval: the noise that x becomes, and the integral of the divergence, [B] float64."""
        if solver.name == "rk45":
            return self._adaptive(x, solver)
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for t, h in step_times(solver):
            x, gain = runge_kutta(self.rates, solver.name, x, t, h)
            total = total + gain
        return x, total

    def forward_with_graph(self, x: Tensor, solver: Solver) -> tuple[Tensor, Tensor]:
        """The same, differentiable through the steps of the solver; each step is made again on the way back."""
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for t, h in step_times(solver):
            x, gain = checkpoint(
                runge_kutta,
                self.rates_with_graph,
                solver.name,
                x,
                t,
                h,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            total = total + gain
        return x, total

    def _adaptive(self, x: Tensor, solver: Solver) -> tuple[Tensor, Tensor]:
        """Each image by itself, so that its steps do not depend on the others."""
        ends, totals = torch.empty_like(x), torch.empty(len(x), dtype=torch.float64, device=x.device)
        everything = self.directions
        for number in range(len(x)):
            one = x[number : number + 1]
            probes = None if everything.probes is None else everything.probes[:, number : number + 1]
            self.directions = Directions(everything.shape, probes, everything.at_a_time)

            def right_side(t: float, state: np.ndarray, one=one) -> np.ndarray:
                image = torch.from_numpy(state[:-1]).to(one).view_as(one)
                rate, gain = self.rates(image, float(t))
                return np.append(rate.double().cpu().numpy().ravel(), gain.item())

            found = scipy.integrate.solve_ivp(
                right_side,
                solver.interval,
                np.append(one.double().cpu().numpy().ravel(), 0.0),
                method="RK45",
                rtol=solver.rtol,
                atol=solver.atol,
            )
            if not found.success:
                raise RuntimeError(f"log_likelihood: the solver gave up on image {number}: {found.message}")
            ends[number] = torch.from_numpy(found.y[:-1, -1]).to(one).view_as(one[0])
            totals[number] = found.y[-1, -1]
        self.directions = everything
        return ends, totals


def step_times(solver: Solver) -> list[tuple[float, float]]:
    """Start and length of the equal steps of its interval."""
    first, last = solver.interval
    length = (last - first) / solver.steps
    return [(first + number * length, length) for number in range(solver.steps)]


def runge_kutta(rates, method: str, x: Tensor, t: float, h: float) -> tuple[Tensor, Tensor]:
    """One step: the state after it, and by how much the integral grows, [B] float64.

    Args:
        rates: (x, t) -> velocity and what is integrated.
    """
    times, coefficients, weights = STEPS[method]
    found: list[tuple[Tensor, Tensor]] = []
    for time, row in zip(times, coefficients, strict=True):
        inner = x
        for coefficient, (velocity, _) in zip(row, found, strict=True):
            if coefficient:
                inner = inner + h * coefficient * velocity
        found.append(rates(inner, t + h * time))
    gain = sum(h * weight * rate for weight, (_, rate) in zip(weights, found, strict=True))
    for weight, (velocity, _) in zip(weights, found, strict=True):
        x = x + h * weight * velocity
    return x, gain
