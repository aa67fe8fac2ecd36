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
from pyattr.evaluation import feature_distances, l2
from pyattr.evaluation.encoded import class_results, quality
from pyattr.report.encoded import class_grid, class_plane
from pyattr.report.numbers import write_results

from .encoded_digits import accuracy, arguments, classifier, digits, ensemble, settings, showing

CLASSES = (0, 1, 2, 3, 4, 6, 8)
MEMBERS, STEPS, SAMPLES = 7, 2400, 144
BATCH = 48


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
    measures = (l2, lambda first, second: feature_distances(first, second, judge.extractor))
    found = class_results(samples.images, without, judge.predict, measures)
    names = [str(c) for c in CLASSES]
    class_grid(args.out / "encoded_classes.png", samples.images, without, found.classes, found.distances["L2"], names)
    plane = args.out / "encoded_classes_plane.png"
    class_plane(plane, judge.extractor, images, labels, samples.images, without, found, names)
    return {
        "settings": {**settings(steps, MEMBERS), "images": len(images), "shape": list(shape)},
        "split sizes": [int((codes >> np.uint64(i) & np.uint64(1)).sum()) for i in range(MEMBERS)],
        "classifier accuracy": accuracy(judge, images, labels),
        **found.summary(),
        **quality(samples.images, singles, images, judge.extractor).summary(),
    }


def main() -> None:
    """Run and write."""
    args = arguments(__doc__.split("\n")[0])
    write_results(args.out / "encoded_classes.json", run(args))


if __name__ == "__main__":
    main()
