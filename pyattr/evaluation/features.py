"""What turns images into features: the networks of the published scores where they can be had, or any other under its name."""

import http.client
import importlib
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusion.images import as_images, evaluating, to_unit
from ..diffusion.progress import Progress, silent
from ..ops._arguments import check_integer

INCEPTION_SIZE = 299
WEIGHTS_HELP = (
    "put the file into torch's cache (torch.hub.get_dir()), or use a Classifier of the data and report its own distance"
)


@dataclass(frozen=True, eq=False)
class Extractor:
    """A network whose output on an image is its feature.

    Args:
        name: of the network, for people; distances of its features bear it.
        module: ``module(x)`` gives [B, D], or [B, D, ...], which is flattened.
        prepare: from images in [-1, 1], [B, C, H, W] float32, to what the module takes.
        standard: whether distances of these features are what the literature calls FID.
    """

    name: str
    module: nn.Module
    prepare: Callable[[Tensor], Tensor] = lambda images: images
    standard: bool = False

    def __post_init__(self):
        if not isinstance(self.module, nn.Module):
            raise TypeError(f"Extractor: module must be a torch.nn.Module, got {type(self.module).__name__}")

    def __call__(self, images, *, batch_size: int = 64, progress: Progress = silent) -> Tensor:
        """The features of images.

        Args:
            images: [N, C, H, W] uint8, or floating point in [-1, 1].
            progress: stage "image features", counts images.

        Returns:
            [N, D] float32 on the CPU; the module is evaluated in eval mode and left in its own.

        Raises:
            TypeError, ValueError: the images are not as above, or none; or the module gives no row for each of them.

        Extra memory: that of the module for ``batch_size`` images.
        """
        images = as_images(images, "Extractor", "images")
        if images.numel() == 0:
            raise ValueError(f"Extractor: images must hold at least one image of one pixel, got {list(images.shape)}")
        batch_size = check_integer("Extractor", "batch_size", batch_size, 1, 2**62)
        like = next(self.module.parameters(), torch.empty(0))
        parts = []
        with torch.no_grad(), evaluating(self.module):
            for batch in images.split(batch_size):
                found = self.module(self.prepare(to_unit(batch, like)))
                if not isinstance(found, Tensor):
                    raise TypeError(f"Extractor: module must return a tensor, got {type(found).__name__}")
                if found.dim() < 2 or len(found) != len(batch):
                    raise ValueError(
                        f"Extractor: module must return [B, D, ...] for {len(batch)} images, got {list(found.shape)}"
                    )
                parts.append(found.flatten(1).float().cpu())
                progress(sum(map(len, parts)), len(images), "image features")
        return torch.cat(parts)


def resized_and_normalised(size: int, mean: Sequence[float], std: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """Images as networks of torchvision take them.

    From [-1, 1] to [0, 1], grey to three equal channels, resized to ``size`` x ``size`` (bilinear, antialiased), less ``mean``,
    by ``std``.
    """

    def prepare(images: Tensor) -> Tensor:  # [B, C, H, W] -> [B, 3, size, size]
        images = (as_colour(images, "Extractor") + 1) / 2
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
        return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]

    return prepare


def as_colour(images: Tensor, op: str) -> Tensor:
    """Three channels, a single one repeated.

    Raises:
        ValueError: neither one nor three channels.
    """
    if images.shape[1] not in (1, 3):
        raise ValueError(f"{op}: images must have 1 or 3 channels, got {images.shape[1]}")
    return images.expand(-1, 3, -1, -1)


def inception() -> Extractor:
    """torchvision's Inception-v3 with its default weights: the features of the FID of encoded ensembles.

    Images are resized to 299 x 299 with antialiasing; features are the last layer, 1,000 numbers. This is the distance that Dai
    and Gifford report, not the one of the usual FID programs, which take another network's 2,048 pooled numbers.

    Raises:
        ImportError: torchvision is missing, or does not load.
        RuntimeError: the weights can be neither found nor downloaded, or the file is damaged.

    Source: Dai, Gifford, "Training Data Attribution for Diffusion Models", arXiv 2306.02174; Heusel et al., NeurIPS 2017.
    """
    models = package("torchvision.models", "inception")
    weights = models.Inception_V3_Weights.DEFAULT
    network = with_weights("inception", lambda: models.inception_v3(weights=weights))
    transforms = weights.transforms()
    prepare = resized_and_normalised(INCEPTION_SIZE, transforms.mean, transforms.std)
    return Extractor("Inception-v3", network.eval(), prepare, standard=True)


def package(name: str, op: str) -> Any:
    """A module of an optional dependency.

    Raises:
        ImportError: it is not installed, and the message says which extra to install; or it does not load, as torchvision does
            not where it was built for another torch.
    """
    top = name.split(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != top:
            raise
        raise ImportError(f"{op} needs the package {top}: install pyattr[evaluation]") from None
    except (ImportError, OSError, RuntimeError) as error:
        raise ImportError(
            f"{op} needs the package {top}, and the one installed does not load ({error}): "
            f"install the build of it that is made for torch {torch.__version__}"
        ) from error


def with_weights(op: str, build: Callable[[], Any]) -> Any:
    """What ``build`` makes, its download's failure told in one line.

    Raises:
        RuntimeError: the weights cannot be had.
    """
    try:
        return build()
    except (OSError, http.client.HTTPException, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        # The network, of which URLError is one, and then what torch says of a file that is cut short or another.
        raise RuntimeError(f"{op}: the network's weights cannot be had ({error}): {WEIGHTS_HELP}") from error
