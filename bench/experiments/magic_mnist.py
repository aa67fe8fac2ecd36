"""Does MAGIC foretell how the likelihood of a digit changes when other digits are left out of training?

A score network (the tutorial's) is trained on MNIST. For four digits that it never saw, MAGIC's derivatives predict phi of
trainings without a random 1% of the items, and without single ones; those trainings are then made. Beside it stand TRAK and
D-TRAK, with the lambda that suits each of them best. phi is minus the denoising loss over fixed draws, or the
log-likelihood by the probability flow, its divergence along fixed random directions.

    python -m bench.experiments.magic_mnist search  OUT --data mnist.npz --work FOLDER   which recipe is smooth
    python -m bench.experiments.magic_mnist scores  OUT --data mnist.npz --work FOLDER   train, replay, TRAK, D-TRAK
    python -m bench.experiments.magic_mnist retrain OUT --data mnist.npz --work FOLDER   without 1%, without single items
    python -m bench.experiments.magic_mnist report  OUT --data mnist.npz --work FOLDER   numbers and pictures

Each goes on from what lies in FOLDER, and ends at the same bits. Two processes share the trainings of ``search`` and
``retrain`` with ``--part 0/2`` and ``--part 1/2``; ``search`` is then run once more without, to gather. ``retrain`` may start
beside ``scores``, and is then run once more for the single items. Trained networks are kept, so a second phi costs no training
but that of the items that only its scores single out.
"""

import argparse
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from rich.console import Console
from torch import Tensor

from bench.experiments.magic_baselines import METHODS, baseline_scores
from pyattr.attribution import MAGIC
from pyattr.attribution.magic import Adam, LogLikelihood, NegativeLoss, Recipe, Smoothness, grid, search
from pyattr.cli.display import Display
from pyattr.diffusion import DamagedFileError, ScoreLoss, ScoreNet, VarianceExploding
from pyattr.diffusion.storage import load_tensors, save_tensors
from pyattr.report.grid import write_grid
from pyattr.report.numbers import write_results

STAGES = ("search", "scores", "retrain", "report")
SDE = VarianceExploding()
LOSS = ScoreLoss(SDE, mean=True)
WIDTHS = (32, 64, 128, 256)
RECIPE = Recipe(600, 64, Adam(learning_rate=2e-3, eps_root=1e-6, warmup=0.1))
GRID = {"learning_rate": [5e-4, 2e-3, 5e-3], "eps_root": [1e-8, 1e-6, 1e-4], "warmup": [0.1]}
PHIS = {
    "loss": NegativeLoss(LOSS, draws=256),
    "likelihood": LogLikelihood(SDE, solver="rk4", steps=10, divergence="hutchinson", probes=16, bits=True),
}
ITEMS, QUERIES, SUBSETS, SHARE = 5000, 4, 32, 0.01
EXTREMES = 2  # of the most positive and of the most negative items of each query that are removed alone
TOP = 8  # shown
SEED = 0


def digits(path: Path) -> tuple[Tensor, Tensor]:
    """The first training digits, and test digits of as many classes as there are queries; [N, 1, 28, 28] uint8."""
    with np.load(path) as archive:
        train = archive["train_images"][:ITEMS, None]
        labels, images = archive["test_labels"], archive["test_images"]
        queries = np.stack([images[np.flatnonzero(labels == label)[0]] for label in range(QUERIES)])[:, None]
    return torch.from_numpy(train), torch.from_numpy(queries)


def network() -> ScoreNet:
    """Where every training starts."""
    torch.manual_seed(SEED)
    return ScoreNet(SDE, widths=WIDTHS)


def method(phi: str, **settings) -> MAGIC:
    """The method of the experiment."""
    return MAGIC(network(), LOSS, PHIS[phi], seed=SEED, **RECIPE.settings, **settings)


def subsets(count: int) -> np.ndarray:
    """[M, N] bool: a random share of the items each."""
    rng = np.random.Generator(np.random.Philox(key=[SEED, 0x72656D76]))
    removed = np.zeros((SUBSETS, count), bool)
    for row in removed:
        row[rng.choice(count, max(1, round(SHARE * count)), replace=False)] = True
    return removed


def singles(scores: np.ndarray) -> list[int]:
    """The items that are removed alone: those that some query's scores are largest and smallest at."""
    order = scores.argsort(1)
    return sorted({int(i) for i in np.concatenate([order[:, :EXTREMES], order[:, -EXTREMES:]], 1).ravel()})


def run_search(args, display: Display) -> None:
    """Metasmoothness of the recipes of the grid."""
    train, _ = digits(args.data)
    recipes = grid([RECIPE.steps], [RECIPE.batch_size], **GRID)
    mine = recipes[args.part[0] :: args.part[1]]

    def say(found: Smoothness) -> None:
        display.say(f"{found.recipe.optimiser}: smoothness {found.value:.4f}, loss {found.loss:.5f}")

    order = search(
        network(),
        LOSS,
        train,
        mine,
        seed=SEED,
        directory=args.work / "recipes",
        progress=display.progress,
        found=say,
    )
    if len(mine) < len(recipes):
        display.say("These recipes are done. When every part is, search without --part writes the results.")
        return
    rows = [
        {
            "learning_rate": found.recipe.optimiser.learning_rate,
            "eps_root": found.recipe.optimiser.eps_root,
            "smoothness": found.value,
            "linearity": found.linearity,
            "change": found.change,
            "loss": found.loss,
        }
        for found in order
    ]
    write_results(args.out / "magic_recipes.json", {"recipes": rows})


def run_scores(args, display: Display) -> None:
    """MAGIC's scores, and those of the baselines for every lambda."""
    train, queries = digits(args.data)
    fitted = method(args.phi, directory=args.work / "magic", checkpointing="sqrt", progress=display.progress).fit(train)
    found = {"magic": fitted.scores(queries), "values": fitted.values(queries)}
    model = fitted.model.requires_grad_()
    found |= baseline_scores(model, SDE, LOSS, PHIS[args.phi], train, queries, seed=SEED, progress=display.progress)
    save_tensors(args.work / f"scores-{args.phi}.safetensors", found, {"kind": "magic scores"})


def run_retrain(args, display: Display) -> None:
    """Networks without some of the items, those of this part; without single ones once there are scores that choose them."""
    train, _ = digits(args.data)
    jobs = {f"subset-{number}": row for number, row in enumerate(subsets(len(train)))}
    path = args.work / f"scores-{args.phi}.safetensors"
    if path.exists():
        scores, _ = load_tensors(path)
        for item in singles(scores["magic"].numpy()):
            jobs[f"single-{item}"] = np.arange(len(train)) == item
    else:
        display.say("There are no scores yet: only the random 1% are left out. Retrain again after scores.")
    mine = list(jobs)[args.part[0] :: args.part[1]]
    for number, name in enumerate(mine):
        path = args.work / f"network-{name}.safetensors"
        if _readable(path):
            continue
        display.stage(f"{number + 1}/{len(mine)} ")
        weights = 1 - torch.from_numpy(jobs[name]).float()
        # Never reversed: no states but those at hand.
        fitted = method(args.phi, checkpointing="binomial", memory=64 << 20, progress=display.progress).fit(
            train, weights
        )
        save_tensors(path, fitted.model.state_dict(), {"kind": "network without", "items": name})


def run_report(args, display: Display) -> None:
    """Predicted beside true changes, rank correlations, the strongest items."""
    train, queries = digits(args.data)
    scores, _ = load_tensors(args.work / f"scores-{args.phi}.safetensors")
    magic, start = scores["magic"].double().numpy(), scores["values"].numpy()
    removed = subsets(len(train))
    alone = singles(magic)
    true = _changes(args, [f"subset-{n}" for n in range(len(removed))], queries, start)  # [M, Q]
    true_alone = _changes(args, [f"single-{item}" for item in alone], queries, start)
    rows = {"magic": _agreement(-(removed @ magic.T), true)}
    for name in METHODS:
        rows[name] = max(
            (
                {"lambda": key.split(" ")[1], **_agreement(-(removed @ table.double().numpy().T), true)}
                for key, table in scores.items()
                if key.startswith(f"{name} ")
            ),
            key=lambda row: row["mean"],
        )
    results = {
        "settings": {"items": len(train), "steps": RECIPE.steps, "batch": RECIPE.batch_size, "phi": args.phi},
        "optimiser": vars(RECIPE.optimiser),
        "subsets": len(removed),
        "removed at a time": int(removed[0].sum()),
        "phi": start,
        "spearman": rows,
        "single items": {
            "count": len(alone),
            "spearman": _agreement(-magic[:, alone].T, true_alone),
            "predicted": -magic[:, alone].T,
            "true": true_alone,
        },
    }
    write_results(args.out / f"magic_mnist_{args.phi}.json", results)
    _plot(args.out / f"magic_mnist_{args.phi}.png", -(removed @ magic.T), true, -magic[:, alone].T, true_alone)
    order = magic.argsort(1)
    write_grid(
        args.out / f"magic_mnist_{args.phi}_top.png",
        [
            [
                query,
                None,
                *(train[i].numpy() for i in items[::-1][:TOP]),
                None,
                *(train[i].numpy() for i in items[:TOP]),
            ]
            for query, items in zip(queries.numpy(), order, strict=True)
        ],
        columns=["query", "", *(f"+{n}" for n in range(1, TOP + 1)), "", *(f"-{n}" for n in range(1, TOP + 1))],
        title="The training digits whose presence raises phi most, and those that lower it most",
    )


def _agreement(predicted: np.ndarray, true: np.ndarray) -> dict:  # [M, Q] both
    """Spearman's rank correlation for each query, and their mean."""
    found = [float(scipy.stats.spearmanr(a, b).statistic) for a, b in zip(predicted.T, true.T, strict=True)]
    return {"mean": float(np.mean(found)), "queries": found}


def _changes(args, names: list[str], queries: Tensor, start: np.ndarray) -> np.ndarray:  # -> [M, Q]
    """By how much phi of networks differs from that of the network which saw every item."""
    rows, phi = [], PHIS[args.phi]
    for name in names:
        model = network()
        model.load_state_dict(load_tensors(args.work / f"network-{name}.safetensors")[0])
        with torch.no_grad():
            rows.append([float(phi(model.eval(), queries[q : q + 1])) for q in range(len(queries))])
    return np.array(rows) - start


def _plot(path: Path, predicted, true, predicted_alone, true_alone) -> None:
    """True against predicted changes, one panel for each query."""
    from matplotlib.figure import Figure

    figure = Figure((3 * predicted.shape[1], 3.2), layout="constrained")
    for q, axes in enumerate(np.atleast_1d(figure.subplots(1, predicted.shape[1]))):
        axes.scatter(predicted[:, q], true[:, q], s=14, label="without 1%")
        axes.scatter(predicted_alone[:, q], true_alone[:, q], s=14, marker="x", label="without one")
        low, high = axes.get_xlim()
        axes.plot([low, high], [low, high], color="grey", linewidth=0.8)
        rho = scipy.stats.spearmanr(predicted[:, q], true[:, q]).statistic
        axes.set(title=f"query {q}: rho = {rho:.2f}", xlabel="predicted change of phi")
    figure.axes[0].set_ylabel("true change of phi")
    figure.axes[0].legend()
    figure.savefig(path, dpi=110)


def _readable(path: Path) -> bool:
    try:
        return path.is_file() and bool(load_tensors(path))
    except DamagedFileError:
        return False


def part(text: str) -> tuple[int, int]:
    """A share from its text, 0/2."""
    number, of = (int(word) for word in text.split("/"))
    if not 0 <= number < of:
        raise argparse.ArgumentTypeError(f"must be like 0/2, got {text}")
    return number, of


def main() -> None:
    """Run a stage."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("out", type=Path, help="folder for the results: a .json and .png files")
    parser.add_argument(
        "--data", type=Path, required=True, help="an .npz of MNIST: train_images, test_images, test_labels"
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for states, scores and networks")
    parser.add_argument("--phi", choices=list(PHIS), default="loss")
    parser.add_argument("--part", type=part, default=(0, 1), help="which of how many shares of the trainings: 0/2")
    parser.add_argument("--threads", type=int, default=1, help="of torch; the same for all stages")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for folder in (args.out, args.work):
        folder.mkdir(parents=True, exist_ok=True)
    with Display(Console()) as display:
        {"search": run_search, "scores": run_scores, "retrain": run_retrain, "report": run_report}[args.stage](
            args, display
        )


if __name__ == "__main__":
    main()
