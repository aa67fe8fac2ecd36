"""Scores that `pyattr evaluate lds` judges: files of Scores, and the methods in an archive of `pyattr attribute`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..diffusion.storage import load_record
from ..evaluation import GroundTruth, Scores
from ..evaluation.ground_truth import subset_hashes
from ..evaluation.scoreboard import AS_THEY_ARE, CHOSEN
from ..evaluation.scores import plain
from .stages import read_npz
from .workspace import WorkspaceError, named_file

ARCHIVE = "scores.npz"
_REMEDY = "make it again by `pyattr attribute`"
_WANTED = "scores must be files of pyattr.evaluation.Scores or archives of `pyattr attribute`"
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
    "training",
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
        signed: whether negative scores mean opponents.
        kind: the method without those of its settings that stand in its name.
        number: of the method in an archive; None: a file of :class:`~pyattr.evaluation.Scores`.
        asked: what identifies the subsets whose models the method asked.
        models, training: of an archive, what identifies each model that the method asked, and the trainings these are
            checkpoints of, where they say so.
    """

    path: Path
    method: str
    settings: dict
    signed: bool
    kind: str
    number: int | None = None
    asked: frozenset[str] = frozenset()
    models: tuple[str, ...] = ()
    training: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        """See :attr:`pyattr.evaluation.Scores.plain`."""
        return plain(self.signed, self.settings)

    def open(self) -> Scores:
        """The scores.

        Raises:
            WorkspaceError, FileNotFoundError, ValueError: the file holds none, or is damaged.
        """
        if self.number is None:
            with named_file(self.path, _WANTED):
                return Scores.open(self.path)
        key = f"scores_{self.number + 1}" if self.number else "scores"
        found = read_npz(self.path, {key, "query_hashes", "images_hash"}, remedy=_REMEDY)
        return Scores(
            found[key],
            self.method,
            self.signed,
            self.settings,
            found["images_hash"].item(),
            tuple(found["query_hashes"].tolist()),
            tuple(self.asked),
        )

    def check(self, name: str, truth: GroundTruth) -> None:
        """Refuse to judge scores by models that they were told of.

        Raises:
            WorkspaceError: the message says what to do.
        """
        if self.asked & set(subset_hashes(truth.masks)):
            raise WorkspaceError(
                f"{name}: {self.method} has asked models of this ground truth's subsets and knows their losses: "
                "score by a pool of its own, of `pyattr evaluate lds build --pool retraining`"
            )


def score_files(path: Path, name: str) -> dict[str, ScoreFile]:
    """What a file holds, by the names of the rows: ``name``, or ``name/METHOD`` where an archive has several methods.

    Raises:
        WorkspaceError, FileNotFoundError: it holds no scores, or is damaged.
    """
    if path.suffix != ".npz":
        with named_file(path, _WANTED):
            record = load_record(path)
        method, asked = record.get("method"), frozenset(record.get("asked", ()))
        signed = record.get("signed", True)
        return {name: ScoreFile(path, method, record.get("settings", {}), signed, method, asked=asked)}
    found = read_npz(path, {"settings", "signed", "images_hash"}, remedy=_REMEDY)
    made = json.loads(found["settings"].item()) if len(found) == 3 else {"methods": [{}]}
    if any("readout" not in each for each in made["methods"]):
        raise WorkspaceError(f"{path} holds no scores of this version's `pyattr attribute`: make them again")
    files = {}
    for number, each in enumerate(made["methods"]):
        settings = {key: value for key, value in each.items() if key not in _LEFT_OUT}
        settings |= _models(each) | _lambda(each) | _readout(each["readout"])
        row = name if len(made["methods"]) == 1 else f"{name}/{each['method']}"
        files[row] = ScoreFile(
            path,
            each["name"],
            settings,
            bool(found["signed"][number]),
            each["method"],
            number,
            frozenset(each.get("pool subsets", ())),
            _each(each.get("model")),
            _each(each.get("training")),
        )
    return files


def without_readout(plain: Mapping[str, bool], readouts: Sequence[str]) -> str:
    """What is to be said of scores that no readout is of, where one was asked for; empty: nothing.

    Args:
        plain: whether readouts are of the scores, by their name.
        readouts: by their names.

    Raises:
        WorkspaceError: there are no other scores, and these were not asked for as they are.
    """
    names = [name for name, value in plain.items() if not value]
    if not names or set(readouts) == {AS_THEY_ARE}:
        return ""
    told = f"no readout of {', '.join(names)}: such scores have no sign, or were read out already"
    if AS_THEY_ARE in readouts:
        return f"{told}; they stand once, as they are, under {AS_THEY_ARE}"
    if len(names) == len(plain):
        raise WorkspaceError(f"{told}: leave --readout away, or give --readout {AS_THEY_ARE} as well")
    return f"{told}; they are left out without --readout {AS_THEY_ARE}"


def _each(told: object) -> tuple:
    """Of one model or several."""
    return () if told is None else tuple(told) if isinstance(told, list) else (told,)


def _models(made: dict) -> dict:
    """How many models were asked, what tells them from others, and their step where it is one; nothing of methods without."""
    if "model" not in made:
        return {}
    told = {
        "models": len(_each(made["model"])),
        "model": hashlib.sha256(json.dumps(made["model"]).encode()).hexdigest()[:8],
    }
    steps = set(_each(made.get("step")))
    return told | ({"step": steps.pop()} if len(steps) == 1 else {})


def _lambda(made: dict) -> dict:
    """That the method chose it, where it did, and among which."""
    asked = made.get("lambda_")
    if "lambda" not in made or isinstance(asked, float):
        return {}
    among = "" if asked is None else " among " + ", ".join(f"{value:g}" for value in asked)
    return {CHOSEN: {"lambda": f"automatically{among}"}}


def _readout(made: dict) -> dict:
    """As a setting of scores, which plain ones have none of."""
    name, percent = made["name"], made["percent"]
    if name == "signed":
        return {}
    return {"readout": name if percent is None else f"{name} {percent:g}%"}
