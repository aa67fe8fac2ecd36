"""The pictures of `pyattr evaluate lds --plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ..diffusion.storage import data_hash
from ..evaluation import LDS, Scores
from ..evaluation.ground_truth import image_hashes
from ..evaluation.scoreboard import Row, Scoreboard, distinguishing
from ..report.lds import lds_bars, lds_lines, prediction_plot, top_and_bottom
from .lds_lines import mean, panels
from .options import readout_word
from .score_files import ScoreFile
from .stages import read_npz
from .workspace import WorkspaceError

BARS = 36  # in a picture, at most
METHODS, QUERIES = 4, 4  # whose strongest images are shown, and queries of each group


def draw(
    folder: Path,
    judged: Sequence[tuple[Scoreboard, Sequence[Row]]],
    files: Mapping[str, ScoreFile],
    images: Path | None,
) -> list[Path]:
    """Draw what the rows of each target allow, and say which files that made.

    Raises:
        WorkspaceError: the images are not those of the ground truth.
    """
    pictures = _images(judged[0][0], images) if images is not None else None
    folder.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []
    for board, rows in judged:
        # A name does not depend on what else is asked for, so that pictures of several calls lie side by side.
        ending = ".png" if board.target == "simple" else f"-{board.target}.png"
        made.append(folder / f"lds{ending}")
        bars, note = _bars(board, rows)
        lds_bars(made[-1], bars, list(board.groups), note)
        for setting, lines in panels(board, rows, files).items():
            made.append(folder / f"lds-against-{setting}{ending}")
            lds_lines(made[-1], lines, setting)
        best = _best([row for row in rows if not row.tuned])
        if best:
            made.append(folder / f"predictions{ending}")
            _predictions(made[-1], board, best[0], files[best[0].name].open())
        for row in best[:METHODS] if pictures is not None else ():
            path = folder / f"images-{row.name.replace('/', '-')}.png"
            if path not in made:  # what scores are highest does not depend on the target
                made.append(path)
                _strongest(path, board, row.method, files[row.name].open(), *pictures)
    return made


def _best(rows: Sequence[Row]) -> list[Row]:
    """The best row of each method, the best method first; those that lack a group of queries come last."""
    best: dict[str, Row] = {}
    for row in sorted(rows, key=mean, reverse=True):
        best.setdefault(row.method, row)
    return sorted((row for row in best.values() if row.groups), key=lambda row: -len(row.groups))


def _bars(board: Scoreboard, rows: Sequence[Row]) -> tuple[dict[str, Mapping[str, LDS]], str]:
    note = ""
    if len(rows) > BARS:
        rows = [row for readout in board.readouts for row in _best([row for row in rows if row.readout == readout])]
        note = "of each method the best settings, chosen by these numbers"
    several = len(board.readouts) > 1
    told: dict[tuple[str, str], str] = {}
    for method in {row.method for row in rows}:
        told |= distinguishing([row for row in rows if row.method == method])
    bars: dict[str, Mapping[str, LDS]] = {}
    for row in rows:
        words = [readout_word(row.readout)] if several and row.plain else []
        words += [told[row.name, row.readout]] if told[row.name, row.readout] else []
        name = f"{row.method} ({', '.join(words)})" if words else row.method
        bars[name if name not in bars else f"{name}, {row.name}"] = row.groups
    return bars, note


def _predictions(path: Path, board: Scoreboard, row: Row, scores: Scores) -> None:
    group, score = next(iter(row.groups.items()))
    columns = board.groups[group]
    place = {int(column): at for at, column in enumerate(scores.rows_in(board.truth))}
    matrix = scores.take([place[int(column)] for column in columns]).matrix
    predicted = board.readouts[row.readout](matrix).astype(np.float64) @ board.truth.masks.T
    losses = board.truth.outputs(board.target)[:, columns]
    prediction_plot(path, predicted, losses, score, f"{row.method}, {group} queries, target {board.target}")


def _images(board: Scoreboard, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The training images and the queries of the ground truth, found among an archive's arrays by what identifies them.

    Raises:
        WorkspaceError: some are missing.
    """
    arrays = [array for array in read_npz(path, remedy="put it back or delete it").values() if array.ndim == 4]
    train = [array for array in arrays if data_hash(torch.from_numpy(array)) == board.truth.images]
    known = {}
    for array in arrays:
        if not train or array is not train[0]:
            known |= dict(zip(image_hashes(torch.from_numpy(array)), array, strict=True))
    if not train or board.truth.queries is None or any(query not in known for query in board.truth.queries):
        raise WorkspaceError(
            f"{path} must hold the training images and queries of the ground truth: put them back or delete it"
        )
    return train[0], np.stack([known[query] for query in board.truth.queries])


def _strongest(
    path: Path, board: Scoreboard, method: str, scores: Scores, train: np.ndarray, queries: np.ndarray
) -> None:
    place = {int(column): at for at, column in enumerate(scores.rows_in(board.truth))}
    shown, labels = [], []
    for name, group in board.groups.items():
        there_are = [int(column) for column in group if int(column) in place]
        for column in there_are[:: max(1, len(there_are) // QUERIES)][:QUERIES]:
            shown.append(column)
            labels.append(f"{name} {column - int(group[0])}")
    matrix = scores.take([place[column] for column in shown]).matrix
    top_and_bottom(path, queries[shown], labels, train, matrix, method=method, signed=scores.signed)
