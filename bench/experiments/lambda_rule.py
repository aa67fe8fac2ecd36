"""How much linear datamodeling score does the automatic lambda of TRAK and D-TRAK give away?

Diffusion models of the 8 x 8 digits of scikit-learn, small enough to train dozens at once: three linear layers, 300 training
images. A score's quality is the rank correlation, over random halves of the training images, between what it predicts for
each half and the loss of models trained on that half (Park et al. 2023, section 2). For each method, number of timesteps and
projection, the best lambda of a fine grid is compared with rules that know only the eigenvalues of the Gram matrix.

    python -m bench.experiments.lambda_rule OUT.json

Five minutes on one core; needs scikit-learn.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn

from pyattr.attribution import QUERY_IDS
from pyattr.attribution.kernel import DampedKernel, effective_dimension
from pyattr.diffusion import Schedule, features, noise
from pyattr.diffusion.features import FeatureMap
from pyattr.files import whole_file

SCHEDULE = Schedule()
WIDTH, TIME = 128, 32
SHAPES = [(WIDTH, 64 + TIME), (WIDTH,), (WIDTH, WIDTH), (WIDTH,), (64, WIDTH), (64,)]
FRACTIONS = (0.5, 0.35, 0.25, 0.15, 0.1, 0.05)


def embed(timesteps: Tensor) -> Tensor:  # [...] -> [..., TIME]
    angles = timesteps.float()[..., None] * torch.exp(-math.log(1000) * torch.arange(TIME // 2) / (TIME // 2))
    return torch.cat([angles.sin(), angles.cos()], -1)


def forward(weights: list[Tensor], x: Tensor, timesteps: Tensor) -> Tensor:  # [E, B, 64], [E, B] -> [E, B, 64]
    """E models side by side."""
    for layer in range(3):
        x = torch.cat([x, embed(timesteps)], -1) if layer == 0 else nn.functional.silu(x)
        x = torch.baddbmm(weights[2 * layer + 1][:, None], x, weights[2 * layer].transpose(1, 2))
    return x


class Model(nn.Module):
    """One of the models, as the library expects it."""

    def __init__(self, weights: list[Tensor]):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(w.shape[1], w.shape[0]) for w in weights[::2])
        for layer, weight, bias in zip(self.layers, weights[::2], weights[1::2], strict=True):
            layer.weight.data, layer.bias.data = weight.clone(), bias.clone()

    def forward(self, images, timesteps):
        x = torch.cat([images.flatten(1), embed(timesteps)], -1)
        x = self.layers[2](nn.functional.silu(self.layers[1](nn.functional.silu(self.layers[0](x)))))
        return x.view_as(images)


def train(images: Tensor, pools: list[Tensor], seeds: list[int], steps: int) -> list[Tensor]:
    """One model for each pool of images, all at once; the weights, stacked."""
    starts = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        bounds = [1 / math.sqrt(SHAPES[i // 2 * 2][1]) for i in range(6)]
        starts.append([b * (2 * torch.rand(s, generator=generator) - 1) for s, b in zip(SHAPES, bounds, strict=True)])
    weights = [torch.stack(parts).requires_grad_() for parts in zip(*starts, strict=True)]
    optimizer = torch.optim.AdamW(weights, lr=3e-3, betas=(0.95, 0.999), weight_decay=1e-6)
    generator, warmup = torch.Generator().manual_seed(1), steps // 10
    for step in range(steps):
        rate = (step + 1) / warmup
        if step >= warmup:
            rate = (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        optimizer.param_groups[0]["lr"] = 3e-3 * rate
        which = torch.stack([pool[torch.randint(len(pool), (32,), generator=generator)] for pool in pools])
        x, t = images.flatten(1)[which], torch.randint(1000, which.shape, generator=generator)  # [E, B, 64], [E, B]
        eps = torch.randn(x.shape, generator=generator)
        abar = SCHEDULE.alphas_cumprod[t].float()[..., None]
        loss = (forward(weights, abar.sqrt() * x + (1 - abar).sqrt() * eps, t) - eps).square().mean((1, 2)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [w.detach() for w in weights]


@torch.no_grad()
def query_losses(weights: list[Tensor], queries: Tensor) -> Tensor:  # -> [E, Q]
    t = torch.arange(10, 1000, 20)
    eps = noise((64,), seed=99, ids=torch.arange(len(queries))[:, None], timesteps=t)  # [Q, T, 64]
    abar = SCHEDULE.alphas_cumprod[t].float()[:, None]
    noisy = (abar.sqrt() * queries.flatten(1)[:, None] + (1 - abar).sqrt() * eps).flatten(0, 1)
    rows = []
    for model in zip(*weights, strict=True):
        out = forward([w[None] for w in model], noisy[None], t.repeat(len(queries))[None])[0]
        rows.append((out.view_as(eps) - eps).square().mean((1, 2)))
    return torch.stack(rows)


def lambda_of_fraction(eigenvalues: Tensor, fraction: float) -> float:
    low, high = math.log(float(eigenvalues.min())) - 30, math.log(float(eigenvalues.max())) + 30
    for _ in range(200):
        middle = (low + high) / 2
        if effective_dimension(eigenvalues, math.exp(middle)) > fraction * len(eigenvalues):
            low = middle
        else:
            high = middle
    return math.exp(low)


def run(count: int, steps: int, subsets: int = 32, seeds: int = 2, num_queries: int = 40) -> dict:
    data = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(data)))
    images, queries = data[order[:count]], data[order[count : count + num_queries]]
    masks = torch.zeros(subsets, count)
    for k in range(subsets):
        masks[k, torch.from_numpy(np.random.RandomState(100 + k).permutation(count)[: count // 2])] = 1
    halves = [mask.nonzero()[:, 0] for mask in masks for _ in range(seeds)]
    weights = train(images, [torch.arange(count), *halves], [42, *(list(range(seeds)) * subsets)], steps)
    losses = query_losses(weights, queries)[1:].view(subsets, seeds, -1).mean(1)  # [M, Q]
    model = Model([w[0] for w in weights]).eval()

    def lds(scores: Tensor) -> float:  # [Q, N], in percent
        predicted = -masks @ scores.T.to(masks)  # a proponent's presence lowers the loss
        return 100 * float(np.mean([spearmanr(p, q).statistic for p, q in zip(predicted.T, losses.T, strict=True)]))

    found = {}
    for num_timesteps in (10, 50):
        for loss in ("simple", "square"):
            for proj_dim in (count // 4, 4096):
                which = FeatureMap(SCHEDULE, loss=loss, num_timesteps=num_timesteps, proj_dim=proj_dim)
                ids = QUERY_IDS + torch.arange(num_queries)
                phi = features.compute(model, images, which, batch_size=64, timesteps_per_pass=50)
                phi_q = features.compute(model, queries, which, ids=ids, batch_size=64, timesteps_per_pass=50).tensor()
                kernel = DampedKernel(phi)
                values = kernel.eigenvalues[kernel.eigenvalues > 1e-12 * kernel.eigenvalues[0]]
                grid = float(values[0]) * 10.0 ** np.arange(-6, 1.1, 0.25)
                rules = {f"fraction {f}": lambda_of_fraction(values, f) for f in FRACTIONS}
                rules |= {"mean": float(values.mean()), "mean / 10": float(values.mean()) / 10}
                scores = {name: lds(kernel.scores(phi_q, lambda_)) for name, lambda_ in rules.items()}
                scores["inner product"] = lds(phi_q @ phi.tensor().T)
                scores["best"] = max(lds(kernel.scores(phi_q, float(lambda_))) for lambda_ in grid)
                found[f"{loss} K={num_timesteps} D={proj_dim}"] = {name: round(s, 1) for name, s in scores.items()}
    return found


def shortfalls(found: dict) -> dict:
    """For each rule, by how much it misses the best lambda: the mean and the largest over all cases."""
    rules = [rule for rule in next(iter(found.values())) if rule != "best"]
    gaps = {rule: [case["best"] - case[rule] for case in found.values()] for rule in rules}
    return {rule: {"mean": round(float(np.mean(g)), 2), "largest": round(max(g), 2)} for rule, g in gaps.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    found = run(count=300, steps=1500)
    with whole_file(out) as stream:
        stream.write(json.dumps({"shortfall": shortfalls(found), "cases": found}, indent=1).encode())


if __name__ == "__main__":
    main()
