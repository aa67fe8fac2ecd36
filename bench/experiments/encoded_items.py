"""How well does the Jacobian of an encoded ensemble guess the ablation of single items, beside the paper's two baselines?

The experiment of figure 5 of Dai and Gifford on the 10,000 MNIST test digits: sixteen members, a random code of weight eight
for each digit. Samples are made again without each of some digits, exactly, and the change is compared with the guesses: for
each counterfactual Pearson's correlation over pixels, for each sample Spearman's of the sizes over its counterfactuals, and
Mann-Whitney tests between the methods. Besides: how samples settle as members are added in a random order (figure 4), and the
most influential digits of ten samples, before and after those that are in several lists are dropped (figure 6).

    python -m bench.experiments.encoded_items OUT --data mnist.npz --work FOLDER

All work is kept in FOLDER, and a second run goes on from there.
"""

from pyattr.attribution.codes import random_codes
from pyattr.attribution.encoded_lists import distinct_top
from pyattr.diffusion.images import to_bytes
from pyattr.evaluation import convergence, nested_codes
from pyattr.evaluation.encoded import GUESSES, convergence_summary, guess_results, random_items
from pyattr.report.encoded import agreement_plot
from pyattr.report.grid import write_grid
from pyattr.report.numbers import write_results

from .encoded_digits import arguments, digits, ensemble, settings, showing

MEMBERS, STEPS, SAMPLES = 16, 800, 32
ITEMS = 32  # of which each sample is made again without
SETTLING = 12  # samples whose nested ensembles are followed
SHOWN, TOP = 10, 10
BATCH = 64


def run(args) -> dict:
    """Train, sample, ablate, guess, compare."""
    (images, _), _ = digits(args.data)
    codes = random_codes(len(images), MEMBERS)
    items = random_items(len(images), ITEMS)
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
            name: model.approximate(samples, codes[items], method, directory=work / method, progress=display.progress)
            for method, name in GUESSES.items()
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
    found, settling = guess_results(samples.images, true, guesses), convergence((nested + 1) / 2)
    distinct = _lists(args.out, model, samples, images, {"directory": work / "jacobian"})
    agreement_plot(args.out / "encoded_items.png", found.agreements, settling)
    return {
        "settings": {**settings(steps, MEMBERS), "weight": MEMBERS // 2, "images": len(images)},
        "samples": count,
        "items": items,
        **found.summary(),
        "distinct lists": distinct,
        "convergence, mean L2": convergence_summary(settling),
    }


def _lists(out, model, samples, images, kept) -> str:
    """The most influential digits of some samples, all and those of no other list; what became of the latter."""
    generated, lists = to_bytes(samples.images).numpy(), {"": model.search(samples, TOP, **kept)}
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


def main() -> None:
    """Run and write."""
    args = arguments(__doc__.split("\n")[0])
    write_results(args.out / "encoded_items.json", run(args))


if __name__ == "__main__":
    main()
