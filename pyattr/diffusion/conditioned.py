"""Images that a model is told something about: each with the number of its prompt."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import arrays
from .images import as_images
from .storage import tensors_hash


@dataclass(frozen=True, eq=False)
class Conditioned:
    """Images, or latents of images, and what a conditional model is told about each of them.

    Goes where images go: into :func:`pyattr.diffusion.train`, ``fit`` and ``scores`` of the methods of gradients, of RawPixel,
    and of those that retrain. A conditional model is a module with the attribute ``num_conditions`` that predicts noise by
    ``model(x_t [B, C, H, W], t [B], conditions [B])``.

    Args:
        images: [N, C, H, W] uint8, or floating point of any range, as latents have it; torch, NumPy or CuPy.
        conditions: [N] integers from 0 on; what they mean is the model's matter.
        mirrored: [N, C, H, W], what stands for ``images`` where training mirrors them: the latents of a mirrored image are not
            its mirrored latents. None: training must not mirror.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    images: Tensor
    conditions: Tensor
    mirrored: Tensor | None = None

    def __post_init__(self):
        images, _ = arrays.to_torch(self.images, "Conditioned", "images")
        if images.dim() not in (4, 5):  # five, within the package: images of each timestep
            raise ValueError(f"Conditioned: images must have shape [N, C, H, W], got {list(images.shape)}")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise TypeError(f"Conditioned: images must be uint8 or floating point, got {images.dtype}")
        conditions = torch.as_tensor(self.conditions)
        if conditions.is_floating_point() or conditions.is_complex() or conditions.dtype == torch.bool:
            raise TypeError(f"Conditioned: conditions must be integers, got {conditions.dtype}")
        conditions = conditions.to("cpu", torch.int64)
        if conditions.shape != images.shape[:1]:
            raise ValueError(
                f"Conditioned: conditions must be {len(images)}, one for each image, got shape {list(conditions.shape)}"
            )
        if conditions.numel() and int(conditions.min()) < 0:
            raise ValueError(f"Conditioned: conditions must not be negative, got {int(conditions.min())}")
        if self.mirrored is not None and self.mirrored.shape != images.shape:
            raise ValueError(
                f"Conditioned: mirrored must have the shape of images, {list(images.shape)}, "
                f"got {list(self.mirrored.shape)}"
            )
        object.__setattr__(self, "images", images)
        object.__setattr__(self, "conditions", conditions)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, which: slice | Tensor) -> "Conditioned":
        """Those of a slice, or of indices or a mask [N] in a tensor."""
        told = which.cpu() if isinstance(which, Tensor) else which
        mirrored = None if self.mirrored is None else self.mirrored[which]
        return Conditioned(self.images[which], self.conditions[told], mirrored)

    @property
    def shape(self) -> torch.Size:
        """Of the images."""
        return self.images.shape

    @property
    def device(self) -> torch.device:
        """Of the images; conditions stay on the CPU."""
        return self.images.device


Examples = Tensor | Conditioned


def as_examples(images, op: str, argument: str) -> Examples:
    """Images as :func:`~pyattr.diffusion.images.as_images` has them, or conditioned ones as they are.

    Raises:
        TypeError, ValueError: they are neither.
    """
    if not isinstance(images, Conditioned):
        return as_images(images, op, argument)
    if images.images.dim() != 4:
        raise ValueError(f"{op}: {argument} must have shape [N, C, H, W], got {list(images.shape)}")
    return images


def separate(examples: Examples) -> tuple[Tensor, Tensor | None]:
    """Images [N, C, H, W] and conditions [N] int64; None where there are none."""
    if isinstance(examples, Conditioned):
        return examples.images, examples.conditions
    return examples, None


def with_conditions(images: Tensor, conditions: Tensor | None) -> Examples:
    """The inverse of :func:`separate`."""
    return images if conditions is None else Conditioned(images, conditions)


def contents(examples: Examples) -> dict[str, Tensor]:
    """What identifies examples, by name, for hashes and for files."""
    images, conditions = separate(examples)
    return {"images": images} if conditions is None else {"images": images, "conditions": conditions}


def pack(examples: Examples, name: str) -> dict[str, Tensor]:
    """Examples as tensors alone, for other processes: the images under ``name``, what else there is under longer names."""
    parts = contents(examples)
    if isinstance(examples, Conditioned) and examples.mirrored is not None:
        parts["mirrored"] = examples.mirrored
    return {name if part == "images" else f"{name} {part}": tensor for part, tensor in parts.items()}


def unpack(tensors: dict[str, Tensor], name: str) -> Examples:
    """The inverse of :func:`pack`."""
    if f"{name} conditions" not in tensors:
        return tensors[name]
    return Conditioned(tensors[name], tensors[f"{name} conditions"], tensors.get(f"{name} mirrored"))


def examples_hash(examples: Examples) -> str:
    """Identifies examples in their order; of plain images it is :func:`~pyattr.diffusion.storage.data_hash`."""
    return tensors_hash(contents(examples))


def with_images(examples: Examples, images: Tensor) -> Examples:
    """Other images under the same conditions."""
    return with_conditions(images, separate(examples)[1])


def check_conditions(model: nn.Module, examples: Examples, op: str, argument: str) -> None:
    """Refuse conditions that a model does not take, and images without the conditions that it needs.

    Raises:
        TypeError: it takes none, or there are none.
        ValueError: one is out of the model's range.
    """
    count, conditions = getattr(model, "num_conditions", None), separate(examples)[1]
    if conditions is None and count is not None:
        raise TypeError(f"{op}: {argument} must be Conditioned, for a model that takes conditions, got plain images")
    if conditions is not None and count is None:
        raise TypeError(f"{op}: {argument} must be plain images, for a model that takes no conditions, got Conditioned")
    if conditions is not None and conditions.numel() and int(conditions.max()) >= count:
        raise ValueError(
            f"{op}: {argument} must have conditions in [0, {count - 1}], those of the model, got {int(conditions.max())}"
        )
