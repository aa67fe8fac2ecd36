"""Scores that `pyattr evaluate lds` judges: files of Scores, and the methods in an archive of `pyattr attribute`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from ..diffusion.storage import load_record
from ..evaluation import GroundTruth, Scores
from ..evaluation.ground_truth import subset_hashes
from .options import readout_word
from .stages import read_npz
from .workspace import WorkspaceError

ARCHIVE = "scores.npz"
_REMEDY = "make it again by `pyattr attribute`"
# Options that are another setting's name or move scores by rounding alone, and what follows from the others.
_LEFT_OUT = (
    "name",
    "method",
    "readout",
    "lambda_",
    "batch_size",
    "memory",
    "effective dimension",
    "pool subsets",
    "checkpointing",
    "check_smoothness",
    "metasmoothness",
    "linearity",
)


@dataclass(frozen=True)
class ScoreFile:
    """Where the scores of one method lie.

    Attributes:
        path: of the file.
        method, settings: of the scores.
        number: of the method in an archive; None: a file of :class:`~pyattr.evaluation.Scores`.
        asked: what identifies the subsets whose models the method asked.
    """

    path: Path
    method: str
    settings: dict
    number: int | None = None
    asked: frozenset[str] = frozenset()

    def open(self) -> Scores:
        """The scores.

        Raises:
            WorkspaceError, FileNotFoundError, DamagedFileError, ValueError: the file holds none, or is damaged.
        """
        if self.number is None:
            return Scores.open(self.path)
        key = f"scores_{self.number + 1}" if self.number else "scores"
        found = read_npz(self.path, {key, "query_hashes", "signed", "images_hash"}, remedy=_REMEDY)
        return Scores(
            found[key],
            self.method,
            bool(found["signed"][self.number]),
            self.settings,
            found["images_hash"].item(),
            tuple(found["query_hashes"].tolist()),
            tuple(self.asked),
        )

    def check(self, name: str, truth: GroundTruth, readouts: tuple[str, ...]) -> None:
        """Refuse to judge scores by models that they were told of, and to read out what was read out already.

        Raises:
            WorkspaceError: the message says what to do.
        """
        read = self.settings.get("readout", "signed")
        if read != "signed" and readouts != ("signed",):
            raise WorkspaceError(
                f"{name} holds {readout_word(read)} scores already, of which --readout would read out again: leave --readout "
                "away, or score by --readout signed first"
            )
        if self.asked & set(subset_hashes(truth.masks)):
            raise WorkspaceError(
                f"{name}: {self.method} has asked models of this ground truth's subsets and knows their losses: "
                "score by a pool of its own, of `pyattr evaluate lds build --pool retraining`"
            )


def score_files(path: Path, name: str) -> dict[str, ScoreFile]:
    """What a file holds, by the names of the rows: ``name``, or ``name/METHOD`` where an archive has several methods.

    Raises:
        WorkspaceError, FileNotFoundError, DamagedFileError: it holds no scores, or is damaged.
    """
    if path.suffix != ".npz":
        record = load_record(path)
        asked = frozenset(record.get("asked", ()))
        return {name: ScoreFile(path, record.get("method"), record.get("settings", {}), asked=asked)}
    found = read_npz(path, {"settings", "signed", "images_hash"}, remedy=_REMEDY)
    made = json.loads(found["settings"].item()) if len(found) == 3 else {"methods": [{}]}
    if any("readout" not in each for each in made["methods"]):
        raise WorkspaceError(f"{path} holds no scores of this version's `pyattr attribute`: make them again")
    files = {}
    for number, each in enumerate(made["methods"]):
        settings = {key: value for key, value in each.items() if key not in _LEFT_OUT}
        settings |= _model(each) | _readout(each["readout"])
        row = name if len(made["methods"]) == 1 else f"{name}/{each['method']}"
        files[row] = ScoreFile(path, each["name"], settings, number, frozenset(each.get("pool subsets", ())))
    return files


def _model(made: dict) -> dict:
    """What tells the model that was asked from others, or several; nothing of methods that ask none."""
    if "model" not in made:
        return {}
    return {"model": hashlib.sha256(json.dumps(made["model"]).encode()).hexdigest()[:8]}


def _readout(made: dict) -> dict:
    """As a setting of scores, which plain ones have none of."""
    name, percent = made["name"], made["percent"]
    if name == "signed":
        return {}
    return {"readout": name if percent is None else f"{name} {percent:g}%"}
