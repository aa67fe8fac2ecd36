"""Per-sample scalars of a noise prediction: the functions whose gradients attribute.

With eps the true and e the predicted noise of one sample at one timestep, D numbers each:

==============  ==================================================  =====================================
name            value                                               source
==============  ==================================================  =====================================
``simple``      mean (e - eps)^2                                    the training loss; TRAK
``elbo``        w_t mean (e - eps)^2                                Ho et al. 2020, equation 12
``square``      mean e^2                                            D-TRAK
``avg``         mean e                                              D-TRAK, table 1
``l1``          sum abs e                                           D-TRAK, table 1
``l2``          sqrt(sum e^2)                                       D-TRAK, table 1
``linf``        max abs e                                           D-TRAK, table 1
``interpolate`` eta square + (1 - eta) (simple - square)            D-TRAK, figure 1
==============  ==================================================  =====================================

Means run over the D numbers, so a constant like D changes only the units of lambda. ``interpolate`` has gradient
2 mean (eta e - (1 - eta) eps) de: eta = 1/2 is half of ``simple`` and eta = 1 is ``square``.

Source: Zheng, Pang, Du, Jiang, Lin, "Intriguing Properties of Data Attribution on Diffusion Models" (D-TRAK), ICLR 2024.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .schedule import Schedule


def simple(prediction, noise, weights):
    return (prediction - noise).square().mean(1)


def elbo(prediction, noise, weights):
    return weights * simple(prediction, noise, weights)


def square(prediction, noise, weights):
    return prediction.square().mean(1)


def avg(prediction, noise, weights):
    return prediction.mean(1)


def l1(prediction, noise, weights):
    return prediction.abs().sum(1)


def l2(prediction, noise, weights):
    return torch.linalg.vector_norm(prediction, dim=1)


def linf(prediction, noise, weights):
    return torch.linalg.vector_norm(prediction, torch.inf, dim=1)


# (prediction [B, D], noise [B, D], weights [B]) -> [B]
_FUNCTIONS = {f.__name__: f for f in (simple, elbo, square, avg, l1, l2, linf)}
NAMES = (*_FUNCTIONS, "interpolate")


@dataclass(frozen=True)
class Loss:
    """One of the functions above.

    Args:
        name: one of :data:`NAMES`.
        eta: in [0, 1], for ``interpolate`` and only for it.

    Raises:
        ValueError: an argument is not as above.
    """

    name: str
    eta: float | None = None

    def __post_init__(self):
        if self.name not in NAMES:
            raise ValueError(f"Loss: name must be one of {', '.join(NAMES)}, got {self.name!r}")
        if (self.name == "interpolate") != (self.eta is not None):
            raise ValueError(
                f"Loss: eta goes with interpolate and with nothing else, got {self.name!r}, eta={self.eta}"
            )
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise ValueError(f"Loss: eta must lie in [0, 1], got {self.eta}")

    def __call__(self, prediction: Tensor, noise: Tensor, timesteps: Tensor, schedule: Schedule) -> Tensor:
        """The function's value for each sample.

        Args:
            prediction, noise: [B, C, H, W] floating point.
            timesteps: [B] int64.
            schedule: gives ``elbo`` its weights w_t.

        Returns:
            [B], in the dtype of ``prediction``.

        Extra memory: a few tensors of the size of ``prediction``.
        """
        prediction, noise = prediction.flatten(1), noise.flatten(1)  # [B, D]
        weights = schedule.elbo_weights(timesteps).to(prediction) if self.name == "elbo" else None  # [B]
        if self.name == "interpolate":
            squared = square(prediction, noise, weights)
            return self.eta * squared + (1 - self.eta) * (simple(prediction, noise, weights) - squared)
        return _FUNCTIONS[self.name](prediction, noise, weights)


def as_loss(loss: "Loss | str") -> Loss:
    """A :class:`Loss` from itself or from its name."""
    return loss if isinstance(loss, Loss) else Loss(loss)
