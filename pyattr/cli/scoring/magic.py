"""MAGIC: trains a network of its own, and differentiates through that training."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import nn

from ... import diffusion
from ...attribution import MAGIC, Readout
from ...attribution.magic import Adam, LogLikelihood, NegativeLoss, NoiseLoss, Recipe, metasmoothness
from ...attribution.magic.schemes import Scheme, choose
from ...datasets import ImageDataset
from ...diffusion.storage import data_hash
from ...report import Attribution
from ..options import MagicOptions
from ..stages import SCHEDULE, Step, check_fits, read_npz, shape_text, write_npz
from ..workspace import Workspace, WorkspaceError
from .base import Scoring

SDE = diffusion.VarianceExploding()
ENOUGH = 0.9  # smoothness below which little is to be expected, as docs/magic.md has it
QUERIES_AT_A_TIME = 8
MODEL_FILE = "model.safetensors"
_OF_SCORE_NET = (1, 28, 28)
_MARGIN = 1_000_000  # bytes: records and stage.json beside tensors


class MagicScoring(Scoring):
    """Derivatives through a training by a fixed recipe.

    Args:
        device: where it trains.

    Raises:
        WorkspaceError, ValueError, ImportError: the network does not fit the images or cannot be built, or an option is not
            possible.
    """

    options: MagicOptions

    def __init__(
        self,
        workspace: Workspace,
        data: ImageDataset,
        options: MagicOptions,
        *,
        device: torch.device,
        readout: Readout | None = None,
    ):
        super().__init__(workspace, None, data, options, SCHEDULE, readout=readout)
        o, self.device = options, device
        if o.network == "score-net":
            _check_score_net(data.shape)
            self.loss = diffusion.ScoreLoss(SDE, mean=True)
            process = {"sde": dataclasses.asdict(SDE)}
        else:
            check_fits(o.network, data.shape)
            self.loss = NoiseLoss(SCHEDULE)
            process = {"schedule": dataclasses.asdict(SCHEDULE)}
        self.recipe = Recipe(o.steps, o.train_batch_size, Adam(learning_rate=o.learning_rate, eps_root=o.eps_root))
        if o.phi == "loss":
            self.phi = NegativeLoss(self.loss, draws=o.draws, seed=o.seed)
            self.phi_in_words = "minus the denoising loss"
            phi = {"draws": o.draws}
        else:
            phi = {"solver": "rk4", "steps": o.solver_steps, "divergence": o.divergence}
            phi |= {"probes": o.probes} if o.divergence == "hutchinson" else {}
            self.phi = LogLikelihood(SDE, **phi, bits=True, seed=o.seed)
            self.phi_in_words = "the log-likelihood, as minus bits per dimension"
        with torch.device("meta"):  # only to count, and to fail before the work
            self.parameters = sum(p.numel() for p in self._network().parameters())
        self.state_bytes = 12 * self.parameters
        self.scheme: Scheme = choose(o.steps, self.state_bytes, o.memory, o.checkpointing)
        self.summary = (
            f"Trains a network of its own on the training images, and differentiates {self.phi_in_words}, in the weight of "
            "each training image, back through all steps of that training: no approximation but the derivative itself."
        )
        self.meaning = (
            "the derivative in its weight: to first order, how much training without it would lower phi of that image, "
            f"{self.phi_in_words}"
        )
        # Replays must make the same bits again, which is for one kind of arithmetic.
        where = {"device": device.type} if device.type == "cuda" else {"threads": torch.get_num_threads()}
        made = {
            "data": data.fingerprint(),
            "network": o.network,
            **process,
            "steps": o.steps,
            "batch_size": o.train_batch_size,
            "optimiser": dataclasses.asdict(self.recipe.optimiser),
            "seed": o.seed,
            "torch": torch.__version__,
            **where,
        }
        self.training = Step(
            "MAGIC training",
            f"{o.network} ({self.parameters:,} parameters), {o.steps:,} steps of {o.train_batch_size} images",
            workspace.stage("magic-train", made),
            # The states that training lays down, one between them, the last, the one being written, and the network.
            self.state_bytes * (len(self.scheme.laid) + 3) + 4 * self.parameters + _MARGIN,
        )
        self.smoothness = Step(
            "MAGIC smoothness",
            "three trainings with other weights",
            workspace.stage("magic-smoothness", made),
            # The last states of three trainings, and two of one of them at once.
            5 * self.state_bytes + _MARGIN,
        )
        self.phi_settings = {"training": self.training.stage.key, "phi": o.phi, **phi, "seed": o.seed}
        self.values: np.ndarray | None = None  # phi of each query, once it is known

    def plan(self, queries_key: str, count: int) -> list[Step]:
        # Scores, their sums in float64 beside what a replay keeps of each query, and that once more while it is written.
        size = 4 * count * len(self.data) + 2 * count * (8 * len(self.data) + self.state_bytes) + _MARGIN
        scored = self._scores_step({**self.phi_settings, "queries": queries_key}, count, size)
        self.steps = [*([self.smoothness] if self.options.check_smoothness else []), self.training, scored]
        return self.steps

    def run(self, model, queries, display, begin) -> Attribution:
        scored = self.steps[-1]
        path = scored.stage.folder / "scores.npz"
        if not all(step.stage.finished for step in self.steps):
            torch.backends.cudnn.deterministic = True  # a replay compares bits
            if self.options.check_smoothness:
                begin(self.smoothness)
                self._measure(display)
            begin(self.training)
            with self.training.working() as notes:
                method = self._fitted(display)
                notes["parameters"] = self.parameters
                if self.options.network != "score-net" and not self.training.stage.finished:
                    diffusion.save_model(
                        self.training.stage.folder / MODEL_FILE,
                        method.model,
                        schedule=SCHEDULE,
                        images=data_hash(self.train),
                    )
            begin(scored)
            with scored.working():
                images = torch.from_numpy(queries.images)
                write_npz(path, {"scores": method.scores(images).numpy(), "values": method.values(images).numpy()})
        found = read_npz(path)
        self.values = found["values"]
        return self.attribution(found["scores"])

    def _network(self) -> nn.Module:
        if self.options.network == "score-net":
            return diffusion.ScoreNet(SDE)
        channels, size, _ = self.data.shape
        return diffusion.unet(self.options.network, channels=channels, size=size, schedule=SCHEDULE)

    def _start(self) -> nn.Module:
        """Where training starts."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.options.seed)
            return self._network().to(self.device)

    def _fitted(self, display) -> MAGIC:
        """The method after its training, which is found where it is finished."""
        o = self.options
        method = MAGIC(
            self._start(),
            self.loss,
            self.phi,
            **self.recipe.settings,
            seed=o.seed,
            checkpointing=o.checkpointing,
            memory=o.memory,
            queries_at_a_time=max(1, min(QUERIES_AT_A_TIME, o.memory // self.state_bytes)),
            directory=self.training.stage.folder,
            progress=display.progress,
        )
        try:
            return method.fit(self.train)
        except FloatingPointError:
            raise self._diverged() from None

    def _measure(self, display) -> None:
        with self.smoothness.working() as notes:
            if self.smoothness.stage.finished:
                return
            outcome = metasmoothness(
                self._start(),
                self.loss,
                self.train,
                self.recipe,
                seed=self.options.seed,
                directory=self.smoothness.stage.folder,
                progress=display.progress,
            )
            if not np.isfinite(outcome.value):
                raise self._diverged()
            notes["metasmoothness"], notes["linearity"] = outcome.value, outcome.linearity

    def _diverged(self) -> WorkspaceError:
        return WorkspaceError(
            "attribute: the loss of magic's training is not finite: give a lower --magic-learning-rate, or a larger "
            "--magic-eps-root"
        )

    def found(self) -> dict:
        return {"model": self.training.stage.key, **self._smoothness()}

    def _smoothness(self) -> dict[str, float]:
        """What was measured; empty where nothing was asked for."""
        if not self.options.check_smoothness:
            return {}
        return {name: self.smoothness.stage.record[name] for name in ("metasmoothness", "linearity")}

    def _settings(self) -> list[tuple[str, str]]:
        o, adam = self.options, self.recipe.optimiser
        if o.phi == "loss":
            phi = f"{self.phi_in_words}, the mean over {o.draws:,} draws of time and noise"
        else:
            how = "exact" if o.divergence == "exact" else f"along {o.probes} random directions"
            phi = f"{self.phi_in_words}, {o.solver_steps} steps of Runge and Kutta’s method, divergence {how}"
        told = [
            ("network", f"{o.network}, {self.parameters:,} parameters"),
            ("steps × batch", f"{o.steps:,} × {o.train_batch_size}"),
            (
                "Adam",
                f"learning rate {adam.learning_rate:g}, warmup over {adam.warmup:.0%} of the steps, then a cosine; "
                f"betas {adam.betas[0]:g}, {adam.betas[1]:g}; {adam.eps_root:g} under the root",
            ),
            ("phi", phi),
            ("phi of the queries", f"{self.values.min():.4g} to {self.values.max():.4g}"),
            ("seed", str(o.seed)),
        ]
        return told + [(name, f"{value:.3f}") for name, value in self._smoothness().items()]

    def _caveats(self) -> list[str]:
        o, name = self.options, self.method_name
        seen = o.steps * o.train_batch_size
        own = (
            f"{name} trained a network of its own ({o.network}, {o.steps:,} steps). Its scores belong to that training"
        )
        if o.network == "score-net":
            own += ", not to a model in the output folder, nor to one that made the queries."
        else:
            left = f"{self.training.stage.key}/{MODEL_FILE}"
            own += (
                f" and to its model, {left}, not to another in the output folder, nor to another that made the queries."
            )
        told = [own]
        if seen < len(self.data):
            told.append(
                f"{name}’s training saw {seen:,} of the {len(self.data):,} training images; the others have score 0."
            )
        smooth = self._smoothness()
        if not smooth:
            told.append(
                f"{name}’s derivatives are exact. How far they foretell what leaving an image out does depends on how smooth "
                "the training is, which was not measured here; --check-smoothness does that."
            )
        elif smooth["metasmoothness"] < ENOUGH:
            told.append(
                f"{name}’s training is rough: metasmoothness {smooth['metasmoothness']:.2f}, where {ENOUGH:g} is wanted. Its "
                "derivatives are exact, but foretell little of what leaving images out does. A larger --magic-eps-root or "
                "--magic-batch-size, or a lower --magic-learning-rate, makes it smoother."
            )
        told.append(f"{name}’s scores say what happens to first order; no model was retrained to confirm them.")
        return told


def _check_score_net(shape: tuple[int, int, int]) -> None:
    """Refuse images that the network does not take.

    Raises:
        WorkspaceError: what would do.
    """
    if shape != _OF_SCORE_NET:
        hint = "give --size 28, or " if shape[0] == 1 else "give "
        raise WorkspaceError(
            f"the network score-net takes images of {shape_text(_OF_SCORE_NET)}, got {shape_text(shape)}: {hint}"
            "--magic-network mnist-small"
        )
