"""The two problems: images, network, training, subsets. Nothing here is computed; everything else reads it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyattr.diffusion import Schedule
from pyattr.diffusion.presets import PatchUNet, diffusers
from pyattr.evaluation import subsets

HERE = Path(__file__).parent
SCHEDULE = Schedule()
SIDE, IMAGES = 16, 1000
VALIDATION = GENERATED = 100  # queries, in this order
SUBSET_STEPS, FULL_STEPS = 1200, 2400  # of models of half of the images and of all: the same epochs, as published
TRAINING = {"batch_size": 16, "learning_rate": 3e-3}
TIMESTEPS = 100  # evenly spaced ones that losses are means over
POOL = 64  # models for methods that learn from retrained ones
MEMBERS = 4  # models of the pool that ensembles of TRAK and D-TRAK take
SEED = 0


@dataclass(frozen=True)
class Problem:
    """One of the two data sets.

    Attributes:
        name: of its folder.
        channels: of an image.
        models: subsets that scores are judged by.
        seeds: models of each.
    """

    name: str
    channels: int
    models: int
    seeds: int

    @property
    def folder(self) -> Path:
        """What is committed."""
        return HERE / self.name

    @property
    def network(self) -> Callable[[], nn.Module]:
        """Builds the network with random weights, which torch's random state decides."""
        return functools.partial(network, self.channels)

    def masks(self, labels: np.ndarray, pool: str) -> np.ndarray:
        """The subsets that models are trained on, [M, N]; "evaluation" or "retraining"."""
        return subsets(IMAGES, self.models if pool == "evaluation" else POOL, labels=labels, pool=pool)

    def draw(self, source: Path) -> dict[str, np.ndarray]:
        """Choose images from the original data, classes in equal parts, and make them 16 x 16.

        Args:
            source: an .npz with train_images, train_labels, and val_ or test_images and labels: uint8, [n, 32, 32, 3] or
                [n, 28, 28].

        Returns:
            train_images [1000, C, 16, 16] uint8, train_labels [1000], validation_images [100, C, 16, 16],
            validation_labels [100].
        """
        with np.load(source) as data:
            other = "val" if "val_images" in data else "test"
            found = {}
            for ours, theirs, count in (("train", "train", IMAGES), ("validation", other, VALIDATION)):
                labels = data[f"{theirs}_labels"].astype(np.int64)
                chosen = _in_equal_parts(labels, count)
                found[f"{ours}_images"] = _small(data[f"{theirs}_images"][chosen])
                found[f"{ours}_labels"] = labels[chosen]
        return found


PROBLEMS = {problem.name: problem for problem in (Problem("cifar2", 3, 48, 2), Problem("mnist", 1, 48, 1))}


def network(channels: int) -> nn.Module:
    """A U-Net with 0.76 million parameters on patches of 2 x 2 pixels, importable by name for the processes that train it.

    A plain U-Net of 0.64 million parameters takes 1.4 times as long for a step, and its samples of the same time are noise.
    """
    patch = 2
    unet = diffusers().UNet2DModel(
        sample_size=SIDE // patch,
        in_channels=patch**2 * channels,
        out_channels=patch**2 * channels,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=None,
        norm_num_groups=8,
        attn_norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
    )
    return PatchUNet(unet, patch, SCHEDULE)


def _in_equal_parts(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices of ``count`` images, equally many of each class, mixed."""
    rng = np.random.Generator(np.random.Philox(SEED))
    classes = np.unique(labels)
    parts = [rng.permutation(np.flatnonzero(labels == c))[: count // len(classes)] for c in classes]
    return rng.permutation(np.concatenate(parts))


def _small(images: np.ndarray) -> np.ndarray:
    """[n, 32, 32, 3] or [n, 28, 28] uint8 -> [n, C, 16, 16] uint8: means of 2 x 2 pixels, digits with a black margin."""
    pixels: Tensor = torch.from_numpy(images if images.ndim == 4 else images[..., None]).movedim(3, 1).double()
    margin = (2 * SIDE - pixels.shape[2]) // 2
    means = F.avg_pool2d(F.pad(pixels, (margin,) * 4), 2)
    return means.round().to(torch.uint8).numpy()
