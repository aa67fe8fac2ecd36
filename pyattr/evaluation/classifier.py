"""A small classifier of the data itself, for predicted classes and for features where standard networks cannot be had."""

import itertools
import numbers
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusion.images import as_images, evaluating, to_unit
from ..diffusion.progress import Progress, silent
from ..diffusion.storage import DamagedFileError, data_hash, differences, load_tensors, save_tensors
from ..ops._arguments import check_integer
from .features import Extractor
from .inputs import as_integers

_ORDER = 0x636C6173  # key word 1 of the data order
NAME = "classifier"


class _Network(nn.Module):
    """Three convolutions, each followed by a halving, and two linear layers; the last but one gives the features."""

    def __init__(self, channels: int, width: int, features: int, classes: int):
        super().__init__()
        widths = [channels, width, 2 * width, 2 * width]
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.hidden = nn.Linear(2 * width * 9, features)
        self.classes = nn.Linear(features, classes)

    def features(self, images: Tensor) -> Tensor:  # [B, C, H, W] -> [B, D]
        channels = self.convolutions[0].in_channels
        if images.shape[1] != channels or 0 in images.shape[2:]:
            raise ValueError(
                f"Classifier: images must have pixels and {channels} channels, as in fit, got {list(images.shape[1:])}"
            )
        x = images
        for convolution in self.convolutions:
            x = F.max_pool2d(F.relu(convolution(x)), 2, ceil_mode=True)
        return F.relu(self.hidden(F.adaptive_avg_pool2d(x, 3).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:  # [B, C, H, W] -> [B, classes]
        return self.classes(self.features(images))


class _Features(nn.Module):
    def __init__(self, network: _Network):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.features(images)


class Classifier:
    """A convolutional network that tells the classes of the data apart.

    Adam on the cross entropy, the learning rate falling to 0 along a cosine, a new permutation of the images each epoch. The
    order is a function of (seed, epoch) and the initial weights of the seed, so that an interrupted training ends at the same
    bits on the same machine and thread count.

    Args:
        epochs: passes over the images.
        batch_size: images in a step.
        learning_rate: at the start.
        width: channels of the first convolution.
        num_features: D.
        seed: in [0, 2^32).

    Raises:
        TypeError: an argument is no number of its kind.
        ValueError: an argument is not positive, or the seed out of range.
    """

    def __init__(
        self,
        *,
        epochs: int = 6,
        batch_size: int = 64,
        learning_rate: float = 2e-3,
        width: int = 16,
        num_features: int = 64,
        seed: int = 0,
    ):
        if not isinstance(learning_rate, numbers.Real):
            raise TypeError(f"Classifier: learning_rate must be a real number, got {type(learning_rate).__name__}")
        if not 0 < learning_rate < float("inf"):
            raise ValueError(f"Classifier: learning_rate must be positive and finite, got {learning_rate}")
        self.settings = {
            "epochs": check_integer("Classifier", "epochs", epochs, 1, 2**31),
            "batch_size": check_integer("Classifier", "batch_size", batch_size, 1, 2**31),
            "learning_rate": float(learning_rate),
            "width": check_integer("Classifier", "width", width, 1, 2**16),
            "num_features": check_integer("Classifier", "num_features", num_features, 1, 2**24),
            "seed": check_integer("Classifier", "seed", seed, 0, 2**32 - 1),
        }
        self._network: _Network | None = None

    def fit(
        self, images, labels, *, path: str | os.PathLike | None = None, progress: Progress = silent
    ) -> "Classifier":
        """Train, or find trained.

        Args:
            images: [N, C, H, W] uint8, or floating point in [-1, 1].
            labels: [N] integers, at least 0; the largest decides the number of classes.
            path: a file that keeps the state after each epoch, and the finished classifier.
            progress: stage "classifier", counts epochs.

        Returns:
            self.

        Raises:
            TypeError, ValueError: images or labels are not as above, or the file holds a classifier made otherwise.

        Extra memory: one batch's activations, four copies of the weights.
        """
        images = as_images(images, "Classifier", "images")
        if images.numel() == 0:
            raise ValueError(f"Classifier: images must hold at least one image of one pixel, got {list(images.shape)}")
        labels = torch.from_numpy(as_integers(labels, "Classifier", "labels"))
        if labels.shape != (len(images),):
            raise ValueError(f"Classifier: labels must have shape [{len(images)}], got {list(labels.shape)}")
        if int(labels.min()) < 0:
            raise ValueError(f"Classifier: labels must not be negative, got {int(labels.min())}")
        settings = {
            **self.settings,
            "kind": NAME,
            "channels": images.shape[1],
            "classes": int(labels.max()) + 1,
            "images": data_hash(images),
            "labels": data_hash(labels),
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings["seed"])
            network = _Network(settings["channels"], settings["width"], settings["num_features"], settings["classes"])
        optimizer = torch.optim.Adam(network.parameters(), lr=settings["learning_rate"])
        first = 0 if path is None else _resume(Path(path), network, optimizer, settings)
        progress(first, settings["epochs"], "classifier")
        for epoch in range(first, settings["epochs"]):
            self._epoch(network, optimizer, images, labels, epoch)
            if path is not None:
                _save(path, network, optimizer, settings, epoch + 1)
            progress(epoch + 1, settings["epochs"], "classifier")
        self._network = network.eval()
        return self

    def _epoch(
        self, network: _Network, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, epoch: int
    ) -> None:
        key = np.random.Philox(key=[self.settings["seed"], _ORDER], counter=[0, 0, 0, epoch])
        order = torch.from_numpy(np.random.Generator(key).permutation(len(images)))
        batches = order.split(self.settings["batch_size"])
        like = network.hidden.weight
        for number, rows in enumerate(batches):
            done = (epoch + number / len(batches)) / self.settings["epochs"]
            for group in optimizer.param_groups:
                group["lr"] = self.settings["learning_rate"] * (1 + np.cos(np.pi * done)) / 2
            optimizer.zero_grad()
            F.cross_entropy(network(to_unit(images[rows], like)), labels[rows]).backward()
            optimizer.step()

    @property
    def network(self) -> nn.Module:
        """The trained network.

        Raises:
            RuntimeError: :meth:`fit` was not called.
        """
        if self._network is None:
            raise RuntimeError("Classifier: call fit first")
        return self._network

    @property
    def extractor(self) -> Extractor:
        """The features before the last layer, [N, D], under the name "classifier"."""
        return Extractor(NAME, _Features(self.network))

    def predict(self, images, *, batch_size: int = 256) -> np.ndarray:
        """Predicted classes.

        Args:
            images: [N, C, H, W] uint8, or floating point in [-1, 1].

        Returns:
            [N] int64; of equally likely classes the first.

        Raises:
            RuntimeError: :meth:`fit` was not called.
            TypeError, ValueError: an argument is not as above, or the images have other channels than those of fit.
        """
        batch_size = check_integer("Classifier", "batch_size", batch_size, 1, 2**62)
        images = as_images(images, "Classifier", "images")
        network, found = self.network, [torch.empty(0, dtype=torch.int64)]
        with torch.no_grad(), evaluating(network):
            for batch in images.split(batch_size):
                found.append(network(to_unit(batch, network.hidden.weight)).argmax(1))
        return torch.cat(found).numpy()


def _save(
    path: str | os.PathLike, network: nn.Module, optimizer: torch.optim.Optimizer, settings: dict, epoch: int
) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": value for key, value in state.items()}
    save_tensors(path, tensors, {"settings": settings, "epoch": epoch})


def _resume(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, settings: dict) -> int:
    """Load the state that the file keeps; the epochs that it has behind it."""
    try:
        tensors, record = load_tensors(path)
    except (FileNotFoundError, DamagedFileError):
        return 0
    differ = differences(record.get("settings", {}), settings)
    if differ:
        raise ValueError(f"Classifier: {path} holds something made otherwise: {differ}; use another file or delete it")
    network.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".")
            state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return record["epoch"]
