"""What looks alike: baselines that ask no diffusion model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from ... import attribution
from ...diffusion.storage import model_hash
from ...evaluation import Extractor
from ...evaluation.clip import clip
from ...evaluation.features import package
from ...report import Attribution
from ..classifying import Classifying
from ..kept_features import kept
from ..options import EncoderOptions, PixelOptions
from ..stages import SCHEDULE, Step, read_npz, write_npz
from ..workspace import WorkspaceError
from .base import Scoring

_SIMILARITIES = {"cosine": "cosine of the angle", "dot": "inner product"}
_NOT_INFLUENCE = "It says nothing of what the training image did to the model"
_CLASSIFIER_FEATURES = 64


class PixelScoring(Scoring):
    """Pixels beside pixels."""

    signed = False
    title = "look like"
    options: PixelOptions

    def __init__(self, workspace, model_key, data, options, schedule=SCHEDULE, **rest):
        super().__init__(workspace, model_key, data, options, schedule, **rest)
        self.method_name = f"Pixel {'cosine' if options.similarity == 'cosine' else 'inner product'}"
        if not options.centre:
            self.method_name += ", not centred"
        taken_off = ", after the mean training image is taken off" if options.centre else ""
        self.summary = (
            f"A baseline that knows nothing of the model: the {_SIMILARITIES[options.similarity]} between the pixel values"
            f"{taken_off}. It shows what looks alike, not what had an influence."
        )
        bounds = ", from 1 to −1" if options.similarity == "cosine" else ""
        self.meaning = f"how alike the two look{bounds}. {_NOT_INFLUENCE}"

    def plan(self, queries_key: str, count: int) -> list[Step]:
        settings = {"data": self.data.fingerprint(), "queries": queries_key, **dataclasses.asdict(self.options)}
        self.steps = [self._scores_step(settings, count, 4 * count * len(self.data))]
        return self.steps

    def run(self, model, queries, display, begin) -> Attribution:
        (step,) = self.steps
        path = step.stage.folder / "scores.npz"
        if not step.stage.finished:
            begin(step)
            with step.stage.work():
                o = self.options
                method = attribution.RawPixel(o.similarity, centre=o.centre).fit(self.data.images)
                write_npz(path, {"scores": method.scores(queries.images).numpy()})
        return self.attribution(read_npz(path)["scores"])

    def _caveats(self) -> list[str]:
        return [
            f"{self.method_name} compares pixels alone: what looks alike need not have had an influence on the model."
        ]


class EncoderScoring(Scoring):
    """The features of an image encoder: CLIP's, or where its weights are not at hand those of a classifier of the data.

    Raises:
        WorkspaceError: there are neither weights nor classes.
        ImportError, RuntimeError: CLIP cannot be had.
    """

    signed = False
    title = "mean the same as"
    options: EncoderOptions

    def __init__(self, workspace, model_key, data, options, schedule=SCHEDULE, **rest):
        super().__init__(workspace, model_key, data, options, schedule, **rest)
        self.classifying = self.clip = None
        if options.clip is None:
            if data.labels is None or len(np.unique(data.labels)) < 2:
                raise WorkspaceError(
                    "attribute: clip-similarity needs CLIP's weights (--clip FOLDER), or training images of at least two "
                    "classes for a classifier whose features stand in, got images of none or one"
                )
            self.classifying = Classifying(workspace, data, options.epochs)
            made, name, self.width = self.classifying.stage.key, "Classifier", _CLASSIFIER_FEATURES
            self.encoder = f"a classifier that was trained on the labels of these images for {options.epochs} epochs"
        else:
            if not Path(options.clip).is_dir():
                raise WorkspaceError(f"--clip must be a folder of transformers' CLIPModel, got {options.clip}")
            # Its bar for the weights, on stderr, would run into ours.
            package("transformers", "clip").utils.logging.disable_progress_bar()
            self.clip = clip(options.clip)
            made, name = model_hash(self.clip.module), "CLIP"
            self.width = self.clip.module.visual_projection.out_features
            self.encoder = f"CLIP’s image encoder, from {options.clip}"
        # As the library names it, since a classifier's features are not CLIP's.
        self.method_name = f"{name}-feature similarity" + (", inner product" if options.similarity == "dot" else "")
        what = f"the {_SIMILARITIES[options.similarity]} between the features of {self.encoder}"
        self.summary = (
            f"A baseline that knows nothing of the diffusion model: {what}. It shows what means the same to that encoder, not "
            "what had an influence."
        )
        self.meaning = f"{what}. {_NOT_INFLUENCE}"
        self.features = Step(
            f"{name} features",
            f"{len(data):,} images, {self.width:,} numbers each",
            workspace.stage("encoder-features", {"encoder": made, "data": data.fingerprint()}),
            5 * self.width * len(data),
        )
        self.made = made

    def plan(self, queries_key: str, count: int) -> list[Step]:
        o = self.options
        settings = {
            "encoder": self.made,
            "data": self.data.fingerprint(),
            "queries": queries_key,
            "similarity": o.similarity,
        }
        size = 4 * count * (len(self.data) + 2 * self.width)
        first = [] if self.classifying is None else [self.classifying]
        self.steps = [*first, self.features, self._scores_step(settings, count, size)]
        return self.steps

    def chosen(self) -> dict:
        told = super().chosen()
        del told["clip" if self.options.clip is None else "epochs"]  # the one stands in for the other
        return told

    def run(self, model, queries, display, begin) -> Attribution:
        scored = self.steps[-1]
        path = scored.stage.folder / "scores.npz"
        if not scored.stage.finished:
            extractor = self.clip if self.classifying is None else self._classifier(display, begin)
            begin(self.features)
            with self.features.working():
                extractor = kept(extractor, self.features.stage.folder, display.progress)
                method = attribution.CLIPSimilarity(extractor, self.options.similarity).fit(self.data.images)
            begin(scored)
            with scored.stage.work():
                write_npz(path, {"scores": method.scores(queries.images).numpy()})
        return self.attribution(read_npz(path)["scores"])

    def _classifier(self, display, begin) -> Extractor:
        begin(self.classifying)
        labels = np.unique(self.data.labels, return_inverse=True)[1].astype(np.int64)
        return self.classifying.run(self.data, labels, display).extractor

    def _settings(self) -> list[tuple[str, str]]:
        return [("encoder", self.encoder), ("features", f"{self.width:,} numbers")]

    def _caveats(self) -> list[str]:
        told = f"{self.method_name} asks an encoder of images alone: what means the same to it need not have had an influence."
        if self.classifying is None:
            return [told]
        return [told, "That encoder is a small classifier of the training images’ own classes, not CLIP."]
