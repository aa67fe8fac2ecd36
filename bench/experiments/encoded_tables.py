"""The tables of docs/encoded.md, from the results of the two experiments with encoded ensembles.

    python -m bench.experiments.encoded_tables docs/encoded.md bench/experiments

What stands between ``<!-- classes -->`` or ``<!-- items -->`` and ``<!-- end -->`` is replaced, where the results are there.
"""

import json
import re
import sys
from pathlib import Path

from pyattr.files import whole_file
from pyattr.report.numbers import p_and_effect, percent

LPIPS = "classifier-feature distance"
FRECHET = "Fréchet distance of classifier features"


def classes(found: dict) -> str:
    """The class experiment beside the paper's."""
    by = found["by distance"]
    own, another = found["own ablation flips the class"], found["another ablation flips the class"]
    quality = found[FRECHET]
    members = sorted(quality["members"])
    recovered = "most influential ablation is of the sample's class"
    rows = [
        ("samples, each without 7 classes", f"{found['samples']:,}", "3,000"),
        ("the most influential ablation is that of the sample's class, by L2", percent(by["L2"][recovered]), "61%"),
        ("the same, by distance of the classifier's features", percent(by[LPIPS][recovered]), "62% (LPIPS)"),
        ("the same, by chance", "14.3%", "14.3%"),
        ("ablating its own class changes the predicted class", percent(own), "93%"),
        ("ablating another class does", percent(another), "43%"),
        ("own against other ablations, L2, all at once", p_and_effect(by["L2"]["own against another"]), "p <= 1e-300"),
        (
            "own against the median of the others, sample by sample",
            p_and_effect(by["L2"]["own against another, paired by sample"]),
            "",
        ),
        (
            "Fréchet distance of classifier features to the training digits: ensemble; best and worst member",
            f"{quality['ensemble']:.3g}; {members[0]:.3g} and {members[-1]:.3g}",
            "",
        ),
    ]
    return "\n".join(["| | here | paper |", "| --- | --- | --- |", *("| " + " | ".join(row) + " |" for row in rows)])


def items(found: dict) -> str:
    """The experiment with items: three ways of guessing."""
    names = list(found["agreement"])
    rows = []
    for kind, told in (("Pearson", "Pearson over pixels"), ("Spearman", "Spearman of sizes")):
        cells = []
        for name in names:
            figures = found["agreement"][name]
            low, high = figures[f"{kind} quartiles"]
            cells.append(f"{figures[f'median {kind}']:.3f} ({low:.3f} to {high:.3f})")
        rows.append([f"{told}, median (quartiles)", *cells])
        against = found["Jacobian against"]
        paired = found["Jacobian against, paired by sample"]
        for told, each in (("all at once (Mann-Whitney)", against), ("sample by sample (Wilcoxon)", paired)):
            tests = [p_and_effect(each[name][kind.lower()]) if name in each else "" for name in names]
            rows.append([f"the Jacobian's {kind} against theirs, {told}", *tests])
    header = ["", *names]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def filled(text: str, results: Path) -> str:
    """A page with its tables replaced."""
    for name, table in (("classes", classes), ("items", items)):
        path = results / f"encoded_{name}.json"
        if path.exists():
            made = table(json.loads(path.read_text(encoding="utf8")))
            text, count = re.subn(
                rf"<!-- {name} -->\n.*?<!-- end -->",
                lambda _, name=name, made=made: f"<!-- {name} -->\n{made}\n<!-- end -->",
                text,
                flags=re.DOTALL,
            )
            if count != 1:
                raise ValueError(f"the page must have one place for {name}, got {count}")
    return text


def main(page: Path, results: Path) -> None:
    """Replace the tables of a page."""
    text = filled(page.read_text(encoding="utf8"), results)
    with whole_file(page) as stream:
        stream.write(text.encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
