"""The page shows what the scores say, and nothing leaves the file."""

import base64
import dataclasses
import io
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pyattr.attribution import Explanation, Match
from pyattr.datasets import ImageDataset
from pyattr.report import Attribution, Matched, Report, ReportError, Timing, render, strongest, write
from pyattr.report.histogram import BINS, HEIGHT, WIDTH, histogram
from pyattr.report.matches import DARKEST, GAP, drawing
from pyattr.report.page import score_text, seconds_text

VOID = {"meta", "link", "img", "line", "rect", "polyline"}


class Page(HTMLParser):
    """The tree as nested (tag, attributes, children) lists."""

    def __init__(self, text):
        super().__init__()
        self.root = ("root", {}, [])
        self.open = [self.root]
        self.feed(text)
        assert len(self.open) == 1, f"unclosed {self.open[-1][0]}"

    def handle_starttag(self, tag, attributes):
        node = (tag, dict(attributes), [])
        self.open[-1][2].append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag, attributes):
        self.open[-1][2].append((tag, dict(attributes), []))

    def handle_endtag(self, tag):
        assert self.open[-1][0] == tag, f"</{tag}> closes <{self.open[-1][0]}>"
        self.open.pop()

    def handle_data(self, data):
        self.open[-1][2].append(data)


def find(node, tag, **attributes):
    for child in node[2]:
        if isinstance(child, str):
            continue
        wanted = {name.replace("_", "-").removesuffix("-"): value for name, value in attributes.items()}
        if child[0] == tag and all(
            value in child[1].get(name, "").split() if name == "class" else child[1].get(name) == value
            for name, value in wanted.items()
        ):
            yield child
        yield from find(child, tag, **attributes)


def words(node):
    return " ".join("".join(child if isinstance(child, str) else words(child) for child in node[2]).split())


def pixels(node):
    """[H, W] or [H, W, 3] of an <img>."""
    head, data = node[1]["src"].split(",", 1)
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def dataset(count=40, channels=1, side=4, labels=True):
    images = np.random.default_rng(1).integers(0, 256, (count, channels, side, side), np.uint8)
    numbers = np.arange(count) % 3 if labels else None
    return ImageDataset(
        images, numbers, ("ant", "<bee>", "cow") if labels else (), tuple(map(str, range(count))), "toys"
    )


def example(**changes):
    train = changes.pop("train", dataset())
    rng = np.random.default_rng(2)
    scores = rng.normal(size=(3, len(train))).astype(np.float32)
    other = rng.random(size=(3, len(train))).astype(np.float32)
    whole = Report(
        title="Who made <these>?",
        queries=rng.integers(0, 256, (3, *train.shape), np.uint8),
        query_names=["first", "second", "third"],
        train=train,
        attributions=[
            Attribution("D-TRAK", scores, True, "gradients", "how much it <raised> it"),
            Attribution("Cosine", other, False, "pixels", "how alike they look"),
        ],
        settings=[("Data", [("source", "toys & co")])],
        timings=[Timing("Training", 65.0), Timing("Scores", 0.25, "from an earlier run")],
        caveats=["Few timesteps."],
        losses=[1.0, 0.5, 0.25],
    )
    return dataclasses.replace(whole, **changes)


# What is shown


@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_score_and_label_is_the_one_of_the_scores(channels):
    report = example(train=dataset(channels=channels))
    page = Page(render(report)).root
    articles = list(find(page, "article"))
    assert [int(a[1]["data-query"]) for a in articles] == [0, 1, 2]
    seen = 0
    for q, article in enumerate(articles):
        assert words(next(find(article, "h2"))) == report.query_names[q]
        shown = pixels(next(find(next(find(article, "figure")), "img")))
        assert np.array_equal(shown, report.queries[q].transpose(1, 2, 0).squeeze())
        sections = list(find(article, "section", class_="method"))
        assert [s[1]["data-method"] for s in sections] == ["D-TRAK", "Cosine"]
        for attribution, section in zip(report.attributions, sections, strict=True):
            row = attribution.scores[q]
            for kind, order in (("proponent", np.argsort(-row)), ("opponent", np.argsort(row))):
                tiles = list(find(section, "li", class_=kind))
                if kind == "opponent" and not attribution.signed:
                    assert tiles == []
                    continue
                assert [int(t[1]["data-index"]) for t in tiles] == order[:10].tolist()
                for tile, n in zip(tiles, order, strict=False):
                    assert float(tile[1]["data-score"]) == row[n]
                    assert words(next(find(tile, "span", class_="value"))) == score_text(row[n])
                    assert words(next(find(tile, "b", class_="label"))) == report.train.label_name(n)
                    assert f"#{n}" in words(tile)
                    assert next(find(tile, "img"))[1]["title"] == report.train.ids[n]
                    expected = report.train.images[n].transpose(1, 2, 0).squeeze()
                    assert np.array_equal(pixels(next(find(tile, "img"))), expected)
                    seen += 1
    assert seen == 3 * (10 + 10 + 10)


def test_dots_mark_what_the_first_method_shows_too():
    report = example()
    top = set(np.argsort(-report.attributions[0].scores[0])[:10].tolist())
    article = next(find(Page(render(report)).root, "article"))
    first, other = find(article, "section", class_="method")
    assert not list(find(first, "span", class_="dot"))
    dotted = {int(t[1]["data-index"]) for t in find(other, "li") if list(find(t, "span", class_="dot"))}
    own = set(np.argsort(-report.attributions[1].scores[0])[:10].tolist())
    assert dotted == own & top
    assert f"{len(own & top)} of 10 shared" in words(next(find(other, "h3")))


def test_labels_of_the_proponents_are_counted():
    scores = np.zeros((1, 6), np.float32)
    scores[0, [0, 3, 1]] = [3, 2, 1]  # ant, ant, <bee>
    report = example(train=dataset(6), queries=np.zeros((1, 1, 4, 4), np.uint8), query_names=["q"],
                     attributions=[Attribution("A", scores, True, "s", "m")], top=3)  # fmt: skip
    page = Page(render(report)).root
    text = words(next(find(page, "p", class_="labels"))).replace("\N{NO-BREAK SPACE}", " ")
    assert text == "Labels of its proponents: ant (2 of 3), <bee> (1)"


def test_few_training_images_are_never_both_proponent_and_opponent():
    for count in (1, 2, 3, 7, 20):
        scores = np.arange(count, dtype=np.float32)[None] - count // 2 + 0.5
        report = example(train=dataset(count), queries=np.zeros((1, 1, 4, 4), np.uint8), query_names=["q"],
                         attributions=[Attribution("A", scores, True, "s", "m")])  # fmt: skip
        article = next(find(Page(render(report)).root, "article"))
        rows = [
            [int(t[1]["data-index"]) for t in find(article, "li", class_=kind)] for kind in ("proponent", "opponent")
        ]
        expected = max(1, min(10, count // 2))
        assert rows == [list(range(count))[::-1][:expected], list(range(count // 2))[:expected]]


def test_proponents_are_positive_and_opponents_negative():
    """Scores on both sides, only above, only below, and at zero."""
    scores = np.array([[3, -1, 0, -2, 5, -4], [1, 2, 3, 4, 5, 6], [0, -1, -2, 0, 0, 0], [0] * 6], np.float32)
    expected = [([4, 0], [5, 3, 1]), ([5, 4, 3], []), ([], [2, 1]), ([], [])]
    methods = [Attribution("A", scores, True, "s", "m"), Attribution("B", scores, False, "s", "m")]
    report = example(train=dataset(6), queries=np.zeros((4, 1, 4, 4), np.uint8), query_names=list("abcd"), top=3,
                     attributions=methods)  # fmt: skip
    # Of magnitudes, which are not negative, none is shown that is 0.
    magnitudes = [[4, 0], [5, 4, 3], [], []]
    articles = find(Page(render(report)).root, "article")
    for article, (proponents, opponents), largest in zip(articles, expected, magnitudes, strict=True):
        signed, unsigned = find(article, "section", class_="method")
        for kind, wanted, sign in (("proponent", proponents, "positive"), ("opponent", opponents, "negative")):
            assert [int(tile[1]["data-index"]) for tile in find(signed, "li", class_=kind)] == wanted
            assert (f"no training image has a {sign} score" in words(signed)) == (not wanted)
            marks = next(find(next(find(article, "svg")), "g", class_=kind))
            assert len(list(find(marks, "line"))) == len(wanted)
        assert [int(tile[1]["data-index"]) for tile in find(unsigned, "li")] == largest
        assert ("no training image has a positive score" in words(unsigned)) == (not largest)
        assert "negative" not in words(unsigned)


def test_settings_timings_caveats_and_sign_convention_are_told():
    text = words(Page(render(example())).root)
    for told in ("toys & co", "1 min 05 s", "0.2 s", "from an earlier run", "Few timesteps.", "how much it <raised> it.",
                 "largest positive scores", "Opponents have the most negative", "Who made <these>?"):  # fmt: skip
        assert told in text, told


def test_unlabelled_unsigned_queries_that_were_given():
    train = dataset(labels=False)
    scores = np.random.default_rng(0).random((3, 40)).astype(np.float32)
    report = example(
        train=train, attributions=[Attribution("DAS", scores, False, "s", "a magnitude")], generated=False, losses=()
    )
    page = Page(render(report)).root
    text = words(page)
    assert "every query image: a magnitude." in text and "DAS knows no opponents" in text
    assert "Proponents" not in text and "Opponents" not in text and "Labels of" not in text
    assert "3 query images" in text and "generated" not in text and "Training loss" not in text


def test_large_images_are_reduced_and_said_so():
    report = example(train=dataset(6, side=200), queries=np.zeros((3, 1, 200, 200), np.uint8))
    page = Page(render(report)).root
    assert pixels(next(find(next(find(page, "article")), "li"))[2][1]).shape == (128, 128)
    assert "shown reduced" in words(page)
    assert "shown reduced" not in words(Page(render(example())).root)
    assert not list(find(page, "img", class_="pixels")) and list(
        find(Page(render(example())).root, "img", class_="pixels")
    )


def test_the_page_is_self_contained():
    page = render(matched_example())
    tree = Page(page).root
    assert not list(find(tree, "script"))
    for _, attributes, _ in (*find(tree, "img"), *find(tree, "image"), *find(tree, "link")):
        assert attributes.get("src", attributes.get("href")).startswith("data:")
    assert all(a[1]["href"].startswith("#") for a in find(tree, "a"))
    assert not re.search(r"https?:|url\(|@import|\son\w+=", page)
    policy = next(find(tree, "meta", http_equiv="Content-Security-Policy"))[1]["content"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    for medium in ("prefers-color-scheme: dark", "screen and (max-width: 760px)", "@media print"):
        assert medium in page


# Where images match


def explanation(*matches, score=8.0, side=4):
    """Of an image whose score comes from one pixel of the query and one of the training image."""
    maps = [torch.zeros(side, side) for _ in range(2)]
    maps[0][1, 1] = maps[1][2, 3] = score
    return Explanation(score, *maps, tuple(matches))


def matched_example(**changes):
    """The second method tells where; its two strongest images of each query, with two regions and one."""
    plain = example()
    scores = plain.attributions[1].scores
    order = np.argsort(-scores)[:, :2].tolist()
    explained = [
        explanation(Match((1, 0), (0, 2), (3, 2), 4.0), Match((0, 3), (2, 3), (1, 1), 0.5)),
        explanation(Match((2, 2), (1, 1), (2, 2), 0.1)),
    ]
    matches = [[Matched(n, e) for n, e in zip(of, explained, strict=True)] for of in order]
    method = Attribution("Patches", scores, False, "patches", "a share", matches)
    return dataclasses.replace(plain, attributions=[plain.attributions[0], method], **changes)


def numbers(node, *names):
    return tuple(float(node[1][name]) for name in names)


def test_regions_stand_on_both_images_in_one_colour_with_a_line_between():
    report = matched_example()
    for q, article in enumerate(find(Page(render(report)).root, "article")):
        first, second = find(article, "section", class_="method")
        assert not list(find(first, "figure", class_="pair"))
        pairs = list(find(second, "figure", class_="pair"))
        assert [int(pair[1]["data-index"]) for pair in pairs] == [m.index for m in report.attributions[1].matches[q]]
        for pair, matched in zip(pairs, report.attributions[1].matches[q], strict=True):
            ours, theirs, *veils = find(pair, "image")
            for image, expected, x in (
                (ours, report.queries[q], 0),
                (theirs, report.train.images[matched.index], 4 * (1 + GAP)),
            ):
                shown = pixels(("img", {"src": image[1]["href"]}, []))
                assert np.array_equal(shown, expected.transpose(1, 2, 0).squeeze())
                assert float(image[1].get("x", 0)) == x and numbers(image, "width", "height") == (4, 4)
            assert len(veils) == 2 and all("veil" in veil[1]["class"] for veil in veils)
            caption = words(next(find(pair, "figcaption")))
            assert score_text(float(report.attributions[1].scores[q, matched.index])) in caption
            assert f"#{matched.index}" in caption and report.train.label_name(matched.index) in caption
        links = {number: next(find(pairs[0], "g", class_=f"link-{number}")) for number in (1, 2)}
        offset = 4 * (1 + GAP)
        for number, ours, theirs, share in (
            (1, (0, 1, 2, 3), (offset + 2, 0, 2, 3), "50%"),
            (2, (3, 0, 1, 1), (offset + 3, 2, 1, 1), "6%"),
        ):
            regions = [numbers(r, "x", "y", "width", "height") for r in find(links[number], "rect", class_="region")]
            assert regions == [ours, theirs]
            halos = [numbers(r, "x", "y", "width", "height") for r in find(links[number], "rect", class_="halo")]
            assert halos == regions
            assert words(next(find(links[number], "text"))) == share
            assert f"{share} of the score" in words(next(find(links[number], "title")))
            # The line runs from the right edge of the one to the left edge of the other.
            path = next(find(links[number], "path"))[1]["d"]
            x, y, width, height = ours
            assert path.startswith(f"M{x + width:g} {y + height / 2:g}C")
            assert path.endswith(f"{theirs[0]:g} {theirs[1] + theirs[3] / 2:g}")


def test_small_regions_are_left_out_but_the_heaviest_stays():
    heavy, light = Match((0, 0), (0, 0), (1, 1), 4.0), Match((2, 2), (0, 0), (1, 1), 0.2)
    assert [link.share for link in drawing(explanation(heavy, light)).links] == [50]
    assert [link.share for link in drawing(explanation(light)).links] == [2.5]
    assert drawing(explanation()).links == []


def test_shares_stand_in_the_order_of_what_they_belong_to():
    low, high = Match((3, 0), (3, 0), (1, 1), 5.0), Match((0, 0), (0, 0), (1, 1), 3.0)
    first, second = drawing(explanation(low, high)).links
    assert first.label[1] > second.label[1] and first.label[0] == second.label[0] == 4 * (1 + GAP / 2)


def test_the_veil_is_thin_where_the_score_comes_from():
    ours, theirs = drawing(explanation(side=9)).heats
    for veil, (row, column) in ((ours, (1, 1)), (theirs, (2, 3))):
        alpha = pixels(("img", {"src": veil}, []))[..., 1]
        assert alpha[row, column] == 0 and alpha[7, 7] == DARKEST
        assert alpha[row, column + 1] < DARKEST and not pixels(("img", {"src": veil}, []))[..., 0].any()
    # No score at all: no veil either.
    (nothing, _) = drawing(Explanation(0.0, torch.zeros(3, 3), torch.zeros(3, 3), ())).heats
    assert not pixels(("img", {"src": nothing}, []))[..., 1].any()


def test_how_to_read_regions_is_told_where_there_are_some():
    told = "by Patches, one by one"
    assert told in words(Page(render(matched_example())).root)
    assert "one by one" not in words(Page(render(example())).root)


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attributions": []}, "report: attributions must hold at least one method, got none"),
        ({"top": 0}, "report: top must be at least 1, got 0"),
        ({"query_names": ["a"]}, "report: query_names must have 3 entries, got 1"),
        ({"queries": np.zeros((3, 1, 4, 4), np.float32)},
         "report: queries must be uint8 [Q, C, H, W] with C 1 or 3, got float32 [3, 1, 4, 4]"),
        ({"attributions": [Attribution("X", np.zeros((3, 39), np.float32), True, "", "")]},
         "report: scores of X must have shape [3, 40], got [3, 39]"),
        ({"attributions": [Attribution("X", np.full((3, 40), np.nan, np.float32), True, "", "")]},
         "report: scores of X must be finite, got 120 NaN or infinite of 120"),
        ({"attributions": [Attribution("X", np.zeros((3, 40), np.float32), True, "", "", [[]])]},
         "report: matches of X must be none or those of 3 queries, got 1"),
    ],
)  # fmt: skip
def test_refusals(tmp_path, changes, message):
    with pytest.raises(ReportError, match=f"^{re.escape(message)}$"):
        write(tmp_path / "report.html", example(**changes))
    assert list(tmp_path.iterdir()) == []


def test_without_jinja2_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ReportError, match=r"^report: needs the package jinja2: install pyattr\[report\]$"):
        render(example())


def test_write_is_the_rendered_page(tmp_path):
    write(tmp_path / "report.html", example())
    assert (tmp_path / "report.html").read_text("utf-8") == render(example())


# Ranking, histogram, numbers


def test_strongest_by_hand():
    scores = np.array([[1.0, 3.0, -2.0, 3.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
    assert strongest(scores, 3).tolist() == [[1, 3, 0], [0, 1, 2]]  # ties by lowest index
    assert strongest(scores, 2, largest=False).tolist() == [[2, 0], [0, 1]]
    assert strongest(scores, 0).shape == (2, 0) and strongest(scores, 1).dtype == np.int64
    with pytest.raises(ValueError, match=r"^strongest: count must be in 0\.\.4, got 5$"):
        strongest(scores, 5)


def test_histogram_by_hand():
    scores = np.array([-1.0, 0.0, 0.0, 0.0, 3.0], np.float32)
    chart = histogram(scores, np.array([4]), np.array([0]))
    step = WIDTH / BINS
    # Bins over [-1, 3]: 70 of width 4/70; 0 lies in bin 17 (17.5).
    unit = HEIGHT * np.log(2) / np.log(4)
    expected = [
        (0, HEIGHT - unit, step - 1, unit),
        (17 * step, 0, step - 1, HEIGHT),
        (69 * step, HEIGHT - unit, step - 1, unit),
    ]
    np.testing.assert_allclose(chart.bars, expected, atol=0.006)
    assert (chart.proponents, chart.opponents, chart.zero) == ([WIDTH], [0.0], WIDTH / 4)
    assert (chart.low, chart.high, chart.tallest) == (-1.0, 3.0, 3)


def test_histogram_of_equal_and_of_one_sided_scores():
    flat = histogram(np.full(5, 2.0, np.float32), np.array([0]), np.array([], np.int64))
    assert len(flat.bars) == 1 and flat.proponents == [WIDTH / 2] and flat.zero is None
    assert histogram(np.array([1.0, 2.0], np.float32), np.array([1]), np.array([0])).zero is None


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=60))
def test_histogram_stays_inside_its_frame(values):
    scores = np.array(values, np.float32)
    order = strongest(scores[None], len(scores))[0]
    chart = histogram(scores, order[:3], order[-3:])
    assert all(0 <= x <= WIDTH and 0 <= y < HEIGHT and abs(y + h - HEIGHT) < 0.02 for x, y, _, h in chart.bars)
    assert all(0 <= x <= WIDTH for x in chart.proponents + chart.opponents)
    assert chart.proponents == sorted(chart.proponents, reverse=True)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.0123456, "+0.0123"), (-4.5678, "−4.57"), (123.456, "+123"), (-98765.0, "−98765"),
     (0.001, "+0.00100"), (0.0000120, "+1.20e−5"), (-3.4e12, "−3.40e12"),
     (2.5e-12, "+2.50e−12"), (0.99999, "+1.00"), (5.0, "+5.00")],
)  # fmt: skip
def test_score_text(value, text):
    assert score_text(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 00 s"),
     (185.2, "3 min 05 s"), (7800, "2 h 10 min")],
)  # fmt: skip
def test_seconds_text(seconds, text):
    assert seconds_text(seconds) == text
