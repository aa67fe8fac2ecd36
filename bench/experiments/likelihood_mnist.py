"""Does the exact likelihood know a digit? Bits per dimension of digits, turned digits, averages of two digits, and noise.

A score network (the tutorial's) is trained on MNIST. The probability flow then gives bits per dimension of test digits as they
are, turned by 90 degrees, averaged in pairs, and of uniform random pixels: by the divergence in full, and by Hutchinson's
estimate of it beside that.

    python -m bench.experiments.likelihood_mnist train    OUT --data mnist.npz --work FOLDER   the network
    python -m bench.experiments.likelihood_mnist converge OUT --data mnist.npz --work FOLDER   steps, on two images
    python -m bench.experiments.likelihood_mnist evaluate OUT --data mnist.npz --work FOLDER   all images of all kinds
    python -m bench.experiments.likelihood_mnist report   OUT --data mnist.npz --work FOLDER   numbers and a picture

Each goes on from what lies in FOLDER, and ends at the same bits. Two processes share the evaluation with ``--part 0/2`` and
``--part 1/2``. The divergence in full takes 784 products for each image and
evaluation, and a step of rk4 is four evaluations.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from bench.experiments.magic_mnist import part
from bench.machine import describe
from pyattr.attribution import MAGIC
from pyattr.attribution.magic import Adam, NegativeLoss
from pyattr.cli.display import Display
from pyattr.diffusion import (
    DamagedFileError,
    ScoreLoss,
    ScoreNet,
    VarianceExploding,
    bits_per_dimension,
    dequantise,
    log_likelihood,
)
from pyattr.diffusion.storage import load_tensors, save_tensors
from pyattr.files import whole_file
from pyattr.report.numbers import write_results

STAGES = ("train", "converge", "evaluate", "report")
SDE = VarianceExploding(25.0)
LOSS = ScoreLoss(SDE, mean=True, spacing="noise")  # as the likelihood weighs times
WIDTHS = (32, 64, 128, 256)
TRAINING = {"steps": 7000, "batch_size": 64}
ADAM = Adam(learning_rate=1e-3, betas=(0.9, 0.999), eps=1e-8, eps_root=1e-16, warmup=0.05)  # nothing needs it smooth
STATES = 64 << 20  # bytes: nothing is differentiated here, so none but the last is kept
SOLVER = {"solver": "rk4", "steps": 8}
TRIALS = (("rk4", 4), ("rk4", 6), ("rk4", 8), ("rk4", 12), ("rk4", 24))
TRIAL_PROBES = 4
IMAGES, BATCH = 16, 4  # of each kind, and evaluated together
PROBES = 16
AT_A_TIME = 49  # divides 784: no forward pass is smaller than the others
SEED = 0
KINDS = ("digits", "rotated", "averaged", "noise")
ESTIMATES = ("exact", "hutchinson")
ARRAYS = ("train_images", "test_images")
SHOWN = 6  # images of each kind in the picture


def digits(path: Path) -> tuple[Tensor, Tensor]:
    """All training and test digits, [N, 1, 28, 28] uint8.

    Raises:
        ValueError: the archive lacks one of them.
    """
    with np.load(path) as archive:
        for name in ARRAYS:
            if name not in archive:
                raise ValueError(f"--data must hold {', '.join(ARRAYS)}, got {path} with {', '.join(archive.files)}")
        return tuple(torch.from_numpy(archive[name][:, None]) for name in ARRAYS)


def images_of_kinds(test: Tensor, count: int) -> dict[str, Tensor]:
    """Images of each kind, [count, 1, 28, 28] uint8: of the same digits, drawn at random, but for the noise.

    The first are the same whatever the count.
    """
    rng = np.random.Generator(np.random.Philox(key=[SEED, 0x6C696B65]))
    pairs = torch.from_numpy(rng.permutation(len(test))[: 2 * count])
    first, second = test[pairs[::2]], test[pairs[1::2]]
    return {
        "digits": first,
        "rotated": first.rot90(1, (2, 3)).contiguous(),
        "averaged": ((first.int() + second.int()) // 2).to(torch.uint8),
        "noise": torch.from_numpy(rng.integers(0, 256, first.shape, np.uint8)),
    }


def trained(args, display: Display) -> nn.Module:
    """The network, trained or found trained; resumed within a minute of where it was."""
    train, _ = digits(args.data)
    torch.manual_seed(SEED)
    # MAGIC's training is a resumable one of any loss; its derivatives are not asked for.
    training = MAGIC(
        ScoreNet(SDE, widths=WIDTHS),
        LOSS,
        NegativeLoss(LOSS),
        **TRAINING,
        optimiser=ADAM,
        seed=SEED,
        checkpointing="binomial",
        memory=STATES,
        directory=args.work / "training",
        progress=display.progress,
    ).fit(train)
    return training.model.eval()


def bits(model: nn.Module, images: Tensor, numbers: Tensor, divergence: str, **options) -> Tensor:
    """Bits per dimension, [B] float64; what noise an image gets depends on its number alone."""
    x = dequantise(images, seed=SEED, ids=numbers)
    chosen = {"probes": PROBES, "seed": SEED, "ids": numbers} if divergence == "hutchinson" else {}
    found = log_likelihood(model, x, SDE, divergence=divergence, at_a_time=AT_A_TIME, **(chosen | options))
    return bits_per_dimension(found.log_prob, x[0].numel())


def run_train(args, display: Display) -> None:
    """Train."""
    trained(args, display)


def run_converge(args, display: Display) -> None:
    """One digit and one image of noise by several numbers of steps along few directions, and one digit in full, timed."""
    model, kinds = trained(args, display), images_of_kinds(digits(args.data)[1], args.images)
    images, numbers = torch.cat([kinds[kind][:1] for kind in ("digits", "noise")]), torch.tensor([0, 1])
    rows = []
    trials = [*TRIALS, ("rk45", None)]
    for done, (solver, steps) in enumerate(trials, 1):
        options = {"solver": solver, "probes": TRIAL_PROBES} | ({} if steps is None else {"steps": steps})
        rows.append(
            {"solver": solver, "steps": steps, "bits": bits(model, images, numbers, "hutchinson", **options).tolist()}
        )
        display.progress(done, len(trials), "passes")
    begin = time.perf_counter()
    bits(model, images[:1], numbers[:1], "exact", **SOLVER)
    write_results(
        args.out / "likelihood_convergence.json",
        {
            "directions": TRIAL_PROBES,
            "digit and noise": rows,
            "seconds of one digit in full": {**SOLVER, "seconds": time.perf_counter() - begin},
            "machine": describe(),
        },
    )


def run_evaluate(args, display: Display) -> None:
    """Bits of the images of this part, a file for each batch."""
    model, kinds = trained(args, display), images_of_kinds(digits(args.data)[1], args.images)
    batches = [(kind, first) for first in range(0, args.images, BATCH) for kind in KINDS][args.part[0] :: args.part[1]]
    for done, (kind, first) in enumerate(batches):
        display.progress(done, len(batches), "batches")
        path = batch_file(args.work, kind, first)
        numbers = torch.arange(first, min(first + BATCH, args.images))
        if not _holds(path, len(numbers)):
            begin = time.perf_counter()
            found = {name: bits(model, kinds[kind][numbers], numbers, name, **SOLVER) for name in ESTIMATES}
            save_tensors(path, found, {"kind": "bits", "images": kind, "seconds": time.perf_counter() - begin})
    display.progress(len(batches), len(batches), "batches")


def batch_file(work: Path, kind: str, first: int) -> Path:
    """Where the bits of a batch lie; those of other settings lie elsewhere."""
    return work / f"bits-{SOLVER['solver']}-{SOLVER['steps']}-{PROBES}-{kind}-{first:04d}.safetensors"


def run_report(args, display: Display) -> None:
    """Every image's bits, their means and medians, and a picture."""
    kinds = images_of_kinds(digits(args.data)[1], args.images)
    found, seconds = {}, 0.0
    for kind in KINDS:
        parts = [load_tensors(batch_file(args.work, kind, first)) for first in range(0, args.images, BATCH)]
        found[kind] = {
            name: torch.cat([tensors[name] for tensors, _ in parts])[: args.images].numpy() for name in ESTIMATES
        }
        seconds += sum(record["seconds"] for _, record in parts)
    rows = {
        kind: {
            name: {"mean": values.mean(), "median": np.median(values), "images": values}
            for name, values in each.items()
        }
        | {"mean difference of estimates": np.abs(each["exact"] - each["hutchinson"]).mean()}
        for kind, each in found.items()
    }
    means = [rows[kind]["exact"]["mean"] for kind in KINDS]
    write_results(
        args.out / "likelihood_mnist.json",
        {
            "bits per dimension": rows,
            "in the expected order": means == sorted(means),
            "settings": {
                "training": {**TRAINING, "optimiser": vars(ADAM)},
                "solver": {**SOLVER, "probes": PROBES},
                "sigma": SDE.sigma,
            },
            "seconds of evaluation": seconds,
            "machine": describe(),
        },
    )
    _plot(args.out / "likelihood_mnist.png", {kind: each["exact"] for kind, each in found.items()}, kinds)


def _plot(path: Path, found: dict[str, np.ndarray], kinds: dict[str, Tensor]) -> None:
    """A row for each kind: its bits, one point an image, and some of the images beside them."""
    from matplotlib.figure import Figure

    figure = Figure((9, 1.1 * len(found) + 0.6), layout="constrained")
    shown = min(SHOWN, *map(len, kinds.values()))
    grid = figure.add_gridspec(len(found), shown + 1, width_ratios=[SHOWN, *[1] * shown])
    low, high = (f(values.min() if f is min else values.max() for values in found.values()) for f in (min, max))
    margin = 0.05 * (high - low) + 1e-6
    for row, (kind, values) in enumerate(found.items()):
        axes = figure.add_subplot(grid[row, 0])
        axes.plot(values, np.linspace(-0.5, 0.5, len(values)), "o", markersize=4, alpha=0.6)
        axes.axvline(values.mean(), color="black", linewidth=1)
        axes.set(
            xlim=(low - margin, high + margin), ylim=(-1, 1), yticks=[0], yticklabels=[f"{kind}, {values.mean():.2f}"]
        )
        axes.tick_params(labelbottom=row + 1 == len(found))
        for column, image in enumerate(kinds[kind][:shown], 1):
            picture = figure.add_subplot(grid[row, column])
            picture.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=255)
            picture.set_axis_off()
    axes.set_xlabel("bits per dimension (the line and the number: the mean)")
    with whole_file(path) as stream:
        figure.savefig(stream, format="png", dpi=110)


def _holds(path: Path, images: int) -> bool:
    """Whether a file has the bits of so many images; fewer or more may have been asked for before."""
    try:
        return path.is_file() and all(len(bits) >= images for bits in load_tensors(path)[0].values())
    except DamagedFileError:
        return False


def main() -> None:
    """Run a stage."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("out", type=Path, help="folder for the results: .json and .png files")
    parser.add_argument("--data", type=Path, required=True, help=f"an .npz of MNIST: {', '.join(ARRAYS)}")
    parser.add_argument("--work", type=Path, required=True, help="folder for the training's states and the batches")
    parser.add_argument("--images", type=int, default=IMAGES, help="of each kind; more may be asked for later")
    parser.add_argument("--part", type=part, default=(0, 1), help="which of how many shares of the evaluation: 0/2")
    parser.add_argument("--threads", type=int, default=1, help="of torch; the same for all stages")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for folder in (args.out, args.work):
        folder.mkdir(parents=True, exist_ok=True)
    stages = {"train": run_train, "converge": run_converge, "evaluate": run_evaluate, "report": run_report}
    with Display(Console()) as display:
        stages[args.stage](args, display)


if __name__ == "__main__":
    main()
