"""What the commands of encoded ensembles find in their output folder, and the stages that several of them share."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
from torch import Tensor

from .. import diffusion
from ..attribution import EncodedEnsemble
from ..datasets import ImageDataset
from ..diffusion.progress import silent
from .classifying import hash_of_labels
from .display import Display
from .options import DataOptions
from .run import Session
from .stages import Step, read_npz, write_images
from .workspace import Stage, Workspace, WorkspaceError

SHOWN = 20  # generated images in a picture
MEMORY = ("ensemble codes", "ensemble", "ensemble samples")  # in the order in which they build on each other
COMMANDS = ("encode SOURCE", "train", "sample")  # that make them


def labels_hash(images: ImageDataset, kind: str) -> str | None:
    """What tells the images' labels from others; None where codes do not depend on them."""
    return None if kind == "items" else hash_of_labels(images)


def found_codes(work: Session) -> tuple[ImageDataset, np.ndarray, Stage]:
    """The images, their codes [N] uint64, and the stage that made these.

    Raises:
        WorkspaceError: there are none, or the images have changed since.
    """
    stage, told = _recalled(work, 0)
    images = work.load(DataOptions(**told["data"]))
    made = stage.settings
    if (images.fingerprint(), labels_hash(images, made["kind"])) != (made["data"], made["labels"]):
        raise WorkspaceError(
            f"{told['data']['source']} has changed since its images were encoded: put them back, or encode again"
        )
    return images, read_npz(stage.folder / "codes.npz")["codes"], stage


def found_ensemble(work: Session) -> tuple[Stage, EncodedEnsemble]:
    """The stage that trained the ensemble of the folder's codes, and the ensemble on the session's device.

    Raises:
        WorkspaceError: there is none, or it is of other codes.
    """
    codes, _ = _recalled(work, 0)
    stage, _ = _recalled(work, 1)
    if stage.settings["codes"] != codes.key:
        folder = work.workspace.folder
        raise WorkspaceError(
            f"the ensemble in {folder} was trained on other codes: run `pyattr ensemble train --out {folder}` first"
        )
    return stage, EncodedEnsemble.open(stage.folder, device=work.device)


def found_samples(work: Session) -> tuple[Stage, EncodedEnsemble]:
    """The stage that made the samples of the folder's ensemble, and the ensemble.

    Raises:
        WorkspaceError: there are none, or they are of another ensemble.
    """
    trained, ensemble = found_ensemble(work)
    stage, _ = _recalled(work, 2)
    if stage.settings["model"] != trained.key:
        folder = work.workspace.folder
        raise WorkspaceError(
            f"the images in {folder} are of another ensemble: run `pyattr ensemble sample --out {folder}` first"
        )
    return stage, ensemble


def _recalled(work: Session, which: int) -> tuple[Stage, dict[str, Any]]:
    """A stage that an earlier command finished, and what it remembered."""
    told = work.workspace.recall(MEMORY[which])
    stage = work.workspace.existing(told.get("stage", "."))
    if stage is None:
        folder = work.workspace.folder
        what = ("codes", "trained ensemble", "images of an ensemble")[which]
        raise WorkspaceError(f"no {what} in {folder}: run `pyattr ensemble {COMMANDS[which]} --out {folder}` first")
    return stage, told


def samples_of(work: Session, ensemble: EncodedEnsemble, stage: Stage) -> diffusion.Samples:
    """The samples of a stage, made or found."""
    options = {name: value for name, value in stage.settings.items() if name != "model"}
    told = silent if stage.finished else work.display.progress
    with contextlib.nullcontext() if stage.finished else stage.work():
        samples = ensemble.sample(directory=stage.folder, progress=told, **options)
        write_images(stage.folder, samples)
    return samples


class Ablating(Step):
    """Makes samples again without what has some codes; the same samples and codes are found whoever asked for them.

    Args:
        sampled: the stage of the samples.
        codes: [M] uint64.
        batch_size: images made together.
        title, what: for people; ``what`` says what they are made without, or by.
        queries: only the first so many samples; None: all.
    """

    def __init__(
        self,
        workspace: Workspace,
        sampled: Stage,
        ensemble: EncodedEnsemble,
        codes: np.ndarray,
        batch_size: int,
        title: str,
        what: str,
        queries: int | None = None,
    ):
        self.codes, self.batch_size, self.queries = codes, batch_size, queries
        settings = {"samples": sampled.key, "codes": [int(c) for c in codes], "batch_size": batch_size}
        if queries is not None:
            settings["queries"] = queries
        count = sampled.settings["num_images"] if queries is None else queries
        super().__init__(
            title,
            f"{count} images, {what}",
            workspace.stage("ensemble-ablation", settings),
            # The batches, and what of them goes into the file of results.
            2 * 4 * count * (len(np.unique(codes)) + len(codes)) * int(np.prod(ensemble.shape)),
        )

    def run(self, ensemble: EncodedEnsemble, samples: diffusion.Samples, display: Display) -> Tensor:
        """[Q, M, C, H, W] float32 in [-1, 1]."""
        with self.working():
            return ensemble.counterfactual(
                samples[: self.queries],
                self.codes,
                batch_size=self.batch_size,
                directory=self.stage.folder,
                progress=display.progress,
            )


class Derivatives(Step):
    """Computes the Jacobian of samples with respect to the members' weights.

    Args:
        sampled: the stage of the samples.
        batch_size: samples whose derivatives are taken together.
    """

    def __init__(self, workspace: Workspace, sampled: Stage, ensemble: EncodedEnsemble, batch_size: int):
        self.batch_size = batch_size
        queries = sampled.settings["num_images"]
        super().__init__(
            "Derivatives",
            f"of {queries} images with respect to {ensemble.num_members} members",
            workspace.stage("ensemble-jacobian", {"samples": sampled.key, "batch_size": batch_size}),
            8 * queries * ensemble.num_members * int(np.prod(ensemble.shape)),
        )

    def run(self, ensemble: EncodedEnsemble, samples: diffusion.Samples, display: Display) -> Tensor:
        """[Q, D, n] float32, of pixels in [0, 1]; kept by the ensemble, so that what follows does not ask the models again."""
        with self.working():
            return ensemble.jacobian(
                samples, batch_size=self.batch_size, directory=self.stage.folder, progress=display.progress
            )


def class_rows(images: ImageDataset) -> dict[str, int]:
    """The first image of each class that has any, by the class's name, in the order of the labels."""
    # Of a part of the data (--limit) some classes may have no image, and then no code.
    firsts = zip(*np.unique(images.labels, return_index=True), strict=True)
    return {images.class_names[label]: int(row) for label, row in firsts}
