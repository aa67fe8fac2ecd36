"""The exact likelihood of images under a score-based model, by the probability-flow ODE."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adjoint import integral_by_adjoint
from .divergence import Directions, random_directions
from .flow import SOLVERS, SPACINGS, STEPS, Flow, Score, Solver
from .noise import MAX_DRAWS, uniform
from .sde import SDE

GRADIENTS = ("backprop", "adjoint")
PROBES = ("rademacher", "gaussian")
_OP = "log_likelihood"


@dataclass(frozen=True, eq=False)
class Likelihood:
    """The outcome of :func:`log_likelihood`.

    Attributes:
        log_prob: [B] float64, natural logarithms of densities.
        prior: [B] float64, the part of the noise that the image becomes.
        integral: [B] float64, that of the divergence; log_prob is the sum of the two.
        noise: [B, *shape], what the image becomes at t = 1.
        evaluations: how often velocity and divergence were computed.
    """

    log_prob: Tensor
    prior: Tensor
    integral: Tensor
    noise: Tensor
    evaluations: int


def log_likelihood(
    score: Score,
    images: Tensor,
    sde: SDE,
    *,
    divergence: str = "exact",
    probes: int = 1,
    probe: str = "rademacher",
    seed: int = 0,
    ids=None,
    solver: str = "rk4",
    steps: int = 50,
    spacing: str = "noise",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    start: float = 1e-5,
    at_a_time: int = 32,
    gradient: str | None = None,
    parameters: Iterable[Tensor] | None = None,
) -> Likelihood:
    """The log-density that a score-based model gives to images.

    With the probability-flow ODE ``dx/dt = v(x, t) = f(t) x - g(t)^2 s(x, t) / 2`` from x(start) = the image,

        log p(x) = log N(x(1); 0, std^2 I) + integral from start to 1 of div v(x(t), t) dt.

    Args:
        score: s, ``score(x [B, *shape], t [B]) -> [B, *shape]``, t in [start, 1] in the dtype of x: a network or any other
            callable of torch operations that treats images one by one. A network is evaluated in the mode that it is in.
        images: [B, *shape] float32 or float64, in the range of the training images.
        sde: the forward process; gives f, g and the prior's std.
        divergence: "exact": the D products of the Jacobian with the axes. "hutchinson": the mean of v . J v over ``probes``
            random directions, an unbiased estimate of the integral; the same directions all the way.
        probes, probe: how many, and their distribution, "rademacher" or "gaussian".
        seed, ids: what the directions of an image are a function of; seed in [0, 2^32), ids [B] integers in [0, 2^63), 0..B-1
            if None.
        solver: "euler", "heun" or "rk4", in ``steps`` steps; or "rk45", Dormand and Prince's adaptive pair as scipy has it,
            for each image by itself.
        spacing: what the steps are equal in, and the variable of the equation: "noise", log(std / scale) of the noise,
            or "time". In time the velocity of a score that sees the noise in an image goes like 1 / sqrt(t) near 0 and its
            divergence like 1 / t, which hundreds of equal steps do not resolve; along the noise both are bounded.
        rtol, atol: of "rk45".
        start: where the image stands in time, in (0, 1): at 0 itself some scores are infinite.
        at_a_time: directions that go through the score together.
        gradient: "backprop": the outcome is differentiable in the images and in whatever the score computes with, through
            the steps of the solver, each made again on the way back. "adjoint": in the images and ``parameters``, by solving
            the adjoint equation backwards with the same solver: exact in the limit of small steps. None: not differentiable.
        parameters: that "adjoint" takes derivatives in; those of the score if it is a module and None is given.

    Returns:
        :class:`Likelihood`. Sums are float64. The error is that of the solver: with "rk4" it falls with the fourth power
        of the step.

    Raises:
        TypeError, ValueError: an argument is not as above.
        RuntimeError: "rk45" gave up.

    Extra memory: forward passes with (at_a_time + 1) B images; with "backprop" what a backward pass needs of one stage
        with ``at_a_time`` tangents, and one image for each step; with "adjoint" a copy of the parameters and the same stage.

    Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021, section 4.3
    and appendix D; Grathwohl et al., "FFJORD", ICLR 2019, for the estimate; Chen et al., "Neural Ordinary Differential
    Equations", NeurIPS 2018, for the adjoint.
    """
    _check(images, divergence, probes, probe, seed, solver, steps, spacing, rtol, atol, start, at_a_time, gradient)
    if gradient != "adjoint" and parameters is not None:
        raise ValueError(f"{_OP}: parameters goes with gradient='adjoint' and with nothing else, got {gradient!r}")
    random = None
    if divergence == "hutchinson":
        ids = torch.arange(len(images)) if ids is None else torch.as_tensor(ids, dtype=torch.int64)
        if ids.shape != images.shape[:1]:
            raise ValueError(f"{_OP}: ids must be {len(images)} integers, got shape {list(ids.shape)}")
        random = random_directions(probe, probes, images.shape[1:], seed, ids)
    flow = Flow(score, sde, Directions(images.shape[1:], random, at_a_time), spacing)
    how = Solver(solver, steps, rtol, atol, flow.interval(start))
    if gradient is None:
        with torch.no_grad():
            end, integral = flow.forward(images.detach(), how)
    elif gradient == "backprop":
        end, integral = flow.forward_with_graph(images, how)
    else:
        if parameters is None:
            if not isinstance(score, nn.Module):
                raise TypeError(f"{_OP}: parameters must be given where score is no module, got {type(score).__name__}")
            parameters = [parameter for parameter in score.parameters() if parameter.requires_grad]
        end, integral = integral_by_adjoint(flow, how, images, list(parameters))
    prior = gaussian_log_prob(end, sde.prior_std)
    return Likelihood(prior + integral, prior, integral, end, flow.evaluations)


def gaussian_log_prob(x: Tensor, std: float) -> Tensor:
    """``log N(x; 0, std^2 I)`` of each image, [B, *shape] -> [B] float64."""
    squares = x.double().flatten(1).square().sum(1)
    return -squares / (2 * std**2) - x[0].numel() * (math.log(std) + math.log(2 * math.pi) / 2)


def dequantise(images: Tensor, *, seed: int = 0, ids=None, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Spread each of the 256 levels of a pixel evenly over its share of a range: ``low + (high - low) (k + u) / 256``.

    Args:
        images: k, [B, *shape] uint8.
        seed: in [0, 2^32).
        ids: [B] integers in [0, 2^63); u in (0, 1) is a function of (seed, id), so that an image's density does not change
            between calls. 0..B-1 if None.
        low, high: the range that the model's images have.

    Returns:
        [B, *shape] float32.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: Uria, Murray, Larochelle, "RNADE", NeurIPS 2013, section 5.1, for the noise.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"dequantise: images must be uint8, got {images.dtype}")
    if not low < high:
        raise ValueError(f"dequantise: low must be below high, got {low} and {high}")
    ids = torch.arange(len(images)) if ids is None else torch.as_tensor(ids, dtype=torch.int64)
    if ids.shape != images.shape[:1]:
        raise ValueError(f"dequantise: ids must be {len(images)} integers, got shape {list(ids.shape)}")
    spread = uniform(images.shape[1:], seed=seed, ids=ids).to(images.device)
    return low + (high - low) * (images.float() + spread) / 256


def bits_per_dimension(log_prob: Tensor, dimensions: int, *, low: float = 0.0, high: float = 1.0) -> Tensor:
    """``-log2 P / D`` with P the mass of a pixel level's share of the range, from the density within.

    ``-log_prob / (D ln 2) - log2((high - low) / 256)``: of a model that gives all 256 levels the same mass it is 8.

    Args:
        log_prob: natural logarithms of densities of images in [low, high], any shape.
        dimensions: D, numbers in an image.
        low, high: as in :func:`dequantise`.

    Source: Theis, van den Oord, Bethge, "A note on the evaluation of generative models", ICLR 2016, section 3.1.
    """
    if dimensions < 1 or not low < high:
        raise ValueError(
            f"bits_per_dimension: dimensions must be at least 1 and low below high, got {dimensions}, {low}, {high}"
        )
    return -log_prob / (dimensions * math.log(2)) - math.log2((high - low) / 256)


def _check(
    images, divergence, probes, probe, seed, solver, steps, spacing, rtol, atol, start, at_a_time, gradient
) -> None:
    if not isinstance(images, Tensor) or images.dtype not in (torch.float32, torch.float64):
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"{_OP}: images must be a float32 or float64 tensor, got {got}")
    if images.dim() < 2 or images.numel() == 0:
        raise ValueError(f"{_OP}: images must have shape [B, *shape] and hold something, got {list(images.shape)}")
    for name, value, options in (
        ("divergence", divergence, ("exact", "hutchinson")),
        ("probe", probe, PROBES),
        ("solver", solver, SOLVERS),
        ("spacing", spacing, SPACINGS),
        ("gradient", gradient, (None, *GRADIENTS)),
    ):
        if value not in options:
            raise ValueError(f"{_OP}: {name} must be one of {', '.join(map(str, options))}, got {value!r}")
    if not 0 < start < 1:
        raise ValueError(f"{_OP}: start must lie in (0, 1), got {start}")
    for name, value, high in (("probes", probes, MAX_DRAWS), ("steps", steps, 2**31), ("at_a_time", at_a_time, 2**31)):
        if not 1 <= value <= high:
            raise ValueError(f"{_OP}: {name} must lie in [1, {high}], got {value}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"{_OP}: seed must lie in [0, {2**32 - 1}], got {seed}")
    if not rtol > 0 or not atol > 0:
        raise ValueError(f"{_OP}: rtol and atol must be positive, got {rtol} and {atol}")
    if gradient == "backprop" and solver not in STEPS:
        raise ValueError(f"{_OP}: gradient='backprop' needs a solver of fixed steps, got {solver!r}")
