"""The methods of `pyattr attribute`: what each plans, computes, keeps in the output folder, and has to say of itself."""

from __future__ import annotations

import torch

from ... import diffusion
from ...attribution import Readout
from ...datasets import ImageDataset
from ..options import HISTORY, MagicOptions, MethodOptions, PatchOptions, PixelOptions, PoolOptions, ScoreOptions
from ..stages import SCHEDULE, Checkpoint
from ..workspace import Workspace
from .base import Scoring, listed
from .ensembles import EnsembleScoring
from .gradients import ChangeScoring, GradientScoring, HistoryScoring, JourneyScoring, evenly_spaced
from .magic import MagicScoring
from .patches import PatchScoring
from .probes import ProbedScoring
from .retraining import RetrainingScoring
from .similarity import EncoderScoring, PixelScoring

__all__ = ["EnsembleScoring", "PatchScoring", "Scoring", "listed", "scoring_of"]


def scoring_of(
    workspace: Workspace,
    model_key: str | None,
    data: ImageDataset,
    options: MethodOptions,
    schedule: diffusion.Schedule = SCHEDULE,
    *,
    model: Checkpoint | None = None,
    readout: Readout | None = None,
    device: torch.device | None = None,
) -> Scoring:
    """The scoring of a method's options.

    Args:
        model_key: what tells the model from others; None where the method needs none.
        model: where the model lies, which says of what training it is; for the methods of several checkpoints, of those too.
        readout: what is read out of the scores; None: what the method has for its own.
        device: where a method that trains a model of its own does so; None: on the CPU.

    Raises:
        WorkspaceError, ValueError, ImportError, RuntimeError: an option is not possible, or what it names cannot be had.
    """
    common = (workspace, model_key, data, options, schedule)
    if isinstance(options, MagicOptions):
        return MagicScoring(workspace, data, options, device=device or torch.device("cpu"), readout=readout)
    if isinstance(options, ScoreOptions):
        training = None if model is None else model.training
        if options.method in HISTORY:
            history = evenly_spaced(options.method, model, options.checkpoints)
            return HistoryScoring(*common, history=history, training=training, readout=readout)
        kinds = {"das": ChangeScoring, "probed-das": ProbedScoring, "journey-trak": JourneyScoring}
        return kinds.get(options.method, GradientScoring)(*common, training=training, readout=readout)
    kinds = {PatchOptions: PatchScoring, PixelOptions: PixelScoring, PoolOptions: RetrainingScoring}
    return kinds.get(type(options), EncoderScoring)(*common, readout=readout)
