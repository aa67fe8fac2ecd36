"""What the commands of encoded ensembles do but `evaluate`, each in its stage of the output folder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from .. import diffusion
from ..attribution import EncodedEnsemble
from ..attribution.codes import ablation_weights, group_codes, membership, random_codes, walsh_codes
from ..attribution.encoded_samples import default_steps
from ..datasets import DataError, ImageDataset
from ..diffusion.images import to_bytes
from ..diffusion.sampling import check_options as check_sampling
from ..diffusion.sampling import num_noises
from ..diffusion.train import check_options as check_training
from ..evaluation import change_sizes
from ..ops import TopK
from ..report.grid import matplotlib, write_grid
from .ensemble_folder import (
    MEMORY,
    SHOWN,
    Ablating,
    Derivatives,
    class_rows,
    found_codes,
    found_ensemble,
    found_samples,
    labels_hash,
    samples_of,
)
from .options import CodeOptions, DataOptions, Machine, TrainOptions
from .run import session
from .stages import Step, check_fits, write_npz
from .workspace import WorkspaceError


def encode(out: Path, data: DataOptions, options: CodeOptions) -> None:
    """Give each image a code, in an output folder."""
    with session(out, Machine("cpu")) as work:
        images = work.load(data)
        codes = _codes(images, options)
        splits = membership(codes, options.num_members).sum(0)
        if not splits.all():
            raise WorkspaceError(
                f"member {int((splits == 0).argmax())} would see no image at all: give fewer --num-members, or more images"
            )
        labels = labels_hash(images, options.kind)
        settings = {"data": images.fingerprint(), "labels": labels, **dataclasses.asdict(options)}
        stage = work.workspace.stage("ensemble-codes", settings)
        step = Step("Encoding", f"{len(images):,} images for {options.num_members} members", stage, 16 * len(images))
        work.plan([step])
        with step.working():
            write_npz(stage.folder / "codes.npz", {"codes": codes, "ids": np.array(images.ids)})
        work.workspace.remember(MEMORY[0], {"stage": stage.key, "data": dataclasses.asdict(data)})
        work.display.say(
            f"done; {len(np.unique(codes)):,} codes, members see {splits.min():,} to {splits.max():,} of {len(images):,} images"
        )
        work.display.say(f"codes  {stage.folder / 'codes.npz'}")


def _codes(images: ImageDataset, options: CodeOptions) -> np.ndarray:
    n, weight, seed = options.num_members, options.weight, options.seed
    if options.kind == "items":
        _enough_codes(len(images), "images", n, weight)
        return random_codes(len(images), n, weight=weight, seed=seed)
    if images.labels is None:
        raise DataError(
            f"data: --codes {options.kind} needs labels, and {images.name} has none: put the images of each class into a "
            "folder of its own, or take --codes items"
        )
    if options.kind == "classes":
        _enough_codes(len(np.unique(images.labels)), "classes", n, weight)
        return group_codes(images.labels, n, weight=weight, seed=seed)
    if weight is not None:
        raise WorkspaceError("--weight goes with random codes: leave it out, or take --codes classes")
    return walsh_codes(images.labels, n)


def _enough_codes(wanted: int, what: str, num_members: int, weight: int | None) -> None:
    weight = num_members // 2 if weight is None else weight
    there_are = math.comb(num_members, weight)
    if weight < num_members and wanted > there_are:
        raise WorkspaceError(
            f"{num_members} members have {there_are:,} codes of {weight} ones, fewer than the {wanted:,} {what}: "
            "give more --num-members, or another --weight"
        )


def train(out: Path, options: TrainOptions, timesteps: int, workers: int, machine: Machine) -> None:
    """Train the members of the folder's codes."""
    with session(out, machine) as work:
        images, codes, encoded = found_codes(work)
        check_fits(options.network, images.shape)
        training = {
            name: value
            for name, value in dataclasses.asdict(options).items()
            if name not in ("network", "dropout", "seed")
        }
        check_training(seed=options.seed, **{name: value for name, value in training.items() if name != "flip"})
        # As noisy at the end as the usual 1,000 timesteps of 1e-4 to 0.02.
        schedule = diffusion.Schedule(timesteps, 0.1 / timesteps, 20 / timesteps)
        members = encoded.settings["num_members"]
        with torch.device("meta"):  # only to count, and to fail before the work
            network = diffusion.unet(options.network, channels=images.shape[0], size=images.shape[1])
        parameters = sum(p.numel() for p in network.parameters())
        settings = {
            "codes": encoded.key,
            "schedule": dataclasses.asdict(schedule),
            "network": options.network,
            "seed": options.seed,
            **training,
        }
        stage = work.workspace.stage("ensemble", settings)
        step = Step(
            "Training",
            f"{members} members of {options.network} ({parameters:,} parameters each), {options.steps:,} steps of "
            f"{options.batch_size} images each",
            stage,
            # Weights, two moments and perhaps an average of each, and of those at work what is being written; and the
            # file of images that several processes read.
            4 * parameters * (3 if options.ema is None else 4) * (members + 2 * workers)
            + (images.images.nbytes if workers > 1 else 0),
        )
        work.plan([step])
        work.begin(step)
        if not stage.finished:
            with stage.work() as notes:
                ensemble = EncodedEnsemble(
                    options.network,
                    codes,
                    num_members=members,
                    schedule=schedule,
                    directory=stage.folder,
                    seed=options.seed,
                    device=work.device,
                    **training,
                )
                ensemble.fit(torch.from_numpy(images.images), workers=workers, progress=work.display.progress)
                notes["parameters"] = parameters
        work.workspace.remember(MEMORY[1], {"stage": stage.key})
        work.display.say(f"done; members  {stage.folder}")


def sample(
    out: Path,
    num_images: int,
    method: str,
    steps: int | None,
    eta: float,
    seed: int,
    batch_size: int,
    machine: Machine,
) -> None:
    """Generate images from the folder's ensemble."""
    matplotlib()
    with session(out, machine) as work:
        trained, ensemble = found_ensemble(work)
        schedule = ensemble.recipe.schedule
        steps = steps or default_steps(method, schedule)
        options = {"method": method, "steps": steps, "eta": eta, "seed": seed, "batch_size": batch_size}
        check_sampling(schedule, **options)
        stage = work.workspace.stage("ensemble-samples", {"model": trained.key, "num_images": num_images, **options})
        numbers = num_images * int(np.prod(ensemble.shape))
        step = Step(
            "Generating",
            f"{num_images} images by {method} in {steps} steps",
            stage,
            2 * 4 * numbers * (1 + num_noises(method, steps, eta)),
        )
        work.plan([step])
        work.begin(step)
        samples = samples_of(work, ensemble, stage)
        work.workspace.remember(MEMORY[2], {"stage": stage.key})
        picture = work.workspace.folder / "ensemble-samples.png"
        shown, across = samples.uint8().numpy()[: 10 * SHOWN], 10
        write_grid(picture, [list(shown[i : i + across]) for i in range(0, len(shown), across)])
        work.display.say(f"done; images   {stage.folder}")
        work.display.say(f"picture  {picture}")


def ablate(out: Path, items: Sequence[str], labels: Sequence[str], batch_size: int, machine: Machine) -> None:
    """Make the folder's samples again without images or classes."""
    matplotlib()
    with session(out, machine) as work:
        images, codes, encoded = found_codes(work)
        sampled, ensemble = found_samples(work)
        names, chosen = _chosen(images, codes, encoded.settings["kind"], items, labels)
        step = Ablating(
            work.workspace,
            sampled,
            ensemble,
            chosen,
            batch_size,
            "Ablating",
            f"each without {len(names)} in turn",
        )
        work.plan([step])
        work.begin(step)
        samples = samples_of(work, ensemble, sampled)
        made = step.run(ensemble, samples, work.display)
        changes = change_sizes(samples.images, made).astype(np.float32)  # [Q, M], of pixels in [0, 1]
        folder = work.workspace.folder
        write_npz(
            folder / "ensemble-ablation.npz",
            {"counterfactuals": to_bytes(made).numpy(), "samples": samples.uint8().numpy(), "changes": changes,
             "names": np.array(names)},
        )  # fmt: skip
        pictures, before = to_bytes(made[:SHOWN]).numpy(), samples.uint8().numpy()
        width = min(len(names), SHOWN)
        write_grid(
            folder / "ensemble-ablation.png",
            [[image, *row[:width]] for image, row in zip(before, pictures, strict=False)],
            columns=["sample", *(f"no {_short(name)}" for name in names[:width])],
            labels=[str(number) for number in samples.ids[:SHOWN].tolist()],
            marked=[(q, 1 + int(row[:width].argmax())) for q, row in enumerate(changes[:SHOWN])],
            title="Framed: the largest change",
        )
        work.display.say(f"done; numbers  {folder / 'ensemble-ablation.npz'}")
        work.display.say(f"picture  {folder / 'ensemble-ablation.png'}")


def _chosen(
    images: ImageDataset, codes: np.ndarray, kind: str, items: Sequence[str], labels: Sequence[str]
) -> tuple[list[str], np.ndarray]:
    """What is to be ablated: names, and codes [M] uint64."""
    places = {name: place for place, name in enumerate(images.ids)}
    for name in items:
        if name not in places:
            raise DataError(f"data: no training image is named {name}: names look like {images.ids[0]}")
    if kind == "items":
        if labels or not items:
            raise WorkspaceError(
                "every member saw some images of each class: give --item NAME, or encode again with --codes classes or walsh"
            )
        return list(items), codes[[places[name] for name in items]]
    rows = class_rows(images)
    classes = list(labels) if labels or items else list(rows)
    for name in classes:
        if name not in rows:
            raise DataError(f"data: no class is named {name}: there are {', '.join(rows)}")
    return [*classes, *items], codes[[rows[name] for name in classes] + [places[name] for name in items]]


def search(out: Path, top: int, distinct: bool, batch_size: int, machine: Machine) -> None:
    """Find the most influential training images of the folder's samples."""
    matplotlib()
    with session(out, machine) as work:
        images, _, _ = found_codes(work)
        sampled, ensemble = found_samples(work)
        if top > len(images):
            raise WorkspaceError(f"--top must be at most the number of training images, {len(images)}, got {top}")
        step = Derivatives(work.workspace, sampled, ensemble, batch_size)
        work.plan([step])
        work.begin(step)
        samples = samples_of(work, ensemble, sampled)
        columns = step.run(ensemble, samples, work.display)  # [Q, D, n]
        found = _distinct(ensemble, samples, top) if distinct else ensemble.search(samples, top)
        scores = ensemble.scores(samples).numpy()
        folder, places = work.workspace.folder, found.indices.numpy()
        # Each without the one image of most influence on it.
        directions = ablation_weights(ensemble.codes[places[:, 0]], ensemble.num_members) - 1 / ensemble.num_members
        changes = torch.einsum("qdi,qi->qd", columns, torch.from_numpy(directions).float())
        without = to_bytes(samples.images + 2 * changes.view_as(samples.images)).numpy()  # J is of pixels in [0, 1]
        write_npz(
            folder / "ensemble-scores.npz",
            {"scores": scores, "top": places, "queries": samples.uint8().numpy(), "without_top": without,
             "gram": ensemble.gram(samples).numpy(), "ids": np.array(images.ids)},
        )  # fmt: skip
        shown, width = samples[:SHOWN], min(top, SHOWN)
        write_grid(
            folder / "ensemble-search.png",
            [
                [before, after, None, *images.images[row[:width]]]
                for before, after, row in zip(shown.uint8().numpy(), without, places, strict=False)
            ],
            columns=["sample", "no 1", "", *(str(k + 1) for k in range(width))],
            labels=[str(number) for number in shown.ids.tolist()],
            title=f"The {width} training images of most influence"
            + (", without those in several lists" if distinct else ""),
        )
        work.display.say(f"done; scores  {folder / 'ensemble-scores.npz'}")
        work.display.say(f"picture  {folder / 'ensemble-search.png'}")


def _distinct(ensemble: EncodedEnsemble, samples: diffusion.Samples, top: int) -> TopK:
    try:
        return ensemble.distinct_top(samples, top)
    except ValueError as error:  # the iteration deleted too many
        raise WorkspaceError(
            f"too few images are left for lists of {top} without repeats: give a smaller --top, or leave out --distinct"
        ) from error


def _short(name: str) -> str:
    return name if len(name) <= 12 else f"…{name[-11:]}"
