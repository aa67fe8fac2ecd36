"""Tables of the experiments with encoded ensembles."""

import json

import pytest

from bench.experiments import encoded_tables


def share(percent):
    return {"percent": percent, "of": 100, "interval": [percent - 5, percent + 5]}


TEST = {"p": 1.5e-7, "effect": 0.9, "counts": [5, 6]}
PAIRED = {"p": 0.0039, "effect": 1.0, "difference": 0.2, "count": 9}
RECOVERED = "most influential ablation is of the sample's class"
CLASSES = {
    "samples": 1234,
    "own ablation flips the class": share(80),
    "another ablation flips the class": share(20),
    "by distance": {
        "L2": {
            RECOVERED: share(60),
            "own against another": {**TEST, "p": 0},
            "own against another, paired by sample": PAIRED,
        },
        "classifier-feature distance": {RECOVERED: share(65), "own against another": TEST},
    },
    "Fréchet distance of classifier features": {"ensemble": 1.5, "members": [3, 2, 4]},
}
FIGURES = {
    "median Pearson": 0.9,
    "Pearson quartiles": [0.8, 0.95],
    "median Spearman": 0.7,
    "Spearman quartiles": [0.6, 0.8],
}
ITEMS = {
    "agreement": {"Jacobian": FIGURES, "individual models": FIGURES},
    "Jacobian against": {"individual models": {"pearson": TEST, "spearman": TEST}},
    "Jacobian against, paired by sample": {"individual models": {"pearson": PAIRED, "spearman": PAIRED}},
}
PAGE = "before\n<!-- classes -->\nold\n<!-- end -->\nbetween\n<!-- items -->\n<!-- end -->\nafter\n"


def test_tables_replace_what_stood_there(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    (tmp_path / "encoded_classes.json").write_text(json.dumps(CLASSES))
    encoded_tables.main(page, tmp_path)  # one of the two
    assert "old" not in page.read_text() and "<!-- items -->\n<!-- end -->" in page.read_text()
    (tmp_path / "encoded_items.json").write_text(json.dumps(ITEMS))
    encoded_tables.main(page, tmp_path)
    text = page.read_text()
    encoded_tables.main(page, tmp_path)
    assert page.read_text() == text
    lines = text.splitlines()
    assert "| samples, each without 7 classes | 1,234 | 3,000 |" in lines
    assert "| ablating another class does | 20.0% (15.0 to 25.0) | 43% |" in lines
    assert "| own against other ablations, L2, all at once | p < 1e-300, effect 0.900 | p <= 1e-300 |" in lines
    assert "| own against the median of the others, sample by sample | p = 3.9e-03, effect 1.000 |  |" in lines
    assert any(line.endswith("| 1.5; 2 and 4 |  |") for line in lines)
    assert "|  | Jacobian | individual models |" in lines
    told = "| the Jacobian's Pearson against theirs,"
    assert f"{told} all at once (Mann-Whitney) |  | p = 1.5e-07, effect 0.900 |" in lines
    assert f"{told} sample by sample (Wilcoxon) |  | p = 3.9e-03, effect 1.000 |" in lines
    assert [lines[0], lines[-1]] == ["before", "after"] and "between" in lines
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_a_page_without_the_place(tmp_path):
    (tmp_path / "encoded_items.json").write_text(json.dumps(ITEMS))
    with pytest.raises(ValueError, match=r"^the page must have one place for items, got 0$"):
        encoded_tables.filled("nothing", tmp_path)
