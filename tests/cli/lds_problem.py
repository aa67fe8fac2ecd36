"""A ground truth of known scores with files of these scores, for tests of `pyattr evaluate lds`."""

import json

import numpy as np
import torch

from pyattr.diffusion.storage import data_hash
from pyattr.evaluation import GroundTruth, Scores, subsets
from pyattr.evaluation.ground_truth import image_hashes

SUBSETS, IMAGES, QUERIES = 12, 16, 6
GROUPS = {"validation": [0, 4], "generated": [4, 6]}
PIXELS = np.random.default_rng(0).integers(0, 256, (IMAGES + QUERIES, 1, 8, 8), dtype=np.uint8)
TRAIN, ASKED = torch.from_numpy(PIXELS[:IMAGES]), torch.from_numpy(PIXELS[IMAGES:])


def noisy(seed, much):
    true = np.random.default_rng(1).standard_normal((QUERIES, IMAGES))
    return (true + much * np.random.default_rng(seed).standard_normal(true.shape)).astype(np.float32)


MATRICES = {
    "dtrak/1": ("D-TRAK", noisy(2, 0.3), {"lambda": 0.1, "D": 64}),
    "dtrak/2": ("D-TRAK", noisy(3, 1.0), {"lambda": 1.0, "D": 64}),
    "dtrak/3": ("D-TRAK", noisy(4, 1.5), {"lambda": 10.0, "D": 64}),
    "pixel": ("Raw pixel", noisy(5, 4.0), {}),
}


def save(folder, name, rows=slice(None)):
    method, matrix, settings = MATRICES[name]
    path = folder / "scores" / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    Scores.of(method, matrix, TRAIN, ASKED, signed=True, settings=settings).take(rows).save(path)
    return path


def make(folder):
    """A folder as `pyattr evaluate lds` takes it."""
    masks, rng = subsets(IMAGES, SUBSETS), np.random.default_rng(6)
    exact = -(masks @ noisy(0, 0).T)
    losses = np.stack([exact + rng.standard_normal(exact.shape), exact + 5 * rng.standard_normal(exact.shape)])
    truth = GroundTruth(
        masks, losses[:, :, None, None], ("simple", "elbo"), np.arange(QUERIES), data_hash(TRAIN),
        tuple(image_hashes(ASKED)), {},
    )  # fmt: skip
    truth.save(folder / "evaluation.safetensors")
    (folder / "queries.json").write_text(json.dumps(GROUPS))
    np.savez(folder / "images.npz", train_images=TRAIN, validation_images=ASKED[:4], generated_images=ASKED[4:])
    for name in MATRICES:
        save(folder, name, rows=slice(4, None) if name == "dtrak/3" else slice(None))
    return folder
