"""How well does the Jacobian of an encoded ensemble guess the ablation of single items, beside the paper's two baselines?

The experiment of figure 5 of Dai and Gifford on the 10,000 MNIST test digits: sixteen members, a random code of weight eight
for each digit. Samples are made again without each of some digits, exactly, and the change is compared with the guesses: for
each counterfactual Pearson's correlation over pixels, for each sample Spearman's of the sizes over its counterfactuals, and
Mann-Whitney tests between the methods. Besides: how samples settle as members are added in a random order (figure 4), and the
most influential digits of ten samples, before and after those that are in several lists are dropped (figure 6).

    python -m bench.experiments.encoded_items OUT --data mnist.npz --work FOLDER

All work is kept in FOLDER, and a second run goes on from there.
"""

import numpy as np

from pyattr.attribution.codes import random_codes
from pyattr.attribution.encoded_lists import distinct_top
from pyattr.attribution.encoded_samples import METHODS
from pyattr.evaluation import agreement, compare, convergence, nested_codes
from pyattr.report.grid import matplotlib, write_grid

from .encoded_digits import arguments, as_bytes, digits, ensemble, settings, showing, write_json

MEMBERS, STEPS, SAMPLES = 16, 800, 32
ITEMS = 32  # of which each sample is made again without
SETTLING = 12  # samples whose nested ensembles are followed
NAMES = {"jacobian": "Jacobian", "last_step": "last step predicted noise", "members": "individual models"}
SHOWN, TOP = 10, 10
BATCH = 64


def run(args) -> dict:
    """Train, sample, ablate, guess, compare."""
    (images, _), _ = digits(args.data)
    codes = random_codes(len(images), MEMBERS)
    items = np.sort(np.random.RandomState(0).permutation(len(images))[:ITEMS])
    steps, count, work = args.steps or STEPS, args.samples or SAMPLES, args.work
    with showing() as display:
        display.stage("1/4 ")
        model = ensemble(codes, MEMBERS, steps, work / "members").fit(
            images, workers=args.workers, progress=display.progress
        )
        display.stage("2/4 ")
        samples = model.sample(
            count, record="trajectory", batch_size=BATCH, directory=work / "samples", progress=display.progress
        )
        display.stage("3/4 ")
        guesses = {
            method: model.approximate(samples, codes[items], method, directory=work / method, progress=display.progress)
            for method in METHODS
        }
        display.stage("4/4 ")
        true = model.counterfactual(
            samples, codes[items], batch_size=BATCH, directory=work / "counterfactuals", progress=display.progress
        )
        nested = model.counterfactual(
            samples[:SETTLING],
            nested_codes(MEMBERS),
            batch_size=BATCH,
            directory=work / "nested",
            progress=display.progress,
        )
    agreements = {method: agreement(samples.images, true, guess) for method, guess in guesses.items()}
    settling = convergence((nested + 1) / 2)
    kept = {"directory": work / "jacobian"}
    distinct = _lists(args.out, model, samples, images, kept)
    _plots(args.out, agreements, settling)
    changes = ((true - samples.images[:, None]) / 2).flatten(2).norm(dim=2).numpy()  # [Q, M]
    return {
        "settings": {**settings(steps, MEMBERS), "weight": MEMBERS // 2, "images": len(images)},
        "samples": count,
        "items": items,
        "size of the true changes, L2": {"median": np.median(changes), "largest": changes.max()},
        "agreement": {
            NAMES[method]: {
                "median Pearson": np.nanmedian(found.pearson),
                "median Spearman": np.nanmedian(found.spearman),
                "Pearson quartiles": np.nanquantile(found.pearson, [0.25, 0.75]),
                "Spearman quartiles": np.nanquantile(found.spearman, [0.25, 0.75]),
            }
            for method, found in agreements.items()
        },
        "Jacobian against": {
            NAMES[method]: {
                name: compare(getattr(agreements["jacobian"], name), getattr(agreements[method], name))
                for name in ("pearson", "spearman")
            }
            for method in METHODS[1:]
        },
        "distinct lists": distinct,
        "convergence, mean L2": {
            "members": list(range(1, MEMBERS + 1)),
            "to the full ensemble": settling.to_full.mean(0),
            "to the next": settling.successive.mean(0),
        },
    }


def _lists(out, model, samples, images, kept) -> str:
    """The most influential digits of some samples, all and those of no other list; what became of the latter."""
    generated, lists = as_bytes(samples.images), {"": model.search(samples, TOP, **kept)}
    told = "found"
    try:
        lists["_distinct"] = distinct_top(model.scores(samples, **kept)[:SHOWN], TOP)
    except ValueError as error:  # the iteration may delete too many
        told = str(error)
    for ending, found in lists.items():
        write_grid(
            out / f"encoded_items_top{ending}.png",
            [[generated[q], None, *images[found.indices[q].numpy()]] for q in range(min(SHOWN, len(samples)))],
            columns=["sample", "", *map(str, range(1, TOP + 1))],
            title=f"The {TOP} training digits of most influence"
            + (", those that are in no other list" if ending else ""),
        )
    return told


def _plots(out, agreements, settling) -> None:
    """Correlations of the three methods, and how samples settle."""
    figure = matplotlib().Figure(figsize=(10, 3.4))
    pearson, spearman, lines = figure.subplots(1, 3)
    for axes, name, told in ((pearson, "pearson", "of pixels"), (spearman, "spearman", "of sizes")):
        values = [getattr(found, name).ravel() for found in agreements.values()]
        axes.boxplot([v[~np.isnan(v)] for v in values], widths=0.6, flierprops={"markersize": 2})
        axes.set_xticks(
            range(1, len(values) + 1),
            [NAMES[m].replace(" predicted", "\npredicted").replace("al m", "al\nm") for m in agreements],
            fontsize=7,
        )
        axes.set_title(f"{name.capitalize()}'s correlation {told}", fontsize=9)
    counts = np.arange(1, MEMBERS + 1)
    lines.plot(counts, settling.to_full.mean(0), marker=".", label="to the full ensemble")
    lines.plot(counts[:-1], settling.successive.mean(0), marker=".", label="to the next")
    lines.set_title("L2 between samples of nested ensembles", fontsize=9)
    lines.set_xlabel("members", fontsize=8)
    lines.legend(fontsize=7)
    for axes in (pearson, spearman, lines):
        axes.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(out / "encoded_items.png", dpi=100)


def main() -> None:
    """Run and write."""
    args = arguments(__doc__.split("\n")[0])
    write_json(args.out / "encoded_items.json", run(args))


if __name__ == "__main__":
    main()
