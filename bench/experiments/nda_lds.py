"""How well do NDA's scores predict retrained models, as it comes and tuned?

The small problem of :mod:`bench.experiments.lambda_rule`: diffusion models of 300 of the 8 x 8 digits of scikit-learn, 32
random halves of them, two models on each. NDA is tuned on 40 queries and judged on 40 others, beside the cosine between pixels
and TRAK and D-TRAK on the model of all images, with the automatic lambda and with one tuned on the same queries. The networks
see the whole image at once, so that this is no problem made for a method of patches.

    python -m bench.experiments.nda_lds OUT.json

Five minutes on one core; needs scikit-learn.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor

from pyattr.attribution import DTRAK, NDA, TRAK
from pyattr.files import whole_file

from .lambda_rule import SCHEDULE, Model, query_losses, train

IMAGES, QUERIES, SUBSETS, SEEDS, STEPS = 300, 40, 32, 2, 1500
CHOICES = {
    "timesteps": range(100, 1000, 100),
    "patch_sizes": (1, 3, 5, 7, 15),
    "coarse_patch_sizes": (2, 4, 6, 8, 16),
    "ks": (1, 10, 1000),
}


def lds(scores: Tensor, masks: np.ndarray, losses: np.ndarray) -> dict[str, float]:
    """Mean over queries of the rank correlation with the losses, and its standard error, in percent."""
    predicted = -masks @ scores.double().numpy().T  # [M, Q]: a proponent's presence lowers the loss
    each = [spearmanr(p, q).statistic for p, q in zip(predicted.T, losses.T, strict=True)]
    return {"lds": round(100 * np.mean(each), 1), "error": round(100 * np.std(each) / len(each) ** 0.5, 1)}


def pixel_cosine(queries: Tensor, images: Tensor) -> Tensor:
    """[Q, N], after the mean image is taken off."""
    ours, theirs = ((x - images.mean(0)).flatten(1) for x in (queries, images))
    return torch.nn.functional.cosine_similarity(ours[:, None], theirs[None], dim=2)


def run() -> dict:
    """Train, attribute, compare."""
    data = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(data)))
    images, valid, test = data[order].split([IMAGES, QUERIES, QUERIES, len(data) - IMAGES - 2 * QUERIES])[:3]
    masks = np.zeros((SUBSETS, IMAGES))
    for k in range(SUBSETS):
        masks[k, np.random.RandomState(100 + k).permutation(IMAGES)[: IMAGES // 2]] = 1
    halves = [torch.from_numpy(mask).nonzero()[:, 0] for mask in masks for _ in range(SEEDS)]
    weights = train(images, [torch.arange(IMAGES), *halves], [42, *(list(range(SEEDS)) * SUBSETS)], STEPS)
    losses = query_losses(weights, torch.cat([valid, test]))[1:].view(SUBSETS, SEEDS, -1).mean(1).numpy()
    for_tuning, for_test = losses[:, :QUERIES], losses[:, QUERIES:]
    model = Model([w[0] for w in weights]).eval()

    found = {"pixel cosine": lds(pixel_cosine(test, images), masks, for_test)}
    for kind in (TRAK, DTRAK):
        method = kind(model, SCHEDULE, num_timesteps=50, timesteps_per_pass=50, batch_size=64).fit(images)
        found[kind.__name__] = lds(method.scores(test), masks, for_test)
        grid = float(method.eigenvalues[0]) * 10.0 ** np.arange(-6, 1.1, 0.25)
        best = max(grid, key=lambda value: lds(method.scores(valid, lambda_=value), masks, for_tuning)["lds"])
        found[f"{kind.__name__}, tuned"] = lds(method.scores(test, lambda_=best), masks, for_test)
    method = NDA(SCHEDULE).fit(images)
    found["NDA"] = lds(method.scores(test), masks, for_test)
    tuned = method.tune(masks, for_tuning, valid, **CHOICES)
    chosen = {name: value for name, value in dataclasses.asdict(tuned).items() if name != "tried"}
    return {"test": {**found, "NDA, tuned": lds(method.scores(test), masks, for_test)}, "tuned": chosen}


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    found = run()
    with whole_file(out) as stream:
        stream.write(json.dumps(found, indent=1).encode())


if __name__ == "__main__":
    main()
