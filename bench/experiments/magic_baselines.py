"""TRAK and D-TRAK for a network that predicts scores in continuous time, against the phi that MAGIC is asked about."""

import numpy as np
import torch
from torch import Tensor, nn

from pyattr.attribution.kernel import DampedKernel
from pyattr.diffusion.features import Features
from pyattr.diffusion.sde import SDE
from pyattr.gradients import project_gradients
from pyattr.ops import rademacher_project

METHODS = ("trak", "d-trak")
PROJ_DIM, DRAWS, BATCH = 2048, 10, 50
FRACTIONS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # lambda, of the largest eigenvalue


def baseline_scores(
    model: nn.Module, sde: SDE, loss, phi, train: Tensor, queries: Tensor, *, seed: int, progress
) -> dict[str, Tensor]:
    """Scores [Q, N] by "METHOD FRACTION", positive = proponent.

    TRAK: ``g_q^T (Phi^T Phi + lambda I)^{-1} phi_n`` with phi_n the gradient of the training loss and g_q that of minus phi.
    D-TRAK: the same with the gradients of the mean of (std s)^2 on either side, since it knows no other function of the query.
    """
    times = torch.from_numpy(loss.start + (1 - loss.start) * (np.arange(DRAWS) + 0.5) / DRAWS).float()
    ours = torch.stack([_slope(model, phi, queries[q : q + 1]) for q in range(len(queries))])  # [Q, P]
    found = {}
    for method in METHODS:
        square = method == "d-trak"
        rows = _features(model, sde, loss, train, times, square, seed, 0, progress)
        kernel = DampedKernel(Features.from_tensor(rows, torch.arange(len(rows))))
        if square:
            asked = _features(model, sde, loss, queries, times, square, seed, 1, progress)
        else:
            asked = rademacher_project(-ours, PROJ_DIM, seed=seed)
        lambdas = [fraction * float(kernel.eigenvalues[0]) for fraction in FRACTIONS]
        for fraction, table in zip(FRACTIONS, kernel.grid(asked, lambdas), strict=True):
            found[f"{method} {fraction:g}"] = table
    return found


def _slope(model: nn.Module, phi, query: Tensor) -> Tensor:
    """d phi / d theta, [P], in the order of the projections."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(phi(model, query).sum(), parameters)])


def _features(model, sde, loss, images, times, square, seed, stream, progress) -> Tensor:  # -> [N, D]
    """Projected gradients, averaged over the times, the noise of an image being a function of its number."""

    def per_image(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:  # -> [B, T]
        t = times.repeat(len(batch["x"]))
        scale, std = (part[:, None, None, None] for part in (sde.scale(t), sde.std(t)))
        eps = batch["eps"].flatten(0, 1)
        x = scale * batch["x"].repeat_interleave(len(times), 0) + std * eps
        predicted = -std * module(x, t)
        errors = predicted if square else predicted - eps
        return errors.square().flatten(1).mean(1).unflatten(0, (-1, len(times)))

    parts, total = [], len(images)
    for first in range(0, total, BATCH):
        chunk = images[first : first + BATCH]
        draws = [
            np.random.Generator(np.random.Philox(key=[seed, 0x62617365], counter=[0, 0, stream, number]))
            for number in range(first, first + len(chunk))
        ]
        shape = (len(times), *chunk.shape[1:])
        eps = torch.from_numpy(np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in draws]))
        x = loss.low + chunk.float() * ((loss.high - loss.low) / 255)
        parts.append(project_gradients(model, per_image, {"x": x, "eps": eps}, PROJ_DIM, seed=seed))
        progress(first + len(chunk), total, "query features" if stream else "features")
    return torch.cat(parts)
