"""Stable Diffusion with LoRA weights as a model of `pyattr attribute`: a local folder, and prompts from a file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from ..datasets import ImageDataset
from ..diffusion import Conditioned, latent
from ..diffusion.checkpoint import identity
from ..diffusion.latent.folder import package
from .display import Display
from .options import LatentOptions
from .stages import Step
from .workspace import Workspace, WorkspaceError


class Prompts:
    """The prompts of a file: a JSON object of prompts by the name of an image, or else of its class.

    Attributes:
        prompts: the distinct ones, in the file's order.

    Raises:
        WorkspaceError: it is no such file.
    """

    def __init__(self, path: str):
        self.path = path
        try:
            found = json.loads(Path(path).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise WorkspaceError(f"--prompts must be a JSON file, got {path} ({error})") from None
        if not isinstance(found, dict) or not found or not all(isinstance(value, str) for value in found.values()):
            raise WorkspaceError(
                f'--prompts must hold prompts by class or image, as in {{"ukiyo_e": "a ukiyo e painting"}}, got {path}'
            )
        self.prompts, numbers = latent.index_prompts(list(found.values()))
        self._numbers = dict(zip(found, numbers.tolist(), strict=True))

    def of(self, data: ImageDataset) -> Tensor:
        """Which prompt each image goes with, [N] int64.

        Raises:
            WorkspaceError: the file has none for one of them.
        """
        found = []
        for n, image in enumerate(data.ids):
            label = data.label_name(n)
            name = image if image in self._numbers else label
            if name not in self._numbers:
                told = f"{image}" if label is None else f"{image} or its class {label}"
                raise WorkspaceError(f"--prompts {self.path} holds none for {told}")
            found.append(self._numbers[name])
        return torch.tensor(found, dtype=torch.int64)


class LatentCheckpoint:
    """A pipeline's network with trained LoRA weights, as :class:`~pyattr.cli.stages.Checkpoint` is a model.

    Attributes:
        path: of the LoRA weights.
        schedule: the one of the pipeline.
        key: what tells this model from others.
        training: empty: LoRA weights say nothing of theirs.

    Raises:
        FileNotFoundError, ValueError, DamagedFileError, ImportError: see :func:`pyattr.diffusion.latent.load`.
    """

    def __init__(self, pipeline: str, prompts: list[str], lora: str):
        self.path, self._folder, self._prompts = Path(lora), pipeline, prompts
        model = self._load()
        self.schedule = model.schedule
        self.key = _hash(identity(model))
        self.training: dict[str, str | int] = {}

    def _load(self) -> latent.LatentModel:
        # Its bar for the weights, on stderr, would run into ours.
        package("transformers").utils.logging.disable_progress_bar()
        return latent.load(self._folder, self._prompts, lora=self.path)

    def trained_on(self, data: ImageDataset) -> None:
        """LoRA weights do not say on which images they were trained."""

    def run(self, device: torch.device) -> nn.Module:
        """The model, read anew: of several no more than one need be in memory."""
        return self._load().to(device)


class Encoding(Step):
    """Makes latents of the training images and of the queries, or finds those of the training images made.

    Args:
        options: where the pipeline lies.
        prompts: of all images.
        data: the training images.
        asked: the queries.

    Attributes:
        train_key, queries_key: what tells the latents of either, with their prompts, from others.

    Raises:
        WorkspaceError: there is no prompt for an image.
        ValueError, FileNotFoundError: see :class:`pyattr.diffusion.latent.Codec`; or images that it cannot take.
    """

    def __init__(
        self,
        workspace: Workspace,
        options: LatentOptions,
        prompts: Prompts,
        data: ImageDataset,
        asked: ImageDataset,
        device: torch.device,
    ):
        self.options, self.prompts, self.data, self.asked = options, prompts, data, asked
        self.conditions, self.asked_conditions = prompts.of(data), prompts.of(asked)
        self.codec = latent.Codec(options.pipeline, device=device)
        shape = self.codec.latent_shape(torch.from_numpy(data.images))
        self.codec.latent_shape(torch.from_numpy(asked.images))
        super().__init__(
            "Latents",
            f"{len(data):,} images and {len(asked):,} queries, {shape.numel():,} numbers each",
            workspace.stage("latents", {"codec": self.codec.identity(), "data": data.fingerprint()}),
            4 * shape.numel() * (len(data) + len(asked)),
        )
        self.train_key = _hash([self.stage.key, self._prompts_of(self.conditions)])
        self.queries_key = _hash([self.stage.key, asked.fingerprint(), self._prompts_of(self.asked_conditions)])

    def run(self, display: Display) -> tuple[Conditioned, Conditioned]:
        """The training images and the queries, as the model takes them."""
        place = self.stage.folder
        with self.working():
            train = self._encoded(self.data, self.conditions, place / "train", display)
        return train, self._encoded(
            self.asked, self.asked_conditions, place / f"queries-{self.queries_key[:16]}", display
        )

    def _prompts_of(self, conditions: Tensor) -> list[str]:
        return [self.prompts.prompts[number] for number in conditions.tolist()]

    def _encoded(self, data: ImageDataset, conditions: Tensor, place: Path, display: Display) -> Conditioned:
        return self.codec.encode(torch.from_numpy(data.images), conditions, directory=place, progress=display.progress)

    def found(self) -> dict:
        """For programs."""
        return {"pipeline": self.options.pipeline, "lora": list(self.options.loras), "prompts": self.prompts.prompts}

    def words(self) -> list[tuple[str, str]]:
        """For people."""
        first, *others = self.prompts.prompts
        return [
            ("pipeline", self.options.pipeline),
            ("LoRA weights", ", ".join(self.options.loras)),
            ("prompts", f"{first}" + (f", … ({1 + len(others)} of them)" if others else "")),
        ]


def _hash(told: object) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
