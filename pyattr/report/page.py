"""Builds the report: data in, one HTML string out."""

from __future__ import annotations

import base64
import collections
import importlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from ..datasets import ImageDataset
from ..files import whole_file
from .histogram import HEIGHT, WIDTH, Histogram, histogram
from .matches import Drawing, Matched, drawing
from .ranking import shown_count, strongest

LARGEST_THUMBNAIL = 128  # pixels; larger training images are reduced to it
PIXELATED_UP_TO = 96  # images this small are enlarged with visible pixels, larger ones smoothly


class ReportError(ValueError):
    """The report cannot be made; the message is one line and says what to do."""


@dataclass(frozen=True)
class Attribution:
    """One method's scores of every training image for every query.

    Args:
        method: its name.
        scores: [Q, N] float32; positive = proponent when `signed`, else a magnitude.
        signed: whether negative scores mean opponents.
        summary: one sentence on what the method measures.
        meaning: what one score is, to follow "Every training image has a score for every image: ".
        matches: for each query, some training images and where they match it, the strongest first; empty when the method
            does not tell.
    """

    method: str
    scores: np.ndarray
    signed: bool
    summary: str
    meaning: str
    matches: Sequence[Sequence[Matched]] = ()


@dataclass(frozen=True)
class Timing:
    """How long a stage took.

    Args:
        stage: its name, for people.
        seconds: time spent computing it, in all runs that worked on it.
        note: what to know about the figure ("from an earlier run"); may be empty.
    """

    stage: str
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Report:
    """All that the page shows.

    Args:
        title: heading.
        queries: [Q, C, H, W] uint8, the attributed images.
        query_names: Q short names.
        train: the training images and labels; column n of every score matrix is image n.
        attributions: at least one; the first is shown large, the others as contrast.
        settings: (group, [(name, value)]) in order of showing.
        timings: stages in order.
        caveats: sentences.
        losses: mean training loss at even distances through the training; empty: no curve.
        top: how many proponents, and opponents, of each query; fewer when there are less than twice as many images, or not
            as many scores of their sign.
        generated: whether a model made the queries (else they were given).
    """

    title: str
    queries: np.ndarray
    query_names: Sequence[str]
    train: ImageDataset
    attributions: Sequence[Attribution]
    settings: Sequence[tuple[str, Sequence[tuple[str, str]]]]
    timings: Sequence[Timing]
    caveats: Sequence[str]
    losses: Sequence[float] = ()
    top: int = 10
    generated: bool = True


def write(path: str | os.PathLike, report: Report) -> None:
    """Write the report to `path`, whole or not at all.

    Raises:
        ReportError: a shape does not fit, a score is not finite, or jinja2 is missing.
        OSError: the file cannot be written.
    """
    page = render(report).encode()
    with whole_file(path) as stream:
        stream.write(page)


def require() -> None:
    """Refuse early, before hours of work, when the report's packages are missing."""
    _jinja2()


def render(report: Report) -> str:
    """The report as one HTML document without scripts or outside references.

    Raises:
        ReportError: a shape does not fit, a score is not finite, or jinja2 is missing.

    Extra memory: the page (some kilobytes per image shown) and 12 bytes per score.
    """
    _check(report)
    jinja2 = _jinja2()
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pyattr.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(score=score_text, seconds=seconds_text, count=lambda value: f"{value:,}")
    template = environment.get_template("report.html.j2")
    style = environment.loader.get_source(environment, "report.css")[0]
    return template.render(
        report=report,
        style=style,
        queries=_queries(report),
        pixelated=max(report.train.shape[1:]) <= PIXELATED_UP_TO,
        reduced=max(report.train.shape[1:]) > LARGEST_THUMBNAIL,
        total_seconds=sum(timing.seconds for timing in report.timings),
        longest=max((timing.seconds for timing in report.timings), default=0.0),
        curve=_curve(report.losses),
        chart=(WIDTH, HEIGHT),
    )


def _jinja2() -> Any:
    try:
        return importlib.import_module("jinja2")
    except ModuleNotFoundError as error:
        raise ReportError("report: needs the package jinja2: install pyattr[report]") from error


def _check(report: Report) -> None:
    if report.queries.dtype != np.uint8 or report.queries.ndim != 4 or report.queries.shape[1] not in (1, 3):
        raise ReportError(
            "report: queries must be uint8 [Q, C, H, W] with C 1 or 3, "
            f"got {report.queries.dtype} {list(report.queries.shape)}"
        )
    if len(report.query_names) != len(report.queries):
        raise ReportError(f"report: query_names must have {len(report.queries)} entries, got {len(report.query_names)}")
    if not report.attributions:
        raise ReportError("report: attributions must hold at least one method, got none")
    if report.top < 1:
        raise ReportError(f"report: top must be at least 1, got {report.top}")
    expected = [len(report.queries), len(report.train)]
    for attribution in report.attributions:
        scores = attribution.scores
        if list(scores.shape) != expected:
            raise ReportError(
                f"report: scores of {attribution.method} must have shape {expected}, got {list(scores.shape)}"
            )
        if not np.isfinite(scores).all():
            bad = int(scores.size - np.isfinite(scores).sum())
            raise ReportError(
                f"report: scores of {attribution.method} must be finite, got {bad} NaN or infinite of {scores.size}"
            )
        if len(attribution.matches) not in (0, len(report.queries)):
            raise ReportError(
                f"report: matches of {attribution.method} must be none or those of {len(report.queries)} queries, "
                f"got {len(attribution.matches)}"
            )


@dataclass(frozen=True)
class _Shown:
    """One training image in a row."""

    index: int
    score: float
    label: str | None
    id: str
    picture: str
    shared: bool  # also among the main method's images of the same kind


@dataclass(frozen=True)
class _Pair:
    """A query beside one training image, and where they match."""

    shown: _Shown
    drawing: Drawing


@dataclass(frozen=True)
class _Block:
    """One method's rows for one query."""

    method: str
    signed: bool
    proponents: list[_Shown]
    opponents: list[_Shown]
    histogram: Histogram
    labels: str  # what the proponents' labels are, in words; empty without labels
    shared: int
    pairs: list[_Pair]


@dataclass(frozen=True)
class _Query:
    name: str
    number: int
    picture: str
    blocks: list[_Block] = field(default_factory=list)


def _queries(report: Report) -> list[_Query]:
    ranked = [_ranked(attribution, report.top) for attribution in report.attributions]
    shown = []
    for q, name in enumerate(report.query_names):
        blocks = []
        main = [set(columns.tolist()) for columns in ranked[0][q]]
        for attribution, of_queries in zip(report.attributions, ranked, strict=True):
            row, (proponents, opponents) = attribution.scores[q], of_queries[q]
            first = attribution is report.attributions[0]
            blocks.append(
                _Block(
                    method=attribution.method,
                    signed=attribution.signed,
                    proponents=[_shown(report.train, row, n, not first and n in main[0]) for n in proponents.tolist()],
                    opponents=[_shown(report.train, row, n, not first and n in main[1]) for n in opponents.tolist()],
                    histogram=histogram(row, proponents, opponents),
                    labels=_labels_in_words(report.train, proponents),
                    shared=len(main[0] & set(proponents.tolist())),
                    pairs=[
                        _Pair(_shown(report.train, row, matched.index, False), drawing(matched.explanation))
                        for matched in (attribution.matches[q] if attribution.matches else ())
                    ],
                )
            )
        shown.append(_Query(name, q + 1, _picture(report.queries[q], None), blocks))
    return shown


def _ranked(attribution: Attribution, top: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The columns of each query's proponents and opponents, which differ in sign where the method has one."""
    scores, count = attribution.scores, shown_count(top, attribution.scores.shape[1])
    if not attribution.signed:
        # What has no score is not strong, however few have one.
        return [(high[row[high] > 0], high[:0]) for row, high in zip(scores, strongest(scores, count), strict=True)]
    pairs = zip(scores, strongest(scores, count), strongest(scores, count, largest=False), strict=True)
    return [(high[row[high] > 0], low[row[low] < 0]) for row, high, low in pairs]


def _shown(train: ImageDataset, row: np.ndarray, n: int, shared: bool) -> _Shown:
    return _Shown(
        n, float(row[n]), train.label_name(n), train.ids[n], _picture(train.images[n], LARGEST_THUMBNAIL), shared
    )


def _labels_in_words(train: ImageDataset, indices: np.ndarray) -> str:
    if train.labels is None or len(indices) == 0:
        return ""
    counts = collections.Counter(train.label_name(n) for n in indices.tolist())
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    (most, number), *others = ordered
    words = [f"{most} ({number} of {len(indices)})", *(f"{label} ({number})" for label, number in others)]
    return ", ".join(word.replace(" ", "\N{NO-BREAK SPACE}") for word in words)


def _picture(pixels: np.ndarray, largest: int | None) -> str:  # [C, H, W] uint8 -> data URI
    image = Image.fromarray(pixels[0] if pixels.shape[0] == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    if largest is not None and max(image.size) > largest:
        image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _curve(losses: Sequence[float]) -> dict[str, Any] | None:
    """The loss curve as SVG points on a logarithmic axis."""
    values = np.asarray(losses, np.float64)
    values = values[np.isfinite(values) & (values > 0)]
    if len(values) < 2:
        return None
    logs = np.log(values)
    span = max(float(logs.max() - logs.min()), 1e-9)
    x = np.linspace(0, WIDTH, len(values))
    y = (logs.max() - logs) / span * HEIGHT
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return {"points": points, "high": float(values.max()), "low": float(values.min()), "last": float(values[-1])}


def score_text(value: float) -> str:
    """Three significant digits with an explicit sign: +0.0123, −4.57, 0; beyond 1e-3..1e5 with a power, +1.20e−5."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{abs(value):.2e}".split("e")
    power = int(exponent)
    if -3 <= power < 5:
        text = f"{abs(value):.{max(0, 2 - power)}f}"
    else:
        text = f"{mantissa}e{power}".replace("-", "−")
    return ("+" if value > 0 else "−") + text


def seconds_text(seconds: float) -> str:
    """0.4 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
