"""What the two experiments with encoded ensembles share: the digits, the small network's training, a classifier."""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from pyattr.attribution import EncodedEnsemble
from pyattr.cli.display import Display
from pyattr.diffusion import Schedule
from pyattr.evaluation import Classifier

# As noisy at its end as 1,000 steps of 1e-4 to 0.02: abar_T is 2e-5 here and 4e-5 there.
SCHEDULE = Schedule(100, 1e-3, 0.2)
NETWORK = "mnist-small"
TRAINING = {
    "batch_size": 32,
    "learning_rate": 5e-3,
    "betas": (0.9, 0.99),
    "ema": 0.995,
    "weighting": "velocity",
}
EPOCHS = 4  # of the classifier
ARRAYS = ("test_images", "test_labels", "train_images", "train_labels")


def digits(path: Path) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The 10,000 test digits, which the ensembles are trained on, and the 60,000 others, for a classifier.

    Args:
        path: an .npz of test_images and train_images [N, 28, 28] uint8, test_labels and train_labels [N].

    Returns:
        Images [N, 1, 28, 28] and labels [N] int64 of either.

    Raises:
        ValueError: the archive lacks one of them.
    """
    with np.load(path) as archive:
        for name in ARRAYS:
            if name not in archive:
                raise ValueError(f"--data must hold {', '.join(ARRAYS)}, got {path} with {', '.join(archive.files)}")
        return tuple(
            (archive[f"{part}_images"][:, None], archive[f"{part}_labels"].astype(np.int64))
            for part in ("test", "train")
        )


def ensemble(codes: np.ndarray, num_members: int, steps: int, folder: Path) -> EncodedEnsemble:
    """The ensemble of an experiment, trained or not."""
    return EncodedEnsemble(
        NETWORK, codes, num_members=num_members, schedule=SCHEDULE, directory=folder, steps=steps, **TRAINING
    )


def classifier(images: np.ndarray, labels: np.ndarray, path: Path, display: Display) -> Classifier:
    """Trained on digits that no member saw."""
    return Classifier(epochs=EPOCHS).fit(images, labels, path=path, progress=display.progress)


def accuracy(model: Classifier, images: np.ndarray, labels: np.ndarray) -> float:
    """The share of digits that it names right."""
    return float((model.predict(images) == labels).mean())


def settings(steps: int, num_members: int) -> dict:
    """Of an ensemble, for the results."""
    return {
        "network": NETWORK,
        "members": num_members,
        "steps": steps,
        "schedule": dataclasses.asdict(SCHEDULE),
        **TRAINING,
    }


def arguments(description: str) -> argparse.Namespace:
    """The command line of both experiments, its folders made."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("out", type=Path, help="folder for the results: a .json and .png files")
    parser.add_argument("--data", type=Path, required=True, help=f"an .npz of MNIST with {', '.join(ARRAYS)}")
    parser.add_argument("--work", type=Path, required=True, help="folder for members, samples and other large files")
    parser.add_argument("--samples", type=int, help="how many digits to generate")
    parser.add_argument("--steps", type=int, help="of each member's training")
    parser.add_argument("--workers", type=int, default=1, help="processes that train members")
    parser.add_argument("--threads", type=int, default=1, help="of torch in each process")
    found = parser.parse_args()
    torch.set_num_threads(found.threads)
    for folder in (found.out, found.work):
        folder.mkdir(parents=True, exist_ok=True)
    return found


def showing() -> Display:
    """Progress on the terminal, or lines in a log."""
    return Display(Console())
