"""Does ablating a class from an encoded ensemble tell which class made a sample?

The Walsh experiment of Dai and Gifford (section 5.1) on the 7,071 MNIST test digits of the classes 0, 1, 2, 3, 4, 6 and 8:
seven members, a code for each class, three members for each code, any two sharing one. Samples of the ensemble are made again
without each class in turn. The class whose ablation changes a sample most is compared with the class that a classifier sees in
it, and the predicted class before with the one after. Distances are L2 and those of the classifier's features, in the place
of LPIPS. The classifier learns from the 60,000 training digits, which no member saw.

    python -m bench.experiments.encoded_classes OUT --data mnist.npz --work FOLDER

All work is kept in FOLDER, and a second run goes on from there.
"""

import numpy as np

from pyattr.attribution.codes import walsh_codes
from pyattr.evaluation import class_ablation, feature_distances, fid, l2, pca
from pyattr.report.grid import matplotlib, write_grid

from .encoded_digits import (
    accuracy,
    arguments,
    as_bytes,
    classifier,
    digits,
    ensemble,
    settings,
    showing,
    write_json,
)

CLASSES = (0, 1, 2, 3, 4, 6, 8)
MEMBERS, STEPS, SAMPLES = 7, 1200, 144
BATCH = 48
SHOWN = 12
REAL = 500  # digits of each class whose features span the plane


def run(args) -> dict:
    """Train, sample, ablate, count."""
    (images, labels), (train_images, train_labels) = digits(args.data)
    keep, train_keep = np.isin(labels, CLASSES), np.isin(train_labels, CLASSES)
    images, labels = images[keep], np.searchsorted(CLASSES, labels[keep])
    codes = walsh_codes(labels, MEMBERS)
    class_codes = np.array([codes[labels == c][0] for c in range(MEMBERS)])
    steps, count, shape = args.steps or STEPS, args.samples or SAMPLES, images.shape[1:]
    with showing() as display:
        display.stage("1/4 ")
        judge = classifier(
            train_images[train_keep],
            np.searchsorted(CLASSES, train_labels[train_keep]),
            args.work / "classifier.safetensors",
            display,
        )
        display.stage("2/4 ")
        model = ensemble(codes, MEMBERS, steps, args.work / "members").fit(
            images, workers=args.workers, progress=display.progress
        )
        display.stage("3/4 ")
        samples = model.sample(count, batch_size=BATCH, directory=args.work / "samples", progress=display.progress)
        display.stage("4/4 ")
        alone = (1 << MEMBERS) - 1 - (1 << np.arange(MEMBERS))  # all members but one saw it
        made = model.counterfactual(
            samples,
            np.concatenate([class_codes, alone.astype(np.uint64)]),
            batch_size=2 * BATCH,
            directory=args.work / "counterfactuals",
            progress=display.progress,
        )
    without, singles = made[:, :MEMBERS], made[:, MEMBERS:]  # [Q, 7, C, H, W] each
    classes = judge.predict(samples.images)
    after = judge.predict(without.flatten(0, 1)).reshape(count, MEMBERS)
    before = samples.images[:, None].expand_as(without).flatten(0, 1)
    measures = (l2(before, without.flatten(0, 1)), feature_distances(before, without.flatten(0, 1), judge.extractor))
    found = {each.name: class_ablation(each.values.reshape(count, -1), classes, after) for each in measures}
    any_one = next(iter(found.values()))
    quality = [fid(made, images, judge.extractor) for made in (samples.images, *singles.unbind(1))]
    _show(args.out, samples, without, classes, after, found["L2"], measures[0].values.reshape(count, -1))
    _plane(args.out, judge, images, labels, samples, without, classes)
    return {
        "settings": {**settings(steps, MEMBERS), "images": len(images), "shape": list(shape)},
        "split sizes": [int((codes >> np.uint64(i) & np.uint64(1)).sum()) for i in range(MEMBERS)],
        "classifier accuracy": accuracy(judge, images, labels),
        "samples": count,
        "samples by predicted class": np.bincount(classes, minlength=MEMBERS),
        "own ablation flips the class": any_one.own_flips,
        "another ablation flips the class": any_one.other_flips,
        "by distance": {
            name: {
                "most influential ablation is of the sample's class": each.recovered,
                "confusion": each.confusion,
                "median of own ablation": np.median(each.own_distances),
                "median of another": np.median(each.other_distances),
                "own against another": each.distances,
            }
            for name, each in found.items()
        },
        quality[0].name: {"ensemble": quality[0].value, "members": [each.value for each in quality[1:]]},
    }


def _show(out, samples, without, classes, after, found, distances) -> None:
    """Samples with each class ablated; the most influential one framed."""
    names = [str(c) for c in CLASSES]
    # One of each class where there is one, then whatever comes.
    order = sorted(range(len(classes)), key=lambda q: (np.sum(classes[:q] == classes[q]), q))[:SHOWN]
    pictures = as_bytes(samples.images), as_bytes(without)
    write_grid(
        out / "encoded_classes.png",
        [[pictures[0][q], *pictures[1][q]] for q in order],
        columns=["sample", *(f"no {name}" for name in names)],
        labels=[f"a {names[classes[q]]}" for q in order],
        marked=[(r, 1 + int(distances[q].argmax())) for r, q in enumerate(order)],
        title="Framed: the ablation that changes the sample most",
    )


def _plane(out, judge, images, labels, samples, without, classes) -> None:
    """The plane in which the features of real digits spread most, with samples before and after."""
    shown = np.concatenate([np.flatnonzero(labels == c)[:REAL] for c in range(MEMBERS)])
    features = judge.extractor(images[shown]).numpy()
    plane = pca(features)
    own = without[np.arange(len(classes)), classes]
    figure = matplotlib().Figure(figsize=(9.5, 4.2))
    for axes, (title, made) in zip(
        figure.subplots(1, 2, sharex=True, sharey=True),
        (("samples", samples.images), ("the same without their own class", own)),
        strict=True,
    ):
        points = plane.project(judge.extractor(made))
        real = plane.project(features)
        for c, name in enumerate(CLASSES):
            colour = f"C{c}"
            axes.scatter(*real[labels[shown] == c].T, s=2, alpha=0.15, color=colour, linewidths=0)
            axes.scatter(
                *points[classes == c].T, s=14, color=colour, edgecolors="black", linewidths=0.4, label=str(name)
            )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(f"first component, {100 * plane.explained[0]:.0f}% of the variance", fontsize=8)
        axes.set_ylabel(f"second, {100 * plane.explained[1]:.0f}%", fontsize=8)
        axes.tick_params(labelsize=7)
    axes.legend(title="predicted class\nof the sample", fontsize=7, title_fontsize=7)
    figure.tight_layout()
    figure.savefig(out / "encoded_classes_plane.png", dpi=100)


def main() -> None:
    """Run and write."""
    args = arguments(__doc__.split("\n")[0])
    write_json(args.out / "encoded_classes.json", run(args))


if __name__ == "__main__":
    main()
