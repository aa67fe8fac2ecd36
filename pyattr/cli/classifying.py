"""A classifier of the folder's labels, trained once for whoever asks for its classes or its features."""

from __future__ import annotations

import hashlib
import json

import numpy as np

from ..datasets import ImageDataset
from ..evaluation import Classifier
from .display import Display
from .stages import Step
from .workspace import Workspace

_BYTES = 4_000_000  # of the largest number of classes that makes sense, with what is being written


class Classifying(Step):
    """Trains a classifier of the images' labels, or finds it trained.

    Args:
        images: with labels.
        epochs: see :class:`~pyattr.evaluation.Classifier`.
        name: of the stage.
        also: what else there is to say of the images, for people.
    """

    def __init__(
        self,
        workspace: Workspace,
        images: ImageDataset,
        epochs: int,
        *,
        name: str = "classifier",
        also: str = "",
    ):
        self.epochs = epochs
        settings = {"data": images.fingerprint(), "labels": hash_of_labels(images), "epochs": epochs}
        super().__init__(
            "Classifier", f"of {len(images):,} labelled images{also}", workspace.stage(name, settings), _BYTES
        )

    def run(self, images: ImageDataset, labels: np.ndarray, display: Display) -> Classifier:
        """The trained classifier; `labels` are the images' [N] int64, numbered without gaps."""
        with self.working():
            return Classifier(epochs=self.epochs).fit(
                images.images, labels, path=self.stage.folder / "classifier.safetensors", progress=display.progress
            )


def hash_of_labels(images: ImageDataset) -> str | None:
    """What tells the images' labels from others; None where there are none."""
    if images.labels is None:
        return None
    names = json.dumps([images.class_names[label] for label in images.labels])
    return hashlib.sha256(names.encode()).hexdigest()
