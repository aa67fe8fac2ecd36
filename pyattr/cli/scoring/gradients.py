"""The methods of gradients: features that any query can use, then scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ... import attribution
from ...attribution import Readout
from ...attribution.gradient_method import GradientMethod
from ...attribution.kernel import FRACTION, effective_dimension
from ...diffusion import Loss
from ...diffusion.features import FeatureMap
from ...diffusion.images import reference_parameter
from ...report import Attribution
from ..display import Display
from ..options import DAMPED, METHODS, SOLVED, ScoreOptions, own_options
from ..stages import SCHEDULE, Checkpoint, Queries, Step, read_npz, write_npz
from ..workspace import WorkspaceError
from .base import INFLUENCE, Scoring, draws, listed

# function whose gradients are taken -> what it is, for people
_FUNCTIONS = {
    "simple": "the training loss",
    "elbo": "the training loss, weighted as in the variational bound",
    "square": "the squared norm of the model’s noise prediction",
    "avg": "the mean of the model’s noise prediction",
    "l1": "the sum of the absolute values of the model’s noise prediction",
    "l2": "the norm of the model’s noise prediction",
    "linf": "the largest absolute value of the model’s noise prediction",
    "interpolate": "a mixture ({eta:g} : {rest:g}) of the squared norm of the model’s noise prediction and of what it lacks to "
    "the training loss",
}
ESTIMATES = (
    "Scores are estimates for {models}; no model was retrained without these images to confirm them."  # the last caveat
)
_TRAK = (
    "Compares gradients of {f}, averaged over timesteps, projected at random, and weighed by the damped inverse of their Gram "
    "matrix over all training images."
)
# method -> its class (that of one network, for those of several), and what it does, for people
_KINDS = {
    "dtrak": (attribution.DTRAK, _TRAK),
    "das": (
        attribution.DAS,
        "Estimates how much the model’s prediction for an image would change without a training image: TRAK’s scores from "
        "gradients of {f}.",
    ),
    "probed-das": (
        attribution.ProbedDAS,
        "Estimates how much the model’s prediction for an image would change without a training image, over all its numbers: "
        "gradients of the prediction along random directions, against gradients of {f}, weighed by the damped inverse of the "
        "curvature, squared, and the mean over directions.",
    ),
    "trak": (attribution.TRAK, _TRAK),
    "journey-trak": (
        attribution.JourneyTRAK,
        "TRAK with gradients of {f}, those of a generated image taken along its way from the noise: at each step of the "
        "sampler, of what the model took the final image to be.",
    ),
    "relative-influence": (
        attribution.RelativeInfluence,
        "TRAK’s scores from gradients of {f}, each divided by how far its training image moves the model: what is rare does "
        "not lead every list.",
    ),
    "renormalized-influence": (
        attribution.RenormalizedInfluence,
        "TRAK’s scores from gradients of {f}, each divided by the length of its training image’s gradient.",
    ),
    "gradient-dot": (
        attribution.GradientDot,
        "The inner product of the gradients of {f}, averaged over timesteps and projected at random: what one step of descent "
        "on the one would do to the other.",
    ),
    "gradient-cosine": (
        attribution.GradientCosine,
        "The cosine of the angle between the gradients of {f}, averaged over timesteps and projected at random.",
    ),
    "tracincp": (
        attribution.GradientDot,
        "The inner product of the gradients of {f}, averaged over timesteps and projected at random, at several checkpoints of "
        "the training, and the mean over these.",
    ),
    "gas": (
        attribution.GradientCosine,
        "The cosine of the angle between the gradients of {f}, averaged over timesteps and projected at random, at several "
        "checkpoints of the training, and the mean over these.",
    ),
}


class GradientScoring(Scoring):
    """One network's gradients.

    Args:
        training: which checkpoint of which training the network is, see :attr:`pyattr.cli.stages.Checkpoint.training`.

    Attributes:
        timesteps: those that the gradients are averaged over.
        damped: whether the method has a lambda.
        normalised: whether the method itself divides gradients by their norms.
    """

    meaning = INFLUENCE
    normalised = False
    options: ScoreOptions

    def __init__(self, workspace, model_key, data, options, schedule=SCHEDULE, *, training=None, **rest):
        super().__init__(workspace, model_key, data, options, schedule, **rest)
        self.training = training or {}
        self.kind, summary = _KINDS[options.method]
        self.damped = options.method in DAMPED
        own = self.kind.default_feature
        self.loss = Loss(own if options.feature is None else options.feature, options.eta)
        eta = self.loss.eta
        function = _FUNCTIONS[self.loss.name].format(eta=eta or 0, rest=1 - (eta or 0))
        self.summary = summary.format(f=function)
        if self.loss != Loss(own):
            self.method_name += f" of {self.loss.name}" + ("" if eta is None else f" {eta:g}")
        self.normalize = self.normalised if options.normalize is None else options.normalize
        if self.normalize != self.normalised:
            self.method_name += ", normalised" if self.normalize else ", not normalised"
        if options.method in SOLVED and options.solve_dtype == "float32":
            self.method_name += ", float32 inverse"
        if self.normalize:
            self.summary += " The gradient at each timestep counts by its direction alone."
        chosen = {name: getattr(options, name) for name in ("num_timesteps", "strategy", "kind", "proj_dim", "seed")}
        chosen["normalize"] = self.normalize
        for noises in (options.num_noises, options.query_noises):
            feature_map = FeatureMap(schedule, num_noises=noises, **chosen)
        self.timesteps = feature_map.timesteps().tolist()
        # Lambda and the queries' noise change no training feature, and memory no result but by rounding. All methods of one
        # gradient share its features.
        self.base = {
            "data": data.fingerprint(),
            "schedule": dataclasses.asdict(schedule),
            "feature": dataclasses.asdict(self.loss),
            **chosen,
            "num_noises": options.num_noises,
            "batch_size": options.batch_size,
        }
        self.features = self._features_step(model_key)

    def _features_step(self, model_key: str, of: str = "") -> Step:
        """The gradients of the network that the key tells from others, `of` which the plan says so."""
        o = self.options
        name = {"simple": "trak", "square": "dtrak"}.get(self.loss.name, self.loss.name)
        return Step(
            f"{METHODS.get(name, name)} features{of}",
            f"{len(self.data):,} images, {o.num_timesteps} timesteps, {o.proj_dim:,} numbers each",
            self.workspace.stage(f"{name}-features", {"model": model_key, **self.base}),
            4 * o.proj_dim * len(self.data),
        )

    def plan(self, queries_key: str, count: int) -> list[Step]:
        settings = {
            "model": self.model_key,
            **({"lambda": self.options.lambda_, "solve": self.options.solve_dtype} if self.damped else {}),
            **self._weights(),
        }
        return self._plan([self.features], settings, queries_key, count)

    def _plan(self, features: list[Step], settings: dict, queries_key: str, count: int) -> list[Step]:
        settings = {**self.base, **settings, "queries": queries_key, "query noises": self.options.query_noises}
        # The queries' features, of each network, and the scores.
        size = 4 * count * (len(self.data) + len(features) * self.options.proj_dim)
        self.steps = [*features, self._scores_step(settings, count, size)]
        return self.steps

    def run(self, model, queries, display, begin) -> Attribution:
        return self.attribution(self.matrix(model, queries, display, begin))

    def matrix(
        self, model: nn.Module, queries: Queries, display: Display, begin: Callable[[Step], None]
    ) -> np.ndarray:  # [Q, N]
        """The scores that are read out, computed or found."""
        step = self.steps[-1]
        path = step.stage.folder / "scores.npz"
        if not step.stage.finished:
            fitted = self._fitted(model, display, begin)
            begin(step)
            with step.stage.work() as notes:
                # Features that were found still have to be decomposed.
                fitted = fitted or self._fit(model, self.features.stage.folder, display)
                scores = self._scores(fitted, queries).numpy()
                if self.damped:
                    notes["lambda"] = fitted.lambda_
                    notes["effective dimension"] = effective_dimension(fitted.eigenvalues, fitted.lambda_)
                write_npz(path, {"scores": scores})
        return read_npz(path)["scores"]

    def _fitted(self, model: nn.Module, display: Display, begin: Callable[[Step], None]) -> GradientMethod | None:
        """Compute what features are still to be computed; the method, if that has fitted it."""
        if self.features.stage.finished:
            return None
        begin(self.features)
        with self.features.stage.work():
            return self._fit(model, self.features.stage.folder, display)

    def _fit(self, model: nn.Module, directory: Path, display: Display) -> GradientMethod:
        options = {**self._of_features(directory, display), **self._weights()}
        if self.damped:
            options["lambda_"] = self.options.lambda_
        if self.options.method in SOLVED:
            options["solve_dtype"] = getattr(torch, self.options.solve_dtype)
        return self.kind(model, self.schedule, **options).fit(self.train)

    def _of_features(self, directory: Path, display: Display) -> dict:
        """The arguments that all methods of gradients have."""
        names = (
            "num_timesteps", "strategy", "num_noises", "query_noises", "kind", "proj_dim", "seed", "batch_size", "memory"
        )  # fmt: skip
        return {
            **{name: getattr(self.options, name) for name in names},
            "feature": self.loss,
            "normalize": self.normalize,
            "directory": directory,
            "progress": display.progress,
        }

    def _weights(self) -> dict[str, bool | int]:
        """Options of the method alone."""
        return {}

    def _scores(self, fitted: GradientMethod, queries: Queries) -> Tensor:  # -> [Q, N]
        return fitted.scores(queries.asked, ids=queries.ids)

    def chosen(self) -> dict:
        told = own_options(self.options) | dataclasses.asdict(self.loss) | {"normalize": self.normalize}
        told["feature"] = told.pop("name")
        return {name: value for name, value in told.items() if name != "eta" or value is not None}

    def found(self) -> dict[str, str | float]:
        record = self.steps[-1].stage.record
        damping = {name: record[name] for name in ("lambda", "effective dimension")} if self.damped else {}
        return {"model": self.model_key, **self.training, **damping}

    def _settings(self) -> list[tuple[str, str]]:
        o, found = self.options, self.found()
        told = [
            (
                "timesteps",
                f"{o.num_timesteps} of {self.schedule.num_timesteps:,}, {o.strategy}: {listed(self.timesteps)}",
            ),
            *([("gradients", "each divided by its norm")] if self.normalize else []),
            ("noise", f"{draws(o.num_noises)} of a training image, {draws(o.query_noises)} of a query"),
            ("projection", f"{o.kind}, to {o.proj_dim:,} numbers, seed {o.seed}"),
        ]
        if self.damped:
            told += [
                ("lambda", f"{found['lambda']:.4g}, {self._how_lambda()}"),
                ("effective dimension", f"{found['effective dimension']:.0f} of {min(o.proj_dim, self._rows()):,}"),
            ]
        return told

    def _rows(self) -> int:
        """Of the matrix whose eigenvalues lambda is added to, before it is squared."""
        return len(self.data)

    def _how_lambda(self) -> str:
        asked = self.options.lambda_
        if isinstance(asked, tuple):
            return "chosen automatically among " + ", ".join(f"{value:g}" for value in asked)
        return "chosen automatically" if asked is None else "given"

    def _caveats(self) -> list[str]:
        o = self.options
        told = [
            f"{self.method_name} averages gradients over {o.num_timesteps} of {self.schedule.num_timesteps:,} timesteps, with "
            f"{draws(o.num_noises)} of a training image and {draws(o.query_noises)} of a query; published results use 10 to "
            "1,000 timesteps. More of them make the scores steadier."
        ]
        if self.damped and isinstance(o.lambda_, float):
            told.append(f"Lambda, the damping, was given as {o.lambda_:g}.")
        elif self.damped:
            among = "" if o.lambda_ is None else f", as nearly as the {len(o.lambda_)} values given allow"
            told.append(
                "Lambda, the damping, was chosen from the spectrum of the training features alone, so as to leave an "
                f"effective dimension of {FRACTION:.0%} of the number of eigenvalues{among}. No retrained model was there to "
                "tune it on, so it is a reasonable value, not the best."
            )
        if self.options.method in SOLVED and o.solve_dtype == "float32":
            told.append(
                "The inverse was taken in float32, as the published code does, to show what that does: at small lambda these "
                "scores are noise."
            )
        return [
            *told,
            f"The gradients of all parameters are compressed to {o.proj_dim:,} random combinations, "
            "which adds noise to every score.",
            ESTIMATES.format(models="one trained model"),
        ]


class ChangeScoring(GradientScoring):
    """DAS: how much the prediction changes, in whatever direction; or, by another readout, the number before the square."""

    meaning = (
        "an estimate of how much the model’s prediction for that image would change without it, for better or worse"
    )
    own = Readout("squared")
    normalised = True

    def __init__(self, workspace, model_key, data, options, schedule=SCHEDULE, **rest):
        super().__init__(workspace, model_key, data, options, schedule, **rest)
        for used, words in (
            (options.residuals, "the model’s error on it"),
            (options.leverage, "what it has to itself"),
        ):
            if used:
                self.summary += f" Each training image is weighed by {words}."
        if self.readout == self.own:
            self.summary += " The score is the square of that."
        else:
            self.meaning = (
                "an estimate of how the model’s prediction for that image would change without it, positive where its gradient "
                "points the same way"
            )

    def _weights(self) -> dict[str, bool]:
        return {"residuals": self.options.residuals, "leverage": self.options.leverage, "squared": False}

    def _settings(self) -> list[tuple[str, str]]:
        used = [name for name, value in self._weights().items() if value]
        return [*super()._settings(), ("weights of training images", ", ".join(used) or "none")]


class JourneyScoring(GradientScoring):
    """Journey TRAK: the queries' gradients along the way on which the model made them."""

    def check(self, queries: Queries) -> None:
        out = self.workspace.folder
        if queries.samples is None:
            raise WorkspaceError(
                "attribute: journey-trak needs generated images with the way on which they were made, got images from files: "
                f"leave --queries out, and run `pyattr generate --trajectory --out {out}` first"
            )
        if queries.samples.trajectory is None:
            raise WorkspaceError(
                "attribute: journey-trak needs generated images with the way on which they were made, got images without: "
                f"run `pyattr generate --trajectory --out {out}` first"
            )

    def _scores(self, fitted: GradientMethod, queries: Queries) -> Tensor:  # -> [Q, N]
        return fitted.scores(queries.samples, ids=queries.ids)

    def _settings(self) -> list[tuple[str, str]]:
        return [*super()._settings(), ("timesteps of a query", "those of the sampler that made it")]


class HistoryScoring(GradientScoring):
    """The mean over several checkpoints of the training: TracInCP and GAS.

    Args:
        history: the checkpoints by step, the model's own the last.
    """

    def __init__(
        self, workspace, model_key, data, options, schedule=SCHEDULE, *, history: dict[int, Checkpoint], **rest
    ):
        super().__init__(workspace, model_key, data, options, schedule, **rest)
        self.history = history
        self.parts = [
            (checkpoint, self._features_step(checkpoint.key, f" at step {step:,}"))
            for step, checkpoint in history.items()
        ]

    def plan(self, queries_key: str, count: int) -> list[Step]:
        keys = [checkpoint.key for checkpoint, _ in self.parts]
        return self._plan([step for _, step in self.parts], {"models": keys}, queries_key, count)

    def matrix(self, model, queries, display, begin) -> np.ndarray:
        step = self.steps[-1]
        path = step.stage.folder / "scores.npz"
        if not step.stage.finished:
            device = reference_parameter(model, "attribute").device
            for checkpoint, features in self.parts:
                if not features.stage.finished:
                    begin(features)
                    with features.stage.work():
                        self._fit(checkpoint.run(device), features.stage.folder, display)
            begin(step)
            with step.stage.work():
                total = None
                for checkpoint, features in self.parts:
                    fitted = self._fit(checkpoint.run(device), features.stage.folder, display)
                    part = self._scores(fitted, queries)
                    total = part if total is None else total.add_(part)
                write_npz(path, {"scores": total.div_(len(self.parts)).numpy()})
        return read_npz(path)["scores"]

    def chosen(self) -> dict:
        return {**super().chosen(), "checkpoints": len(self.history)}

    def _settings(self) -> list[tuple[str, str]]:
        return [*super()._settings(), ("checkpoints", f"{len(self.history)}, after steps {listed([*self.history])}")]

    def _caveats(self) -> list[str]:
        return [
            *super()._caveats(),
            f"{self.method_name} takes {len(self.history)} checkpoints for the whole training, and counts them alike, whatever "
            "the learning rate between them was.",
        ]


def evenly_spaced(method: str, model: Checkpoint, count: int | None) -> dict[int, Checkpoint]:
    """Of the checkpoints of a model's training, this many, the last among them; None: all.

    Raises:
        WorkspaceError: there are fewer, or one alone.
    """
    found = model.history()
    told = "`pyattr train --keep-checkpoints COUNT` keeps more"
    if len(found) < 2:
        raise WorkspaceError(
            f"attribute: {method} needs at least 2 checkpoints of the training, got {len(found)} in {model.file.parent}: {told}"
        )
    if count is not None and count > len(found):
        raise WorkspaceError(
            f"attribute: checkpoints must be at most {len(found)}, as many as lie in {model.file.parent}, got {count}: {told}"
        )
    steps, count = [*found], count or len(found)
    return {
        steps[(i + 1) * len(steps) // count - 1]: found[steps[(i + 1) * len(steps) // count - 1]] for i in range(count)
    }
